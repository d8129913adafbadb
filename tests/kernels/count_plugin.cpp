// A plugin for QEMU: the instructions between the entry of counted() and that of was_counted(), as tests/kernels/count.cpp calls
// them, a line for each pair in the file that the argument `out` names.
//
// QEMU comes without the header of its plugins: these are the declarations of its API's version 1 that are used.
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>

extern "C" {

using qemu_plugin_id_t = uint64_t;
struct qemu_plugin_tb;  // a block of instructions that is translated, and run, as a whole
struct qemu_plugin_insn;
enum { QEMU_PLUGIN_CB_NO_REGS = 0, QEMU_PLUGIN_INLINE_ADD_U64 = 0 };

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb*));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb*);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb*, size_t);
const char* qemu_plugin_insn_symbol(const struct qemu_plugin_insn*);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb*, int operation, void* counter, uint64_t by);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb*, void (*)(unsigned, void*), int flags, void*);

int qemu_plugin_version = 1;
int qemu_plugin_install(qemu_plugin_id_t, const void* information, int count, char** arguments);

}  // extern "C"

namespace {

FILE* out;
uint64_t executed, executed_before;
uint64_t entry;  // of counted(): its first block to be translated, since it is the first to run

void begin(unsigned, void*) {
  executed_before = executed;
}

void end(unsigned, void*) {
  std::fprintf(out, "%" PRIu64 "\n", executed - executed_before);
  std::fflush(out);
}

void see_block(qemu_plugin_id_t, qemu_plugin_tb* block) {
  const char* const symbol = qemu_plugin_insn_symbol(qemu_plugin_tb_get_insn(block, 0));
  const uint64_t address = qemu_plugin_tb_vaddr(block);
  if (symbol != nullptr && std::strcmp(symbol, "counted") == 0 && (entry == 0 || entry == address)) {
    entry = address;
    qemu_plugin_register_vcpu_tb_exec_cb(block, begin, QEMU_PLUGIN_CB_NO_REGS, nullptr);
  }
  if (symbol != nullptr && std::strcmp(symbol, "was_counted") == 0) {
    qemu_plugin_register_vcpu_tb_exec_cb(block, end, QEMU_PLUGIN_CB_NO_REGS, nullptr);
  }
  qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &executed, qemu_plugin_tb_n_insns(block));
}

}  // namespace

int qemu_plugin_install(qemu_plugin_id_t id, const void*, int count, char** arguments) {
  if (count != 1 || std::strncmp(arguments[0], "out=", 4) != 0) {
    return -1;
  }
  out = std::fopen(arguments[0] + 4, "w");
  if (out == nullptr) {
    return -1;
  }
  qemu_plugin_register_vcpu_tb_trans_cb(id, see_block);
  return 0;
}

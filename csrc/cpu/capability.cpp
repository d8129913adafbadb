#include "capability.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>

#include <cstdlib>
#include <cstring>
#include <string>

namespace attn_ext::cpu {

// setup.py compiles kernels/ once for each of these.
namespace DEFAULT {
const Kernels& dot_kernels(Dtype, bool, int64_t);
const Kernels& additive_kernels(Dtype, bool, int64_t);
void centre_item(const Centring&, int64_t, char*);
}  // namespace DEFAULT

#if defined(__x86_64__)
namespace AVX2 {
const Kernels& dot_kernels(Dtype, bool, int64_t);
const Kernels& additive_kernels(Dtype, bool, int64_t);
void centre_item(const Centring&, int64_t, char*);
}  // namespace AVX2

namespace AVX512 {
const Kernels& dot_kernels(Dtype, bool, int64_t);
const Kernels& additive_kernels(Dtype, bool, int64_t);
void centre_item(const Centring&, int64_t, char*);
const MatmulKernels& matmul_kernels();
}  // namespace AVX512

namespace AVX512_BF16 {
const Kernels& dot_kernels(Dtype, bool, int64_t);
const Kernels& additive_kernels(Dtype, bool, int64_t);
void centre_item(const Centring&, int64_t, char*);
}  // namespace AVX512_BF16

namespace AVX512_AMX {
const Kernels& dot_kernels(Dtype, bool, int64_t);
const Kernels& additive_kernels(Dtype, bool, int64_t);
void centre_item(const Centring&, int64_t, char*);
const MatmulKernels& matmul_kernels();
}  // namespace AVX512_AMX
#endif

namespace {

bool always() {
  return true;
}

const MatmulKernels* no_matmul() {
  return nullptr;
}

#if defined(__x86_64__)
// MKL takes AVX-512 on Intel's processors alone. Any other library is taken to use it everywhere.
const MatmulKernels* where_mkl_leaves_it() {
  return !at::hasMKL() || __builtin_cpu_is("intel") ? nullptr : &AVX512::matmul_kernels();
}

// Of floats no library takes matrix tiles.
const MatmulKernels* amx_matmul() {
  return &AVX512_AMX::matmul_kernels();
}

// Whoever asks for AVX512 by name gets no more than that. PyTorch ignores a name that it does not know.
bool unasked_bfloat16() {
  const char* const asked = std::getenv("ATEN_CPU_CAPABILITY");
  return (asked == nullptr || std::strcmp(asked, "avx512") != 0) && __builtin_cpu_supports("avx512bf16");
}

// All processors with matrix tiles have them for bfloat16. The system has to be asked for their state, which PyTorch does.
bool unasked_tiles() {
  return unasked_bfloat16() && at::cpu::init_amx();
}
#endif

}  // namespace

const Capability& capability() {
  static constexpr Capability compiled[] = {
      {"default", "DEFAULT", always, DEFAULT::dot_kernels, DEFAULT::additive_kernels, DEFAULT::centre_item, no_matmul},
#if defined(__x86_64__)
      {"avx2", "AVX2", always, AVX2::dot_kernels, AVX2::additive_kernels, AVX2::centre_item, no_matmul},
      {"avx512_amx",
       "AVX512",
       unasked_tiles,
       AVX512_AMX::dot_kernels,
       AVX512_AMX::additive_kernels,
       AVX512_AMX::centre_item,
       amx_matmul},
      {"avx512_bf16",
       "AVX512",
       unasked_bfloat16,
       AVX512_BF16::dot_kernels,
       AVX512_BF16::additive_kernels,
       AVX512_BF16::centre_item,
       where_mkl_leaves_it},
      {"avx512", "AVX512", always, AVX512::dot_kernels, AVX512::additive_kernels, AVX512::centre_item, where_mkl_leaves_it},
#endif
  };
  static const Capability& chosen = []() -> const Capability& {
    const std::string wanted = at::get_cpu_capability();
    for (const Capability& candidate : compiled) {
      if (wanted == candidate.torch_name && candidate.runs()) {
        return candidate;
      }
    }
    return compiled[0];
  }();
  return chosen;
}

}  // namespace attn_ext::cpu

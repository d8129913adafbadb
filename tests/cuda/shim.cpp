// The executor behind shim.h: fibers, meetings, and a log of who touched which memory when.
#include "shim.h"

#include "device.cuh"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

dim3 threadIdx, blockIdx, blockDim, gridDim;

// There when ASan's runtime is loaded.
extern "C" [[gnu::weak]] void* __asan_region_is_poisoned(void* begin, size_t bytes);

// Saves the callee's registers on this stack and its pointer in *from, and goes on where `to` was saved.
extern "C" void attn_ext_switch_fiber(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.type attn_ext_switch_fiber, @function
.hidden attn_ext_switch_fiber
.globl attn_ext_switch_fiber
attn_ext_switch_fiber:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
constexpr int kReturnAddress = 6;
constexpr int kFrameWords = 8;  // with the entry's own return address, none
#elif defined(__aarch64__)
asm(R"(
.text
.type attn_ext_switch_fiber, %function
.hidden attn_ext_switch_fiber
.globl attn_ext_switch_fiber
attn_ext_switch_fiber:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr int kReturnAddress = 11;
constexpr int kFrameWords = 20;
#else
#error "a fiber switch for this processor is missing"
#endif

namespace attn_ext::shim {
namespace {

using cuda::kWarp;
using std::to_string;

constexpr size_t kMostThreads = 1024;
constexpr size_t kMostWarps = kMostThreads / kWarp;
constexpr size_t kStack = 128 * 1024;
constexpr size_t kPage = 4096;
constexpr size_t kCallers = 16 * 1024;  // of the stack, where a launch's arguments are
constexpr size_t kUnaskedShared = 48 * 1024;
constexpr size_t kMostShared = 227 * 1024;  // of a block, on any GPU
constexpr size_t kMargin = 1 << 20;         // what falls so near to shared memory was meant for it

// An access as it is remembered. The epoch counts the barriers of all blocks, and their beginnings: it tells block and launch too.
struct Access {
  uint32_t epoch = 0;
  uint16_t warp_epoch = 0;  // sync_warps of the thread's warp since the barrier
  uint16_t who = 0;         // a thread, or one of the following
};
constexpr uint16_t kLanesOf = 1024;  // + warp: several of its lanes
constexpr uint16_t kSeveral = 2048;  // threads of several warps
constexpr uint16_t kCopy = 4096;     // + thread: its copy_async16 is under way

// The last accesses to 2 bytes, the smallest element that threads share.
struct Cell {
  Access write;
  Access read;
};
constexpr size_t kCellBytes = 2;

struct Copy {
  int group;
  void* to;
  const void* from;
  bool there;
};

struct Thread {
  void* stack_pointer;
  bool waits;
  bool done;
  bool begins_early;  // and has not waited for the last launch
  Meeting meeting;
  std::source_location where;
  uint64_t mine;
  int argument;
  uint64_t result;
  int groups;  // of copies, committed
  std::vector<Copy> copies;
};

const char* name_of(Meeting meeting) {
  constexpr const char* names[] = {"sync_threads", "any_in_block", "sync_warp", "shuffle_xor", "shuffle"};
  return names[static_cast<int>(meeting)];
}

bool takes_the_block(Meeting meeting) {
  return meeting == Meeting::Barrier || meeting == Meeting::AnyInBlock;
}

std::string file_and_line(const std::source_location& where) {
  const std::string file = where.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + to_string(where.line());
}

std::string text(const dim3& at) {
  return "(" + to_string(at.x) + ", " + to_string(at.y) + ", " + to_string(at.z) + ")";
}

std::string name_of(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) {
    return "a kernel";  // in an executable, linked without -rdynamic
  }
  int status;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status), std::free);
  return name ? name.get() : info.dli_sname;
}

// " at file:line" of the instruction before `address`, where there is a tool to tell.
std::string source_of(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0) {
    return "";
  }
  char command[1024];
  const auto offset = static_cast<const char*>(address) - 1 - static_cast<const char*>(info.dli_fbase);
  std::snprintf(command, sizeof(command), "addr2line -se '%s' %#tx 2>&-", info.dli_fname, offset);
  std::string line;
  if (FILE* tool = popen(command, "r")) {
    char buffer[256];
    if (std::fgets(buffer, sizeof(buffer), tool) != nullptr) {
      line = buffer;
    }
    pclose(tool);
  }
  line = line.substr(0, line.find_first_of(" \n"));
  return line.empty() || line[0] == '?' ? "" : " at " + line;
}

[[noreturn]] void enter();

class Executor {
 public:
  Executor() {
    const auto reserve = [](size_t bytes, int protection) {
      void* memory = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) {
        throw std::runtime_error("the shim got no memory for its stacks");
      }
      return static_cast<char*>(memory);
    };
    stacks_ = reserve(kMostThreads * kStack, PROT_NONE);
    // 16 bytes are all the alignment that shared memory is promised.
    shared_ = reserve(2 * kMargin + kMostShared, PROT_READ | PROT_WRITE) + kMargin + 16;
    shared_cells_.resize(kMostShared / kCellBytes);
    if (const char* text = std::getenv("ATTN_EXT_SHIM_SEED")) {
      seed(std::strtoull(text, nullptr, 10));
    }
  }

  void seed(uint64_t value) {
    random_ = value * 0x9e3779b97f4a7c15 + 1;
  }

  void compiled_to(int ptx_version) {
    ptx_version_ = ptx_version;
  }

  void shared_memory_of_multiprocessor(int bytes) {
    multiprocessors_shared_ = bytes;
  }

  int shared_memory_of_multiprocessor() const {
    return multiprocessors_shared_;
  }

  // sm_75 gives a block all that there is, the others keep 1 KB.
  size_t most_shared() const {
    const size_t all = multiprocessors_shared_;
    return all <= 64 * 1024 ? all : all - 1024;
  }

  int ptx_version() const {
    return ptx_version_;
  }

  void skip(const char* where) {
    skipped_ = where;
  }

  cudaError_t allow_shared(const void* kernel, int bytes) {
    if (bytes < 0 || static_cast<size_t>(bytes) > most_shared()) {
      return cudaErrorInvalidValue;
    }
    allowed_shared_[kernel] = bytes;
    return cudaSuccess;
  }

  cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(const void*), const void* arguments) {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    const dim3 grid = config.gridDim;
    const dim3 block = config.blockDim;
    const auto allowed = allowed_shared_.find(kernel);
    if (config.dynamicSmemBytes > most_shared() ||
        config.dynamicSmemBytes > std::max(kUnaskedShared, allowed == allowed_shared_.end() ? 0 : allowed->second)) {
      return cudaErrorInvalidValue;
    }
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff || block.x < 1 ||
        block.x > kMostThreads || block.y != 1 || block.z != 1) {
      return cudaErrorInvalidConfiguration;
    }
    kernel_ = kernel;
    body_ = body;
    arguments_ = arguments;
    callers_ = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    shared_bytes_ = config.dynamicSmemBytes;
    begins_early_ = false;
    for (unsigned i = 0; i < config.numAttrs; ++i) {
      const cudaLaunchAttribute& attribute = config.attrs[i];
      begins_early_ |= attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                       attribute.val.programmaticStreamSerializationAllowed != 0;
    }
    gridDim = grid;
    blockDim = block;
    launch_epoch_ = epoch_ + 1;
    if (pages_.size() > kMostPages) {
      pages_.clear();  // what earlier launches did is in order
      recent_pages_ = {};
    }
    prepare_threads(block.x);
    std::vector<uint32_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[below(i)]);
    }
    for (const uint32_t index : order) {
      run_block(dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y));
    }
    return cudaSuccess;
  }

  bool running() const {
    return thread_ >= 0;
  }

  // What a fiber does until its end.
  [[noreturn]] void live() {
    body_(arguments_);
    if (!current().copies.empty()) {
      fail(me() + " has left with copies under way");
    }
    current().done = true;
    leave();
    std::abort();
  }

  uint64_t meet(Meeting meeting, uint64_t mine, int argument, const std::source_location& where) {
    if ((meeting == Meeting::Barrier || meeting == Meeting::SyncWarp) && !skipped_.empty() && file_and_line(where) == skipped_) {
      return 0;
    }
    Thread& thread = current();
    thread.meeting = meeting;
    thread.where = where;
    thread.mine = mine;
    thread.argument = argument;
    thread.waits = true;
    leave();
    return thread.result;
  }

  char* shared() const {
    return shared_;
  }

  template <bool write>
  void access(const void* at, size_t bytes, const void* caller) {
    const auto address = reinterpret_cast<uintptr_t>(at);
    const bool is_of_stacks = address - reinterpret_cast<uintptr_t>(stacks_) < kMostThreads * kStack;
    if (!running() || is_of_stacks || address - callers_ < kCallers || is_special(address)) {
      return;
    }
    caller_ = caller;
    if (is_shared(at)) {
      check_shared(at, bytes);
      const size_t offset = static_cast<const char*>(at) - shared_;
      for (size_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
        log<write, true>(shared_cells_[i], at, bytes);
      }
    } else {
      check_global(at, bytes);
      for (uintptr_t i = address / kCellBytes; i <= (address + bytes - 1) / kCellBytes; ++i) {
        log<write, false>(global_cell(i), at, bytes);
      }
    }
  }

  void check_aligned(const void* at, size_t bytes, const void* caller) {
    if (running() && reinterpret_cast<uintptr_t>(at) % bytes != 0) {
      caller_ = caller;
      fail(me() + " takes " + to_string(bytes) + " bytes at " + address_of(at) + ", which is not aligned to them");
    }
  }

  void check_is_global(const void* at, const void* caller) {
    if (is_shared(at)) {
      caller_ = caller;
      fail(me() + " takes " + address_of(at) + " for global memory");
    }
  }

  void start_copy(void* to, const void* from, bool there, const void* caller) {
    check_aligned(to, 16, caller);
    if (!is_shared(to)) {
      caller_ = caller;
      fail(me() + " copies to " + address_of(to) + ", which is no shared memory");
    }
    if (there) {
      check_aligned(from, 16, caller);
      check_is_global(from, caller);
      access<false>(from, 16, caller);
    }
    access<true>(to, 16, caller);
    std::memset(to, 0xff, 16);
    mark_shared(to, kCopy + thread_);
    current().copies.push_back({current().groups, to, from, there});
  }

  void commit_copies() {
    ++current().groups;
  }

  void wait_for_last_launch() {
    if (ptx_version_ >= cuda::kLeastThatWaits) {
      current().begins_early = false;
    }
  }

  void wait_copies(int pending) {
    Thread& thread = current();
    std::erase_if(thread.copies, [&](const Copy& copy) {
      if (copy.group >= thread.groups - pending) {
        return false;
      }
      if (copy.there) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
      mark_shared(copy.to, thread_);
      return true;
    });
  }

 private:
  static constexpr size_t kMostPages = 1 << 14;
  using CellPage = std::array<Cell, kPage / kCellBytes>;

  struct RecentPage {
    uintptr_t number = 0;
    CellPage* cells = nullptr;
  };

  void prepare_threads(size_t count) {
    for (size_t i = threads_.size(); i < count; ++i) {
      // The lowest page stays shut: a stack that runs over crashes.
      mprotect(stacks_ + i * kStack + kPage, kStack - kPage, PROT_READ | PROT_WRITE);
      threads_.emplace_back();
    }
    count_ = count;
  }

  void begin(Thread& thread, size_t index) {
    void** frame = reinterpret_cast<void**>(stacks_ + (index + 1) * kStack) - kFrameWords;
    std::fill_n(frame, kFrameWords, nullptr);
    frame[kReturnAddress] = reinterpret_cast<void*>(&enter);
    thread.stack_pointer = frame;
    thread.waits = false;
    thread.done = false;
    thread.begins_early = begins_early_;
    thread.groups = 0;
    thread.copies.clear();
  }

  void run_block(const dim3& block) {
    blockIdx = block;
    ++epoch_;
    block_epoch_ = epoch_;
    warp_epochs_.fill(0);
    arrived_.fill(0);
    std::memset(shared_, 0xff, shared_bytes_);
    ready_.resize(count_);
    std::iota(ready_.begin(), ready_.end(), 0);
    for (size_t i = 0; i < count_; ++i) {
      begin(threads_[i], i);
    }
    size_t left = count_;
    while (!ready_.empty()) {
      std::swap(ready_[below(ready_.size())], ready_.back());
      thread_ = ready_.back();
      ready_.pop_back();
      threadIdx = dim3(thread_, 0, 0);
      attn_ext_switch_fiber(&scheduler_, current().stack_pointer);
      const int thread = std::exchange(thread_, -1);
      if (!error_.empty()) {
        raise(std::exchange(error_, ""));
      }
      if (threads_[thread].done) {
        --left;
      } else {
        arrive(thread);
      }
    }
    if (left > 0) {
      raise("not all threads come together: " + whereabouts(0, count_));
    }
  }

  void arrive(int thread) {
    const bool whole_block = takes_the_block(threads_[thread].meeting);
    const int warp = thread / kWarp;
    size_t& arrived = arrived_[whole_block ? kMostWarps : warp];
    const size_t first = whole_block ? 0 : warp * kWarp;
    const size_t wanted = whole_block ? count_ : kWarp;
    if (++arrived == wanted) {
      arrived = 0;
      conclude(first, first + wanted);
    }
  }

  // All the threads that meet are there.
  void conclude(size_t first, size_t end) {
    const Thread& one = threads_[first];
    uint64_t any = 0;
    for (size_t i = first; i < end; ++i) {
      const Thread& other = threads_[i];
      if (other.meeting != one.meeting || other.where.line() != one.where.line() ||
          std::strcmp(other.where.file_name(), one.where.file_name()) != 0) {
        raise("threads meet in different places: " + whereabouts(first, end));
      }
      any |= other.mine;
    }
    for (size_t i = first; i < end; ++i) {
      Thread& thread = threads_[i];
      const size_t lane = i - first;
      size_t from = lane;
      if (one.meeting == Meeting::ShuffleXor) {
        from = lane ^ thread.argument;
      } else if (one.meeting == Meeting::Shuffle) {
        from = thread.argument;
      }
      if (!takes_the_block(one.meeting) && from >= kWarp) {
        raise("thread " + to_string(i) + " asks for lane " + to_string(from) + " at " + file_and_line(thread.where));
      }
      thread.result = takes_the_block(one.meeting) ? any : threads_[first + from].mine;
      thread.waits = false;
      ready_.push_back(static_cast<int>(i));
    }
    if (takes_the_block(one.meeting)) {
      ++epoch_;
      warp_epochs_.fill(0);
    } else if (one.meeting == Meeting::SyncWarp) {
      ++warp_epochs_[first / kWarp];
    }
  }

  static std::string place(const Thread& thread) {
    return thread.done    ? "has left the kernel"
           : thread.waits ? "waits in " + std::string(name_of(thread.meeting)) + " at " + file_and_line(thread.where)
                          : "runs";
  }

  // Who is where, one thread for all that are in the same place.
  std::string whereabouts(size_t first, size_t end) const {
    std::vector<std::pair<std::string, size_t>> places;
    for (size_t i = first; i < end; ++i) {
      const std::string here = place(threads_[i]);
      if (std::none_of(places.begin(), places.end(), [&](const auto& seen) { return seen.first == here; })) {
        places.emplace_back(here, i);
      }
    }
    std::string all;
    for (const auto& [here, thread] : places) {
      all += (all.empty() ? "thread " : ", thread ") + to_string(thread) + " " + here;
    }
    return all + (count_ % kWarp != 0 ? "; the last warp has " + to_string(count_ % kWarp) + " threads" : "");
  }

  void leave() {
    attn_ext_switch_fiber(&current().stack_pointer, scheduler_);
  }

  // Ends the launch from inside a fiber: kernels hold nothing that would have to be given back.
  [[noreturn]] void fail(const std::string& what) {
    error_ = what + source_of(caller_);
    leave();
    std::abort();
  }

  [[noreturn]] void raise(const std::string& what) const {
    throw std::runtime_error(name_of(kernel_) + ", block " + text(blockIdx) + ": " + what);
  }

  Thread& current() {
    return threads_[thread_];
  }

  std::string me() const {
    return "thread " + to_string(thread_);
  }

  // threadIdx and its like, which on a GPU are no memory.
  static bool is_special(uintptr_t address) {
    const auto is_in = [&](const dim3& index) { return address - reinterpret_cast<uintptr_t>(&index) < sizeof(dim3); };
    return is_in(threadIdx) || is_in(blockIdx) || is_in(blockDim) || is_in(gridDim);
  }

  bool is_shared(const void* at) const {
    return static_cast<size_t>(static_cast<const char*>(at) - shared_ + kMargin) < 2 * kMargin + kMostShared - 16;
  }

  std::string address_of(const void* at) const {
    if (is_shared(at)) {
      return "byte " + to_string(static_cast<const char*>(at) - shared_) + " of shared memory";
    }
    char buffer[32];
    std::snprintf(buffer, sizeof(buffer), "%p", at);
    return buffer;
  }

  void check_shared(const void* at, size_t bytes) {
    const auto offset = static_cast<const char*>(at) - shared_;
    if (offset < 0 || offset + bytes > shared_bytes_) {
      fail(me() + " takes " + to_string(bytes) + " bytes at " + address_of(at) + ", which has " + to_string(shared_bytes_));
    }
  }

  void check_global(const void* at, size_t bytes) {
    if (current().begins_early) {
      fail(me() + " takes " + to_string(bytes) + " bytes at " + address_of(at) + " and has not waited for the last launch");
    }
    if (reinterpret_cast<uintptr_t>(at) < kPage) {
      fail(me() + " takes " + to_string(bytes) + " bytes at a null pointer");
    }
    if (__asan_region_is_poisoned != nullptr && __asan_region_is_poisoned(const_cast<void*>(at), bytes) != nullptr) {
      fail(me() + " takes " + to_string(bytes) + " bytes at " + address_of(at) + ", outside of what was allocated");
    }
  }

  Cell& global_cell(uintptr_t index) {
    constexpr size_t cells = kPage / kCellBytes;
    const uintptr_t number = index / cells;
    RecentPage& recent = recent_pages_[number % recent_pages_.size()];
    if (recent.number != number) {
      auto& page = pages_[number];
      if (page == nullptr) {
        page = std::make_unique<CellPage>();
      }
      recent = {number, page.get()};
    }
    return (*recent.cells)[index % cells];
  }

  void mark_shared(const void* at, size_t who) {
    const size_t first = (static_cast<const char*>(at) - shared_) / kCellBytes;
    Access access = now();
    access.who = static_cast<uint16_t>(who);
    for (size_t i = first; i < first + 16 / kCellBytes; ++i) {
      shared_cells_[i].write = access;
    }
  }

  Access now() const {
    return {epoch_, warp_epochs_[thread_ / kWarp], static_cast<uint16_t>(thread_)};
  }

  static int warp_of(const Access& access) {
    return access.who < kLanesOf ? access.who / kWarp : access.who < kSeveral ? access.who - kLanesOf : -1;
  }

  // Whether this thread may rely on an earlier access being over.
  bool ordered(const Access& before) const {
    if (before.epoch < block_epoch_) {
      return before.epoch < launch_epoch_;
    }
    const int warp = thread_ / kWarp;
    return before.epoch < epoch_ || before.who == thread_ || (warp_of(before) == warp && before.warp_epoch < warp_epochs_[warp]);
  }

  template <bool write, bool is_shared>
  void log(Cell& cell, const void* at, size_t bytes) {
    const bool of_this_block = cell.write.epoch >= block_epoch_;
    if (is_shared && of_this_block && cell.write.who >= kCopy) {
      complain<write>(at, bytes, ", where the copy of thread " + to_string(cell.write.who - kCopy) + " is under way");
    }
    if (is_shared && !write && !of_this_block) {
      complain<write>(at, bytes, ", which nobody has written");
    }
    if ((!is_shared || of_this_block) && !ordered(cell.write)) {
      complain<write>(at, bytes, ", which " + name(cell.write) + " has written with no barrier since");
    }
    if constexpr (write) {
      if ((!is_shared || cell.read.epoch >= block_epoch_) && !ordered(cell.read)) {
        complain<write>(at, bytes, ", which " + name(cell.read) + " has read with no barrier since");
      }
      cell.write = now();
    } else if (cell.read.epoch < epoch_ || ordered(cell.read)) {
      // Of two blocks' reads the later is remembered: enough for one that writes what others read without having read it.
      cell.read = now();
    } else {
      const int warp = warp_of(cell.read);
      cell.read = now();
      cell.read.who = static_cast<uint16_t>(warp == thread_ / kWarp ? kLanesOf + warp : kSeveral);
    }
  }

  template <bool write>
  [[noreturn, gnu::noinline]] void complain(const void* at, size_t bytes, const std::string& why) {
    fail(me() + (write ? " writes " : " reads ") + to_string(bytes) + " bytes at " + address_of(at) + why);
  }

  std::string name(const Access& access) const {
    const std::string who = access.who < kLanesOf   ? "thread " + to_string(access.who)
                            : access.who < kSeveral ? "more than one lane of warp " + to_string(access.who - kLanesOf)
                                                    : "more than one warp";
    return who + (access.epoch < block_epoch_ ? " of another block" : "");
  }

  // Uniform enough below any n that occurs.
  size_t below(size_t n) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return (random_ >> 16) % n;
  }

  std::mutex mutex_;
  std::string skipped_;
  uint64_t random_ = 88172645463325252;
  std::unordered_map<const void*, size_t> allowed_shared_;

  // The launch.
  const void* kernel_ = nullptr;
  void (*body_)(const void*) = nullptr;
  const void* arguments_ = nullptr;
  uintptr_t callers_ = 0;  // their stack frames begin here
  uint32_t launch_epoch_ = 0;
  bool begins_early_ = false;
  int multiprocessors_shared_ = 228 * 1024;
  int ptx_version_ = cuda::kLeastThatWaits;
  uint32_t block_epoch_ = 0;

  // The block: `ready_` may run, the others wait or are done.
  std::vector<Thread> threads_;
  size_t count_ = 0;
  std::vector<int> ready_;
  std::array<size_t, kMostWarps + 1> arrived_;  // by warp, and of the block
  uint32_t epoch_ = 0;
  std::array<uint16_t, kMostWarps> warp_epochs_;

  int thread_ = -1;  // that runs
  void* scheduler_ = nullptr;
  const void* caller_ = nullptr;
  std::string error_;

  char* stacks_ = nullptr;
  char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  std::vector<Cell> shared_cells_;
  std::unordered_map<uintptr_t, std::unique_ptr<CellPage>> pages_;
  std::array<RecentPage, 256> recent_pages_;
};

Executor& executor() {
  static Executor it;
  return it;
}

void enter() {
  executor().live();
}

}  // namespace

void seed(uint64_t value) {
  executor().seed(value);
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, void (*thread)(const void*), const void* arguments) {
  return executor().run(config, kernel, thread, arguments);
}

uint64_t meet(Meeting meeting, uint64_t mine, int argument, const std::source_location& where) {
  return executor().meet(meeting, mine, argument, where);
}

void wait_copies(int pending) {
  executor().wait_copies(pending);
}

void wait_for_last_launch() {
  executor().wait_for_last_launch();
}

void compiled_to(int ptx_version) {
  executor().compiled_to(ptx_version);
}

void shared_memory_of_multiprocessor(int bytes) {
  executor().shared_memory_of_multiprocessor(bytes);
}

}  // namespace attn_ext::shim

const char* cudaGetErrorString(cudaError_t error) {
  constexpr const char* texts[] = {"no error", "invalid argument", "invalid configuration argument"};
  return texts[error];
}

cudaError_t cudaFuncGetName(const char** name, const void* kernel) {
  thread_local std::string text;
  text = attn_ext::shim::name_of(kernel);
  *name = text.c_str();
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  return attn_ext::shim::executor().allow_shared(kernel, value);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& executor = attn_ext::shim::executor();
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(executor.most_shared())
                                                                : executor.shared_memory_of_multiprocessor();
  return cudaSuccess;
}

// What a driver makes of older PTX is code of the device all the same.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {90, attn_ext::shim::executor().ptx_version()};
  return cudaSuccess;
}

namespace attn_ext::cuda {
namespace {

using shim::executor;

float without_subnormals(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

// `y` or a neighbour, always the same for one x; 0 has none, of which one would be -0.
float nearly(float y, float x) {
  const uint32_t hash = bits_of(x) * 2654435769u >> 16;
  const float infinity = hash % 3 == 1 ? kInfinity<float> : -kInfinity<float>;
  return hash % 3 == 0 || y == 0 || !std::isfinite(y) ? y : std::nextafter(y, infinity);
}

}  // namespace

char* shared_memory() {
  return executor().shared();
}

float exp2_approx(float x) {
  x = without_subnormals(x);
  const float y = std::exp2(x);
  return without_subnormals(x == std::nearbyint(x) ? y : nearly(y, x));
}

float reciprocal_approx(float x) {
  x = without_subnormals(x);
  int exponent;
  const float y = 1 / x;
  return without_subnormals(std::fabs(std::frexp(x, &exponent)) == 0.5f ? y : nearly(y, x));
}

float to_acc(Half x) {
  const int exponent = x.bits >> 10 & 31;
  const auto fraction = static_cast<float>(x.bits & 1023);
  float y = exponent == 31  ? (fraction != 0 ? NAN : kInfinity<float>)
            : exponent == 0 ? std::ldexp(fraction, -24)
                            : std::ldexp(fraction + 1024, exponent - 25);
  return x.bits >> 15 != 0 ? -y : y;
}

Half rounded_to_half(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  const float size = std::fabs(x);
  uint32_t bits;
  if (std::isnan(x)) {
    return {0x7fff};
  }
  if (size >= 65520) {
    bits = 0x7c00;
  } else if (size < 0x1p-14f) {
    bits = static_cast<uint32_t>(std::nearbyint(size * 0x1p24f));
  } else {
    int exponent;
    const float fraction = std::frexp(size, &exponent);  // [0.5, 1): 11 bits of it are kept, a carry belongs to the exponent
    bits = static_cast<uint32_t>((exponent + 13) << 10) + static_cast<uint32_t>(std::nearbyint(fraction * 2048));
  }
  return {static_cast<uint16_t>(sign | bits)};
}

Vector16 load16(const void* from) {
  executor().check_aligned(from, 16, __builtin_return_address(0));
  executor().access<false>(from, 16, __builtin_return_address(0));
  return *static_cast<const Vector16*>(from);
}

Vector16 load16_streaming(const void* from) {
  executor().check_is_global(from, __builtin_return_address(0));
  executor().check_aligned(from, 16, __builtin_return_address(0));
  executor().access<false>(from, 16, __builtin_return_address(0));
  return *static_cast<const Vector16*>(from);
}

void store16(void* to, const Vector16& x) {
  executor().check_aligned(to, 16, __builtin_return_address(0));
  executor().access<true>(to, 16, __builtin_return_address(0));
  *static_cast<Vector16*>(to) = x;
}

void store8(void* to, uint32_t first, uint32_t second) {
  executor().check_aligned(to, 8, __builtin_return_address(0));
  executor().access<true>(to, 8, __builtin_return_address(0));
  static_cast<uint32_t*>(to)[0] = first;
  static_cast<uint32_t*>(to)[1] = second;
}

void store16_streaming(void* to, const Vector16& x) {
  executor().check_is_global(to, __builtin_return_address(0));
  executor().check_aligned(to, 16, __builtin_return_address(0));
  executor().access<true>(to, 16, __builtin_return_address(0));
  *static_cast<Vector16*>(to) = x;
}

void copy_async16(void* to, const void* from, bool there) {
  executor().start_copy(to, from, there, __builtin_return_address(0));
}

void commit_copies() {
  executor().commit_copies();
}

}  // namespace attn_ext::cuda

extern "C" {

// The barrier at "file:line" is left out from now on: a test of the tests.
void attn_ext_shim_skip(const char* where) {
  attn_ext::shim::executor().skip(where);
}

// The hooks of -fsanitize=thread, one before every access.

void __tsan_init() {}

void __tsan_func_entry(void*) {}

void __tsan_func_exit() {}

#define ATTN_EXT_HOOKS(bytes)                                                         \
  void __tsan_read##bytes(const void* at) {                                           \
    attn_ext::shim::executor().check_aligned(at, bytes, __builtin_return_address(0)); \
    attn_ext::shim::executor().access<false>(at, bytes, __builtin_return_address(0)); \
  }                                                                                   \
  void __tsan_write##bytes(const void* at) {                                          \
    attn_ext::shim::executor().check_aligned(at, bytes, __builtin_return_address(0)); \
    attn_ext::shim::executor().access<true>(at, bytes, __builtin_return_address(0));  \
  }                                                                                   \
  void __tsan_unaligned_read##bytes(const void* at) {                                 \
    attn_ext::shim::executor().access<false>(at, bytes, __builtin_return_address(0)); \
  }                                                                                   \
  void __tsan_unaligned_write##bytes(const void* at) {                                \
    attn_ext::shim::executor().access<true>(at, bytes, __builtin_return_address(0));  \
  }
ATTN_EXT_HOOKS(1)
ATTN_EXT_HOOKS(2)
ATTN_EXT_HOOKS(4)
ATTN_EXT_HOOKS(8)
ATTN_EXT_HOOKS(16)
#undef ATTN_EXT_HOOKS

void __tsan_read_range(const void* at, size_t bytes) {
  attn_ext::shim::executor().access<false>(at, bytes, __builtin_return_address(0));
}

void __tsan_write_range(const void* at, size_t bytes) {
  attn_ext::shim::executor().access<true>(at, bytes, __builtin_return_address(0));
}

}  // extern "C"

// Huge pages for the fresh memory that results are written to.
#pragma once

#include "../attention.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace attn_ext::cpu {

// Asks for huge pages behind a large output. It is fresh memory: faults on its small pages would take several times as long as
// writing it.
inline void use_huge_pages(const Tensor& output) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  if (!output.defined() || output.nbytes() < 2 * page) {
    return;
  }
  const auto begin = reinterpret_cast<uintptr_t>(output.const_data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t end = (begin + output.nbytes()) / page * page;
  // Where the system has none it says so, and nothing is lost.
  (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace attn_ext::cpu

#include "capability.h"

#include <ATen/Version.h>

#include <string>

namespace attn_ext::cpu {

// setup.py compiles kernels/ once for each of these.
namespace DEFAULT {
const Kernels& dot_kernels(Dtype);
const Kernels& additive_kernels(Dtype);
}  // namespace DEFAULT

#if defined(__x86_64__)
namespace AVX2 {
const Kernels& dot_kernels(Dtype);
const Kernels& additive_kernels(Dtype);
}  // namespace AVX2

namespace AVX512 {
const Kernels& dot_kernels(Dtype);
const Kernels& additive_kernels(Dtype);
}  // namespace AVX512
#endif

const Capability& capability() {
  static constexpr Capability compiled[] = {
      {"default", "DEFAULT", DEFAULT::dot_kernels, DEFAULT::additive_kernels},
#if defined(__x86_64__)
      {"avx2", "AVX2", AVX2::dot_kernels, AVX2::additive_kernels},
      {"avx512", "AVX512", AVX512::dot_kernels, AVX512::additive_kernels},
#endif
  };
  static const Capability& chosen = []() -> const Capability& {
    const std::string wanted = at::get_cpu_capability();
    for (const Capability& candidate : compiled) {
      if (wanted == candidate.torch_name) {
        return candidate;
      }
    }
    return compiled[0];
  }();
  return chosen;
}

}  // namespace attn_ext::cpu

// The compiler's own word on what it compiled for: CUDART_VERSION and __CUDA_ARCH_LIST__.
#include "build.h"

#include <cuda_runtime_api.h>

namespace attn_ext::cuda {

std::string build() {
  std::string text = "CUDA " + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) + " for";
  const char* separator = " ";
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    text += separator + ("sm_" + std::to_string(architecture / 10));
    separator = ", ";
  }
  return text;
}

}  // namespace attn_ext::cuda

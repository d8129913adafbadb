// The way to launch a kernel. tests/cuda/shim.h has the runtime's part of it on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace attn_ext::cuda {

inline void check(cudaError_t error, const void* kernel) {
  if (error == cudaSuccess) {
    return;
  }
  cudaGetLastError();  // PyTorch's next check is not to find it again
  const char* name = nullptr;
  cudaFuncGetName(&name, kernel);
  throw std::runtime_error(std::string("attn_ext: ") + (name ? name : "a kernel") + ": " + cudaGetErrorString(error));
}

// What a kernel may take of shared memory without asking.
constexpr size_t kUnaskedSharedMemory = 48 * 1024;

// Whether the next launch may come to its wait_for_last_launch while the one before it still runs.
inline bool begins_early() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

// An empty grid, of an empty batch for one, is no error and does nothing.
template <class... Parameters>
void launch_as(
    bool early,
    void (*kernel)(Parameters...),
    dim3 grid,
    int threads,
    size_t shared_bytes,
    cudaStream_t stream,
    std::type_identity_t<Parameters>... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
    return;
  }
  const void* address = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kUnaskedSharedMemory) {
    check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), address);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), address);
}

void launch(auto kernel, const auto&... rest) {
  launch_as(false, kernel, rest...);
}

// A kernel that calls wait_for_last_launch before it touches anything, behind one that calls let_next_launch_begin.
void launch_behind(auto kernel, const auto&... rest) {
  launch_as(begins_early(), kernel, rest...);
}

}  // namespace attn_ext::cuda

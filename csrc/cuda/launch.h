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

// An empty grid, of an empty batch for one, is no error and does nothing.
template <class... Parameters>
void launch(
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
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), address);
}

}  // namespace attn_ext::cuda

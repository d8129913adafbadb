// The way to launch a kernel. tests/cuda/shim.h has the runtime's part of it on the host.
#pragma once

#include "device.cuh"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace attn_ext::cuda {

inline void check(cudaError_t error, const void* kernel) {
  if (error == cudaSuccess) {
    return;
  }
  const char* name = nullptr;
  cudaFuncGetName(&name, kernel);
  cudaGetLastError();  // PyTorch's next check is to find neither's error
  throw std::runtime_error(std::string("attn_ext: ") + (name ? name : "a kernel") + ": " + cudaGetErrorString(error));
}

// What a kernel may take of shared memory without asking.
constexpr size_t kUnaskedSharedMemory = 48 * 1024;

// Blocks whose shared memory the current device's multiprocessors have room for at a time, with the 1 KB of each that is the
// system's.
inline int64_t blocks_by_shared_memory(size_t bytes) {
  int device = 0, of_multiprocessor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) != cudaSuccess) {
    return std::numeric_limits<int64_t>::max();
  }
  return std::max<int64_t>(static_cast<int64_t>(of_multiprocessor) / static_cast<int64_t>(bytes + 1024), 1);
}

// Of CUDA 12.3, whose graphs are the first to know of launches that begin early.
constexpr int kLeastDriver = 12030;

// Whether a kernel may begin while the launch before it still runs: whether the current device's code of it waits. The PTX that it
// was compiled to decides, not the device, nor the machine code, which a driver may have made of older PTX.
template <auto kernel>
bool begins_early() {
  constexpr int most_devices = 64;
  enum Answer : char { kUnasked, kWaits, kDoesNot };
  thread_local Answer answers[most_devices] = {};  // asking may take as long as a launch
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= most_devices) {
    return false;
  }
  if (answers[device] == kUnasked) {
    const void* address = reinterpret_cast<const void*>(kernel);
    cudaFuncAttributes attributes{};
    int driver = 0;
    check(cudaFuncGetAttributes(&attributes, address), address);
    check(cudaDriverGetVersion(&driver), address);
    answers[device] = attributes.ptxVersion >= kLeastThatWaits && driver >= kLeastDriver ? kWaits : kDoesNot;
  }
  return answers[device] == kWaits;
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
    int device = 0, most = 0;
    check(cudaGetDevice(&device), address);
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), address);
    // Not what this launch takes: another thread may be about to launch the kernel with more.
    check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, most), address);
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
template <auto kernel>
void launch_behind(const auto&... rest) {
  launch_as(begins_early<kernel>(), kernel, rest...);
}

}  // namespace attn_ext::cuda

#include "stream.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

namespace attn_ext::cuda {
namespace {

int64_t attribute(cudaDeviceAttr which, c10::Device device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device.index()));
  return value;
}

}  // namespace

Stream current_stream(c10::Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index());
}

int64_t multiprocessors(c10::Device device) {
  return attribute(cudaDevAttrMultiProcessorCount, device);
}

int64_t major_capability(c10::Device device) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device);
}

}  // namespace attn_ext::cuda

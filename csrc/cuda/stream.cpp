#include "stream.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

namespace attn_ext::cuda {

Stream current_stream(c10::Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index());
}

int64_t multiprocessors(c10::Device device) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.index()));
  return count;
}

}  // namespace attn_ext::cuda

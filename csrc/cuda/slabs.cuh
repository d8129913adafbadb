// out = sum over n of slabs[n], in their order. Bound by reading the slabs.
#pragma once

#include "device.cuh"

namespace attn_ext::cuda {

constexpr int kSlabThreads = 256;

// A block has 256 / groups elements; each group of its threads sums every groups-th slab, so that many short slabs are read by
// many.
template <class scalar>
__global__ void __launch_bounds__(kSlabThreads)
    sum_slabs(scalar* out, const accumulated_t<scalar>* slabs, int64_t count, int64_t size, int groups) {
  using acc = accumulated_t<scalar>;
  const int width = kSlabThreads / groups, group = threadIdx.x / width;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * width + threadIdx.x % width;
  acc sum = 0;
  for (int64_t n = group; at < size && n < count; n += groups) {
    sum += slabs[n * size + at];
  }
  if (groups > 1) {
    acc* sums = reinterpret_cast<acc*>(shared_memory());  // [groups][width]
    sums[threadIdx.x] = sum;
    sync_threads();  // every group's is there
    for (int other = 1; group == 0 && other < groups; ++other) {
      sum += sums[other * width + threadIdx.x];
    }
  }
  if (group == 0 && at < size) {
    out[at] = from_acc<scalar>(sum);
  }
}

}  // namespace attn_ext::cuda

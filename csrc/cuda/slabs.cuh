// out = sum over n of slabs[n], always in the same order; out may be slabs[0]. Bound by reading the slabs.
#pragma once

#include "device.cuh"

namespace attn_ext::cuda {

constexpr int kSlabThreads = 256;

// Blocks that share a sum, and the groups of each one's threads: it has 256 / groups elements, and each group sums every groups-th
// slab, so that many short slabs are read by many.
struct SlabBlocks {
  unsigned count;
  int groups;
};

// Of so many slabs, so that each thread has few of them; a block's elements are a sector of memory's at least.
inline SlabBlocks slab_blocks(int64_t slabs, int64_t size) {
  constexpr int each = 16, most = 32;
  int groups = 1;
  while (groups < most && groups * each < slabs) {
    groups *= 2;
  }
  const int width = kSlabThreads / groups;
  return {static_cast<unsigned>((size + width - 1) / width), groups};
}

// A block's elements. Shared memory where there are several groups: [kSlabThreads] acc.
template <class scalar>
__device__ __forceinline__ void sum_slabs_by(
    scalar* out, const accumulated_t<scalar>* slabs, int64_t count, int64_t size, int groups, unsigned block) {
  using acc = accumulated_t<scalar>;
  constexpr int at_once = 64 / sizeof(acc);  // loads under way
  const int width = kSlabThreads / groups, group = threadIdx.x / width;
  const int64_t at = static_cast<int64_t>(block) * width + threadIdx.x % width;
  acc sum = 0;
  if (at < size) {
    for (int64_t n = group; n < count; n += at_once * groups) {
      acc x[at_once];
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        x[i] = n + i * groups < count ? slabs[(n + i * groups) * size + at] : acc(0);
      }
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        sum += x[i];
      }
    }
  }
  if (groups > 1) {
    acc* sums = reinterpret_cast<acc*>(shared_memory());  // [groups][width]
    sums[threadIdx.x] = sum;
    sync_threads();  // every group's is there
    if (group == 0) {
#pragma unroll 8
      for (int other = 1; other < groups; ++other) {
        sum += sums[other * width + threadIdx.x];
      }
    }
  }
  if (group == 0 && at < size) {
    out[at] = from_acc<scalar>(sum);
  }
}

template <class scalar>
__global__ void __launch_bounds__(kSlabThreads)
    sum_slabs(scalar* out, const accumulated_t<scalar>* slabs, int64_t count, int64_t size, int groups) {
  sum_slabs_by(out, slabs, count, size, groups, blockIdx.x);
}

}  // namespace attn_ext::cuda

// What the blocks of one query a batch element left, to the outputs, always in their order: a launch behind theirs. Bound by
// latency: whatever a thread needs is asked for at once.
#pragma once

#include "one_step.cuh"
#include "slabs.cuh"

namespace attn_ext::cuda {

// The splits' results to a batch element's: `parts` blocks a batch element, each of kStepBlock columns and a share of the weights.
// Every warp has the splits' factors, a lane each.
template <class scalar>
__global__ void __launch_bounds__(kStepBlock) merge_one_step(const OneStep call, int parts) {
  using acc = accumulated_t<scalar>;
  constexpr int at_once = 32 / sizeof(acc);
  const int64_t b = blockIdx.x / static_cast<unsigned>(parts), size = call.problem.memory_size, stride = size + 2;
  const int part = blockIdx.x % static_cast<unsigned>(parts), count = static_cast<int>(call.splits.count);
  const int lane = threadIdx.x % kWarp;
  const int64_t d = static_cast<int64_t>(part) * kStepBlock + threadIdx.x;
  const acc* partials = static_cast<const acc*>(call.splits.partials) + b * count * stride;  // [count][size + 2]
  acc columns[at_once];
  const auto load_columns = [&](int first) {
#pragma unroll
    for (int n = 0; n < at_once; ++n) {
      columns[n] = first + n < count && d < size ? partials[(first + n) * stride + d] : acc(0);
    }
  };
  const auto softmax_of = [&](int n) {
    Softmaxed<acc> split;
    if (n < count) {
      split.largest = partials[n * stride + size];
      split.total = partials[n * stride + size + 1];
    }
    return split;
  };

  wait_for_last_launch();
  load_columns(0);
  Softmaxed<acc> split = softmax_of(lane), all;
  all.largest = split.largest;
  for (int n = lane + kWarp; n < count; n += kWarp) {
    const acc largest = softmax_of(n).largest;
    all.largest = largest > all.largest ? largest : all.largest;
  }
  all.largest = warp_max(all.largest);
  acc sum = 0;
  for (int first = 0; first < count; first += kWarp) {
    if (first > 0) {
      split = softmax_of(first + lane);
    }
    const acc factor = exponential(split.largest - all.shift());
    all.total += factor * split.total;
    for (int m = 0; m < kWarp && first + m < count; m += at_once) {
      if (first + m > 0) {
        load_columns(first + m);
      }
#pragma unroll
      for (int n = 0; n < at_once; ++n) {
        sum += shuffle(factor, m + n) * columns[n];
      }
    }
  }
  all.total = warp_sum(all.total);
  if (d < size) {
    store_context<scalar>(call, b, d, sum * all.inverse());
  }
  finish_weights<scalar>(call, b, all, d, static_cast<int64_t>(parts) * kStepBlock);
}

// grad_v by the first blocks, of_v's, and then every batch element's grad_query. Either may have none.
template <class scalar>
__global__ void __launch_bounds__(kSlabThreads) merge_gradients(const OneStepBackward call, SlabBlocks of_v, SlabBlocks of_query) {
  using acc = accumulated_t<scalar>;
  const int64_t size = call.problem.key_size, splits = call.splits.count;
  wait_for_last_launch();
  if (blockIdx.x < of_v.count) {
    const acc* partials = static_cast<const acc*>(call.partial_grad_v);  // [B, splits, size]
    sum_slabs_by(static_cast<scalar*>(call.grad_v), partials, call.problem.batch * splits, size, of_v.groups, blockIdx.x);
  } else {
    const unsigned block = blockIdx.x - of_v.count;
    const int64_t b = block / of_query.count;
    const acc* partials = static_cast<const acc*>(call.splits.partials) + b * splits * size;  // [splits, size]
    scalar* to = static_cast<scalar*>(call.grad_query) + b * size;
    sum_slabs_by(to, partials, splits, size, of_query.groups, block % of_query.count);
  }
}

}  // namespace attn_ext::cuda

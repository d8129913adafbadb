// What the kernels of one query a batch element share: a block's place, the way of rows to its threads, and the merge of partial
// results, of a block's warps or of a batch element's splits, always in their order.
#pragma once

#include "device.cuh"
#include "kernels.h"
#include "mask.cuh"
#include "view.cuh"

namespace attn_ext::cuda {

constexpr int kStepBlock = 128;
constexpr int kStepWarps = kStepBlock / kWarp;
constexpr int kStepBlocks = 4;  // that a multiprocessor has registers for

// Rows on their way from global into shared memory past the registers: `depth` slots, each of `pieces` vectors a thread. A thread
// reads only what it has put there itself, so no barrier is needed; the threads' pieces lie side by side, free of bank conflicts.
// The slot that is read is the next to be filled:
//
//   depth times  { copy() or store() every piece;  next(); }
//   and then     { wait();  read the pieces;  copy() or store() the next ones, or nothing more;  next(); }
//
// finish(), and a barrier, before the memory is used for something else.
template <int pieces, int depth>
class RowsUnderWay {
 public:
  static constexpr int kBytes = depth * pieces * kStepBlock * static_cast<int>(sizeof(Vector16));

  // kBytes of shared memory, aligned to 16.
  __device__ __forceinline__ explicit RowsUnderWay(void* shared) : slots_(static_cast<Vector16*>(shared) + threadIdx.x) {}

  // Zeros where it is not `there`; the address is then not read.
  __device__ __forceinline__ void copy(int piece, const void* from, bool there) {
    copy_async16(slots_ + at_ + piece * kStepBlock, from, there);
  }

  __device__ __forceinline__ void store(int piece, const Vector16& x) {
    store16(slots_ + at_ + piece * kStepBlock, x);
  }

  // The slot has all its pieces.
  __device__ __forceinline__ void next() {
    commit_copies();
    at_ = at_ == (depth - 1) * pieces * kStepBlock ? 0 : at_ + pieces * kStepBlock;
  }

  // Until the slot's pieces have arrived.
  __device__ __forceinline__ void wait() const {
    wait_copies<depth - 1>();
  }

  __device__ __forceinline__ Vector16 piece(int piece) const {
    return load16(slots_ + at_ + piece * kStepBlock);
  }

  __device__ __forceinline__ void finish() const {
    wait_copies<0>();
  }

 private:
  Vector16* slots_;
  int at_ = 0;
};

// The block's place: a split of a batch element.
struct Place {
  int64_t b, split, begin, end;

  __device__ __forceinline__ Place(const Problem& problem, const Splits& splits)
      : b(blockIdx.x / static_cast<unsigned>(splits.count)),
        split(blockIdx.x % static_cast<unsigned>(splits.count)),
        begin(split * splits.steps) {
    end = begin + splits.steps < problem.steps ? begin + splits.steps : problem.steps;
  }

  // Whether this block is the batch element's last: what the others wrote is there.
  __device__ __forceinline__ bool is_last(const Splits& splits) const {
    sync_threads();  // the whole block's share is written
    return any_in_block(threadIdx.x == 0 && atomic_ticket(splits.tickets + b) == splits.count - 1);
  }
};

template <class acc>
struct Softmaxed {
  acc largest = -kInfinity<acc>;
  acc total = 0;

  // With nothing to attend, everything is exp(-inf) = 0.
  __device__ __forceinline__ acc shift() const {
    return largest == -kInfinity<acc> ? 0 : largest;
  }

  __device__ __forceinline__ acc inverse() const {
    return total == 0 ? 0 : 1 / total;
  }
};

// `count` partial results, each `size` sums, its maximum and its total, in their order: their factors go to `factors`.
template <class acc>
__device__ __forceinline__ Softmaxed<acc> merge_softmaxes(const acc* partials, int64_t count, int64_t size, acc* factors) {
  const int64_t stride = size + 2;
  Softmaxed<acc> all;
  for (int64_t n = 0; n < count; ++n) {
    const acc largest = partials[n * stride + size];
    all.largest = largest > all.largest ? largest : all.largest;
  }
  for (int64_t n = threadIdx.x; n < count; n += kStepBlock) {
    factors[n] = exponential(partials[n * stride + size] - all.shift());
  }
  sync_threads();  // all factors are there
  for (int64_t n = 0; n < count; ++n) {
    all.total += factors[n] * partials[n * stride + size + 1];
  }
  return all;
}

template <class acc>
__device__ __forceinline__ acc merged_column(const acc* partials, int64_t count, int64_t stride, const acc* factors, int64_t d) {
  acc sum = 0;
#pragma unroll 8
  for (int64_t n = 0; n < count; ++n) {
    sum += (factors == nullptr ? 1 : factors[n]) * partials[n * stride + d];
  }
  return sum;
}

template <class scalar>
__device__ __forceinline__ void store_context(const OneStep& call, int64_t b, int64_t d, accumulated_t<scalar> context) {
  const int64_t at = b * call.problem.memory_size + d;
  static_cast<scalar*>(call.context)[at] = from_acc<scalar>(context);
  if (call.exact_context != nullptr) {
    static_cast<accumulated_t<scalar>*>(call.exact_context)[at] = context;
  }
}

// The log-sum-exp, and the scores' weights where they are wanted, from step `first` on, `stride` apart.
template <class scalar>
__device__ __forceinline__ void finish_weights(
    const OneStep& call, int64_t b, const Softmaxed<accumulated_t<scalar>>& all, int64_t first, int64_t stride) {
  using acc = accumulated_t<scalar>;
  const acc inverse = all.inverse(), shift = all.shift();
  if (first == 0) {
    static_cast<acc*>(call.logsumexp)[b] = shift + logarithm(all.total);
  }
  if (call.weights == nullptr) {
    return;
  }
  const int64_t steps = call.problem.steps, row = b * steps;
  const Attendable may_attend(call.problem, b, 0);
  const acc* scores = static_cast<const acc*>(call.scores) + row;
  scalar* weights = static_cast<scalar*>(call.weights) + row;
  acc* exact = call.exact_weights == nullptr ? nullptr : static_cast<acc*>(call.exact_weights) + row;
  for (int64_t s = first; s < steps; s += stride) {
    const acc weight = may_attend(s) ? exponential(scores[s] - shift) * inverse : acc(0);
    weights[s] = from_acc<scalar>(weight);
    if (exact != nullptr) {
      exact[s] = weight;
    }
  }
}

template <class scalar>
__device__ __forceinline__ void finish_weights(
    const OneStep& call, const Place& place, const Softmaxed<accumulated_t<scalar>>& all) {
  finish_weights<scalar>(call, place.b, all, threadIdx.x, kStepBlock);
}

// From partial results with their factors to the outputs.
template <class scalar>
__device__ __forceinline__ void finish_step(
    const OneStep& call,
    const Place& place,
    const accumulated_t<scalar>* partials,
    int64_t count,
    const accumulated_t<scalar>* factors,
    const Softmaxed<accumulated_t<scalar>>& all) {
  const int64_t size = call.problem.memory_size;
  for (int64_t d = threadIdx.x; d < size; d += kStepBlock) {
    store_context<scalar>(call, place.b, d, merged_column(partials, count, size + 2, factors, d) * all.inverse());
  }
  finish_weights<scalar>(call, place, all);
}

// The splits' results to a batch element's, by a launch behind theirs: `parts` blocks a batch element, each of kStepBlock columns
// and a share of the weights. Shared memory: [2 count + 2 kStepWarps].
template <class scalar>
__global__ void __launch_bounds__(kStepBlock) merge_one_step(const OneStep call, int parts) {
  using acc = accumulated_t<scalar>;
  constexpr int early = 32 / sizeof(acc);
  wait_for_last_launch();
  const int64_t b = blockIdx.x / static_cast<unsigned>(parts), size = call.problem.memory_size, stride = size + 2;
  const int part = blockIdx.x % parts, count = static_cast<int>(call.splits.count), warp = threadIdx.x / kWarp;
  const int64_t d = static_cast<int64_t>(part) * kStepBlock + threadIdx.x;
  const acc* partials = static_cast<const acc*>(call.splits.partials) + b * count * stride;  // [count][size + 2]
  acc* factors = reinterpret_cast<acc*>(shared_memory());
  acc* totals = factors + count;
  acc* of_warps = totals + count;
  // Everything that the first splits left is asked for before anything is waited for.
  acc columns[early];
#pragma unroll
  for (int n = 0; n < early; ++n) {
    columns[n] = n < count && d < size ? partials[n * stride + d] : acc(0);
  }
  Softmaxed<acc> all;
  for (int n = threadIdx.x; n < count; n += kStepBlock) {
    factors[n] = partials[n * stride + size];
    totals[n] = partials[n * stride + size + 1];
    all.largest = factors[n] > all.largest ? factors[n] : all.largest;
  }
  all.largest = warp_max(all.largest);
  if (threadIdx.x % kWarp == 0) {
    of_warps[warp] = all.largest;
  }
  sync_threads();  // every warp's maximum is there
#pragma unroll
  for (int w = 0; w < kStepWarps; ++w) {
    all.largest = of_warps[w] > all.largest ? of_warps[w] : all.largest;
  }
  for (int n = threadIdx.x; n < count; n += kStepBlock) {
    factors[n] = exponential(factors[n] - all.shift());
    all.total += factors[n] * totals[n];
  }
  all.total = warp_sum(all.total);
  if (threadIdx.x % kWarp == 0) {
    of_warps[kStepWarps + warp] = all.total;
  }
  sync_threads();  // every warp's total is there, and all factors
  all.total = 0;
#pragma unroll
  for (int w = 0; w < kStepWarps; ++w) {
    all.total += of_warps[kStepWarps + w];
  }
  if (d < size) {
    acc sum = 0;
#pragma unroll
    for (int n = 0; n < early; ++n) {
      sum += n < count ? factors[n] * columns[n] : acc(0);
    }
    if (count > early) {
      sum += merged_column(partials + early * stride, count - early, stride, factors + early, d);
    }
    store_context<scalar>(call, b, d, sum * all.inverse());
  }
  finish_weights<scalar>(call, b, all, d, static_cast<int64_t>(parts) * kStepBlock);
}

// The splits' partial gradients of a query likewise.
template <class scalar>
__global__ void __launch_bounds__(kStepBlock) merge_grad_query(const OneStepBackward call, int parts) {
  using acc = accumulated_t<scalar>;
  wait_for_last_launch();
  const int64_t b = blockIdx.x / static_cast<unsigned>(parts), size = call.problem.key_size, count = call.splits.count;
  const int64_t d = static_cast<int64_t>(blockIdx.x % parts) * kStepBlock + threadIdx.x;
  const acc* partials = static_cast<const acc*>(call.splits.partials) + b * count * size;  // [count][size]
  if (d < size) {
    static_cast<scalar*>(call.grad_query)[b * size + d] = from_acc<scalar>(merged_column<acc>(partials, count, size, nullptr, d));
  }
}

}  // namespace attn_ext::cuda

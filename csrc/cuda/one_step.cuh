// What the kernels of one query a batch element share: a block's place, the way of rows to its threads, their columns of a row, and
// the merge of its warps' results, in their order.
#pragma once

#include "device.cuh"
#include "kernels.h"
#include "mask.cuh"
#include "view.cuh"

namespace attn_ext::cuda {

constexpr int kStepBlock = 128;  // threads, as a rule
constexpr int kStepWarps = kStepBlock / kWarp;
constexpr int kStepBlocks = 4;  // that a multiprocessor is to have registers for, as a rule

// Rows on their way from global into shared memory past the registers: `depth` slots, each of `pieces` vectors a thread. A thread
// reads only what it has put there itself, so no barrier is needed; a warp's pieces lie side by side, free of bank conflicts.
// The slot that is read is the next to be filled:
//
//   depth times  { copy() or store() every piece;  next(); }
//   and then     { wait();  read the pieces;  copy() or store() the next ones, or nothing more;  next(); }
//
// finish(), and a barrier, before the memory is used for something else.
template <int pieces, int depth>
class RowsUnderWay {
 public:
  static constexpr int kBytes = depth * pieces * kWarp * static_cast<int>(sizeof(Vector16));  // of a warp

  // kBytes of shared memory for each warp, aligned to 16.
  __device__ __forceinline__ explicit RowsUnderWay(void* shared)
      : slots_(static_cast<Vector16*>(shared) + threadIdx.x / kWarp * (depth * pieces * kWarp) + threadIdx.x % kWarp) {}

  // Zeros where it is not `there`; the address is then not read.
  __device__ __forceinline__ void copy(int piece, const void* from, bool there) {
    copy_async16(slots_ + at_ + piece * kWarp, from, there);
  }

  __device__ __forceinline__ void store(int piece, const Vector16& x) {
    store16(slots_ + at_ + piece * kWarp, x);
  }

  // The slot has all its pieces.
  __device__ __forceinline__ void next() {
    commit_copies();
    at_ = at_ == (depth - 1) * pieces * kWarp ? 0 : at_ + pieces * kWarp;
  }

  // Until the slot's pieces have arrived.
  __device__ __forceinline__ void wait() const {
    wait_copies<depth - 1>();
  }

  __device__ __forceinline__ Vector16 piece(int piece) const {
    return load16(slots_ + at_ + piece * kWarp);
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

  __device__ __forceinline__ Place(const Problem& problem, const Splits& splits, uint32_t block = blockIdx.x)
      : b(block / static_cast<unsigned>(splits.count)),
        split(block % static_cast<unsigned>(splits.count)),
        begin(split * splits.steps) {
    end = begin + splits.steps < problem.steps ? begin + splits.steps : problem.steps;
  }
};

// How many steps of the split come before the end of what is attended.
__device__ __forceinline__ int steps_to_attend(const Place& place, const Attendable& may_attend) {
  const int64_t end = place.end < may_attend.end() ? place.end : may_attend.end();
  return end > place.begin ? static_cast<int>(end - place.begin) : 0;
}

template <class acc>
struct Softmaxed {
  acc largest = -kInfinity<acc>;
  acc total = 0;

  __device__ __forceinline__ acc shift() const {
    return shift_of(largest);
  }

  __device__ __forceinline__ acc inverse() const {
    return inverse_of_sum(total);
  }
};

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

// A lane's columns: `pieces` times 16 bytes, the lanes' pieces taking turns along the row. A team of lanes has a row. Blocks of any
// width, where they are not the usual kStepBlock.
template <class scalar, int pieces, bool any_width = false>
struct LanesOfRow {
  using acc = accumulated_t<scalar>;
  static constexpr int kEach = kLanes<scalar>;

  int log_lanes;  // of a team; a warp where there is more than one piece

  __host__ __device__ __forceinline__ int lanes() const {
    return pieces > 1 ? kWarp : 1 << log_lanes;
  }

  __device__ __forceinline__ int lane() const {
    return threadIdx.x & (lanes() - 1);
  }

  __device__ __forceinline__ int team() const {
    return pieces > 1 ? threadIdx.x / kWarp : threadIdx.x >> log_lanes;
  }

  static __device__ __forceinline__ int warps() {
    return any_width ? static_cast<int>(blockDim.x) / kWarp : kStepWarps;
  }

  __device__ __forceinline__ int teams() const {
    return pieces > 1 ? warps() : warps() * kWarp >> log_lanes;
  }

  __device__ __forceinline__ int piece(int p) const {
    return p * lanes() + lane();
  }

  __device__ __forceinline__ int column(int p) const {
    return piece(p) * kEach;
  }

  // The columns of a team, those beyond the row too.
  __host__ __device__ __forceinline__ int width() const {
    return pieces * lanes() * kEach;
  }

  static __device__ __forceinline__ void multiply(acc (&x)[pieces][kEach], acc factor) {
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        x[p][i] *= factor;
      }
    }
  }

  // Sums over the team, in each of its lanes and in the same bits.
  template <int count>
  __device__ __forceinline__ void sum_in_team(acc (&x)[count]) const {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      if (distance < lanes()) {
#pragma unroll
        for (int n = 0; n < count; ++n) {
          x[n] += shuffle_xor(x[n], distance);
        }
      }
    }
  }

  // Sums over the teams of a warp, in each of them.
  __device__ __forceinline__ acc sum_of_teams(acc x) const {
    for (int distance = lanes(); distance < kWarp; distance *= 2) {
      x += shuffle_xor(x, distance);
    }
    return x;
  }

  // The warps' sums, each times `factor`, to shared memory [warps][columns], whole pieces; complete after a barrier.
  __device__ __forceinline__ void share(acc* sums, const acc (&x)[pieces][kEach], acc factor, int columns) const {
    constexpr int of_vector = kLanes<acc>;
    acc* to = sums + threadIdx.x / kWarp * columns;
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
#pragma unroll
      for (int i = 0; i < kEach; i += of_vector) {
        acc part[of_vector];
#pragma unroll
        for (int n = 0; n < of_vector; ++n) {
          part[n] = sum_of_teams(x[p][i + n] * factor);
        }
        if (threadIdx.x % kWarp < lanes() && column(p) < columns) {
          store16(to + column(p) + i, pack<acc>(part));
        }
      }
    }
  }
};

// launch_of(pieces, log_lanes): the lanes and their pieces that hold a row. A short one is less than a warp's.
template <class scalar, int pieces = 1, class Launch>
void for_lanes_of_row(int64_t size, const Launch& launch_of) {
  constexpr int64_t of_lane = int64_t{pieces} * kLanes<scalar>;
  if constexpr (kWarp * of_lane < most_one_step_columns(sizeof(scalar))) {
    if (size > kWarp * of_lane) {
      return for_lanes_of_row<scalar, 2 * pieces>(size, launch_of);
    }
  }
  int log_lanes = 0;
  while (size > of_lane << log_lanes) {
    ++log_lanes;
  }
  launch_of(std::integral_constant<int, pieces>(), log_lanes);
}

// Of the warps' sums [warps][columns].
template <class acc>
__device__ __forceinline__ acc shared_column(const acc* sums, int columns, int d, int warps = kStepWarps) {
  acc sum = 0;
#pragma unroll 4
  for (int warp = 0; warp < warps; ++warp) {
    sum += sums[warp * columns + d];
  }
  return sum;
}

// The split's result, of one split the outputs, from what the teams have: their softmaxes, and the sums of memory of them. Shared
// memory: sums [warps][columns], where until now rows may have been under way, and of_warps [2 warps].
template <class scalar, int pieces, bool any_width>
__device__ __forceinline__ void finish_split(
    const OneStep& call,
    const Place& place,
    const LanesOfRow<scalar, pieces, any_width>& lanes,
    int columns,
    const Softmaxed<accumulated_t<scalar>>& mine,
    const accumulated_t<scalar> (&context)[pieces][kLanes<scalar>],
    accumulated_t<scalar>* sums,
    accumulated_t<scalar>* of_warps) {
  using acc = accumulated_t<scalar>;
  const int warp = threadIdx.x / kWarp, warps = lanes.warps(), size = static_cast<int>(call.problem.memory_size);
  Softmaxed<acc> all{warp_max(mine.largest), 0};
  if (threadIdx.x % kWarp == 0) {
    of_warps[warp] = all.largest;
  }
  sync_threads();  // every warp's maximum and scores are there, and its rows have been read
#pragma unroll 4
  for (int w = 0; w < warps; ++w) {
    all.largest = of_warps[w] > all.largest ? of_warps[w] : all.largest;
  }
  const acc factor = exponential(mine.largest - all.shift());
  lanes.share(sums, context, factor, columns);
  const acc total = lanes.sum_of_teams(mine.total * factor);
  if (threadIdx.x % kWarp == 0) {
    of_warps[warps + warp] = total;
  }
  sync_threads();  // every warp's sums are there
#pragma unroll 4
  for (int w = 0; w < warps; ++w) {
    all.total += of_warps[warps + w];
  }
  if (call.splits.count == 1) {
    const acc inverse = all.inverse();
    for (int d = threadIdx.x; d < size; d += warps * kWarp) {
      store_context<scalar>(call, place.b, d, shared_column(sums, columns, d, warps) * inverse);
    }
    finish_weights<scalar>(call, place.b, all, threadIdx.x, warps * kWarp);
    return;
  }
  acc* to = static_cast<acc*>(call.splits.partials) + (place.b * call.splits.count + place.split) * int64_t{size + 2};
  for (int d = threadIdx.x; d < size; d += warps * kWarp) {
    to[d] = shared_column(sums, columns, d, warps);
  }
  if (threadIdx.x == 0) {
    to[size] = all.largest;
    to[size + 1] = all.total;
  }
}

// From the warps' results to the block's, in every thread; by way of shared memory [warps].
template <class acc, class Combine>
__device__ __forceinline__ acc combine_warps(acc of_warp, acc* of_warps, int warps, const Combine& combine) {
  sync_threads();  // what stood there has been read
  if (threadIdx.x % kWarp == 0) {
    of_warps[threadIdx.x / kWarp] = of_warp;
  }
  sync_threads();  // every warp's is there
  acc all = of_warps[0];
#pragma unroll 4
  for (int warp = 1; warp < warps; ++warp) {
    all = combine(all, of_warps[warp]);
  }
  return all;
}

template <class acc>
__device__ __forceinline__ acc block_sum(acc x, acc* of_warps, int warps = kStepWarps) {
  return combine_warps(warp_sum(x), of_warps, warps, [](acc a, acc b) { return a + b; });
}

template <class acc>
__device__ __forceinline__ acc block_max(acc x, acc* of_warps) {
  return combine_warps(warp_max(x), of_warps, kStepWarps, [](acc a, acc b) { return a > b ? a : b; });
}

// sum_s a_s gw_s, of a whole batch element; 0 without gw. Apart from g . c, which is summed as g . m_s is: where a step has all the
// weight, c is m_s and either difference is 0 to the last bit.
template <class scalar>
__device__ __forceinline__ accumulated_t<scalar> delta_of_weights(
    const OneStepBackward& call,
    const Place& place,
    const Attendable& may_attend,
    accumulated_t<scalar>* of_warps,
    int warps = kStepWarps) {
  using acc = accumulated_t<scalar>;
  if (call.grad_weights.data == nullptr) {
    return 0;
  }
  const Problem& problem = call.problem;
  const acc* weights = static_cast<const acc*>(call.weights) + place.b * problem.steps;
  const scalar* grad = row_of<scalar>(call.grad_weights, place.b, 0);
  acc sum = 0;
#pragma unroll 4
  for (int64_t s = threadIdx.x; s < problem.steps; s += warps * kWarp) {
    sum += may_attend(s) ? weights[s] * to_acc(grad[s * call.grad_weights.element_stride]) : acc(0);
  }
  return block_sum(sum, of_warps, warps);
}

}  // namespace attn_ext::cuda

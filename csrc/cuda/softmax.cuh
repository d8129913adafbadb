// Row softmax over what a query may attend, its backward, and the rows of memory that its weights may meet.
//
//   forward    a_s = exp(e_s - max) / sum_s exp(e_s - max),  e = scale scores
//   backward   de_s = scale a_s (da_s - sum_s a_s da_s)
//
// A row of up to 32 elements a lane is a warp's, which holds it in registers: one read, one write, no barrier. A longer one is a
// block's, which reads it again for each pass over it. Bound by memory; neighbours in a row are neighbours in a warp.
#pragma once

#include "device.cuh"
#include "kernels.h"
#include "mask.cuh"
#include "view.cuh"

namespace attn_ext::cuda {

constexpr int kRowBlock = 256;  // threads, whether its warps work on one row or each on its own

// Elements of a row that a lane of its warp holds at most: pairs of double would take more registers than there are.
template <class acc>
constexpr int kMostHeld = std::is_same_v<acc, double> ? 16 : 32;

// The threads of one row: a warp where each holds `held` of its elements, a block where each reads them anew (0).
template <int held>
struct RowTeam {
  static constexpr int kThreads = held > 0 ? kWarp : kRowBlock;

  static __device__ __forceinline__ int64_t row() {
    return held > 0 ? static_cast<int64_t>(blockIdx.x) * (kRowBlock / kWarp) + threadIdx.x / kWarp : blockIdx.x;
  }

  static __device__ __forceinline__ int rank() {
    return threadIdx.x % kThreads;
  }

  template <class T>
  static __device__ __forceinline__ T sum(T x) {
    return reduce(warp_sum(x), [](T all) { return warp_sum(all); }, T(0));
  }

  template <class T>
  static __device__ __forceinline__ T max(T x) {
    return reduce(warp_max(x), [](T all) { return warp_max(all); }, -kInfinity<T>);
  }

 private:
  // From the warps' results to the block's.
  template <class T, class Reduction>
  static __device__ __forceinline__ T reduce(T x, const Reduction& reduction, T nothing) {
    if constexpr (held > 0) {
      return x;
    } else {
      T* of_warps = reinterpret_cast<T*>(shared_memory());
      const int lane = threadIdx.x % kWarp;
      sync_threads();  // the last reduction's results have been read
      if (lane == 0) {
        of_warps[threadIdx.x / kWarp] = x;
      }
      sync_threads();  // every warp's is there
      return reduction(lane < kRowBlock / kWarp ? of_warps[lane] : nothing);
    }
  }
};

// A thread's elements of a row: read(s), held or read anew.
template <int held, class Read>
class RowValues {
 public:
  __device__ __forceinline__ RowValues(int64_t steps, const Read& read) : steps_(steps), read_(read) {
#pragma unroll
    for (int i = 0; i < held; ++i) {
      value_[i] = read(step(i));
    }
  }

  // Where they are held, each becomes change(value).
  template <class Change>
  __device__ __forceinline__ void change_held(const Change& change) {
#pragma unroll
    for (int i = 0; i < held; ++i) {
      value_[i] = change(value_[i]);
    }
  }

  // body(s, value)
  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    if constexpr (held > 0) {
#pragma unroll
      for (int i = 0; i < held; ++i) {
        if (step(i) < steps_) {
          body(step(i), value_[i]);
        }
      }
    } else {
      for (int64_t s = RowTeam<held>::rank(); s < steps_; s += kRowBlock) {
        body(s, read_(s));
      }
    }
  }

 private:
  using Value = decltype(std::declval<Read>()(int64_t()));

  static __device__ __forceinline__ int step(int i) {
    return RowTeam<held>::rank() + i * kWarp;
  }

  int64_t steps_;
  const Read& read_;
  Value value_[held > 0 ? held : 1];
};

// A row of an output that may not be wanted.
template <class scalar>
class OutputRow {
 public:
  __device__ __forceinline__ OutputRow(void* to, int64_t first)
      : row_(to == nullptr ? nullptr : static_cast<scalar*>(to) + first) {}

  __device__ __forceinline__ void store(int64_t s, accumulated_t<scalar> x) const {
    if (row_ != nullptr) {
      row_[s] = from_acc<scalar>(x);
    }
  }

 private:
  scalar* row_;
};

template <class scalar, int held>
__global__ void __launch_bounds__(kRowBlock, 1) softmax_rows(const Softmax call) {
  using acc = accumulated_t<scalar>;
  using Team = RowTeam<held>;
  const Problem& problem = call.problem;
  const int64_t row = Team::row(), first = row * problem.steps;
  if (row >= problem.batch * problem.queries) {
    return;  // a whole warp, which has no barrier before it; never a block
  }
  const Attendable may_attend(problem, row / problem.queries, row % problem.queries);
  const acc scale = static_cast<acc>(problem.scale);
  const acc* scores = static_cast<const acc*>(call.scores) + first;
  const auto read = [&](int64_t s) { return may_attend(s) ? scale * scores[s] : -kInfinity<acc>; };
  RowValues<held, decltype(read)> values(problem.steps, read);
  acc largest = -kInfinity<acc>;
  values.for_each([&](int64_t, acc x) { largest = x > largest ? x : largest; });
  largest = Team::max(largest);
  const acc shift = largest == -kInfinity<acc> ? 0 : largest;  // with nothing to attend, everything is exp(-inf) = 0
  const auto exponential_of = [&](acc x) { return exponential(x - shift); };
  acc total = 0;
  values.change_held(exponential_of);
  values.for_each([&](int64_t, acc x) { total += held > 0 ? x : exponential_of(x); });
  total = Team::sum(total);
  const acc factor = total == 0 ? 0 : 1 / total;
  const OutputRow<acc> weights(call.weights, first);
  const OutputRow<scalar> rounded(call.rounded, first);
  values.for_each([&](int64_t s, acc x) {
    const acc weight = (held > 0 ? x : exponential_of(x)) * factor;
    weights.store(s, weight);
    if constexpr (!std::is_same_v<scalar, acc>) {
      rounded.store(s, weight);
    }
  });
  if (Team::rank() == 0) {
    static_cast<acc*>(call.logsumexp)[row] = shift + logarithm(total);
  }
}

template <class scalar, int held>
__global__ void __launch_bounds__(kRowBlock, 1) softmax_backward_rows(const SoftmaxBackward call) {
  using acc = accumulated_t<scalar>;
  using Team = RowTeam<held>;
  struct Pair {
    acc weight, grad;
  };
  const Problem& problem = call.problem;
  const int64_t row = Team::row(), first = row * problem.steps;
  if (row >= problem.batch * problem.queries) {
    return;  // a whole warp, which has no barrier before it; never a block
  }
  const int64_t b = row / problem.queries, t = row % problem.queries;
  const Attendable may_attend(problem, b, t);
  const acc scale = static_cast<acc>(problem.scale);
  const acc* weights = call.weights == nullptr ? nullptr : static_cast<const acc*>(call.weights) + first;
  const acc* scores = weights != nullptr ? nullptr : static_cast<const acc*>(call.scores) + first;
  const acc logsumexp = weights != nullptr ? 0 : static_cast<const acc*>(call.logsumexp)[row];
  const acc* from_context = call.grad_from_context == nullptr ? nullptr : static_cast<const acc*>(call.grad_from_context) + first;
  const scalar* grad_weights = call.grad_weights.data == nullptr ? nullptr : row_of<scalar>(call.grad_weights, b, t);
  const auto read = [&](int64_t s) {
    Pair pair{};
    if (may_attend(s)) {
      pair.weight = weights != nullptr ? weights[s] : exponential(scale * scores[s] - logsumexp);
      pair.grad = from_context != nullptr ? from_context[s] : acc(0);
      if (grad_weights != nullptr) {
        pair.grad += to_acc(grad_weights[s * call.grad_weights.element]);
      }
    }
    return pair;
  };
  const RowValues<held, decltype(read)> values(problem.steps, read);
  acc delta = 0;
  values.for_each([&](int64_t, const Pair& x) { delta += x.weight * x.grad; });
  delta = Team::sum(delta);
  const OutputRow<acc> recomputed(call.recomputed, first), grad_scores(call.grad_scores, first);
  const int64_t halves = problem.queries * problem.steps;
  const OutputRow<scalar> rounded(call.rounded, (2 * b * problem.queries + t) * problem.steps);
  values.for_each([&](int64_t s, const Pair& x) {
    const acc grad_score = may_attend(s) ? scale * (x.weight * (x.grad - delta)) : acc(0);
    recomputed.store(s, x.weight);
    grad_scores.store(s, grad_score);
    if constexpr (!std::is_same_v<scalar, acc>) {
      rounded.store(s, x.weight);
      rounded.store(s + halves, grad_score);
    }
  });
}

// A warp a row. `by_vectors`: of memory and of the copy.
template <class scalar>
__global__ void __launch_bounds__(kRowBlock, 1) copy_attended_rows(const AttendedRows call, bool by_vectors) {
  const Problem& problem = call.problem;
  const int64_t row = RowTeam<1>::row(), size = problem.memory_size;
  if (row >= problem.batch * problem.steps) {
    return;
  }
  const int64_t b = row / problem.steps, s = row % problem.steps;
  const bool attended = Attendable::by_any(problem, b)(s);
  const scalar* from = row_of<scalar>(problem.memory, b, s);
  scalar* to = static_cast<scalar*>(call.rows) + row * size;
  const int lane = RowTeam<1>::rank();
  if (by_vectors) {
    for (int64_t d = lane * kLanes<scalar>; d < size; d += kWarp * kLanes<scalar>) {
      store16(to + d, attended ? load16_streaming(from + d) : Vector16{});
    }
  } else {
    for (int64_t d = lane; d < size; d += kWarp) {
      to[d] = attended ? from[d * problem.memory.element] : scalar{};
    }
  }
}

}  // namespace attn_ext::cuda

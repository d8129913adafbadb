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

// Which of a thread's elements of a row are attended. Asked for before any is read: conditions between the loads would make each
// wait for the one before.
template <int held>
class AttendedValues {
 public:
  __device__ __forceinline__ AttendedValues(const Attendable& may_attend, int64_t steps) : may_attend_(may_attend), steps_(steps) {
#pragma unroll
    for (int i = 0; i < held; ++i) {
      bits_ |= static_cast<uint32_t>(may_attend(step(i))) << i;
    }
  }

  static __device__ __forceinline__ int step(int i) {
    return RowTeam<held>::rank() + i * kWarp;
  }

  __device__ __forceinline__ bool is_there(int i) const {
    return step(i) < steps_;
  }

  __device__ __forceinline__ bool operator[](int i) const {
    return (bits_ >> i & 1) != 0;
  }

  // body(i, s, attended), where nothing is held with i = 0.
  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    if constexpr (held > 0) {
#pragma unroll
      for (int i = 0; i < held; ++i) {
        if (is_there(i)) {
          body(i, step(i), (*this)[i]);
        }
      }
    } else {
      for (int64_t s = RowTeam<held>::rank(); s < steps_; s += kRowBlock) {
        body(0, s, may_attend_(s));
      }
    }
  }

 private:
  const Attendable& may_attend_;
  int64_t steps_;
  uint32_t bits_ = 0;
};

// A thread's elements of a row, held or read anew; or of the sum of two, the second of any stride.
template <int held, class scalar>
class RowValues {
  using acc = accumulated_t<scalar>;

 public:
  // A row that is null is zeros, and so is what is not attended.
  __device__ __forceinline__
  RowValues(const AttendedValues<held>& attended, const acc* row, const scalar* other = nullptr, int64_t element = 0)
      : row_(row), other_(other), element_(element) {
    if (row != nullptr) {
#pragma unroll
      for (int i = 0; i < held; ++i) {
        value_[i] = attended[i] ? row[attended.step(i)] : acc(0);
      }
    }
    if (other != nullptr) {
#pragma unroll
      for (int i = 0; i < held; ++i) {
        value_[i] += attended[i] ? to_acc(other[attended.step(i) * element]) : acc(0);
      }
    }
  }

  __device__ __forceinline__ acc operator()(int i, int64_t s, bool attended) const {
    if constexpr (held > 0) {
      return value_[i];
    } else {
      return (row_ != nullptr && attended ? row_[s] : acc(0)) +
             (other_ != nullptr && attended ? to_acc(other_[s * element_]) : acc(0));
    }
  }

  // Where they are held, each becomes change(value, attended).
  template <class Change>
  __device__ __forceinline__ void change_held(const AttendedValues<held>& attended, const Change& change) {
#pragma unroll
    for (int i = 0; i < held; ++i) {
      value_[i] = change(value_[i], attended[i]);
    }
  }

 private:
  const acc* row_;
  const scalar* other_;
  int64_t element_;
  acc value_[held > 0 ? held : 1] = {};
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
  const AttendedValues<held> attended(may_attend, problem.steps);
  RowValues<held, scalar> scores(attended, static_cast<const acc*>(call.scores) + first);
  const acc scale = static_cast<acc>(problem.scale);
  const auto scaled = [&](acc x, bool attends) { return attends ? scale * x : -kInfinity<acc>; };
  acc largest = -kInfinity<acc>;
  attended.for_each([&](int i, int64_t s, bool attends) {
    const acc x = scaled(scores(i, s, attends), attends);
    largest = x > largest ? x : largest;
  });
  largest = Team::max(largest);
  const acc shift = largest == -kInfinity<acc> ? 0 : largest;  // with nothing to attend, everything is exp(-inf) = 0
  const auto exponential_of = [&](acc x, bool attends) { return exponential(scaled(x, attends) - shift); };
  scores.change_held(attended, exponential_of);
  const auto value_of = [&](int i, int64_t s, bool attends) {
    return held > 0 ? scores(i, s, attends) : exponential_of(scores(i, s, attends), attends);
  };
  acc total = 0;
  attended.for_each([&](int i, int64_t s, bool attends) { total += value_of(i, s, attends); });
  total = Team::sum(total);
  const acc factor = total == 0 ? 0 : 1 / total;
  const OutputRow<acc> weights(call.weights, first);
  const OutputRow<scalar> rounded(call.rounded, first);
  attended.for_each([&](int i, int64_t s, bool attends) {
    const acc weight = value_of(i, s, attends) * factor;
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
  const Problem& problem = call.problem;
  const int64_t row = Team::row(), first = row * problem.steps;
  if (row >= problem.batch * problem.queries) {
    return;  // a whole warp, which has no barrier before it; never a block
  }
  const int64_t b = row / problem.queries, t = row % problem.queries;
  const Attendable may_attend(problem, b, t);
  const AttendedValues<held> attended(may_attend, problem.steps);
  const bool recomputes = call.weights == nullptr;
  RowValues<held, scalar> weights(attended, static_cast<const acc*>(recomputes ? call.scores : call.weights) + first);
  const scalar* grad_weights = call.grad_weights.data == nullptr ? nullptr : row_of<scalar>(call.grad_weights, b, t);
  const RowValues<held, scalar> grads(
      attended,
      call.grad_from_context == nullptr ? nullptr : static_cast<const acc*>(call.grad_from_context) + first,
      grad_weights,
      call.grad_weights.element);
  const acc scale = static_cast<acc>(problem.scale);
  const acc logsumexp = recomputes ? static_cast<const acc*>(call.logsumexp)[row] : 0;
  const auto recomputed_weight = [&](acc score, bool attends) { return attends ? exponential(scale * score - logsumexp) : acc(0); };
  if (recomputes) {
    weights.change_held(attended, recomputed_weight);
  }
  const auto weight_of = [&](int i, int64_t s, bool attends) {
    const acc x = weights(i, s, attends);
    return held == 0 && recomputes ? recomputed_weight(x, attends) : x;
  };
  acc delta = 0;
  attended.for_each([&](int i, int64_t s, bool attends) { delta += weight_of(i, s, attends) * grads(i, s, attends); });
  delta = Team::sum(delta);
  const OutputRow<acc> recomputed(call.recomputed, first), grad_scores(call.grad_scores, first);
  const int64_t halves = problem.queries * problem.steps;
  const OutputRow<scalar> rounded(call.rounded, (2 * b * problem.queries + t) * problem.steps);
  attended.for_each([&](int i, int64_t s, bool attends) {
    const acc weight = weight_of(i, s, attends);
    const acc grad_score = attends ? scale * (weight * (grads(i, s, attends) - delta)) : acc(0);
    recomputed.store(s, weight);
    grad_scores.store(s, grad_score);
    if constexpr (!std::is_same_v<scalar, acc>) {
      rounded.store(s, weight);
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

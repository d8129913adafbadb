// Row softmax over what a query may attend, and its backward.
//
//   forward    a_s = exp(e_s - max) / sum_s exp(e_s - max),  e = scale scores
//   backward   de_s = scale a_s (da_s - sum_s a_s da_s)
//
// sum_s de_s is 0, and what rounding to halves adds to it would be multiplied by whatever the keys have in common: each of a
// thread's takes back what the one before it was rounded by, and one of a warp's what is left.
//
// A row of up to 32 elements a lane is a warp's, which holds it in registers: one read, one write, no barrier. A longer one is a
// block's, which reads it again for each pass over it. Bound by memory; neighbours in a row are neighbours in a warp.
#pragma once

#include "device.cuh"
#include "kernels.h"
#include "mask.cuh"
#include "view.cuh"

namespace attn_ext::cuda {

constexpr int kRowBlock = 256;   // threads that work on one row
constexpr int kHeldBlock = 128;  // threads whose warps work each on its own: of more, a multiprocessor's registers are left over

// Elements of a row that a lane of its warp holds at most: pairs of double would take more registers than there are.
template <class acc>
constexpr int kMostHeld = std::is_same_v<acc, double> ? 16 : 32;

// The threads of one row: a warp where each holds `held` of its elements, a block where each reads them anew (0).
template <int held>
struct RowTeam {
  static constexpr int kThreads = held > 0 ? kWarp : kRowBlock;
  static constexpr int kBlock = held > 0 ? kHeldBlock : kRowBlock;
  static constexpr int kRows = kBlock / kThreads;  // of a block

  static __device__ __forceinline__ int64_t row() {
    return held > 0 ? static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads : blockIdx.x;
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

// A thread's elements of a row of up to 32 * held: `width` neighbours at a time, warp after warp.
template <int held, int width>
class HeldRow {
 public:
  __device__ __forceinline__ HeldRow(const Attendable& may_attend, int64_t steps)
      : steps_(static_cast<int>(steps)), end_(static_cast<int>(may_attend.end())), may_attend_(may_attend) {}

  // Whatever stands there where a step is not attended: conditions between the loads would make each wait for the one before. What
  // begins before the end of the attended is written to the end of its 16 bytes.
  template <class acc>
  __device__ __forceinline__ void load(acc (&to)[held], const acc* row) const {
#pragma unroll
    for (int i = 0; i < held; i += width) {
      acc part[width];
#pragma unroll
      for (int n = 0; n < width; ++n) {
        part[n] = 0;
      }
      if (step(i) < end_) {
        if constexpr (width == 1) {
          part[0] = row[step(i)];
        } else {
          unpack<acc>(part, load16(row + step(i)));
        }
      }
#pragma unroll
      for (int n = 0; n < width; ++n) {
        to[i + n] = part[n];
      }
    }
  }

  // += a row of any stride.
  template <class acc, class scalar>
  __device__ __forceinline__ void add(acc (&to)[held], const scalar* row, int64_t element) const {
#pragma unroll
    for (int i = 0; i < held; ++i) {
      to[i] += step(i) < end_ ? to_acc(row[step(i) * element]) : acc(0);
    }
  }

  // `nothing` where a step is not attended or the row is over.
  template <class acc>
  __device__ __forceinline__ void clear_unattended(acc (&x)[held], acc nothing) const {
    if (may_attend_.is_masked()) {
#pragma unroll
      for (int i = 0; i < held; ++i) {
        x[i] = may_attend_(step(i)) ? x[i] : nothing;
      }
    } else if (end_ < kWarp * held) {
#pragma unroll
      for (int i = 0; i < held; ++i) {
        x[i] = step(i) < end_ ? x[i] : nothing;
      }
    }
  }

  // As T, which rounds; a row that is null is not wanted.
  template <class T>
  __device__ __forceinline__ void store(T* row, const accumulated_t<T> (&from)[held]) const {
    if (row == nullptr) {
      return;
    }
#pragma unroll
    for (int i = 0; i < held; i += width) {
      if (step(i) < steps_) {
        if constexpr (width == 1) {
          row[step(i)] = from_acc<T>(from[i]);
        } else {
          accumulated_t<T> part[width];
#pragma unroll
          for (int n = 0; n < width; ++n) {
            part[n] = from[i + n];
          }
          store_neighbours(row + step(i), part);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ int step(int i) {
    return i / width * (kWarp * width) + threadIdx.x % kWarp * width + i % width;
  }

  int steps_, end_;
  const Attendable& may_attend_;
};

template <class T>
__device__ __forceinline__ void store_if_wanted(T* row, int64_t s, accumulated_t<T> x) {
  if (row != nullptr) {
    row[s] = from_acc<T>(x);
  }
}

// A weight out of its exponential: 0 of what is not attended, also where the sum is no number.
template <class acc>
__device__ __forceinline__ acc part_of_sum(acc exponential, acc inverse) {
  return exponential == 0 ? acc(0) : exponential * inverse;
}

// Rounded, less the excess, which becomes what that rounds it by; but a 0 takes nothing, and what is rounded to infinity leaves
// none.
template <class scalar>
__device__ __forceinline__ float rounded_less(float x, float& excess) {
  if (x == 0) {
    return x;
  }
  const float wanted = x - excess, rounded = to_acc(from_acc<scalar>(wanted));
  excess = fabsf(rounded - wanted) < kInfinity<float> ? rounded - wanted : 0.0f;
  return rounded;
}

// What takes back an excess: of the rounded x, the smallest that does not change its sign by it, whose next rounding is the least.
__device__ __forceinline__ float smallest_to_take(float excess, float x, float smallest) {
  return fabsf(x) >= fabsf(excess) && fabsf(x) < smallest ? fabsf(x) : smallest;
}

// Whether a lane's is the smallest of the warp's, one lane's only. Where none took the excess it is infinite. A half leaves
// thirteen bits of a float to the lane.
__device__ __forceinline__ bool is_smallest(float of_lane) {
  const float ranked = of_lane < kInfinity<float> ? float_of(bits_of(of_lane) | threadIdx.x % kWarp) : of_lane;
  return -warp_max(-ranked) == ranked && ranked < kInfinity<float>;
}

template <class scalar, int held, int width>
__global__ void __launch_bounds__(RowTeam<held>::kBlock, 1) softmax_rows(const Softmax call) {
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
  acc* weights = part_of<acc>(call.weights, first);
  scalar* rounded = std::is_same_v<scalar, acc> ? nullptr : part_of<scalar>(call.rounded, first);
  acc largest = -kInfinity<acc>, total = 0;
  if constexpr (held > 0) {
    const HeldRow<held, width> at(may_attend, problem.steps);
    acc x[held];
    at.load(x, scores);
#pragma unroll
    for (int i = 0; i < held; ++i) {
      x[i] = product(scale, x[i]);
    }
    at.clear_unattended(x, -kInfinity<acc>);
#pragma unroll
    for (int i = 0; i < held; ++i) {
      largest = x[i] > largest ? x[i] : largest;
    }
    const acc shift = shift_of(largest = Team::max(largest));
#pragma unroll
    for (int i = 0; i < held; ++i) {
      x[i] = exponential_of_negative(x[i] - shift);
      total += x[i];
    }
    total = Team::sum(total);
    const acc factor = inverse_of_sum(total);
#pragma unroll
    for (int i = 0; i < held; ++i) {
      x[i] = part_of_sum(x[i], factor);
    }
    at.store(weights, x);
    at.store(rounded, x);
  } else {
    const auto score = [&](int64_t s) { return may_attend(s) ? product(scale, scores[s]) : -kInfinity<acc>; };
    for (int64_t s = Team::rank(); s < problem.steps; s += kRowBlock) {
      const acc x = score(s);
      largest = x > largest ? x : largest;
    }
    const acc shift = shift_of(largest = Team::max(largest));
    for (int64_t s = Team::rank(); s < problem.steps; s += kRowBlock) {
      total += exponential_of_negative(score(s) - shift);
    }
    total = Team::sum(total);
    const acc factor = inverse_of_sum(total);
    for (int64_t s = Team::rank(); s < problem.steps; s += kRowBlock) {
      const acc weight = part_of_sum(exponential_of_negative(score(s) - shift), factor);
      store_if_wanted(weights, s, weight);
      store_if_wanted(rounded, s, weight);
    }
  }
  if (Team::rank() == 0) {
    static_cast<acc*>(call.logsumexp)[row] = shift_of(largest) + logarithm(total);
  }
}

template <class scalar, int held, int width>
__global__ void __launch_bounds__(RowTeam<held>::kBlock, 1) softmax_backward_rows(const SoftmaxBackward call) {
  using acc = accumulated_t<scalar>;
  using Team = RowTeam<held>;
  const Problem& problem = call.problem;
  const int64_t row = Team::row(), first = row * problem.steps;
  if (row >= problem.batch * problem.queries) {
    return;  // a whole warp, which has no barrier before it; never a block
  }
  const int64_t b = row / problem.queries, t = row % problem.queries;
  const Attendable may_attend(problem, b, t);
  const acc scale = static_cast<acc>(problem.scale);
  const bool recomputes = call.weights == nullptr;
  const acc* weights = static_cast<const acc*>(recomputes ? call.scores : call.weights) + first;
  const acc logsumexp = recomputes ? shift_of(static_cast<const acc*>(call.logsumexp)[row]) : 0;
  // The forward's score to the bit: where all the weight is on one step, it is 1. The sum of the weights is as far from 1 as their
  // log-sum-exp is rounded, which grows with it: they are divided by it.
  const auto recomputed_weight = [&](acc score) { return exponential_of_negative(product(scale, score) - logsumexp); };
  const acc* from_context = call.grad_from_context == nullptr ? nullptr : static_cast<const acc*>(call.grad_from_context) + first;
  const scalar* grad_weights = call.grad_weights.data == nullptr ? nullptr : row_of<scalar>(call.grad_weights, b, t);
  // A weight of 0 passes nothing on, whatever came in.
  const auto grad_score = [&](acc weight, acc grad, acc delta) { return weight != 0 ? scale * (weight * (grad - delta)) : acc(0); };
  constexpr bool rounds = !std::is_same_v<scalar, acc>;
  const bool rounds_both = problem.method != Method::Additive;
  const int64_t rounded_first = ((rounds_both ? 2 : 1) * b * problem.queries + t) * problem.steps;
  acc* recomputed = part_of<acc>(call.recomputed, first);
  acc* grad_scores = part_of<acc>(call.grad_scores, first);
  scalar* rounded = rounds ? part_of<scalar>(call.rounded, rounded_first) : nullptr;
  scalar* rounded_grads = rounded == nullptr || !rounds_both ? nullptr : rounded + problem.queries * problem.steps;
  acc delta = 0;
  if constexpr (held > 0) {
    const HeldRow<held, width> at(may_attend, problem.steps);
    acc weight[held], grad[held] = {};
    at.load(weight, weights);
    if (from_context != nullptr) {
      at.load(grad, from_context);
    }
    if (grad_weights != nullptr) {
      at.add(grad, grad_weights, call.grad_weights.element_stride);
    }
    if (recomputes) {
#pragma unroll
      for (int i = 0; i < held; ++i) {
        weight[i] = recomputed_weight(weight[i]);
      }
    }
    at.clear_unattended(weight, acc(0));
    at.clear_unattended(grad, acc(0));
    if (recomputes) {
      acc total = 0;
#pragma unroll
      for (int i = 0; i < held; ++i) {
        total += weight[i];
      }
      const acc factor = inverse_of_sum(Team::sum(total));
#pragma unroll
      for (int i = 0; i < held; ++i) {
        weight[i] = part_of_sum(weight[i], factor);
      }
    }
#pragma unroll
    for (int i = 0; i < held; ++i) {
      delta += weight[i] * grad[i];
    }
    delta = Team::sum(delta);
    at.store(recomputed, weight);
    at.store(rounded, weight);
#pragma unroll
    for (int i = 0; i < held; ++i) {
      grad[i] = grad_score(weight[i], grad[i], delta);
    }
    at.store(grad_scores, grad);
    if constexpr (rounds) {
      if (rounded_grads == nullptr) {
        return;
      }
      acc excess = 0, smallest = kInfinity<acc>;
#pragma unroll
      for (int i = 0; i < held; ++i) {
        grad[i] = rounded_less<scalar>(grad[i], excess);
      }
      excess = warp_sum(excess);
#pragma unroll
      for (int i = 0; i < held; ++i) {
        smallest = smallest_to_take(excess, grad[i], smallest);
      }
      bool takes = is_smallest(smallest);
#pragma unroll
      for (int i = 0; i < held; ++i) {
        const bool takes_it = takes && fabsf(grad[i]) == smallest;
        grad[i] -= takes_it ? excess : acc(0);
        takes = takes && !takes_it;
      }
      at.store(rounded_grads, grad);
    }
  } else {
    acc factor = 1;
    const auto weight_of = [&](int64_t s) {
      return !may_attend(s) ? acc(0) : recomputes ? part_of_sum(recomputed_weight(weights[s]), factor) : weights[s];
    };
    if (recomputes) {
      acc total = 0;
      for (int64_t s = Team::rank(); s < problem.steps; s += kRowBlock) {
        total += weight_of(s);
      }
      factor = inverse_of_sum(Team::sum(total));
    }
    const auto grad_of = [&](int64_t s) {
      acc grad = 0;
      if (may_attend(s)) {
        grad = from_context != nullptr ? from_context[s] : acc(0);
        grad += grad_weights != nullptr ? to_acc(grad_weights[s * call.grad_weights.element_stride]) : acc(0);
      }
      return grad;
    };
    for (int64_t s = Team::rank(); s < problem.steps; s += kRowBlock) {
      delta += weight_of(s) * grad_of(s);
    }
    delta = Team::sum(delta);
    acc excess = 0;
    for (int64_t s = Team::rank(); s < problem.steps; s += kRowBlock) {
      const acc weight = weight_of(s), grad = grad_score(weight, grad_of(s), delta);
      store_if_wanted(recomputed, s, weight);
      store_if_wanted(grad_scores, s, grad);
      store_if_wanted(rounded, s, weight);
      if constexpr (rounds) {
        store_if_wanted(rounded_grads, s, rounded_less<scalar>(grad, excess));
      }
    }
    if constexpr (rounds) {
      if (rounded_grads == nullptr) {
        return;
      }
      excess = warp_sum(excess);
      acc smallest = kInfinity<acc>;
      int64_t at = 0;
      for (int64_t s = Team::rank(); s < problem.steps; s += kRowBlock) {
        const acc before = smallest;
        smallest = smallest_to_take(excess, to_acc(rounded_grads[s]), before);
        at = smallest < before ? s : at;
      }
      if (is_smallest(smallest)) {
        rounded_grads[at] = from_acc<scalar>(to_acc(rounded_grads[at]) - excess);
      }
    }
  }
}

}  // namespace attn_ext::cuda

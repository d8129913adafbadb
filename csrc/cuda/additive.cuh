// What the additive kernels share. With E = exp(2q) exp(2k) and r = 1 / (1 + E), tanh(q + k) = 1 - 2r:
//
//   forward    e_ts = -2 sum_a v_a (r_tsa - 1/2); the sum without the halves, sum(v) less, does as well: it is the same for every
//              step and cancels in the softmax
//   backward   h = r - 1/2 = -tanh / 2, y = 1/4 - h^2 = tanh' / 4:
//              dq_t = 4v sum_s de_ts y_ts,  dk_s = 4v sum_t de_ts y_ts,  dv = -2 sum_ts de_ts h_ts
//
// dv is summed from h: r alone would leave it the rounding of sum_s de_ts, which is 0, where tanh is small.
#pragma once

#include "device.cuh"

namespace attn_ext::cuda {

// double has no approximate reciprocal that sharing could save, and takes tanh itself.
template <class acc>
constexpr bool kFactors = std::is_same_v<acc, float>;

// exp(2x) = 2^(this x).
constexpr float kTwoOverLn2 = 2.88539008f;

// NaN is.
__device__ __forceinline__ bool is_beyond(float x, float limit) {
  return !(x <= limit && x >= -limit);
}

// r of any q and k: where exp is inf, it is 0.
__device__ __forceinline__ float direct_reciprocal(float query, float key) {
  return reciprocal_approx(1 + exp2_approx(kTwoOverLn2 * (query + key)));
}

// h of any q and k.
__device__ __forceinline__ float direct_centred(float query, float key) {
  return direct_reciprocal(query, key) - 0.5f;
}

__device__ __forceinline__ double direct_centred(double query, double key) {
  return -0.5 * tanh_of(query + key);
}

// What a feature adds to a score, times -2v: r as elsewhere; h where nothing is factored, so that double's scores lack nothing.
__device__ __forceinline__ float direct_term(float query, float key) {
  return direct_reciprocal(query, key);
}

__device__ __forceinline__ double direct_term(double query, double key) {
  return direct_centred(query, key);
}

// Of many queries: a block's threads, and a chunk's features.
constexpr int kAdditiveThreads = 128;
constexpr int kAdditiveWarps = kAdditiveThreads / kWarp;
constexpr int kFeatures = kWarp;

// exp(2x), or x where it is to be taken directly. The approximate one is off by the rounding of its argument, 2^-18 at most: too
// much for float's gradients, and nothing beside a half's own rounding.
template <class scalar>
__device__ __forceinline__ accumulated_t<scalar> factor_of(accumulated_t<scalar> x, bool direct) {
  if (direct) {
    return x;
  }
  if constexpr (sizeof(scalar) == 2) {
    return exp2_approx(kTwoOverLn2 * x);
  } else {
    return exponential(2 * x);
  }
}

// Consecutive elements of shared memory, which lie on 16 bytes where there are as many.
template <class acc, int count>
__device__ __forceinline__ void load_shared(acc (&to)[count], const acc* from) {
  constexpr int lanes = kLanes<acc>;
  if constexpr (count % lanes == 0) {
#pragma unroll
    for (int i = 0; i < count; i += lanes) {
      acc part[lanes];
      unpack<acc>(part, load16(from + i));
#pragma unroll
      for (int n = 0; n < lanes; ++n) {
        to[i + n] = part[n];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      to[i] = from[i];
    }
  }
}

}  // namespace attn_ext::cuda

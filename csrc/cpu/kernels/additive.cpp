// Additive scores, e_ts = scale v . tanh(q_t + k_s), without a tanh.
//
// With E = exp(2q) exp(2k), tanh(q + k) = 1 - 2 / (1 + E). The exponentials are taken once per feature of a query and of a key, so
// that the loop over (t, s, feature) is a multiply-add, a reciprocal and an addition; sums begin with -sum(v) / 2:
//
//   forward    e_ts = -2 scale (sum_a 1 / x_tsa - sum(v) / 2),  x = (1 + E) / v
//   backward   h = 2 / (1 + E) - 1 = -tanh,  u_ts = de_ts h_ts,  y_ts = de_ts - u_ts h_ts = de_ts tanh'
//              dq_t = v sum_s y_ts,  dk_s = v sum_t y_ts,  dv = -sum_ts u_ts
//
// It is bound by arithmetic, and the reciprocal is most of it: three instructions of an estimate and a Newton step, or a division.
// Forward, four features share one, 1/x0 + 1/x1 = (x0 + x1) / (x0 x1) and so on: 17 instructions on four vectors, two of them
// additions, instead of 24. Their numerators are one because x, a multiply-add of exp(2k) with exp(2q) / v and 1 / v, has v in it.
// The backward needs every reciprocal by itself: 11 operations a vector, of which three are additions, for which many processors
// have ports of their own. Where they have not, two source steps share a reciprocal, multiply-adds take the sums, and 9 are left.
//
// x, and the product of those that share, must neither overflow nor lose its factors to underflow. While the exponentials are taken
// the largest |2q| and |2k| are found; their sum, and how far the v are apart, decide how many features share a reciprocal. Where
// even two could leave the type's range, E = exp(2 (q + k)) is taken directly, which any input may be; a backward of many queries
// decides so for each vector of features. A single query takes it so too: for it the exponentials are as many either way,
// and the keys are read where they stand. A decoder's steps share their keys: their exponentials come prepared.
#include "additive_gradients.h"
#include "additive_scores.h"
#include "kernels.h"
#include "one_query_additive.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

const Kernels& additive_kernels(Dtype product_dtype, bool one_query, int64_t chunk) {
  return kernels_of<AdditiveScore, AdditiveGradient, OneQueryAdditive>(product_dtype, one_query, chunk);
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

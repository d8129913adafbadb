// What a softmax takes, over whole vectors of scores. The end of a sum, across a vector, takes as long as the rest of a
// short row: sums are returned as they are, one a lane, for sum_each() of several rows to share the shuffles.
#pragma once

#include "products.h"
#include "vec.h"

#include <cmath>
#include <limits>

namespace attn_ext::cpu::CPU_CAPABILITY {

// The score of what is not attended.
template <class acc>
constexpr acc kNothing = -std::numeric_limits<acc>::infinity();

// Below this exp() is subnormal, and every product with a subnormal costs the processor a microcode assist.
template <class acc>
constexpr acc kSmallestExponent = std::is_same_v<acc, double> ? -708 : -87;

// row[j] = exp(row[j] - subtract), 0 where that is subnormal, for whole vectors; returns their partial sums, one a lane.
template <class acc>
ATTN_EXT_INLINE_OF_ROW Vec<acc> exponentials(acc* row, int64_t count, acc subtract) {
  Vec<acc> total(0);
  const Vec<acc> shift(subtract);
  for (int64_t j = 0; j < count; j += Vec<acc>::size()) {
    const Vec<acc> p = exponential_from(kSmallestExponent<acc>, Vec<acc>::loadu(row + j) - shift);
    p.store(row + j);
    total = total + p;
  }
  return total;
}

// What a part of a row's steps came to: the largest score, the sum of the exponentials relative to it, and of the rows they weigh.
template <class acc>
struct Part {
  acc& max;
  acc& sum;
  acc* context;

  // Another part's joins it. NaN stays NaN.
  void absorb(const Part& other, int64_t size) const {
    const acc most = max == kNothing<acc> ? other.max : std::max(max, other.max);
    if (most == kNothing<acc>) {
      return;
    }
    const acc kept = std::exp(max - most), entering = std::exp(other.max - most);
    scale_row(context, context, size, kept);
    add_row(context, entering, other.context, size);
    sum = sum * kept + other.sum * entering;
    max = most;
  }
};

// row[j] = gradient(factor a_j, row[j], subtract), but nothing where the weight a_j is 0. Returns the partial sums.
template <class acc, class Gradient>
ATTN_EXT_INLINE_OF_ROW Vec<acc> pass_on(
    acc* row, const acc* weights, int64_t steps, acc factor, acc subtract, const Gradient& gradient) {
  Vec<acc> total(0);
  for_vectors<acc>(steps, [&](int64_t j, auto count) {
    const Vec<acc> a = Vec<acc>::loadu(weights + j, count);
    const Vec<acc> de = gradient(Vec<acc>(factor) * a, Vec<acc>::loadu(row + j, count), Vec<acc>(subtract));
    const Vec<acc> passed = where_weighted(a, de);
    passed.store(row + j, static_cast<int>(count));
    total = total + passed;
  });
  return total;
}

// The gradients of scores out of those of their weights, de_s = scale a_s (da_s - delta). Returns their partial sums, whose sum
// over a whole row is 0 but for what rounding left in delta. `delta_from_context`: out of the context rather than of the da_s,
// delta would be rounded otherwise than the one whose weight is 1, and the scale would multiply their difference: such a weight
// leaves the others nothing, and has no gradient. Of weights that are recomputed that cannot be told, since a log-sum-exp is
// rounded by as much as it is large.
template <class acc>
ATTN_EXT_INLINE_OF_ROW Vec<acc> differentiate_softmax(
    acc* row, const acc* weights, int64_t steps, acc delta, acc scale, bool delta_from_context) {
  const auto gradient = [](const auto& a, const auto& da, const auto& delta) { return a * (da - delta); };
  if (!delta_from_context) {
    return pass_on(row, weights, steps, scale, delta, gradient);
  }
  return pass_on(row, weights, steps, scale, delta, [&](const auto& a, const auto& da, const auto& delta) {
    return Vec<acc>::blendv(gradient(a, da, delta), Vec<acc>(0), a == Vec<acc>(scale));
  });
}

// That sum, of steps that are all there are, out of their gradients.
template <class acc>
void subtract_excess(acc* row, const acc* weights, int64_t steps, acc excess) {
  pass_on(row, weights, steps, acc(1), excess, [](const auto& a, const auto& de, const auto& excess) { return de - a * excess; });
}

// The largest of a row and `start`. A NaN stays out of the way, since its exponential will not, unless there is nothing else.
template <class acc>
acc maximum(const acc* row, int64_t count, acc start) {
  Vec<acc> all(start);
  for (int64_t j = 0; j < count; j += Vec<acc>::size()) {
    all = raised(all, Vec<acc>::loadu(row + j));
  }
  const acc found = reduce(all, raised<acc>);
  if (found != kNothing<acc>) {
    return found;
  }
  for (int64_t j = 0; j < count; j += Vec<acc>::size()) {
    all = maximum(all, Vec<acc>::loadu(row + j));
  }
  return largest(all);
}

// A tile's weights out of its scores, filled up to whole vectors, and the row's log-sum-exp; returns their partial sums, by whose
// sum those of a `whole` row are to be divided unless it is 0. The log-sum-exp is rounded by as much as it is large, the scores may
// be rounded otherwise than the forward's were, and both grow with the scale: a whole row goes by its own maximum, and of a part no
// weight is more than 1.
template <class acc>
ATTN_EXT_INLINE_OF_ROW Vec<acc> recompute_softmax(acc* row, int64_t steps, acc logsumexp, bool whole) {
  const int64_t count = whole_vectors<acc>(steps);
  const acc shift = whole ? maximum(row, count, kNothing<acc>) : logsumexp;
  if (logsumexp == kNothing<acc> || shift == kNothing<acc>) {
    std::fill_n(row, count, acc(0));
    return Vec<acc>(0);
  }
  if (!whole) {
    for (int64_t j = 0; j < count; j += Vec<acc>::size()) {
      clamp_max(Vec<acc>::loadu(row + j), Vec<acc>(shift)).store(row + j);
    }
  }
  return exponentials(row, count, shift);
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

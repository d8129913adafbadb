// What a softmax takes, over whole vectors of scores.
#pragma once

#include "vec.h"

#include <limits>

namespace attn_ext::cpu::CPU_CAPABILITY {

// The score of what is not attended.
template <class acc>
constexpr acc kNothing = -std::numeric_limits<acc>::infinity();

// Below this exp() is subnormal, and every product with a subnormal costs the processor a microcode assist.
template <class acc>
constexpr acc kSmallestExponent = std::is_same_v<acc, double> ? -708 : -87;

// row[j] = exp(row[j] - subtract), 0 where that is subnormal, for whole vectors; returns the sum.
template <class acc>
acc exponentials(acc* row, int64_t count, acc subtract) {
  Vec<acc> total(0);
  const Vec<acc> shift(subtract);
  for (int64_t j = 0; j < count; j += Vec<acc>::size()) {
    const Vec<acc> p = exponential_from(kSmallestExponent<acc>, Vec<acc>::loadu(row + j) - shift);
    p.store(row + j);
    total = total + p;
  }
  return sum(total);
}

template <class acc>
acc maximum(const acc* row, int64_t count, acc start) {
  Vec<acc> all(start);
  for (int64_t j = 0; j < count; j += Vec<acc>::size()) {
    all = at::vec::maximum(all, Vec<acc>::loadu(row + j));
  }
  return largest(all);
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

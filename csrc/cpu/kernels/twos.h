// Rows two vectors of features at a time, which are whole lines of halves.
#pragma once

#include "elements.h"
#include "softmax.h"
#include "vec.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)
// Two vectors of bfloat16 in the order that takes the fewest instructions: the numbers at even places, and those at odd ones, which
// are floats but for their neighbours' bits.
template <class scalar>
constexpr bool kDeinterleaves = std::is_same_v<scalar, c10::BFloat16>;

[[gnu::always_inline]] inline void load_deinterleaved(Vec<float> (&to)[2], const c10::BFloat16* from) {
  const __m512i pairs = _mm512_loadu_si512(from);
  to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  to[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}

// And back into the order of memory.
[[gnu::always_inline]] inline void interleave(Vec<float> (&x)[2]) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512 even = x[0], odd = x[1];
  x[0] = _mm512_permutex2var_ps(even, low, odd);
  x[1] = _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd);
}
#else
template <class scalar>
constexpr bool kDeinterleaves = false;

#endif

// Whether all of two vectors are there, as for_twos() tells by the type of its count.
template <class Count>
constexpr bool kAreWhole = !std::is_same_v<Count, int64_t>;

// load_two() in whatever order is the quickest.
template <class acc, class scalar, class Count>
[[gnu::always_inline]] inline void load_two_any_order(Vec<acc> (&to)[2], const scalar* from, Count count) {
  if constexpr (kDeinterleaves<scalar> && kAreWhole<Count>) {
    load_deinterleaved(to, from);
  } else {
    load_two(to, from, count);
  }
}

// How a row of `scalar` enters a product: bfloat16 as pairs, whose instruction takes subnormal numbers for zeros.
template <class scalar>
using Paired = std::conditional_t<std::is_same_v<scalar, c10::BFloat16>, Pair, scalar>;

#if defined(__AVX512BF16__)
template <class scalar>
constexpr bool kMultipliesPairs = std::is_same_v<scalar, c10::BFloat16>;

template <class Count>
[[gnu::always_inline]] inline __m512i load_pairs(const c10::BFloat16* from, Count count) {
  if constexpr (kAreWhole<Count>) {
    return _mm512_loadu_si512(from);
  } else {
    return _mm512_maskz_loadu_epi16((__mmask32(1) << count) - 1, from);
  }
}
#else
template <class scalar>
constexpr bool kMultipliesPairs = false;
#endif

template <bool streams, class acc, class scalar>
[[gnu::always_inline]] inline void store_two(scalar* to, const Vec<acc> (&x)[2], int64_t count) {
  constexpr int64_t lanes = Vec<acc>::size();
  const auto store = [](scalar* at, const auto& vector, int64_t filled) {
    if constexpr (streams) {
      stream(at, vector);
    } else if (filled > 0) {
      vector.store(at, static_cast<int>(filled));
    }
  };
  if constexpr (std::is_same_v<scalar, acc>) {
    store(to, x[0], std::min(count, lanes));
    store(to + lanes, x[1], count - lanes);
  } else {
    store(to, rounded<scalar>(x[0], x[1]), count);
  }
}

#if defined(__AVX512BF16__)
// a . b as rows are multiplied in pairs: b is of bfloat16, and what a is rounded by is added.
inline float dot_product_by_pairs(const float* a, const float* b, int64_t size) {
  Vec<float> sums[2] = {Vec<float>(0), Vec<float>(0)}, rests[2] = {Vec<float>(0), Vec<float>(0)}, left[2], right[2];
  for_twos<float>(size, [&](int64_t d, auto count) {
    load_two(left, a + d, count);
    load_two(right, b + d, count);
    const Vec<c10::BFloat16> rounded_left = rounded<c10::BFloat16>(left[0], left[1]);
    const auto [low, high] = convert_to_float<c10::BFloat16>(rounded_left);
    sums[0] = ElementTraits<Pair>::multiply_add(rounded<c10::BFloat16>(right[0], right[1]), rounded_left, sums[0]);
    std::swap(sums[0], sums[1]);
    rests[0] = fmadd(left[0] - low, right[0], rests[0]);
    rests[1] = fmadd(left[1] - high, right[1], rests[1]);
  });
  return sum(sums[0] + sums[1]) + sum(rests[0] + rests[1]);
}
#endif

// a . b as RowGroup multiplies rows of the dtype: where all the weight is on one step, and the context a is its row, delta is to be
// its da.
template <class acc>
acc dot_product_by_twos([[maybe_unused]] Dtype dtype, const acc* a, const acc* b, int64_t size) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<acc, float>) {
    if (dtype == Dtype::BFloat16) {
      return dot_product_by_pairs(a, b, size);
    }
  }
#endif
  Vec<acc> sums[2] = {Vec<acc>(0), Vec<acc>(0)}, left[2], right[2];
  for_twos<acc>(size, [&](int64_t d, auto count) {
    load_two(left, a + d, count);
    load_two(right, b + d, count);
    sums[0] = fmadd(left[0], right[0], sums[0]);
    sums[1] = fmadd(left[1], right[1], sums[1]);
  });
  return sum(sums[0] + sums[1]);
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

// What the products multiply, by element of a row: numbers of the accumulation type, halves, which become such numbers as they are
// loaded, or pairs of bfloat16, which one instruction multiplies and adds up in float32, twice the multiply-adds of float32's.
#pragma once

#include "vec.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

template <class element>
struct ElementTraits {
  using acc = element;
  using Vector = Vec<element>;

  // Elements of a row of `size` numbers.
  static int64_t elements(int64_t size) {
    return size;
  }

  static Vector load(const element* from, int64_t count = Vector::size()) {
    return Vector::loadu(from, count);
  }

  static Vector broadcast(element x) {
    return Vector(x);
  }

  static Vec<acc> multiply_add(const Vector& a, const Vector& b, const Vec<acc>& sum) {
    return fmadd(a, b, sum);
  }

  // A row's numbers from i on.
  static Vec<acc> numbers(const element* row, int64_t i, int64_t count) {
    return Vec<acc>::loadu(row + i, count);
  }
};

template <class element>
constexpr bool kIsHalf = std::is_same_v<element, c10::BFloat16> || std::is_same_v<element, c10::Half>;

template <class half>
  requires kIsHalf<half>
struct ElementTraits<half> {
  using Vector = Vec<float>;

  static Vector load(const half* from, int64_t count = Vector::size()) {
    return load_one<float>(from, count);
  }
};

// Whether products take rows of halves as they stand: where it is an instruction or two to make numbers of a vector of them.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr bool kConvertsInRegisters = true;
#else
constexpr bool kConvertsInRegisters = false;
#endif

// Neighbours along the index that a product sums over.
struct Pair {
  c10::BFloat16 even;
  c10::BFloat16 odd;
};

template <class element>
constexpr bool kIsPaired = std::is_same_v<element, Pair>;

// Pairs that are multiplied at once; rows are filled up with zeros to a multiple. A matrix tile (amx.h) takes 16.
#if defined(__AMX_BF16__)
constexpr int64_t kPairsAtOnce = 16;
#else
constexpr int64_t kPairsAtOnce = 1;
#endif

#if defined(__AVX512BF16__)
// Sixteen bfloat16 as floats.
inline __m512 widened(__m256i bfloat16s) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16s), 16));
}

template <>
struct ElementTraits<Pair> {
  using acc = float;
  using Vector = __m512i;

  static int64_t elements(int64_t size) {
    return ceil_div(size, 2 * kPairsAtOnce) * kPairsAtOnce;
  }

  static Vector load(const Pair* from, int64_t count = 16) {
    return count >= 16 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi32(first_lanes(count), from);
  }

  static Vector broadcast(Pair x) {
    int bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return _mm512_set1_epi32(bits);
  }

  static Vec<float> multiply_add(const Vector& a, const Vector& b, const Vec<float>& sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  static Vec<float> numbers(const Pair* row, int64_t i, int64_t count) {
    return widened(_mm256_maskz_loadu_epi16(first_lanes(count), reinterpret_cast<const c10::BFloat16*>(row) + i));
  }
};

// Words `even` + i and `odd` + i, next to each other, of the 64 words of a and b.
inline __m512i zip_words(__m512i a, __m512i b, int even, int odd) {
  const __m512i i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_permutex2var_epi16(
      a, _mm512_add_epi32(_mm512_mullo_epi32(i, _mm512_set1_epi32(0x10001)), _mm512_set1_epi32(odd << 16 | even)), b);
}

// (a_i, b_i) for rows of bfloat16 from number i = `first` on, in whole vectors, `stride` from one to the next; b may be null:
// zeros.
inline void zip_rows(Pair* to, const Pair* a, const Pair* b, int64_t first, int64_t count, int64_t stride = 16) {
  for (int64_t i = 0; i < count; i += 32, to += 2 * stride) {
    const __mmask32 mask = count - i >= 32 ? ~__mmask32(0) : (__mmask32(1) << (count - i)) - 1;
    const auto load = [&](const Pair* row) {
      return _mm512_maskz_loadu_epi16(mask, reinterpret_cast<const c10::BFloat16*>(row) + first + i);
    };
    const __m512i x = load(a), y = b == nullptr ? _mm512_setzero_si512() : load(b);
    _mm512_storeu_si512(to, zip_words(x, y, 0, 32));
    _mm512_storeu_si512(to + stride, zip_words(x, y, 16, 48));
  }
}

// A row of floats, rounded, as pairs in whole vectors; the last are filled up with zeros.
inline void pair_row(Pair* to, const float* from, int64_t count) {
  for_twos<float>(count, [&](int64_t i, auto some) {
    Vec<float> x[2];
    load_two(x, from + i, some);
    _mm512_storeu_si512(to + i / 2, rounded<c10::BFloat16>(x[0], x[1]));
  });
}

// to[i] = (a_i, b_i), rounded, in whole vectors; b may be null: zeros.
inline void pair_rows(Pair* to, const float* a, const float* b, int64_t count) {
  for_vectors<float>(count, [&](int64_t i, auto some) {
    const Vec<float> second = b == nullptr ? Vec<float>(0) : Vec<float>::loadu(b + i, some);
    const __m512i both = rounded<c10::BFloat16>(Vec<float>::loadu(a + i, some), second);
    _mm512_storeu_si512(to + i, zip_words(both, both, 0, 16));
  });
}

// Numbers as a pair has them.
inline Vec<float> as_paired(const Vec<float>& x) {
  return widened(std::bit_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// By how much the sum of a row's numbers grows as they are rounded: its partial sums, one a lane.
ATTN_EXT_INLINE_OF_ROW Vec<float> gained_by_rounding(const float* row, int64_t count) {
  Vec<float> gained(0);
  for_vectors<float>(count, [&](int64_t i, auto some) {
    const Vec<float> x = Vec<float>::loadu(row + i, some);
    gained = gained + (as_paired(x) - x);
  });
  return gained;
}

// What a row's numbers lose by it.
inline void lost_by_rounding(float* to, const float* row, int64_t count) {
  for_vectors<float>(count, [&](int64_t i, auto some) {
    const Vec<float> x = Vec<float>::loadu(row + i, some);
    (x - as_paired(x)).store(to + i, static_cast<int>(some));
  });
}

// Keeps a row's sum through rounding: what that adds is taken off the smallest number that keeps its sign by it, whose own rounding
// errs least. Magnitudes are ordered as their bits are, and those of bfloat16 leave room for a place behind them.
inline void keep_sum(float* row, int64_t count, float gained) {
  constexpr uint32_t none = 0x7f800000;  // infinity's
  const __m512i magnitude = _mm512_set1_epi32(0x7fff0000), enough = _mm512_set1_epi32(std::bit_cast<int>(std::abs(gained)));
  const __m512i zero = _mm512_setzero_si512();
  __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), least = _mm512_set1_epi32(none);
  for_vectors<float>(count, [&](int64_t i, auto some) {
    const __m512i x = _mm512_and_si512(_mm512_castps_si512(as_paired(Vec<float>::loadu(row + i, some))), magnitude);
    const __mmask16 keeps_sign = _mm512_mask_cmpge_epu32_mask(_mm512_cmpgt_epu32_mask(x, zero), x, enough);
    least = _mm512_mask_min_epu32(least, keeps_sign, least, _mm512_or_si512(x, place));
    place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
  });
  const uint32_t smallest = _mm512_reduce_min_epu32(least);
  if (smallest < none) {
    float& taken = row[smallest & 0xffff];
    taken = std::copysign(std::bit_cast<float>(smallest & 0xffff0000), taken) - gained;
  }
}

#if defined(__AMX_BF16__)
// (x_i, y_i) as sums of bfloat16, of eight bits each: every part of the 16 pairs `stride` from the one before. What products leave
// out is small, and errs to either side where a part is rounded: the first of two, but not to infinity, and the second of three.
// The others are cut off, the last of three without a loss. One part at least of a NaN stays one.
template <int parts>
inline void split_pairs(Pair* to, int64_t stride, const Vec<float>& x, const Vec<float>& y) {
  static_assert(parts == 2 || parts == 3);
  const __m512i upper = _mm512_set1_epi32(0xffff0000);
  const auto cut = [&](__m512i bits) { return _mm512_castsi512_ps(_mm512_and_si512(bits, upper)); };
  // To be cut off.
  const auto rounded = [](__m512 number) { return _mm512_add_epi32(_mm512_castps_si512(number), _mm512_set1_epi32(0x8000)); };
  const auto store = [&](int p, __m512i even, __m512 odd) {
    _mm512_storeu_si512(to + p * stride, _mm512_or_si512(_mm512_srli_epi32(even, 16), _mm512_castps_si512(odd)));
  };
  const auto first = [&](__m512 number) {
    if constexpr (parts == 3) {
      return _mm512_castps_si512(number);
    } else {
      constexpr int smaller_magnitude = 2;
      return rounded(_mm512_range_ps(number, _mm512_set1_ps(0x1.fep127f), smaller_magnitude));
    }
  };
  const __m512i x_bits = first(x), y_bits = first(y);
  const __m512 x_first = cut(x_bits), y_first = cut(y_bits);
  store(0, x_bits, y_first);
  const __m512 x_rest = _mm512_sub_ps(x, x_first), y_rest = _mm512_sub_ps(y, y_first);
  if constexpr (parts == 2) {
    store(1, _mm512_castps_si512(x_rest), cut(_mm512_castps_si512(y_rest)));
  } else {
    const __m512i x_rest_bits = rounded(x_rest), y_rest_bits = rounded(y_rest);
    const __m512 x_second = cut(x_rest_bits), y_second = cut(y_rest_bits);
    store(1, x_rest_bits, y_second);
    const __m512 x_third = _mm512_sub_ps(x_rest, x_second), y_third = _mm512_sub_ps(y_rest, y_second);
    store(2, _mm512_castps_si512(x_third), cut(_mm512_castps_si512(y_third)));
  }
}
#endif

#endif

// a . b of rows of `size` numbers, where a 0 of a passes nothing on, whatever it meets: its partial sums, one a lane.
template <class acc, class element>
ATTN_EXT_INLINE_OF_ROW Vec<acc> partial_dot_products(const acc* a, const element* b, int64_t size) {
  Vec<acc> total(0);
  for_vectors<acc>(size, [&](int64_t i, auto count) {
    const auto x = Vec<acc>::loadu(a + i, count);
    total = fmadd(x, where_weighted(x, ElementTraits<element>::numbers(b, i, count)), total);
  });
  return total;
}

template <class acc, class element>
acc dot_product(const acc* a, const element* b, int64_t size) {
  return sum(partial_dot_products(a, b, size));
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

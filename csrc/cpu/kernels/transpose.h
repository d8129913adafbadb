// Rows into columns, in registers: of elements of 32 bits, and of halves, which become floats.
#pragma once

#include "elements.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(ATTN_EXT_SSE2)

template <class element>
constexpr bool kTransposes = std::is_same_v<element, float> || std::is_same_v<element, Pair>;

#if defined(CPU_CAPABILITY_AVX512)
// Of four rows of 16 numbers: fours[c] has c, c + 4, c + 8 and c + 12 of each.
inline void transpose_fours(__m512* fours, __m512 row_0, __m512 row_1, __m512 row_2, __m512 row_3) {
  const __m512d low_01 = _mm512_castps_pd(_mm512_unpacklo_ps(row_0, row_1));
  const __m512d low_23 = _mm512_castps_pd(_mm512_unpacklo_ps(row_2, row_3));
  const __m512d high_01 = _mm512_castps_pd(_mm512_unpackhi_ps(row_0, row_1));
  const __m512d high_23 = _mm512_castps_pd(_mm512_unpackhi_ps(row_2, row_3));
  fours[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low_01, low_23));
  fours[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low_01, low_23));
  fours[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high_01, high_23));
  fours[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high_01, high_23));
}

struct TwoColumns {
  __m512 first, second;
};

// Of 16 rows whose fours are one behind the other: columns c and c + 8 or, of the odd quarters, c + 4 and c + 12.
template <bool odd>
inline TwoColumns columns_of_fours(const __m512* fours, int64_t c) {
  constexpr int quarters = odd ? 0xdd : 0x88;
  const __m512 low = _mm512_shuffle_f32x4(fours[c], fours[c + 4], quarters);
  const __m512 high = _mm512_shuffle_f32x4(fours[c + 8], fours[c + 12], quarters);
  return {_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd)};
}

// to[d][j] = from[j][first + d] for 16 rows and 16 features. Each row is loaded once and whole: rows that are a multiple of 1 KiB
// apart share a few sets of the cache, which would not keep them for a second load.
template <class to_element, class element>
inline void transpose_square(to_element* to, int64_t stride, const element* const* from, int64_t first) {
  static_assert(sizeof(to_element) == 4 && (kIsHalf<element> || sizeof(element) == 4));
  __m512 x[16], fours[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if constexpr (kIsHalf<element>) {
      x[i] = ElementTraits<element>::load(from[i] + first);
    } else {
      x[i] = _mm512_loadu_ps(from[i] + first);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    transpose_fours(fours + i, x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
#pragma GCC unroll 4
  for (int d = 0; d < 4; ++d) {
    const auto [even_low, even_high] = columns_of_fours<false>(fours, d);
    const auto [odd_low, odd_high] = columns_of_fours<true>(fours, d);
    _mm512_storeu_ps(to + d * stride, even_low);
    _mm512_storeu_ps(to + (d + 4) * stride, odd_low);
    _mm512_storeu_ps(to + (d + 8) * stride, even_high);
    _mm512_storeu_ps(to + (d + 12) * stride, odd_high);
  }
}

#elif defined(ATTN_EXT_SSE2)
// to[d][j] = from[j][first + d] for 4 rows and 4 features.
template <class to_element, class element>
inline void transpose_square(to_element* to, int64_t stride, const element* const* from, int64_t first) {
  static_assert(sizeof(to_element) == 4 && (kIsHalf<element> || sizeof(element) == 4));
  __m128 x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = ElementTraits<element>::load(from[i] + first);
  }
  _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
#pragma GCC unroll 4
  for (int d = 0; d < 4; ++d) {
    _mm_storeu_ps(to + d * stride, x[d]);
  }
}

#else
// to[d][j] = from[j][first + d] for 8 rows and 8 features. A load brings four features of a row, a second those of the row four
// below, which leaves two shuffles a vector.
template <class to_element, class element>
inline void transpose_square(to_element* to, int64_t stride, const element* const* from, int64_t first) {
  static_assert(sizeof(to_element) == 4 && (kIsHalf<element> || sizeof(element) == 4));
  const auto load_four = [](const element* row) {
    if constexpr (std::is_same_v<element, c10::BFloat16>) {
      const __m128i four = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row));
      return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(four), 16));
    } else if constexpr (std::is_same_v<element, c10::Half>) {
      return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row)));
    } else {
      return _mm_loadu_ps(row);
    }
  };
#pragma GCC unroll 2
  for (int d = 0; d < 8; d += 4) {
    const int64_t column = first + d;
    __m256 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(load_four(from[i] + column)), load_four(from[i + 4] + column), 1);
    }
    const __m256d low_01 = _mm256_castps_pd(_mm256_unpacklo_ps(x[0], x[1]));
    const __m256d low_23 = _mm256_castps_pd(_mm256_unpacklo_ps(x[2], x[3]));
    const __m256d high_01 = _mm256_castps_pd(_mm256_unpackhi_ps(x[0], x[1]));
    const __m256d high_23 = _mm256_castps_pd(_mm256_unpackhi_ps(x[2], x[3]));
    const auto store = [&](int row, __m256d v) { _mm256_storeu_ps(to + (d + row) * stride, _mm256_castpd_ps(v)); };
    store(0, _mm256_unpacklo_pd(low_01, low_23));
    store(1, _mm256_unpackhi_pd(low_01, low_23));
    store(2, _mm256_unpacklo_pd(high_01, high_23));
    store(3, _mm256_unpackhi_pd(high_01, high_23));
  }
}

#endif

// to[d][j] = from[j][first + d] for `size` features of `count` rows. The last vector of columns is filled up with the last row.
template <class to_element, class element>
inline void transpose(to_element* to, int64_t stride, const element* const* from, int64_t count, int64_t first, int64_t size) {
  constexpr int64_t lanes = Vec<float>::size();
  for (int64_t j = 0; j < count; j += lanes) {
    const element* rows[lanes];
    for (int64_t i = 0; i < lanes; ++i) {
      rows[i] = from[std::min(j + i, count - 1)] + first;
    }
    int64_t d = 0;
    for (; d + lanes <= size; d += lanes) {
      transpose_square(to + d * stride + j, stride, rows, d);
    }
    for (; d < size; ++d) {
      for (int64_t i = 0; i < lanes; ++i) {
        to[d * stride + j + i] = static_cast<to_element>(rows[i][d]);
      }
    }
  }
}

#else

template <class element>
constexpr bool kTransposes = false;

#endif

}  // namespace attn_ext::cpu::CPU_CAPABILITY

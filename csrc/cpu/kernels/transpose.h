// Rows into columns, in registers: of elements of 32 bits.
#pragma once

#include "factors.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

template <class element>
constexpr bool kTransposes = std::is_same_v<element, float> || std::is_same_v<element, Pair>;

#if defined(CPU_CAPABILITY_AVX512)
// to[d][j] = from[j][first + d] for 16 rows and 16 features. Each row is loaded once and whole: rows that are a multiple of 1 KiB
// apart share a few sets of the cache, which would not keep them for a second load.
template <class element>
inline void transpose_square(element* to, int64_t stride, const element* const* from, int64_t first) {
  static_assert(sizeof(element) == 4);
  __m512 x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    x[i] = _mm512_loadu_ps(from[i] + first);
  }
  // Pairs of rows, then four: y[4i + d] has feature d (and d + 4, 8, 12) of the rows 4i .. 4i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d low_01 = _mm512_castps_pd(_mm512_unpacklo_ps(x[i], x[i + 1]));
    const __m512d low_23 = _mm512_castps_pd(_mm512_unpacklo_ps(x[i + 2], x[i + 3]));
    const __m512d high_01 = _mm512_castps_pd(_mm512_unpackhi_ps(x[i], x[i + 1]));
    const __m512d high_23 = _mm512_castps_pd(_mm512_unpackhi_ps(x[i + 2], x[i + 3]));
    y[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low_01, low_23));
    y[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low_01, low_23));
    y[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high_01, high_23));
    y[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high_01, high_23));
  }
  // Quarters change places: even ones (features d and d + 8) and odd ones (d + 4 and d + 12), then once more.
#pragma GCC unroll 4
  for (int d = 0; d < 4; ++d) {
    const __m512 even_low = _mm512_shuffle_f32x4(y[d], y[d + 4], 0x88), odd_low = _mm512_shuffle_f32x4(y[d], y[d + 4], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(y[d + 8], y[d + 12], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(y[d + 8], y[d + 12], 0xdd);
    _mm512_storeu_ps(to + d * stride, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    _mm512_storeu_ps(to + (d + 4) * stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_ps(to + (d + 8) * stride, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    _mm512_storeu_ps(to + (d + 12) * stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
}

#else
// to[d][j] = from[j][first + d] for 8 rows and 8 features. A load brings four features of a row, a second those of the row four
// below, which leaves two shuffles a vector.
template <class element>
inline void transpose_square(element* to, int64_t stride, const element* const* from, int64_t first) {
  static_assert(sizeof(element) == 4);
#pragma GCC unroll 2
  for (int d = 0; d < 8; d += 4) {
    const int64_t column = first + d;
    __m256 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from[i] + column)), _mm_loadu_ps(from[i + 4] + column), 1);
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
template <class element>
inline void transpose(element* to, int64_t stride, const element* const* from, int64_t count, int64_t first, int64_t size) {
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
        to[d * stride + j + i] = rows[i][d];
      }
    }
  }
}

#else

template <class element>
constexpr bool kTransposes = false;

#endif

}  // namespace attn_ext::cpu::CPU_CAPABILITY

// The two matrix products of attention, over rows given by address so that a mask's gaps and any stride cost nothing.
#pragma once

#include "vec.h"

#include <utility>

namespace attn_ext::cpu::CPU_CAPABILITY {

// f(std::integral_constant<int, n>, first) over blocks of at most `block` that cover 0 .. count.
template <int block, class F>
void for_blocks(int64_t count, const F& f) {
  int64_t first = 0;
  for (; first + block <= count; first += block) {
    f(std::integral_constant<int, block>(), first);
  }
  if constexpr (block > 1) {
    if (first < count) {
      for_blocks<block / 2>(count - first, [&](auto size, int64_t offset) { f(size, first + offset); });
    }
  }
}

// Register tiles: 4 x 4 accumulators and their 8 operands fit the 32 registers of AVX-512, 4 x 2 and 6 the 16 of AVX2. Without
// either, a vector of PyTorch's takes two registers.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRows = 4, kColumns = 4;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kRows = 4, kColumns = 2;
#else
constexpr int kRows = 2, kColumns = 2;
#endif

// out[i][j] = factor * (the sum of sums[i][j]), in a tile: out's rows are kTile apart.
template <int rows, int columns, class acc>
inline void store_sums(acc* out, const Vec<acc> (&sums)[rows][columns], acc factor) {
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    if constexpr (columns == 4) {
      acc four[4];
      sum_four<acc>(four, sums[i]);
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) {
        out[i * kTile + j] = factor * four[j];
      }
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) {
        out[i * kTile + j] = factor * sum(sums[i][j]);
      }
    }
  }
}

// out[i][j] = factor * sum_d a[i][d] b[j][d], for a tile: out's rows are kTile apart.
template <class acc>
void product_rows(acc* out, const acc* const* a, int64_t a_count, const acc* const* b, int64_t b_count, int64_t size, acc factor) {
  for_blocks<kRows>(a_count, [&](auto rows, int64_t i0) {
    for_blocks<kColumns>(b_count, [&](auto columns, int64_t j0) {
      Vec<acc> sums[rows.value][columns.value];
      for (int i = 0; i < rows.value; ++i) {
        for (int j = 0; j < columns.value; ++j) {
          sums[i][j] = Vec<acc>(0);
        }
      }
      const auto step = [&](int64_t d, auto count) {
        Vec<acc> right[columns.value];
#pragma GCC unroll 8
        for (int j = 0; j < columns.value; ++j) {
          right[j] = Vec<acc>::loadu(b[j0 + j] + d, count);
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows.value; ++i) {
          const auto left = Vec<acc>::loadu(a[i0 + i] + d, count);
#pragma GCC unroll 8
          for (int j = 0; j < columns.value; ++j) {
            sums[i][j] = at::vec::fmadd(left, right[j], sums[i][j]);
          }
        }
      };
      constexpr std::integral_constant<int64_t, Vec<acc>::size()> full;
      int64_t d = 0;
      for (; d + full <= size; d += full) {
        step(d, full);
      }
      if (d < size) {
        step(d, size - d);
      }
      store_sums<rows.value, columns.value>(out + i0 * kTile + j0, sums, factor);
    });
  });
}

// Coefficients of a tile as they stand, or transposed: c(i, j) = data[i * row + j * column].
template <class acc>
struct Coefficients {
  const acc* data;
  int64_t row;
  int64_t column;
};

// out[i] += sum_j c(i, j) rows[j], for out_count rows of `out`, `stride` apart.
template <class acc>
void add_product(
    acc* out, int64_t stride, int64_t out_count, Coefficients<acc> c, const acc* const* rows, int64_t count, int64_t size) {
  for_blocks<kRows>(out_count, [&](auto block, int64_t i0) {
    constexpr std::integral_constant<int64_t, Vec<acc>::size()> lanes;
    const auto column_block = [&](auto width, int64_t d, auto last) {
      // The last of the vectors may be a partial one.
      const auto filled = [&](int k) -> int64_t { return k + 1 < width.value ? lanes.value : int64_t(last); };
      Vec<acc> sums[block.value][width.value];
#pragma GCC unroll 8
      for (int i = 0; i < block.value; ++i) {
#pragma GCC unroll 8
        for (int k = 0; k < width.value; ++k) {
          sums[i][k] = Vec<acc>::loadu(out + (i0 + i) * stride + d + k * Vec<acc>::size(), filled(k));
        }
      }
      for (int64_t j = 0; j < count; ++j) {
        Vec<acc> right[width.value];
#pragma GCC unroll 8
        for (int k = 0; k < width.value; ++k) {
          right[k] = Vec<acc>::loadu(rows[j] + d + k * Vec<acc>::size(), filled(k));
        }
#pragma GCC unroll 8
        for (int i = 0; i < block.value; ++i) {
          const Vec<acc> left(c.data[(i0 + i) * c.row + j * c.column]);
#pragma GCC unroll 8
          for (int k = 0; k < width.value; ++k) {
            sums[i][k] = at::vec::fmadd(left, right[k], sums[i][k]);
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < block.value; ++i) {
#pragma GCC unroll 8
        for (int k = 0; k < width.value; ++k) {
          sums[i][k].store(out + (i0 + i) * stride + d + k * Vec<acc>::size(), static_cast<int>(filled(k)));
        }
      }
    };
    int64_t d = 0;
    for (; d + kColumns * lanes <= size; d += kColumns * lanes) {
      column_block(std::integral_constant<int, kColumns>(), d, lanes);
    }
    for (; d + lanes <= size; d += lanes) {
      column_block(std::integral_constant<int, 1>(), d, lanes);
    }
    if (d < size) {
      column_block(std::integral_constant<int, 1>(), d, size - d);
    }
  });
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

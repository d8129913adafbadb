// The two matrix products of attention, over rows given by address so that a mask's gaps and any stride cost nothing.
//
//   dot_products   out[i][j] = factor a_i . b_j           scores, and the gradient of the weights
//   multiply       out[i] += sum_k c(i, k) b_k            contexts, and the gradients of rows
//
// multiply broadcasts its coefficients, so that no sum crosses a vector: with the 64 or more k of a tile it runs at 80 to 95 % of
// the multiply-add peak, as oneDNN's brgemm does. Dot products of many rows go its way too, over b transposed block by block; those
// of a few rows, whose transposition would not pay, sum along vectors.
#pragma once

#include "transpose.h"
#include "vec.h"

#include <utility>

namespace attn_ext::cpu::CPU_CAPABILITY {

// Accumulators of a register tile of multiply, and its greatest height. AVX-512 has 32 registers: 6 x 4 accumulators, 4 vectors of
// b and a coefficient; AVX2 has 16: 6 x 2, 2 and 1. Two multiply-adds a cycle with a latency of four need eight at least. Without
// either, a vector of PyTorch's takes two registers.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kAccumulators = 24, kTallest = 6;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kAccumulators = 12, kTallest = 6;
#else
constexpr int kAccumulators = 4, kTallest = 2;
#endif

// The square register tile of sums along vectors: 4 x 4 accumulators and their 8 operands, or half of the columns.
constexpr int kRows = kTallest < 4 ? kTallest : 4;
constexpr int kColumns = kAccumulators / kTallest;

// Vectors abreast in a register tile of so many rows: a power of two, at most 8.
constexpr int abreast(int rows) {
  int width = 8;
  while (rows * width > kAccumulators) {
    width /= 2;
  }
  return width;
}

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

// The same, but as even as blocks of at most `block` can be: a last one of a single row would wait for its own results.
template <int block, class F>
void for_even_blocks(int64_t count, const F& f) {
  const int64_t blocks = (count + block - 1) / block;
  for (int64_t left = blocks, first = 0; left > 0; --left) {
    const int64_t rows = (count - first + left - 1) / left;
    [&]<int... n>(std::integer_sequence<int, n...>) {
      (void)((rows == n + 1 && (f(std::integral_constant<int, n + 1>(), first), true)) || ...);
    }(std::make_integer_sequence<int, block>());
    first += rows;
  }
}

// Coefficients as they stand, or transposed: c(i, k) = data[i * row + k * column].
template <class acc>
struct Coefficients {
  const acc* data;
  int64_t row;
  int64_t column;
};

// multiply's register tile: `rows` by `width` vectors over all k. Of a partial one, a single vector, `count` elements exist.
template <int rows, int width, bool partial, class acc>
[[gnu::always_inline]] inline void multiply_tile(
    acc* out,
    int64_t stride,
    Coefficients<acc> c,
    const acc* const* b,
    int64_t n,
    int64_t depth,
    int64_t count,
    bool add,
    acc factor) {
  static_assert(!partial || width == 1);
  constexpr int lanes = Vec<acc>::size();
  const auto load = [&](const acc* from) { return partial ? Vec<acc>::loadu(from, count) : Vec<acc>::loadu(from); };
  Vec<acc> sums[rows][width];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int w = 0; w < width; ++w) {
      sums[i][w] = add ? load(out + i * stride + w * lanes) : Vec<acc>(0);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    const acc* from = b[k] + n;
    Vec<acc> right[width];
#pragma GCC unroll 8
    for (int w = 0; w < width; ++w) {
      right[w] = load(from + w * lanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vec<acc> coefficient(c.data[i * c.row + k * c.column]);
#pragma GCC unroll 8
      for (int w = 0; w < width; ++w) {
        sums[i][w] = at::vec::fmadd(coefficient, right[w], sums[i][w]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int w = 0; w < width; ++w) {
      (sums[i][w] * Vec<acc>(factor)).store(out + i * stride + w * lanes, partial ? static_cast<int>(count) : lanes);
    }
  }
}

// Columns n .. size of the rows, `width` vectors abreast, then half as many, and part of a vector last.
template <int tallest, int width, class acc>
void multiply_columns(
    int64_t n,
    acc* out,
    int64_t stride,
    int64_t height,
    Coefficients<acc> c,
    const acc* const* b,
    int64_t depth,
    int64_t size,
    bool add,
    acc factor) {
  constexpr int64_t lanes = Vec<acc>::size();
  const auto tiles = [&](auto partial) {
    for_even_blocks<tallest>(height, [&](auto rows, int64_t i) {
      const Coefficients<acc> block{c.data + i * c.row, c.row, c.column};
      multiply_tile<rows.value, width, partial.value>(out + i * stride + n, stride, block, b, n, depth, size - n, add, factor);
    });
  };
  for (; n + width * lanes <= size; n += width * lanes) {
    tiles(std::false_type());
  }
  if constexpr (width > 1) {
    multiply_columns<tallest, width / 2>(n, out, stride, height, c, b, depth, size, add, factor);
  } else if (n < size) {
    tiles(std::true_type());
  }
}

// out_i = factor (out_i + sum_k c(i, k) b_k), without the first out_i unless `add`; for `height` rows of out, `stride` apart. A
// block of b, all k by a few vectors, stays in the first-level cache while out's rows pass.
template <class acc>
void multiply(
    acc* out,
    int64_t stride,
    int64_t height,
    Coefficients<acc> c,
    const acc* const* b,
    int64_t depth,
    int64_t size,
    bool add,
    acc factor = 1) {
  if (height == 1) {
    // As many accumulators, from more vectors abreast.
    multiply_columns<1, abreast(1)>(0, out, stride, height, c, b, depth, size, add, factor);
  } else {
    multiply_columns<kTallest, abreast(kTallest)>(0, out, stride, height, c, b, depth, size, add, factor);
  }
}

// out[i][j] = factor * (the sum of sums[i][j]); out's rows are `stride` apart.
template <int rows, int columns, class acc>
inline void store_sums(acc* out, int64_t stride, const Vec<acc> (&sums)[rows][columns], acc factor) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<acc, float> && rows == 4 && columns == 4) {
    return store_sixteen_sums(out, stride, sums, factor);
  }
#endif
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    if constexpr (columns == 4) {
      acc four[4];
      sum_four<acc>(four, sums[i]);
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) {
        out[i * stride + j] = factor * four[j];
      }
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) {
        out[i * stride + j] = factor * sum(sums[i][j]);
      }
    }
  }
}

// out[i][j] = factor * sum_d a[i][d] b[j][d], summed along vectors: for a few rows.
template <class acc>
void sum_products(
    acc* out,
    int64_t stride,
    const acc* const* a,
    int64_t a_count,
    const acc* const* b,
    int64_t b_count,
    int64_t size,
    acc factor) {
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
      store_sums<rows.value, columns.value>(out + i0 * stride + j0, stride, sums, factor);
    });
  });
}

// A block of b transposed: kPanelDepth features of kPanelWidth rows, 64 KiB, used at once by all rows of a.
constexpr int64_t kPanelWidth = 64;
constexpr int64_t kPanelDepth = 256;

// Rows of a from which on a panel pays.
constexpr int64_t kPanelRows = 16;

// Elements of scratch for dot_products of up to `rows` rows a.
template <class acc>
constexpr int64_t panel_size(int64_t rows) {
  return kTransposes<acc> && rows >= kPanelRows ? kPanelWidth * kPanelDepth : 0;
}

// out[i][j] = factor a_i . b_j; out's rows are `stride` apart. `panel` is scratch of panel_size.
template <class acc>
void dot_products(
    acc* out,
    int64_t stride,
    const acc* const* a,
    int64_t a_count,
    const acc* const* b,
    int64_t b_count,
    int64_t size,
    acc factor,
    acc* panel) {
  int64_t j0 = 0;
  if constexpr (kTransposes<acc>) {
    if (a_count >= kPanelRows) {
      // What is left of whole vectors is cheaper by sums, unless it is most of one.
      constexpr int64_t lanes = Vec<acc>::size();
      const int64_t rest = b_count % lanes;
      const int64_t paneled = rest > lanes / 2 ? b_count : b_count - rest;
      const acc* columns[kPanelDepth];
      for (int64_t k = 0; k < kPanelDepth; ++k) {
        columns[k] = panel + k * kPanelWidth;
      }
      for (; j0 < paneled; j0 += kPanelWidth) {
        const int64_t width = std::min(kPanelWidth, paneled - j0);
        for (int64_t d = 0; d < size; d += kPanelDepth) {
          const int64_t depth = std::min(kPanelDepth, size - d);
          transpose(panel, kPanelWidth, b + j0, width, d, depth);
          // a's rows are evenly spaced: they are queries.
          multiply<acc>(
              out + j0,
              stride,
              a_count,
              {a[0] + d, a_count > 1 ? a[1] - a[0] : 0, 1},
              columns,
              depth,
              (width + lanes - 1) / lanes * lanes,
              d > 0,
              d + depth == size ? factor : acc(1));
        }
      }
      j0 = std::min(j0, paneled);
    }
  }
  if (j0 < b_count) {
    sum_products(out + j0, stride, a, a_count, b + j0, b_count - j0, size, factor);
  }
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

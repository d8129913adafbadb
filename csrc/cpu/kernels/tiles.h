// Products of pairs of bfloat16 by the processor's matrix tiles (AMX): 16 rows of 16 pairs by 16 pairs of 16 columns an
// instruction, 16 times the multiply-adds of AVX-512's.
#pragma once

#include "cache.h"
#include "factors.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// Rows of a tile, and the numbers of 32 bits in one.
constexpr int64_t kTileRows = 16;

template <class element>
constexpr bool kTakesTiles = false;

// While it lives, this thread's tiles are whole ones where products of `element` take them. Left so, they would slow down others.
template <class element>
class MatrixTiles {
 public:
  MatrixTiles() {}
};

#if defined(__AMX_BF16__)
template <>
constexpr bool kTakesTiles<Pair> = true;

// What ldtilecfg reads.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <>
class MatrixTiles<Pair> {
 public:
  MatrixTiles() {
    _tile_loadconfig(&kWhole);
  }

  ~MatrixTiles() {
    _tile_release();
  }

  MatrixTiles(const MatrixTiles&) = delete;
  MatrixTiles& operator=(const MatrixTiles&) = delete;

 private:
  static constexpr TileConfiguration kWhole{};
};

// sums (+)= a b for 16 `rows` of a, `depth` pairs each, a multiple of 16, and 16 `columns` of b, the next ones
// `b_columns` behind: four loads serve four products. A load takes half as long as a product, and the lines that are wanted
// next are asked for beside them.
template <int rows, int columns>
inline void tile_products(
    float* sums,
    int64_t stride,
    bool add,
    const Pair* a,
    int64_t a_stride,
    const Pair* b,
    int64_t b_stride,
    int64_t b_columns,
    int64_t depth,
    Ahead& ahead) {
  const int64_t a_bytes = a_stride * sizeof(Pair), b_bytes = b_stride * sizeof(Pair), bytes = stride * sizeof(float);
  float* const below = sums + kTileRows * stride;
  asm volatile("" ::: "memory");  // the compiler does not know that these instructions read
  if (add) {
    _tile_loadd(0, sums, bytes);
    if constexpr (columns == 2) {
      _tile_loadd(1, sums + kTileRows, bytes);
    }
    if constexpr (rows == 2) {
      _tile_loadd(2, below, bytes);
    }
    if constexpr (rows == 2 && columns == 2) {
      _tile_loadd(3, below + kTileRows, bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  constexpr int lines_a_step = rows * columns;
  for (int64_t k = 0; k < depth; k += kTileRows) {
    const Ahead::Lines lines = ahead.take(lines_a_step);
    for (int64_t i = 0; i < lines.count; ++i) {
      fetch(lines.first + i * Ahead::kLine);
    }
    _tile_loadd(6, b + k * b_stride, b_bytes);
    _tile_loadd(4, a + k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (columns == 2) {
      _tile_loadd(7, b + b_columns + k * b_stride, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (rows == 2) {
      _tile_loadd(5, a + kTileRows * a_stride + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (rows == 2 && columns == 2) {
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, bytes);
  if constexpr (columns == 2) {
    _tile_stored(1, sums + kTileRows, bytes);
  }
  if constexpr (rows == 2) {
    _tile_stored(2, below, bytes);
  }
  if constexpr (rows == 2 && columns == 2) {
    _tile_stored(3, below + kTileRows, bytes);
  }
}

#endif

}  // namespace attn_ext::cpu::CPU_CAPABILITY

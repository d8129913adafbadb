// The products of products.h by matrix tiles (tiles.h). Their left factor has its pairs along a row, their right one, a panel of
// columns, from row to row, so that a tile's lines lie one behind the other and share no set of the cache. Pairs of bfloat16 stand
// so in a query or a memory; rows of floats are taken into their parts, block by block.
#pragma once

#include "operands.h"
#include "transpose.h"

#include <utility>

namespace attn_ext::cpu::CPU_CAPABILITY {

// What taking a number of either factor into three parts costs, the right one's from rows or transposed, in multiply-adds of such
// numbers by tiles; and what a multiply-add of floats does, less what the caches take besides. Measured on a Xeon.
constexpr int64_t kTakeLeft = 24, kTakeRows = 16, kTakeColumns = 34;
constexpr double kMultiplyAdd = 1.75;

// Multiply-adds below which registers are faster anyhow.
constexpr int64_t kWorthTiles = 1 << 19;

// Whether a product, whose factors need not fill their tiles, is faster by them. Pairs are there to begin with.
template <class element>
bool is_worth_tiles(int64_t height, int64_t depth, int64_t width, int parts, int64_t take_right) {
  if constexpr (std::is_same_v<element, Pair>) {
    return true;
  } else {
    const int64_t work = height * width * depth;
    const int64_t filled = whole_tiles(height) * whole_tiles(width) * ceil_div(depth, 2 * kTileRows) * 2 * kTileRows;
    const int64_t taken = (kTakeLeft * height + take_right * width) * depth;
    return work >= kWorthTiles && filled * parts * (parts + 1) / 12 + taken * (parts + 1) / 4 <= kMultiplyAdd * work;
  }
}

#if defined(__AMX_BF16__)

// The right factor: columns of a panel, with room for so many numbers along the index that is summed over.
template <class element, int parts>
struct TilePanel : TileBuffer<parts> {
  static constexpr int64_t kDepth = std::is_same_v<element, Pair> ? 2 * kPanelDepth : kPartsDepth;
  static_assert(
      TileBuffer<parts>::size(kPanelWidth / kTileRows, kDepth) * sizeof(Pair) <= kPanelWidth * kPanelDepth * sizeof(element));

  explicit TilePanel(element* panel) : TileBuffer<parts>(panel, kDepth) {}

  // Of the group of column n.
  Pair* pair(int64_t n, int64_t k) const {
    return this->line(n / kTileRows, k / kTileRows, k % kTileRows);
  }

  // Zeros below `pairs` pairs, as far as the last tile goes.
  void fill_up(int64_t pairs, int64_t width) const {
    for (int64_t n = 0; n < width; n += kTileRows) {
      for (int64_t k = pairs; k % kTileRows != 0; ++k) {
        for (int p = 0; p < parts; ++p) {
          std::fill_n(pair(n, k) + p * this->kPart, kTileRows, Pair{});
        }
      }
    }
  }
};

// Numbers n .. n + width of `depth` rows of b.
inline void take_rows(const TilePanel<Pair, 1>& panel, const Pair* const* b, int64_t n, int64_t width, int64_t depth) {
  for (int64_t k = 0; k < depth; k += 2) {
    zip_rows(panel.pair(0, k / 2), b[k], k + 1 < depth ? b[k + 1] : nullptr, n, width, panel.group);
  }
}

template <int parts>
void take_rows(const TilePanel<float, parts>& panel, const float* const* b, int64_t n, int64_t width, int64_t depth) {
  for (int64_t k = 0; k < depth; k += 2) {
    const float* const even = b[k] + n;
    const float* const odd = k + 1 < depth ? b[k + 1] + n : nullptr;
    Pair* to = panel.pair(0, k / 2);
    for (int64_t j = 0; j < width; j += kTileRows, to += panel.group) {
      const int64_t count = std::min(kTileRows, width - j);
      const auto second = odd == nullptr ? Vec<float>(0) : Vec<float>::loadu(odd + j, count);
      split_pairs<parts>(to, panel.kPart, Vec<float>::loadu(even + j, count), second);
    }
  }
}

// Rows of b as columns, `depth` of their elements from d on.
inline void take_columns(const TilePanel<Pair, 1>& panel, const Pair* const* b, int64_t width, int64_t d, int64_t depth) {
  for (int64_t j = 0; j < width; j += kTileRows) {
    transpose(panel.pair(j, 0), kTileRows, b + j, std::min(kTileRows, width - j), d, depth);
  }
}

template <int parts>
void take_columns(const TilePanel<float, parts>& panel, const float* const* b, int64_t width, int64_t d, int64_t depth) {
  alignas(64) float columns[panel.kDepth * kTileRows];
  for (int64_t j = 0; j < width; j += kTileRows) {
    transpose(columns, kTileRows, b + j, std::min(kTileRows, width - j), d, depth);
    for (int64_t k = 0; k < depth; k += 2) {
      const float* const even = columns + k * kTileRows;
      const auto odd = k + 1 < depth ? Vec<float>::loadu(even + kTileRows) : Vec<float>(0);
      split_pairs<parts>(panel.pair(j, k / 2), panel.kPart, Vec<float>::loadu(even), odd);
    }
  }
}

// Blocks of the result, factor (a b + what is there, if it is to `add`), with the columns of a panel. There are 16 rows of a, or
// those that are missing may be read.
template <int parts>
void multiply_panel(
    float* out,
    int64_t stride,
    bool add,
    float factor,
    int64_t height,
    int64_t width,
    const Tiles& a,
    const Tiles& panel,
    int64_t tiles,
    Ahead& ahead) {
  alignas(64) float sums[2 * kTileRows * 2 * kTileRows];
  const auto block = [&](auto rows, auto columns, int64_t i, int64_t n) {
    constexpr int64_t tall = rows * kTileRows, wide = columns * kTileRows, apart = 2 * kTileRows;
    // A last tile of fewer rows takes some of those before it once more, or, in scratch, what there is.
    const int64_t first = a.is_in_place() ? std::max<int64_t>(std::min(i, height - tall), 0) : i;
    const int64_t end = std::min(height, first + tall);
    const Tiles left = a.from(first), right = panel.from(n);
    if (factor == 1 && first == i && end - i == tall && n + wide <= width) {
      return tile_products<parts, rows, columns>(out + i * stride + n, stride, add, left, right, tiles, ahead);
    }
    tile_products<parts, rows, columns>(sums, apart, false, left, right, tiles, ahead);
    for (int64_t t = i; t < end; ++t) {
      float* const to = out + t * stride + n;
      for (int64_t j = 0; j < std::min(wide, width - n); j += kTileRows) {
        const int64_t count = std::min(kTileRows, width - n - j);
        Vec<float> sum = Vec<float>::loadu(sums + (t - first) * apart + j);
        if (add) {
          sum = sum + Vec<float>::loadu(to + j, count);
        }
        (sum * Vec<float>(factor)).store(to + j, static_cast<int>(count));
      }
    }
  };
  constexpr std::integral_constant<int64_t, 1> one;
  constexpr std::integral_constant<int64_t, 2> two;
  for (int64_t n = 0; n < width; n += 2 * kTileRows) {
    const bool wide = width - n > kTileRows;
    for (int64_t i = 0, rows; i < height; i += rows) {
      const bool tall = height >= 2 * kTileRows && height - i > kTileRows;
      rows = tall ? 2 * kTileRows : kTileRows;
      if (tall && wide) {
        block(two, two, i, n);
      } else if (tall) {
        block(two, one, i, n);
      } else if (wide) {
        block(one, two, i, n);
      } else {
        block(one, one, i, n);
      }
    }
  }
}

// The left factor: row i of `depth` numbers, times a factor, filled up with zeros.
template <int parts>
void take_row(const TileBuffer<parts>& left, int64_t i, const float* row, int64_t depth, float factor) {
  const Vec<float> times(factor);
  Pair* to = left.line(i / kTileRows, 0, i % kTileRows);
  for (int64_t k = 0; k < depth; k += 2 * kTileRows, to += left.kTile) {
    const int64_t low = std::min(kTileRows, depth - k), high = std::min(kTileRows, depth - k - low);
    const Vec<float> upper = high > 0 ? Vec<float>::loadu(row + k + kTileRows, high) : Vec<float>(0);
    split_neighbours<parts>(to, left.kPart, Vec<float>::loadu(row + k, low) * times, upper * times);
  }
}

// Coefficients, times their rows' factors. Those that come by columns are transposed first.
template <int parts>
void take_coefficients(
    const TileBuffer<parts>& left, int64_t height, const Coefficients<float>& c, int64_t depth, const Result<float>& out) {
  if (c.column == 1) {
    for (int64_t i = 0; i < height; ++i) {
      take_row(left, i, c.data + i * c.row, depth, out.factors[i * out.step]);
    }
    return;
  }
  constexpr int64_t stride = kPanelDepth + kTileRows;
  alignas(64) float rows[kTileRows * stride];
  const float* columns[kPanelDepth];
  for (int64_t k = 0; k < depth; ++k) {
    columns[k] = c.data + k * c.column;
  }
  for (int64_t first = 0; first < height; first += kTileRows) {
    const int64_t count = std::min(kTileRows, height - first);
    transpose(rows, stride, columns, depth, first, count);
    for (int64_t i = 0; i < count; ++i) {
      take_row(left, first + i, rows + i * stride, depth, out.factors[(first + i) * out.step]);
    }
  }
}

// take(panel, n, width, k, depth) brings `depth` of the right factor's numbers, from the k-th on, of the columns n .. n + width.
template <int parts, class element, class Take>
void multiply_in_parts(
    Result<float> out,
    int64_t height,
    Coefficients<float> c,
    int64_t depth,
    int64_t size,
    Workspace<element>& work,
    const Take& take) {
  const TilePanel<element, parts> panel(work.panel);
  const TileBuffer<parts> left(work.left, depth);
  take_coefficients(left, height, c, depth, out);
  for (int64_t n = 0; n < size; n += kPanelWidth) {
    const int64_t width = std::min(kPanelWidth, size - n);
    const Result<float> to = out.at(0, n);
    to.begin(height, width);
    // Of no depth it is 0.
    int64_t k = 0;
    do {
      const int64_t count = std::min(panel.kDepth, depth - k), pairs = ceil_div(count, 2);
      take(panel, n, width, k, count);
      panel.fill_up(pairs, width);
      const Tiles coefficients = left.from(k / (2 * kTileRows)), columns = panel.from(0);
      const bool add = to.plus != nullptr || k > 0;
      const int64_t tiles = ceil_div(pairs, kTileRows);
      multiply_panel<parts>(to.to, to.stride, add, 1, height, width, coefficients, columns, tiles, work.ahead);
      k += panel.kDepth;
    } while (k < depth);
  }
}

template <int parts, class element>
void dot_products_in_parts(
    float* out,
    int64_t stride,
    const element* const* a,
    int64_t a_count,
    const element* const* b,
    int64_t b_count,
    int64_t size,
    float factor,
    Workspace<element>& work) {
  constexpr bool in_place = std::is_same_v<element, Pair>;
  const TilePanel<element, parts> panel(work.panel);
  const TileBuffer<parts> left(work.left, panel.kDepth);
  constexpr int64_t kStep = in_place ? panel.kDepth / 2 : panel.kDepth;
  for (int64_t d = 0; d < size; d += kStep) {
    const int64_t depth = std::min(kStep, size - d), pairs = in_place ? depth : ceil_div(depth, 2);
    Tiles rows = left.from(0);
    if constexpr (in_place) {
      // a's rows are evenly spaced: they are queries or their gradients.
      rows = Tiles::in_place(a[0] + d, a_count > 1 ? a[1] - a[0] : 0);
    } else {
      for (int64_t i = 0; i < a_count; ++i) {
        take_row(left, i, a[i] + d, depth, factor);
      }
    }
    for (int64_t j = 0; j < b_count; j += kPanelWidth) {
      const int64_t width = std::min(kPanelWidth, b_count - j);
      take_columns(panel, b + j, width, d, depth);
      panel.fill_up(pairs, width);
      multiply_panel<parts>(
          out + j,
          stride,
          d > 0,
          in_place && d + depth == size ? factor : 1,
          a_count,
          whole_tiles(width),
          rows,
          panel.from(0),
          ceil_div(pairs, kTileRows),
          work.ahead);
    }
  }
}

// f(parts) of the products of `element`.
template <class element, class F>
void with_parts(int parts, const F& f) {
  if constexpr (std::is_same_v<element, Pair>) {
    f(std::integral_constant<int, 1>());
  } else if (parts == 2) {
    f(std::integral_constant<int, 2>());
  } else {
    f(std::integral_constant<int, 3>());
  }
}

template <class element>
void multiply_by_tiles(
    Result<float> out,
    int64_t height,
    Coefficients<float> c,
    const element* const* b,
    int64_t depth,
    int64_t size,
    Workspace<element>& work) {
  with_parts<element>(work.parts, [&](auto parts) {
    const auto take = [&](const auto& panel, int64_t n, int64_t width, int64_t k, int64_t count) {
      take_rows(panel, b + k, n, width, count);
    };
    multiply_in_parts<parts>(out, height, c, depth, size, work, take);
  });
}

// The same where b comes by columns: find(n, width) has the addresses of those from n on.
template <class Find>
void multiply_columns_by_tiles(
    Result<float> out,
    int64_t height,
    Coefficients<float> c,
    const Find& find,
    int64_t depth,
    int64_t size,
    Workspace<float>& work) {
  with_parts<float>(work.parts, [&](auto parts) {
    const float* const* columns = nullptr;
    const auto take = [&](const auto& panel, int64_t n, int64_t width, int64_t k, int64_t count) {
      columns = k == 0 ? find(n, width) : columns;
      take_columns(panel, columns, width, k, count);
    };
    multiply_in_parts<parts>(out, height, c, depth, size, work, take);
  });
}

template <class element>
void dot_products_by_tiles(
    float* out,
    int64_t stride,
    const element* const* a,
    int64_t a_count,
    const element* const* b,
    int64_t b_count,
    int64_t size,
    float factor,
    Workspace<element>& work) {
  with_parts<element>(
      work.parts, [&](auto parts) { dot_products_in_parts<parts>(out, stride, a, a_count, b, b_count, size, factor, work); });
}

#endif

}  // namespace attn_ext::cpu::CPU_CAPABILITY

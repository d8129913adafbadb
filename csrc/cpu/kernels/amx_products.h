// The products of products.h by matrix tiles (amx.h). Their left operand has its pairs along a row, their right one, a panel of
// columns, from row to row, so that a tile's lines lie one behind the other and share no set of the cache. Pairs of
// bfloat16 stand so in a query or a memory; rows of floats are packed, split into their parts, block by block.
#pragma once

#include "operands.h"
#include "transpose.h"

#include <utility>

namespace attn_ext::cpu::CPU_CAPABILITY {

// Costs on a Xeon, in multiply-adds of three-part floats by AMX: of packing a number of the left operand; one of the right operand
// from rows, or from columns beyond what registers spend on transposing; and of beginning after other work.
constexpr int64_t kPackLeft = 40, kPackRows = 38, kPackColumns = 26, kBegin = 1 << 17;
// Of a multiply-add by registers; and what AMX adds to an exponential. After tiles, vectors are slower for some time, multiply-adds
// by a fifth, which is why neighbouring products go the same way.
constexpr double kMultiplyAdd = 2.0, kSlowerExponential = 0.7;

// How much longer a product takes by AMX, whose tiles its operands need not fill, than by registers.
constexpr double excess_of_amx(int64_t height, int64_t depth, int64_t width, int parts, int64_t pack_right) {
  const double work = static_cast<double>(height) * width * depth;
  const double filled =
      static_cast<double>(whole_amx_tiles(height) * whole_amx_tiles(width)) * ceil_div(depth, 2 * kAmxRows) * 2 * kAmxRows;
  const double packing = static_cast<double>(kPackLeft * height + pack_right * width) * depth;
  return filled * parts * (parts + 1) / 12 + packing * (parts + 1) / 4 - kMultiplyAdd * work;
}

// Whether products go by AMX: of pairs wherever there are tiles, of floats all that follow each other, whose excess that is, or
// none.
template <class element>
constexpr bool is_worth_amx(double excess) {
  return kHasAmx<element> && (kIsPaired<element> || kBegin + excess <= 0);
}

// The excess of an item's queries with a tile of memory.
struct AmxExcess {
  const Problem& problem;
  int64_t queries;
  int64_t steps;
  int parts;

  AmxExcess(const Problem& problem, const Plan& plan)
      : problem(problem),
        queries(std::min(plan.chunk, kChunk)),
        steps(std::min({plan.tile, plan.split_size, problem.steps})),
        parts(parts_of(problem.product_dtype)) {}

  // Scores, or their gradients: dot products of rows of `size` numbers.
  double of_scores(int64_t size) const {
    return excess_of_amx(queries, size, steps, parts, kPackColumns);
  }

  // What is summed of the memory's rows, or into their gradient.
  double of_rows() const {
    return excess_of_amx(queries, steps, problem.memory_size, parts, kPackRows);
  }

  double of_exponentials() const {
    return kSlowerExponential * queries * steps * problem.key_size;
  }
};

#if defined(__AMX_BF16__)

// The right operand: 32 columns of it, so many numbers of each along the index that is summed over. A workspace has two panels: one
// is multiplied, and the next one packed meanwhile.
template <class element, int parts>
struct AmxPanel : AmxBuffer<parts> {
  static constexpr int64_t kWidth = 2 * kAmxRows;
  static constexpr int64_t kDepth = kIsPaired<element> ? 2 * kPanelDepth : kPartsDepth<parts>;
  static constexpr int64_t kSize = AmxBuffer<parts>::size(2, kDepth);
  static_assert(2 * kSize * sizeof(Pair) <= kPanelWidth * kPanelDepth * sizeof(element));

  AmxPanel() = default;

  AmxPanel(const Workspace<element>& work, int which)
      : AmxBuffer<parts>(reinterpret_cast<Pair*>(work.panel) + which * kSize, kDepth) {}
};

// Floats are packed in steps. A matrix product leaves the vectors' units idle for most of its 16 cycles: some have a step at their
// side. Pairs, of whose products there are a sixth as many, are packed at once.
template <class Packer>
class PackSteps {
 public:
  int64_t steps_left() const {
    return left_;
  }

  [[gnu::noinline]] void step() {
    static_cast<Packer*>(this)->pack();
    --left_;
  }

  [[gnu::noinline]] void finish() {
    for (; left_ > 0; --left_) {
      static_cast<Packer*>(this)->pack();
    }
  }

 protected:
  int64_t left_ = 0;
};

struct AtOnce {
  static constexpr int64_t steps_left() {
    return 0;
  }

  void step() {}

  void finish() {}
};

// Zeros below the last of a panel's pairs, as far as its last tile goes.
inline void fill_up(const AmxPanel<Pair, 1>& panel, int64_t pairs) {
  for (int64_t k = pairs; k < whole_amx_tiles(pairs); ++k) {
    std::fill_n(panel.line(0, 0, k), kAmxRows, Pair{});
    std::fill_n(panel.line(1, 0, k), kAmxRows, Pair{});
  }
}

// A panel from rows of b.
template <class element, int parts>
class RowsPacker;

template <>
class RowsPacker<Pair, 1> : public AtOnce {
 public:
  // Numbers n .. n + width of `depth` rows.
  void begin(const AmxPanel<Pair, 1>& panel, const Pair* const* b, int64_t n, int64_t width, int64_t depth) {
    for (int64_t k = 0; k < depth; k += 2) {
      zip_rows(panel.line(0, 0, k / 2), b[k], k + 1 < depth ? b[k + 1] : nullptr, n, width, panel.group);
    }
    fill_up(panel, ceil_div(depth, 2));
  }
};

// The order in which a product sums up is free: pairs are numbers i and i + 8 of 16 along that index, which spares permutations. A
// step packs two rows.
template <int parts>
class RowsPacker<float, parts> : public PackSteps<RowsPacker<float, parts>> {
  friend class PackSteps<RowsPacker<float, parts>>;
  using PackSteps<RowsPacker<float, parts>>::left_;

 public:
  void begin(const AmxPanel<float, parts>& panel, const float* const* b, int64_t n, int64_t width, int64_t depth) {
    panel_ = panel;
    width_ = width;
    left_ = whole_amx_tiles(ceil_div(depth, 2));
    line_ = 0;
    for (int64_t k = 0; k < depth; ++k) {
      rows_[k] = b[k] + n;
    }
    std::fill(rows_ + depth, rows_ + 2 * left_, kZeros);
  }

 private:
  void pack() {
    const float* const* const row = rows_ + line_ / 8 * 16 + line_ % 8;
    const float *const x = row[0], *const y = row[8];
    Pair* const to = panel_.line(0, line_ / kAmxRows, line_ % kAmxRows);
    if (width_ == panel_.kWidth) {
      split_pairs<parts>(to, panel_.kPart, Vec<float>::loadu(x), Vec<float>::loadu(y));
      split_pairs<parts>(to + panel_.group, panel_.kPart, Vec<float>::loadu(x + kAmxRows), Vec<float>::loadu(y + kAmxRows));
    } else {
      for (int64_t n = 0; n < width_; n += kAmxRows) {
        const auto some = [&](const float* row) { return Vec<float>(_mm512_maskz_loadu_ps(first_lanes(width_ - n), row + n)); };
        split_pairs<parts>(to + n / kAmxRows * panel_.group, panel_.kPart, some(x), some(y));
      }
    }
    ++line_;
  }

  alignas(64) static constexpr float kZeros[AmxPanel<float, parts>::kWidth] = {};

  AmxPanel<float, parts> panel_;
  const float* rows_[AmxPanel<float, parts>::kDepth];
  int64_t width_, line_;
};

// A panel from rows of b as columns.
template <class element, int parts>
class ColumnsPacker;

template <>
class ColumnsPacker<Pair, 1> : public AtOnce {
 public:
  // `depth` elements from d on of `width` rows.
  void begin(const AmxPanel<Pair, 1>& panel, const Pair* const* b, int64_t width, int64_t d, int64_t depth) {
    for (int64_t j = 0; j < width; j += kAmxRows) {
      transpose(panel.line(j / kAmxRows, 0, 0), kAmxRows, b + j, std::min(kAmxRows, width - j), d, depth);
    }
    fill_up(panel, depth);
  }
};

// 16 numbers of 16 rows are packed in six steps, two for eight rows each and four for two lines of pairs each, or at once, in
// registers.
template <int parts>
class ColumnsPacker<float, parts> : public PackSteps<ColumnsPacker<float, parts>> {
  friend class PackSteps<ColumnsPacker<float, parts>>;
  using PackSteps<ColumnsPacker<float, parts>>::left_;

 public:
  void begin(const AmxPanel<float, parts>& panel, const float* const* b, int64_t width, int64_t d, int64_t depth) {
    panel_ = panel;
    depth_ = depth;
    squares_ = 2 * ceil_div(depth, 2 * kAmxRows);
    left_ = kStepsOfSquare * squares_ * ceil_div(width, kAmxRows);
    group_ = square_ = step_ = 0;
    for (int64_t j = 0; j < whole_amx_tiles(width); ++j) {
      rows_[j] = b[std::min(j, width - 1)] + d;
    }
  }

  [[gnu::noinline]] void finish() {
    while (left_ > 0 && step_ > 0) {
      this->step();
    }
    for (; left_ > 0; left_ -= kStepsOfSquare) {
      __m512 fours[kAmxRows];
#pragma GCC unroll 4
      for (int i = 0; i < kAmxRows; i += 4) {
        transpose_rows(fours, i);
      }
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        pack_lines(fours, c);
      }
      next_square();
    }
  }

 private:
  static constexpr int kStepsOfSquare = 6;

  void pack() {
    if (step_ < 2) {
      transpose_rows(fours_, 8 * step_);
      transpose_rows(fours_, 8 * step_ + 4);
    } else {
      pack_lines(fours_, step_ - 2);
    }
    if (++step_ == kStepsOfSquare) {
      step_ = 0;
      next_square();
    }
  }

  void next_square() {
    if (++square_ == squares_) {
      square_ = 0;
      ++group_;
    }
  }

  void transpose_rows(__m512* fours, int64_t i) const {
    const float* const* const row = rows_ + group_ * kAmxRows + i;
    const int64_t d = square_ * kAmxRows;
    if (d + kAmxRows <= depth_) {
      const auto load = [&](int j) { return _mm512_loadu_ps(row[j] + d); };
      transpose_fours(fours + i, load(0), load(1), load(2), load(3));
    } else {
      const auto load = [&](int j) { return _mm512_maskz_loadu_ps(first_lanes(depth_ - d), row[j] + d); };
      transpose_fours(fours + i, load(0), load(1), load(2), load(3));
    }
  }

  // Lines c and c + 4.
  void pack_lines(const __m512* fours, int64_t c) const {
    Pair* const to = panel_.line(group_, square_ / 2, square_ % 2 * 8 + c);
    const TwoColumns even = columns_of_fours<false>(fours, c), odd = columns_of_fours<true>(fours, c);
    split_pairs<parts>(to, panel_.kPart, Vec<float>(even.first), Vec<float>(even.second));
    split_pairs<parts>(to + 4 * kAmxRows, panel_.kPart, Vec<float>(odd.first), Vec<float>(odd.second));
  }

  AmxPanel<float, parts> panel_;
  const float* rows_[AmxPanel<float, parts>::kWidth];
  int64_t depth_, squares_, group_, square_;
  int step_;
  __m512 fours_[kAmxRows];
};

// The columns of a panel, factor (a b + what is there, if it is to `add`), in one order wherever the result's edges are. There are
// 16 rows of a, or those that are missing may be read.
template <int parts, class Packer>
void multiply_panel(
    float* out,
    int64_t stride,
    bool add,
    float factor,
    int64_t height,
    int64_t width,
    const AmxOperand& a,
    const AmxOperand& panel,
    int64_t tiles,
    PrefetchQueue& prefetches,
    Packer& packer) {
  constexpr int64_t sums_stride = 2 * kAmxRows;
  const int64_t products = parts * (parts + 1) / 2 * ceil_div(height, kAmxRows) * ceil_div(width, kAmxRows) * tiles;
  const int64_t every = std::max<int64_t>(1, products / std::max<int64_t>(packer.steps_left(), 1));
  alignas(64) float sums[2 * kAmxRows * sums_stride];
  const auto block = [&](auto rows, auto columns, int64_t i) {
    constexpr int64_t tall = rows * kAmxRows, wide = columns * kAmxRows;
    // A last tile of fewer rows takes some of those before it once more, or, in scratch, what there is.
    const int64_t first = a.is_in_place() ? std::max<int64_t>(std::min(i, height - tall), 0) : i;
    const int64_t end = std::min(height, first + tall);
    const AmxOperand left = a.from(first);
    if (factor == 1 && first == i && end - i == tall && wide <= width) {
      return multiply_amx_tiles<parts, rows, columns>(out + i * stride, stride, add, left, panel, tiles, prefetches, packer, every);
    }
    const auto for_vectors = [&](const auto& f) {
      for (int64_t t = i; t < end; ++t) {
        for (int64_t j = 0; j < std::min(wide, width); j += kAmxRows) {
          f(sums + (t - first) * sums_stride + j, out + t * stride + j, std::min(kAmxRows, width - j));
        }
      }
    };
    if (add) {
      for_vectors([](float* sum, const float* to, int64_t count) { Vec<float>::loadu(to, count).store(sum); });
    }
    multiply_amx_tiles<parts, rows, columns>(sums, sums_stride, add, left, panel, tiles, prefetches, packer, every);
    for_vectors([&](const float* sum, float* to, int64_t count) {
      (Vec<float>::loadu(sum) * Vec<float>(factor)).store(to, static_cast<int>(count));
    });
  };
  constexpr std::integral_constant<int64_t, 1> one;
  constexpr std::integral_constant<int64_t, 2> two;
  const bool wide = width > kAmxRows;
  for (int64_t i = 0, rows; i < height; i += rows) {
    const bool tall = height >= 2 * kAmxRows && height - i > kAmxRows;
    rows = tall ? 2 * kAmxRows : kAmxRows;
    if (tall && wide) {
      block(two, two, i);
    } else if (tall) {
      block(two, one, i);
    } else if (wide) {
      block(one, two, i);
    } else {
      block(one, one, i);
    }
  }
}

// The left operand: row i of `depth` numbers, times a factor, filled up with zeros.
template <int parts>
void pack_row(const AmxBuffer<parts>& left, int64_t i, const float* row, int64_t depth, float factor) {
  const Vec<float> times(factor);
  Pair* to = left.line(i / kAmxRows, 0, i % kAmxRows);
  const auto pack = [&](const Vec<float>& lower, const Vec<float>& upper) {
    if constexpr (parts == 1) {
      _mm512_storeu_si512(to, rounded<c10::BFloat16>(lower * times, upper * times));
    } else {
      // Numbers i and i + 8 of either.
      const __m512 x = lower * times, y = upper * times;
      const __m512 even = _mm512_shuffle_f32x4(x, y, 0x44), odd = _mm512_shuffle_f32x4(x, y, 0xee);
      split_pairs<parts>(to, left.kPart, Vec<float>(even), Vec<float>(odd));
    }
    to += left.kTile;
  };
  int64_t k = 0;
  for (; k + 2 * kAmxRows <= depth; k += 2 * kAmxRows) {
    pack(Vec<float>::loadu(row + k), Vec<float>::loadu(row + k + kAmxRows));
  }
  if (k < depth) {
    const auto some = [&](int64_t i) { return Vec<float>(_mm512_maskz_loadu_ps(first_lanes(depth - i), row + i)); };
    pack(some(k), some(k + kAmxRows));
  }
}

// Coefficients, times their rows' factors. Those that come by columns are transposed first.
template <int parts>
void pack_coefficients(
    const AmxBuffer<parts>& left, int64_t height, const Coefficients<float>& c, int64_t depth, const Result<float>& out) {
  if (c.column_stride == 1) {
    for (int64_t i = 0; i < height; ++i) {
      pack_row(left, i, c.data + i * c.row_stride, depth, out.factors[i * out.factor_stride]);
    }
    return;
  }
  constexpr int64_t stride = kPanelDepth + kAmxRows;
  alignas(64) float rows[kAmxRows * stride];
  const float* columns[kPanelDepth];
  for (int64_t k = 0; k < depth; ++k) {
    columns[k] = c.data + k * c.column_stride;
  }
  for (int64_t first = 0; first < height; first += kAmxRows) {
    const int64_t count = std::min(kAmxRows, height - first);
    transpose(rows, stride, columns, depth, first, count);
    for (int64_t i = 0; i < count; ++i) {
      pack_row(left, first + i, rows + i * stride, depth, out.factors[(first + i) * out.factor_stride]);
    }
  }
}

// The left operand from rows of a.
template <class element, int parts>
class LeftPacker;

// Where they are.
template <>
class LeftPacker<Pair, 1> : public AtOnce {
 public:
  using Rows = const Pair* const*;

  LeftPacker(const Workspace<Pair>&, Rows a, int64_t count, float) : a_(a[0]), stride_(count > 1 ? a[1] - a[0] : 0) {}

  void begin(int64_t, int64_t) {}

  // a's rows are evenly spaced: they are queries or their gradients.
  AmxOperand tiles(int64_t d) const {
    return AmxOperand::in_place(a_ + d, stride_);
  }

 private:
  const Pair* a_;
  int64_t stride_;
};

// Times a factor; a step packs one. While a block of their numbers is multiplied, the next one is packed.
template <int parts>
class LeftPacker<float, parts> : public PackSteps<LeftPacker<float, parts>> {
  friend class PackSteps<LeftPacker<float, parts>>;
  using PackSteps<LeftPacker<float, parts>>::left_;

 public:
  using Rows = const float* const*;

  LeftPacker(const Workspace<float>& work, Rows a, int64_t count, float factor)
      : scratch_(work.left), rows_(a), count_(count), factor_(factor) {}

  // `depth` numbers from d on.
  void begin(int64_t d, int64_t depth) {
    first_ = d;
    depth_ = depth;
    left_ = count_;
  }

  AmxOperand tiles(int64_t d) const {
    return block(d).from(0);
  }

 private:
  void pack() {
    const int64_t i = count_ - left_;
    pack_row(block(first_), i, rows_[i] + first_, depth_, factor_);
  }

  AmxBuffer<parts> block(int64_t d) const {
    constexpr int64_t depth = kPartsDepth<parts>;
    return {scratch_ + d / depth % 2 * AmxBuffer<parts>::size(kChunk / kAmxRows, depth), depth};
  }

  Pair* scratch_;
  Rows rows_;
  int64_t count_;
  float factor_;
  int64_t first_ = 0, depth_ = 0;
};

// begin(packer, panel, n, width, k, depth) has `depth` of the right operand's numbers packed, from the k-th on, of the columns n ..
// n + width.
template <int parts, class element, class Packer, class Begin>
void multiply_in_parts(
    Result<float> out,
    int64_t height,
    Coefficients<float> c,
    int64_t depth,
    int64_t size,
    Workspace<element>& work,
    Packer& packer,
    const Begin& begin) {
  using Panel = AmxPanel<element, parts>;
  const AmxBuffer<parts> left(work.left, depth);
  pack_coefficients(left, height, c, depth, out);
  const auto pack = [&](int which, int64_t n, int64_t k) {
    if (n < size) {
      begin(packer, Panel(work, which), n, std::min(Panel::kWidth, size - n), k, std::min(Panel::kDepth, depth - k));
    }
  };
  pack(0, 0, 0);
  packer.finish();
  int which = 0;
  for (int64_t n = 0; n < size; n += Panel::kWidth) {
    const int64_t width = std::min(Panel::kWidth, size - n);
    const Result<float> to = out.at(0, n);
    to.begin(height, width);
    // Of no depth it is 0.
    int64_t k = 0;
    do {
      const int64_t next = k + Panel::kDepth, tiles = ceil_div(std::min(Panel::kDepth, depth - k), 2 * kAmxRows);
      pack(1 - which, next < depth ? n : n + Panel::kWidth, next < depth ? next : 0);
      const AmxOperand coefficients = left.from(k / (2 * kAmxRows)), columns = Panel(work, which).from(0);
      const bool add = to.plus != nullptr || k > 0;
      multiply_panel<parts>(to.to, to.stride, add, 1, height, width, coefficients, columns, tiles, work.prefetches, packer);
      packer.finish();
      which = 1 - which;
      k = next;
    } while (k < depth);
  }
}

// The steps of both operands, the right one's first, which is needed sooner.
template <class Right, class Left>
struct BothPackers {
  Right& right;
  Left& left;

  int64_t steps_left() const {
    return right.steps_left() + left.steps_left();
  }

  void step() {
    if (right.steps_left() > 0) {
      right.step();
    } else {
      left.step();
    }
  }

  void finish() {
    right.finish();
    left.finish();
  }
};

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
  using Panel = AmxPanel<element, parts>;
  constexpr int64_t kStep = kIsPaired<element> ? Panel::kDepth / 2 : Panel::kDepth;  // elements
  LeftPacker<element, parts> rows(work, a, a_count, factor);
  ColumnsPacker<element, parts> columns;
  BothPackers<ColumnsPacker<element, parts>, LeftPacker<element, parts>> both{columns, rows};
  const auto pack_rows = [&](int64_t d) {
    if (d < size) {
      rows.begin(d, std::min(kStep, size - d));
    }
  };
  const auto pack_columns = [&](int which, int64_t d, int64_t j) {
    if (d < size) {
      columns.begin(Panel(work, which), b + j, std::min(Panel::kWidth, b_count - j), d, std::min(kStep, size - d));
    }
  };
  pack_rows(0);
  pack_columns(0, 0, 0);
  both.finish();
  int which = 0;
  for (int64_t d = 0; d < size; d += kStep) {
    const int64_t depth = std::min(kStep, size - d);
    pack_rows(d + kStep);
    for (int64_t j = 0; j < b_count; j += Panel::kWidth) {
      const bool last = j + Panel::kWidth >= b_count;
      pack_columns(1 - which, last ? d + kStep : d, last ? 0 : j + Panel::kWidth);
      multiply_panel<parts>(
          out + j,
          stride,
          d > 0,
          kIsPaired<element> && d + depth == size ? factor : 1,
          a_count,
          whole_amx_tiles(std::min(Panel::kWidth, b_count - j)),
          rows.tiles(d),
          Panel(work, which).from(0),
          ceil_div(depth, kIsPaired<element> ? kAmxRows : 2 * kAmxRows),
          work.prefetches,
          both);
      columns.finish();
      which = 1 - which;
    }
    rows.finish();
  }
}

// f(parts) of the products of `element`.
template <class element, class F>
void with_parts(int parts, const F& f) {
  if constexpr (kIsPaired<element>) {
    f(std::integral_constant<int, 1>());
  } else if (parts == 2) {
    f(std::integral_constant<int, 2>());
  } else {
    f(std::integral_constant<int, 3>());
  }
}

template <class element>
void multiply_by_amx(
    Result<float> out,
    int64_t height,
    Coefficients<float> c,
    const element* const* b,
    int64_t depth,
    int64_t size,
    Workspace<element>& work) {
  with_parts<element>(work.parts, [&](auto parts) {
    RowsPacker<element, parts> rows;
    const auto begin = [&](auto& packer, const auto& panel, int64_t n, int64_t width, int64_t k, int64_t count) {
      packer.begin(panel, b + k, n, width, count);
    };
    multiply_in_parts<parts>(out, height, c, depth, size, work, rows, begin);
  });
}

// The same where b comes by columns: find(n, width) has the addresses of those from n on.
template <class Find>
void multiply_columns_by_amx(
    Result<float> out,
    int64_t height,
    Coefficients<float> c,
    const Find& find,
    int64_t depth,
    int64_t size,
    Workspace<float>& work) {
  with_parts<float>(work.parts, [&](auto parts) {
    ColumnsPacker<float, parts> columns;
    const float* const* found = nullptr;
    const auto begin = [&](auto& packer, const auto& panel, int64_t n, int64_t width, int64_t k, int64_t count) {
      found = k == 0 ? find(n, width) : found;
      packer.begin(panel, found, width, k, count);
    };
    multiply_in_parts<parts>(out, height, c, depth, size, work, columns, begin);
  });
}

template <class element>
void dot_products_by_amx(
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

// Matrix products of which rows are left out: the projections around the ops and their gradients.
//
// A block of the result is summed over blocks of depth, for each of which b comes by packed panels and a, where it is given by its
// columns, is copied once: products.h has the register tile and says why. Halves are converted as they are copied or packed, and
// rounded once, at the end. Rows left out between others, fewer than a tile has, are multiplied with them and come to nothing
// afterwards: more tiles of fewer rows would take longer.
#include "products.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// Elsewhere they are PyTorch's (capability.cpp). With AVX512_BF16 they are those of AVX512, whose products of floats are the same;
// AMX has its own.
#if defined(CPU_CAPABILITY_AVX512) && (!defined(__AVX512BF16__) || defined(__AMX_BF16__))

namespace {

// Columns that a few rows take at a time.
constexpr int64_t kFewColumns = 8;

class Block {
 public:
  Block(const Matmul& call, Arena& arena)
      : call_(call),
        by_rows_(call.has_rows_of_b()),
        is_few_(call.has_few_rows()),
        depth_stride_(padded<float>(is_few_ ? call.depth : kPanelDepth)),
        height_stride_(padded<float>(call.height)),
        width_stride_(padded<float>(call.width)),
        work_(arena, call.product_dtype, kTile, is_worth_amx_of(call)),
        ranges_(arena.take<RowRange>(call.height / 2 + 1)),
        a_(call.a_columns != nullptr ? arena.take<float>(kPanelDepth * height_stride_)
           : is_float(call.a_type)   ? nullptr
                                     : arena.take<float>(call.height * depth_stride_)),
        b_(is_float(call.b_type) ? nullptr
           : by_rows_            ? arena.take<float>(kPanelDepth * width_stride_)
                                 : arena.take<float>((is_few_ ? kFewColumns : kPanelWidth) * depth_stride_)),
        sums_(is_float(call.out_type) ? nullptr : arena.take<float>(call.height * width_stride_)) {}

  void run(int64_t item) {
    const int64_t across = ceil_div(call_.columns, call_.width), down = ceil_div(call_.rows, call_.height);
    first_column_ = item % across * call_.width;
    width_ = std::min(call_.width, call_.columns - first_column_);
    batch_ = item / across / down;
    first_row_ = item / across % down * call_.height;
    height_ = std::min(call_.height, call_.rows - first_row_);
    const AmxScope amx_scope(work_.by_amx);
    out_ = sums_ != nullptr ? sums_ : static_cast<float*>(call_.out) + place(0);
    stride_ = sums_ != nullptr ? width_stride_ : call_.out_row;
    find_ranges();
    if (sums_ != nullptr && call_.adds_to_out) {
      for_rows([&](int64_t i) { load_row(sums_ + i * stride_, call_.out_type, call_.out, place(i), 1, width_); });
    }
    if (is_few_) {
      multiply_few_rows();
    } else {
      for (int64_t k = 0; ranges_ != end_ranges_ && k < call_.depth; k += kPanelDepth) {
        add(k, std::min(kPanelDepth, call_.depth - k));
      }
    }
    if (sums_ != nullptr) {
      for_rows([&](int64_t i) { store_row(call_.out_type, call_.out, place(i), sums_ + i * stride_, width_); });
    }
    if (!call_.adds_to_out) {
      hide_others();
    }
  }

 private:
  static bool is_float(Dtype dtype) {
    return dtype == Dtype::Float;
  }

  // Where row i of the block begins in out.
  int64_t place(int64_t i) const {
    return batch_ * call_.out_batch + (first_row_ + i) * call_.out_row + first_column_;
  }

  // f(range) of the block's own rows.
  template <class F>
  void for_ranges(const F& f) const {
    const int64_t first = batch_ * call_.rows + first_row_, end = first + height_;
    const RowRange *const begin = call_.row_ranges.data, *const behind = begin + call_.row_ranges.count;
    const auto is_before = [](const RowRange& range, int64_t row) { return range.end <= row; };
    for (const RowRange* range = std::lower_bound(begin, behind, first, is_before); range != behind && range->first < end;
         ++range) {
      f(RowRange{std::max(range->first, first) - first, std::min(range->end, end) - first});
    }
  }

  // f(i) of each of their rows.
  template <class F>
  void for_rows(const F& f) const {
    for_ranges([&](const RowRange& range) {
      for (int64_t i = range.first; i < range.end; ++i) {
        f(i);
      }
    });
  }

  // Those that are multiplied: all between them, too, if they are few, but not where a result is added to, which keeps what it is.
  void find_ranges() {
    const int64_t bridged = call_.adds_to_out ? 0 : tallest(kWidest);
    end_ranges_ = ranges_;
    for_ranges([&](const RowRange& range) {
      if (end_ranges_ != ranges_ && range.first - end_ranges_[-1].end < bridged) {
        end_ranges_[-1].end = range.end;
      } else {
        *end_ranges_++ = range;
      }
    });
  }

  // Zeros in all other rows.
  void hide_others() {
    int64_t row = 0;
    for_ranges([&](const RowRange& range) {
      hide(row, range.first);
      row = range.end;
    });
    hide(row, height_);
  }

  void hide(int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      zero_row(call_.out_type, call_.out, place(i), width_);
    }
  }

  // What is added to the product, from its column n on, and how far its rows are apart.
  std::pair<const float*, int64_t> plus(int64_t k, int64_t n) const {
    if (k == 0 && call_.bias != nullptr) {
      return {call_.bias + first_column_ + n, 0};
    }
    return {k > 0 || call_.adds_to_out ? out_ + n : nullptr, stride_};
  }

  // The block's row i of a, from k on, where a is not given by its columns; converted, it has a place of its own.
  const float* row_of_a(int64_t i, int64_t k, int64_t depth) {
    const int64_t first = (first_row_ + i) * call_.a.row_stride + k;
    if (a_ == nullptr) {
      return static_cast<const float*>(call_.a.data) + first;
    }
    load_row(a_ + i * depth_stride_, call_.a_type, call_.a.data, first, 1, depth);
    return a_ + i * depth_stride_;
  }

  // `count` columns of b, from n on and k down, where it is given by columns.
  void find_columns(const float** columns, int64_t n, int64_t count, int64_t k, int64_t depth) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t first = (first_column_ + n + j) * call_.b.element_stride + k;
      if (b_ == nullptr) {
        columns[j] = static_cast<const float*>(call_.b.data) + first;
      } else {
        load_row(b_ + j * depth_stride_, call_.b_type, call_.b.data, first, 1, depth);
        columns[j] = b_ + j * depth_stride_;
      }
    }
  }

  void multiply_few_rows() {
    const float* rows[kFewRows];
    int64_t count = 0;
    for_rows([&](int64_t i) { rows[count++] = row_of_a(i, 0, call_.depth); });
    for (int64_t n = 0; n < width_; n += kFewColumns) {
      const int64_t width = std::min(kFewColumns, width_ - n);
      const float* columns[kFewColumns];
      find_columns(columns, n, width, 0, call_.depth);
      sum_products(work_.panel, kFewColumns, rows, count, columns, width, call_.depth, 1.f);
      const float* sums = work_.panel;
      const auto [added, stride] = plus(0, n);
      for_rows([&](int64_t i) {
        for (int64_t j = 0; j < width; ++j) {
          out_[i * stride_ + n + j] = added == nullptr ? sums[j] : sums[j] + added[i * stride + j];
        }
        sums += kFewColumns;
      });
    }
  }

  // The terms k .. k + depth - 1.
  void add(int64_t k, int64_t depth) {
    const Coefficients<float> c = coefficients(k, depth);
#if defined(__AMX_BF16__)
    if (work_.by_amx) {
      std::for_each(ranges_, end_ranges_, [&](const RowRange& range) { add_by_amx(k, depth, c, range); });
      return;
    }
#endif
    // Of rows that only one tile takes nothing is kept.
    const bool packs = end_ranges_ - ranges_ > 1 || ranges_->end - ranges_->first > tallest(kWidest);
    const PanelRows<float> panel(work_.panel, depth);
    const float* rows_of_b[kPanelDepth];
    for (int64_t i = 0; i < depth && by_rows_; ++i) {
      rows_of_b[i] = row_of_b(i, k);
    }
    for (int64_t n = 0; n < width_; n += kPanelWidth) {
      const int64_t width = std::min(kPanelWidth, width_ - n);
      const float* from[kPanelDepth];
      if (by_rows_) {
        for (int64_t i = 0; i < depth; ++i) {
          from[i] = rows_of_b[i] + n;
        }
      } else {
        const float* columns[kPanelWidth];
        find_columns(columns, n, width, k, depth);
        transpose(work_.panel, kPanelWidth, columns, width, 0, depth);
      }
      const auto [added, stride] = plus(k, n);
      const Result<float> all(out_ + n, stride_, added, stride, &Result<float>::kOne, 0);
      for (const RowRange* range = ranges_; range != end_ranges_; ++range) {
        const auto [i, end] = *range;
        const bool first = by_rows_ && range == ranges_;
        const Coefficients<float> of_rows{c.data + i * c.row_stride, c.row_stride, c.column_stride};
        multiply_blocks<float, float>(
            {all.at(i, 0), of_rows, first ? from : panel.address, depth, width, nullptr, first && packs ? &panel : nullptr},
            end - i);
      }
    }
  }

  // Whatever the division into blocks, so that the number of threads changes no bit.
  static bool is_worth_amx_of(const Matmul& call) {
    const int64_t rows = std::min({call.mean_range_rows, call.rows, kTile}), columns = std::min(call.columns, kTile);
    const int64_t depth = std::min(call.depth, kPanelDepth), take_right = call.has_rows_of_b() ? kPackRows : kPackColumns;
    return is_worth_amx<float>(excess_of_amx(rows, depth, columns, parts_of(call.product_dtype), take_right));
  }

#if defined(__AMX_BF16__)
  // What the next terms are taken from, where it stands.
  void queue_prefetches(int64_t k, const RowRange& range) {
    work_.prefetches.clear();
    const int64_t depth = std::min(kPanelDepth, call_.depth - k);
    if (call_.a_columns == nullptr) {
      work_.prefetches.add(call_.a_type, call_.a, 0, first_row_ + range.first, range.end - range.first, k, depth);
    }
    if (call_.b_rows == nullptr) {
      const View& b = call_.b;
      if (by_rows_) {
        work_.prefetches.add(call_.b_type, b, 0, k, depth, first_column_, width_);
      } else {
        work_.prefetches.add(call_.b_type, {b.data, 0, b.element_stride, b.row_stride}, 0, first_column_, width_, k, depth);
      }
    }
  }

  void add_by_amx(int64_t k, int64_t depth, const Coefficients<float>& c, const RowRange& range) {
    queue_prefetches(k + depth, range);
    const auto [added, stride] = plus(k, 0);
    const Result<float> out = Result<float>(out_, stride_, added, stride, &Result<float>::kOne, 0).at(range.first, 0);
    const Coefficients<float> rows{c.data + range.first * c.row_stride, c.row_stride, c.column_stride};
    if (by_rows_) {
      const float* rows_of_b[kPanelDepth];
      for (int64_t i = 0; i < depth; ++i) {
        rows_of_b[i] = row_of_b(i, k);
      }
      multiply_by_amx(out, range.end - range.first, rows, rows_of_b, depth, width_, work_);
    } else {
      const float* columns[kPanelWidth];
      const auto find = [&](int64_t n, int64_t width) {
        find_columns(columns, n, width, k, depth);
        return columns;
      };
      multiply_columns_by_amx(out, range.end - range.first, rows, find, depth, width_, work_);
    }
  }
#endif

  // The block's part of row k + i of b, where it is or, converted, in scratch.
  const float* row_of_b(int64_t i, int64_t k) {
    const bool by_address = call_.b_rows != nullptr;
    const void* const data = by_address ? call_.b_rows[batch_ * call_.depth + k + i] : call_.b.data;
    const int64_t first = first_column_ + (by_address ? 0 : (k + i) * call_.b.row_stride);
    if (b_ == nullptr) {
      return static_cast<const float*>(data) + first;
    }
    load_row(b_ + i * width_stride_, call_.b_type, data, first, 1, width_);
    return b_ + i * width_stride_;
  }

  // The block of a: where it is, or copied, since what lies in a few sets of the cache would not stay there.
  Coefficients<float> coefficients(int64_t k, int64_t depth) {
    if (call_.a_columns != nullptr) {
      for (int64_t i = 0; i < depth; ++i) {
        load_row(a_ + i * height_stride_, call_.a_type, call_.a_columns[batch_ * call_.depth + k + i], first_row_, 1, height_);
      }
      return {a_, 1, height_stride_};
    }
    if (a_ == nullptr) {
      return {row_of_a(0, k, depth), call_.a.row_stride, 1};
    }
    for (const RowRange* range = ranges_; range != end_ranges_; ++range) {
      for (int64_t i = range->first; i < range->end; ++i) {
        row_of_a(i, k, depth);
      }
    }
    return {a_, depth_stride_, 1};
  }

  const Matmul& call_;
  bool by_rows_;  // of b
  bool is_few_;
  int64_t depth_stride_, height_stride_, width_stride_;  // of rows in scratch that are so long
  Workspace<float> work_;
  RowRange *ranges_, *end_ranges_ = nullptr;  // counted from the block's first row
  float* a_;                                  // its columns, or its rows where they are converted, or null
  float* b_;                                  // some of its rows or columns, converted, or null
  float* sums_;                               // of a block, to be rounded, or null
  int64_t batch_ = 0, first_row_ = 0, height_ = 0, first_column_ = 0, width_ = 0;
  float* out_ = nullptr;  // the block's sums: in place, or in scratch
  int64_t stride_ = 0;
};

size_t slot_size(const Matmul& call) {
  Arena arena(nullptr);
  const Block block(call, arena);
  return arena.used();
}

void run(const Matmul& call, int64_t item, char* slot) {
  Arena arena(slot);
  Block(call, arena).run(item);
}

}  // namespace

const MatmulKernels& matmul_kernels() {
  static constexpr MatmulKernels kernels{kHasAmx<float> ? "avx512_amx" : "avx512", slot_size, run};
  return kernels;
}

#endif

}  // namespace attn_ext::cpu::CPU_CAPABILITY

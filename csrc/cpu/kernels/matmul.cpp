// Matrix products of which rows are left out: the projections around the ops and their gradients.
//
// A block of the result is summed over blocks of depth, for each of which b comes by packed panels and a, where it is given by its
// columns, is copied once: products.h has the register tile and says why. Rows left out between others, fewer
// than a tile has, are multiplied with them and come to nothing afterwards: more tiles of fewer rows would take longer.
#include "products.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// Elsewhere they are PyTorch's (capability.cpp). Where there are products of bfloat16 too, those of floats are the same.
#if defined(CPU_CAPABILITY_AVX512) && !defined(CPU_CAPABILITY_AVX512_BF16)

namespace {

// Rows that are not worth transposing b for, which sums along vectors take as it stands: so many at most, and fewer where a product
// is shallow, since each of its sums ends across a vector.
constexpr int64_t kFewRows = 32, kDepthOfRow = 8;

class Block {
 public:
  Block(const Matmul& call, Arena& arena)
      : call_(call),
        panel_(arena.take<float>(kPanelWidth * kPanelDepth)),
        stride_(padded<float>(call.height)),
        runs_(arena.take<Run>(call.height / 2 + 1)),
        copied_(call.a_columns != nullptr ? arena.take<float>(kPanelDepth * stride_) : nullptr) {}

  void run(int64_t item) {
    const int64_t across = ceil_div(call_.columns, call_.width), down = ceil_div(call_.rows, call_.height);
    first_column_ = item % across * call_.width;
    end_column_ = std::min(first_column_ + call_.width, call_.columns);
    batch_ = item / across / down;
    first_row_ = item / across % down * call_.height;
    height_ = std::min(call_.height, call_.rows - first_row_);
    out_ = call_.out + batch_ * call_.out_batch + first_row_ * call_.out_row;
    find_runs();
    if (!is_by_rows() && call_.rows <= std::min(kFewRows, call_.depth / kDepthOfRow)) {
      take_few_rows();
    } else {
      for (int64_t k = 0; runs_ != end_runs_ && (k == 0 || k < call_.depth); k += kPanelDepth) {
        add(k, std::min(kPanelDepth, call_.depth - k));
      }
    }
    if (!call_.adds_to_out) {
      hide_others();
    }
  }

 private:
  // f(run) of the block's own rows.
  template <class F>
  void for_runs(const F& f) const {
    const int64_t first = batch_ * call_.rows + first_row_, end = first + height_;
    const Run *const begin = call_.row_runs.data, *const behind = begin + call_.row_runs.count;
    const auto is_before = [](const Run& run, int64_t row) { return run.end <= row; };
    for (const Run* run = std::lower_bound(begin, behind, first, is_before); run != behind && run->first < end; ++run) {
      f(Run{std::max(run->first, first) - first, std::min(run->end, end) - first});
    }
  }

  // Those that are multiplied: all between them, too, if they are few, but not where a result is added to, which keeps what it is.
  void find_runs() {
    const int64_t bridged = call_.adds_to_out ? 0 : tallest(kWidest);
    end_runs_ = runs_;
    for_runs([&](const Run& run) {
      if (end_runs_ != runs_ && run.first - end_runs_[-1].end < bridged) {
        end_runs_[-1].end = run.end;
      } else {
        *end_runs_++ = run;
      }
    });
  }

  // Zeros in all other rows.
  void hide_others() {
    int64_t row = 0;
    for_runs([&](const Run& run) {
      hide(row, run.first);
      row = run.end;
    });
    hide(row, height_);
  }

  void hide(int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      std::fill(out_ + i * call_.out_row + first_column_, out_ + i * call_.out_row + end_column_, 0.f);
    }
  }

  bool is_by_rows() const {
    return call_.b_rows != nullptr || call_.b.element == 1;
  }

  const float* column_of_b(int64_t n) const {
    return static_cast<const float*>(call_.b.data) + n * call_.b.element;
  }

  // What is added to the product, from its row i and column n on, and how far its rows are apart.
  std::pair<const float*, int64_t> plus(int64_t k, int64_t n) const {
    if (k == 0 && call_.bias != nullptr) {
      return {call_.bias + n, 0};
    }
    return {k > 0 || call_.adds_to_out ? out_ + n : nullptr, call_.out_row};
  }

  // Of fewer rows than are worth transposing b for, whose columns then meet them as they stand: sums along vectors.
  void take_few_rows() {
    const float* rows[kFewRows];
    const float** end = rows;
    for_runs([&](const Run& run) {
      for (int64_t i = run.first; i < run.end; ++i) {
        *end++ = static_cast<const float*>(call_.a.data) + (first_row_ + i) * call_.a.row;
      }
    });
    const auto [added, stride] = plus(0, 0);
    for (int64_t n = first_column_; n < end_column_; n += kPanelWidth) {
      const int64_t width = std::min(kPanelWidth, end_column_ - n);
      const float* columns[kPanelWidth];
      for (int64_t j = 0; j < width; ++j) {
        columns[j] = column_of_b(n + j);
      }
      sum_products<float>(panel_, kPanelWidth, rows, end - rows, columns, width, call_.depth, 1.f);
      const float* sums = panel_;
      for_runs([&](const Run& run) {
        for (int64_t i = run.first; i < run.end; ++i, sums += kPanelWidth) {
          float* to = out_ + i * call_.out_row + n;
          for (int64_t j = 0; j < width; ++j) {
            to[j] = added == nullptr ? sums[j] : sums[j] + added[i * stride + n + j];
          }
        }
      });
    }
  }

  // The terms k .. k + depth - 1.
  void add(int64_t k, int64_t depth) {
    const Coefficients<float> c = coefficients(k, depth);
    const float* rows_of_b[kPanelDepth];
    const auto* b = static_cast<const float*>(call_.b.data);
    const bool by_rows = is_by_rows();
    const bool packs = end_runs_ - runs_ > 1 || runs_->end - runs_->first > tallest(kWidest);
    for (int64_t i = 0; i < depth && by_rows; ++i) {
      rows_of_b[i] = call_.b_rows != nullptr ? call_.b_rows[batch_ * call_.depth + k + i] : b + (k + i) * call_.b.row;
    }
    const PanelRows<float> panel(panel_, depth);
    for (int64_t n = first_column_; n < end_column_; n += kPanelWidth) {
      const int64_t width = std::min(kPanelWidth, end_column_ - n);
      const float* from[kPanelDepth];
      if (by_rows) {
        for (int64_t i = 0; i < depth; ++i) {
          from[i] = rows_of_b[i] + n;
        }
      } else {
        const float* columns[kPanelWidth];
        for (int64_t j = 0; j < width; ++j) {
          columns[j] = column_of_b(n + j);
        }
        transpose(panel_, kPanelWidth, columns, width, k, depth);
      }
      static constexpr float one = 1;
      const auto [added, stride] = plus(k, n);
      const Result<float> all(out_ + n, call_.out_row, added, stride, &one, 0);
      for (const Run* run = runs_; run != end_runs_; ++run) {
        const auto [i, end] = *run;
        const bool first = by_rows && run == runs_;
        multiply_blocks<float>(
            all.at(i, 0),
            end - i,
            {c.data + i * c.row, c.row, c.column},
            first ? from : panel.address,
            depth,
            width,
            first && packs ? &panel : nullptr);
      }
    }
  }

  // The block of a: where it is, or copied, since what lies in a few sets of the cache would not stay there.
  Coefficients<float> coefficients(int64_t k, int64_t depth) {
    if (call_.a_columns == nullptr) {
      return {static_cast<const float*>(call_.a.data) + first_row_ * call_.a.row + k, call_.a.row, 1};
    }
    for (int64_t i = 0; i < depth; ++i) {
      std::copy_n(call_.a_columns[batch_ * call_.depth + k + i] + first_row_, height_, copied_ + i * stride_);
    }
    return {copied_, 1, stride_};
  }

  const Matmul& call_;
  float* panel_;
  int64_t stride_;
  Run *runs_, *end_runs_ = nullptr;  // counted from the block's first row
  float* copied_;
  int64_t batch_ = 0, first_row_ = 0, height_ = 0, first_column_ = 0, end_column_ = 0;
  float* out_ = nullptr;
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
  static constexpr MatmulKernels kernels{slot_size, run};
  return kernels;
}

#endif

}  // namespace attn_ext::cpu::CPU_CAPABILITY

// Matrix products of which rows are left out: the projections around the ops and their gradients.
//
// A block of the result is summed over blocks of depth, for each of which b comes by packed panels and a, where it is given by its
// columns, is copied once: products.h has the register tile and says why.
#include "products.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// Elsewhere they are PyTorch's (capability.cpp). Where there are products of bfloat16 too, those of floats are the same.
#if defined(CPU_CAPABILITY_AVX512) && !defined(CPU_CAPABILITY_AVX512_BF16)

namespace {

// The part of a run that lies in first .. end, from `first` on.
Run within(const Run& run, int64_t first, int64_t end) {
  return {std::max(run.first, first) - first, std::min(run.end, end) - first};
}

class Block {
 public:
  Block(const Matmul& call, Arena& arena)
      : call_(call),
        panel_(arena.take<float>(kPanelWidth * kPanelDepth)),
        stride_(padded<float>(call.height)),
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
    if (runs_ == end_runs_) {
      return;
    }
    int64_t k = 0;
    do {
      add(k, std::min(kPanelDepth, call_.depth - k));
      k += kPanelDepth;
    } while (k < call_.depth);
  }

 private:
  // The block's own runs, and zeros in the rows between them, unless what is there is to be added to.
  void find_runs() {
    first_ = batch_ * call_.rows + first_row_;
    const Run *const begin = call_.row_runs.data, *const end = begin + call_.row_runs.count;
    const auto is_before = [](const Run& run, int64_t row) { return run.end <= row; };
    const auto is_behind = [](int64_t row, const Run& run) { return row <= run.first; };
    runs_ = std::lower_bound(begin, end, first_, is_before);
    end_runs_ = std::upper_bound(runs_, end, first_ + height_, is_behind);
    int64_t row = 0;
    for (const Run* run = runs_; run != end_runs_; ++run) {
      const Run rows = within(*run, first_, first_ + height_);
      hide(row, rows.first);
      row = rows.end;
    }
    hide(row, height_);
  }

  void hide(int64_t first, int64_t end) {
    for (int64_t i = first; i < end && !call_.adds_to_out; ++i) {
      std::fill(out_ + i * call_.out_row + first_column_, out_ + i * call_.out_row + end_column_, 0.f);
    }
  }

  // The terms k .. k + depth - 1.
  void add(int64_t k, int64_t depth) {
    const Coefficients<float> c = coefficients(k, depth);
    const float* rows_of_b[kPanelDepth];
    const auto* b = static_cast<const float*>(call_.b.data);
    const bool by_rows = call_.b_rows != nullptr || call_.b.element == 1;
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
          columns[j] = b + (n + j) * call_.b.element;
        }
        transpose(panel_, kPanelWidth, columns, width, k, depth);
      }
      static constexpr float one = 1;
      float* const out = out_ + n;
      const bool has_bias = k == 0 && call_.bias != nullptr;
      const float* plus = has_bias ? call_.bias + n : k > 0 || call_.adds_to_out ? out : nullptr;
      const Result<float> all(out, call_.out_row, plus, has_bias ? 0 : call_.out_row, &one, 0);
      for (const Run* run = runs_; run != end_runs_; ++run) {
        const auto [i, end] = within(*run, first_, first_ + height_);
        const bool packs = by_rows && run == runs_;
        multiply_blocks<float>(
            all.at(i, 0),
            end - i,
            {c.data + i * c.row, c.row, c.column},
            packs ? from : panel.address,
            depth,
            width,
            packs ? &panel : nullptr);
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
  float* copied_;
  int64_t batch_ = 0, first_row_ = 0, height_ = 0, first_column_ = 0, end_column_ = 0;
  int64_t first_ = 0;  // of the batch's rows
  float* out_ = nullptr;
  const Run *runs_ = nullptr, *end_runs_ = nullptr;
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

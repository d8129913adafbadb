// Matrix products of which rows are left out: the projections around the ops and their gradients.
//
// A block of the result is summed over blocks of depth, for each of which b comes by packed panels and a, where it is stored by
// columns, is copied once: products.h has the register tile and says why.
#include "products.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// Elsewhere, and of processors whose libraries know them, it is theirs (capability.cpp). The products of bfloat16 change nothing.
#if defined(CPU_CAPABILITY_AVX512) && !defined(__AVX512BF16__)

namespace {

// Numbers of the depth that are summed over at once, of one run, or of several where they need not be neighbours.
struct DepthBlock {
  int64_t count = 0;
  int64_t at[kPanelDepth];
};

class DepthWalk {
 public:
  explicit DepthWalk(const Matmul& call) : runs_(call.depth_runs), crosses_runs_(call.takes_any_depth()) {}

  bool next(DepthBlock& block) {
    block.count = 0;
    for (; run_ < runs_.count; ++run_, done_ = 0) {
      const Run& run = runs_.data[run_];
      const int64_t count = std::min(run.end - run.first - done_, kPanelDepth - block.count);
      std::iota(block.at + block.count, block.at + block.count + count, run.first + done_);
      block.count += count;
      done_ += count;
      if (block.count == kPanelDepth || (!crosses_runs_ && block.count > 0)) {
        return true;
      }
    }
    return block.count > 0;
  }

 private:
  const Runs& runs_;
  bool crosses_runs_;
  int64_t run_ = 0;
  int64_t done_ = 0;
};

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
        copied_(call.is_a_by_columns() ? arena.take<float>(kPanelDepth * stride_) : nullptr) {}

  void run(int64_t item) {
    const int64_t across = ceil_div(call_.columns, call_.width), down = ceil_div(call_.rows, call_.height);
    first_column_ = item % across * call_.width;
    end_column_ = std::min(first_column_ + call_.width, call_.columns);
    const int64_t batch = item / across / down, first_row = item / across % down * call_.height;
    height_ = std::min(call_.height, call_.rows - first_row);
    const int64_t first = batch * call_.rows + first_row;
    out_ = static_cast<float*>(const_cast<void*>(call_.out.data)) + batch * call_.out.batch + first_row * call_.out.row;
    a_ = static_cast<const float*>(call_.a.data) + batch * call_.a.batch + first_row * call_.a.row;
    b_ = static_cast<const float*>(call_.b.data) + batch * call_.b.batch;
    find_runs(first);
    DepthWalk walk(call_);
    DepthBlock depth;
    for (bool begins = true; walk.next(depth) || begins; begins = false) {
      add(depth, begins);
    }
  }

 private:
  // The block's own runs, and zeros in the rows between them, unless what is there is to be added to.
  void find_runs(int64_t first) {
    const Run *const begin = call_.row_runs.data, *const end = begin + call_.row_runs.count;
    const auto is_before = [](const Run& run, int64_t row) { return run.end <= row; };
    const auto is_behind = [](int64_t row, const Run& run) { return row <= run.first; };
    runs_ = std::lower_bound(begin, end, first, is_before);
    end_runs_ = std::upper_bound(runs_, end, first + height_, is_behind);
    first_ = first;
    int64_t row = 0;
    for (const Run* run = runs_; run != end_runs_; ++run) {
      const Run rows = within(*run, first, first + height_);
      hide(row, rows.first);
      row = rows.end;
    }
    hide(row, height_);
  }

  void hide(int64_t first, int64_t end) {
    for (int64_t i = first; i < end && !call_.adds_to_out; ++i) {
      std::fill(out_ + i * call_.out.row + first_column_, out_ + i * call_.out.row + end_column_, 0.f);
    }
  }

  void add(const DepthBlock& depth, bool begins) {
    const float* rows_of_b[kPanelDepth];
    for (int64_t k = 0; k < depth.count && !call_.is_b_by_columns(); ++k) {
      rows_of_b[k] = b_ + depth.at[k] * call_.b.row;
    }
    Coefficients<float> c{a_, call_.a.row, 1};
    if (copied_ != nullptr) {
      for (int64_t k = 0; k < depth.count; ++k) {
        std::copy_n(a_ + depth.at[k] * call_.a.element, height_, copied_ + k * stride_);
      }
      c = {copied_, 1, stride_};
    } else if (depth.count > 0) {
      c.data += depth.at[0];
    }
    const PanelRows<float> panel(panel_, depth.count);
    for (int64_t n = first_column_; n < end_column_; n += kPanelWidth) {
      const int64_t width = std::min(kPanelWidth, end_column_ - n);
      if (!call_.is_b_by_columns()) {
        for (int64_t k = 0; k < depth.count; ++k) {
          scale_row(panel_ + k * kPanelWidth, rows_of_b[k] + n, width, 1.f);
        }
      } else if (depth.count > 0) {
        const float* columns[kPanelWidth];
        for (int64_t j = 0; j < width; ++j) {
          columns[j] = b_ + (n + j) * call_.b.element;
        }
        transpose(panel_, kPanelWidth, columns, width, depth.at[0], depth.count);
      }
      static constexpr float one = 1;
      float* const out = out_ + n;
      const bool has_bias = begins && call_.bias != nullptr;
      const float* plus = has_bias ? call_.bias + n : begins && !call_.adds_to_out ? nullptr : out;
      const Result<float> all(out, call_.out.row, plus, has_bias ? 0 : call_.out.row, &one, 0);
      for (const Run* run = runs_; run != end_runs_; ++run) {
        const auto [i, end] = within(*run, first_, first_ + height_);
        multiply_blocks<float>(all.at(i, 0), end - i, {c.data + i * c.row, c.row, c.column}, panel.address, depth.count, width);
      }
    }
  }

  const Matmul& call_;
  float* panel_;
  int64_t stride_;
  float* copied_;
  int64_t first_column_ = 0, end_column_ = 0, height_ = 0, first_ = 0;
  float* out_ = nullptr;
  const float *a_ = nullptr, *b_ = nullptr;
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

// The gradient of a memory's or of keys' rows, of many queries.
#pragma once

#include "call.h"
#include "products.h"
#include "rows.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// A [B, S, size] gradient, tile by tile: added up in the output itself, or in scratch where a mask leaves gaps between rows, the
// output is of another type, and where rows are to be padded(). Where the queries are divided among items, each has its share of
// the gradient in place of the output until merge().
template <class acc>
class TileGradient {
 public:
  TileGradient(Arena& arena, void* out, const Problem& problem, const Plan& plan, int64_t size, bool pad = false)
      : out_(out),
        problem_(&problem),
        size_(size),
        shares_(plan.chunks),
        share_(out != nullptr && shares_ > 1 ? arena.take<acc>(plan.split_size * padded<acc>(size)) : nullptr),
        dtype_(shares_ > 1 ? kAccumulated<acc> : problem.dtype),
        to_stride_(shares_ > 1 ? padded<acc>(size) : size),
        may_be_in_place_(out != nullptr && (shares_ > 1 || (!pad && dtype_ == kAccumulated<acc>))),
        streams_(plan.streams && shares_ == 1),
        scratch_(arena.take<acc>(plan.tile * padded<acc>(size))) {}

  bool wanted() const {
    return out_ != nullptr;
  }

  void begin_item(const Item& item) {
    to_ = shares_ > 1 ? share_ : out_;
    origin_ = shares_ > 1 ? item.first_step : -item.batch * problem_->steps;
  }

  // Room for the tile's rows, with any content. Steps between the tiles, from `written` on, have no gradient.
  void begin(const Tile& tile, int64_t written) {
    in_place_ = may_be_in_place_ && tile.contiguous();
    rows_ = in_place_ ? static_cast<acc*>(to_) + (tile.steps[0] - origin_) * to_stride_ : scratch_;
    stride_ = in_place_ ? to_stride_ : padded<acc>(size_);
    zero(written, tile.steps[0]);
  }

  void end(const Tile& tile) {
    if (in_place_ || !wanted()) {
      return;
    }
    for (int64_t j = 0; j < tile.count; ++j) {
      write_row(streams_, dtype_, to_, (tile.steps[j] - origin_) * to_stride_, rows_ + j * stride_, size_);
      if (j + 1 < tile.count) {
        zero(tile.steps[j] + 1, tile.steps[j + 1]);
      }
    }
  }

  // Steps that nobody attends.
  void zero(int64_t first, int64_t end) {
    if (wanted()) {
      zero_row(dtype_, to_, (first - origin_) * to_stride_, (end - first) * to_stride_);
    }
  }

  // Into the output, some steps of a split. This is the first of its shares, the others are `distance` bytes apart.
  void merge(const Item& item, int64_t first, int64_t end, size_t distance) const {
    for (int64_t s = first; wanted() && s < end; ++s) {
      acc* row = share_ + (s - item.first_step) * to_stride_;
      merge_row(problem_->dtype, out_, item.batch * problem_->steps + s, row, shares_, distance, size_);
    }
  }

  // The tile's rows, for a product.
  Result<acc> rows(bool add) const {
    const Result<acc> result(rows_, stride_, add);
    return in_place_ && streams_ ? result.streamed() : result;
  }

 private:
  void* out_;
  const Problem* problem_;
  int64_t size_;
  int64_t shares_;
  acc* share_;  // [split_size] rows
  Dtype dtype_;
  int64_t to_stride_;
  bool may_be_in_place_;
  bool streams_;
  acc* scratch_;
  void* to_ = nullptr;  // the output or the share
  int64_t origin_ = 0;  // the step of its first row
  bool in_place_ = false;
  acc* rows_ = nullptr;
  int64_t stride_ = 0;
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

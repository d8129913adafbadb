// The source steps that queries may attend, in tiles.
#pragma once

#include "call.h"

#include <numeric>

namespace attn_ext::cpu::CPU_CAPABILITY {

// Up to a plan's tile of source steps, in ascending order.
struct Tile {
  int64_t count = 0;
  int64_t steps[kTile];

  bool contiguous() const {
    return steps[count - 1] - steps[0] == count - 1;
  }

  // Behind the last of the consecutive steps that begin at index j.
  int64_t run_end(int64_t j) const {
    if (contiguous()) {
      return count;
    }
    while (++j < count && steps[j] == steps[j - 1] + 1) {
    }
    return j;
  }
};

inline bool may_attend(const Problem& problem, int64_t b, int64_t t, int64_t s) {
  const View& mask = problem.mask;
  return static_cast<const bool*>(mask.data)[b * mask.batch_stride + t * mask.row_stride + s * mask.element_stride];
}

// The same within the source's length, with or without a mask.
inline bool is_attended(const Problem& problem, int64_t b, int64_t t, int64_t s) {
  return (problem.lengths == nullptr || s < problem.lengths[b]) && (problem.mask.data == nullptr || may_attend(problem, b, t, s));
}

// The source steps that some query of an item may attend, tile by tile. What stands in the others is never read.
class SourceWalk {
 public:
  SourceWalk(const Problem& problem, const Item& item, int64_t tile)
      : problem_(problem), item_(item), tile_(tile), next_(item.first_step) {
    end_ = item.end_step;
    if (problem.lengths != nullptr) {
      end_ = std::min(end_, problem.lengths[item.batch]);
    }
  }

  bool next(Tile& tile) {
    tile.count = 0;
    if (problem_.mask.data == nullptr) {
      tile.count = std::clamp<int64_t>(end_ - next_, 0, tile_);
      std::iota(tile.steps, tile.steps + tile.count, next_);
      next_ += tile.count;
      return tile.count > 0;
    }
    for (; next_ < end_ && tile.count < tile_; ++next_) {
      if (attended(next_)) {
        tile.steps[tile.count++] = next_;
      }
    }
    return tile.count > 0;
  }

 private:
  bool attended(int64_t step) const {
    const int64_t queries = problem_.mask_per_query ? item_.queries : 1;
    for (int64_t t = 0; t < queries; ++t) {
      if (may_attend(problem_, item_.batch, item_.first_query + t, step)) {
        return true;
      }
    }
    return false;
  }

  const Problem& problem_;
  const Item& item_;
  int64_t tile_;
  int64_t next_;
  int64_t end_;
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

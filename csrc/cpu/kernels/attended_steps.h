// The source steps that queries may attend, in tiles.
#pragma once

#include "call.h"

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace attn_ext::cpu::CPU_CAPABILITY {

// Up to a plan's tile of source steps, and at least one, in ascending order.
struct Tile {
  int64_t count;
  bool is_fragmented;  // so few follow each other that a row's values are sooner moved one by one than by vectors
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

// A query's row of the mask, by bytes: one that is true may be another number than 1.
inline const uint8_t* mask_row(const Problem& problem, int64_t b, int64_t t) {
  const View& mask = problem.mask;
  return static_cast<const uint8_t*>(mask.data) + b * mask.batch_stride + t * mask.row_stride;
}

inline bool may_attend(const Problem& problem, int64_t b, int64_t t, int64_t s) {
  return mask_row(problem, b, t)[s * problem.mask.element_stride] != 0;
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
    tile.is_fragmented = false;
    if (problem_.mask.data == nullptr) {
      tile.count = std::clamp<int64_t>(end_ - next_, 0, tile_);
      std::iota(tile.steps, tile.steps + tile.count, next_);
      next_ += tile.count;
      return tile.count > 0;
    }
    while (next_ < end_ && tile.count < tile_) {
      uint8_t attended[kAbreast];
      const int64_t count = std::min({kAbreast, end_ - next_, tile_ - tile.count});
      find_attended(attended, count);
      for (int64_t j = 0; j < count; ++j) {
        tile.steps[tile.count] = next_ + j;
        tile.count += attended[j] != 0;
      }
      next_ += count;
    }
    if (item_.queries > 1) {  // of one query nobody asks
      int64_t runs = 1;
      for (int64_t j = 1; j < tile.count; ++j) {
        runs += tile.steps[j] != tile.steps[j - 1] + 1;
      }
      tile.is_fragmented = runs > 1 && tile.count < kLeastRun * runs;
    }
    return tile.count > 0;
  }

 private:
  // Steps that are looked at together, by vectors.
  static constexpr int64_t kAbreast = 64;

  // Steps that follow each other, on average, for vectors to gain.
  static constexpr int64_t kLeastRun = 12;

  // Whether some query may attend each of the next steps.
  void find_attended(uint8_t* attended, int64_t count) const {
    const int64_t queries = problem_.mask_per_query ? item_.queries : 1, stride = problem_.mask.element_stride;
    std::fill_n(attended, count, 0);
    for (int64_t t = 0; t < queries; ++t) {
      const uint8_t* const row = mask_row(problem_, item_.batch, item_.first_query + t) + next_ * stride;
      if (stride == 1) {
        for (int64_t j = 0; j < count; ++j) {
          attended[j] |= row[j];
        }
      } else {
        for (int64_t j = 0; j < count; ++j) {
          attended[j] |= row[j * stride];
        }
      }
    }
  }

  const Problem& problem_;
  const Item& item_;
  int64_t tile_;
  int64_t next_;
  int64_t end_;
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

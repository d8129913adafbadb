// Rows of tensors as the products take them: by address, in the accumulation type.
#pragma once

#include "call.h"
#include "factors.h"
#include "vec.h"

#include <numeric>

namespace attn_ext::cpu::CPU_CAPABILITY {

// Scratch handed out piece by piece. Without a base it only counts: the same code that lays a slot out tells its size.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }

  size_t used() const {
    return used_;
  }

 private:
  char* base_;
  size_t used_ = 0;
};

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
  return static_cast<const bool*>(mask.data)[b * mask.batch + t * mask.row + s * mask.element];
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

// A row of `view`, converted into scratch.
template <class acc>
void load_row(acc* to, Dtype dtype, const View& view, int64_t b, int64_t row, int64_t size) {
  load_row(to, dtype, view.data, b * view.batch + row * view.row, view.element, size);
}

#if defined(__AVX512BF16__)
// The same as pairs, rounded and filled up with zeros.
inline void load_row(Pair* to, Dtype dtype, const View& view, int64_t b, int64_t row, int64_t size) {
  const auto load = [&](const auto* from) {
    from += b * view.batch + row * view.row;
    if constexpr (std::is_same_v<decltype(from), const float*>) {
      if (view.element == 1) {
        return pair_row(to, from, size);
      }
    }
    auto* const numbers = reinterpret_cast<c10::BFloat16*>(to);
    if (view.element == 1) {
      std::copy_n(from, size, numbers);
    } else {
      for (int64_t i = 0; i < size; ++i) {
        numbers[i] = from[i * view.element];
      }
    }
    std::fill(numbers + size, numbers + 2 * Factors<Pair>::elements(size), c10::BFloat16());
  };
  if (dtype == Dtype::Float) {
    load(static_cast<const float*>(view.data));
  } else {
    load(static_cast<const c10::BFloat16*>(view.data));
  }
}
#endif

// Addresses of rows: the tensor's own where they are dense and of the products' elements, of converted copies otherwise.
template <class element>
class Rows {
 public:
  Rows(Arena& arena, Dtype dtype, const View& view, int64_t capacity, int64_t size)
      : dtype_(dtype),
        view_(view),
        size_(size),
        stride_(padded<element>(Factors<element>::elements(size))),
        in_place_(may_be_in_place()),
        address_(arena.take<const element*>(capacity)),
        copies_(in_place_ ? nullptr : arena.take<element>(capacity * stride_)) {}

  void load(int64_t b, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      load_one(i, b, first + i);
    }
  }

  void load(int64_t b, const Tile& tile) {
    for (int64_t i = 0; i < tile.count; ++i) {
      load_one(i, b, tile.steps[i]);
    }
  }

  // The row of one query; null if there is none.
  const element* load_only(int64_t b) {
    if (view_.data == nullptr) {
      return nullptr;
    }
    load_one(0, b, 0);
    return address_[0];
  }

  const element* const* addresses() const {
    return address_;
  }

 private:
  bool may_be_in_place() const {
    if constexpr (std::is_same_v<element, Pair>) {
      // dot_products() counts from row to row in whole pairs.
      return dtype_ == Dtype::BFloat16 && view_.element == 1 && size_ % (2 * kPairsAtOnce) == 0 && view_.row % 2 == 0;
    }
    return view_.data == nullptr || (dtype_ == kAccumulated<element> && (view_.element == 1 || size_ <= 1));
  }

  void load_one(int64_t i, int64_t b, int64_t row) {
    if (in_place_) {
      const auto* data = static_cast<const typename Factors<element>::Number*>(view_.data);
      address_[i] = reinterpret_cast<const element*>(data + b * view_.batch + row * view_.row);
    } else {
      address_[i] = copies_ + i * stride_;
      load_row(copies_ + i * stride_, dtype_, view_, b, row, size_);
    }
  }

  Dtype dtype_;
  View view_;
  int64_t size_;
  int64_t stride_;
  bool in_place_;
  const element** address_;
  element* copies_;
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

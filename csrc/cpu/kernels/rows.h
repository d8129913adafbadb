// Rows of tensors as the products take them, by address.
#pragma once

#include "arena.h"
#include "attended_steps.h"
#include "call.h"
#include "elements.h"
#include "vec.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// A row of `view`, converted into scratch.
template <class acc>
void load_row(acc* to, Dtype dtype, const View& view, int64_t b, int64_t row, int64_t size) {
  load_row(to, dtype, view.data, b * view.batch_stride + row * view.row_stride, view.element_stride, size);
}

#if defined(__AVX512BF16__)
// The same as pairs, rounded and filled up with zeros.
inline void load_row(Pair* to, Dtype dtype, const View& view, int64_t b, int64_t row, int64_t size) {
  const auto load = [&](const auto* from) {
    from += b * view.batch_stride + row * view.row_stride;
    if constexpr (std::is_same_v<decltype(from), const float*>) {
      if (view.element_stride == 1) {
        return pair_row(to, from, size);
      }
    }
    auto* const numbers = reinterpret_cast<c10::BFloat16*>(to);
    if (view.element_stride == 1) {
      std::copy_n(from, size, numbers);
    } else {
      for (int64_t i = 0; i < size; ++i) {
        numbers[i] = from[i * view.element_stride];
      }
    }
    std::fill(numbers + size, numbers + 2 * ElementTraits<Pair>::elements(size), c10::BFloat16());
  };
  if (dtype == Dtype::Float) {
    load(static_cast<const float*>(view.data));
  } else {
    load(static_cast<const c10::BFloat16*>(view.data));
  }
}
#endif

// Rows by address, of numbers of the accumulation type or of halves as they stand: the right operand of a product.
struct StoredRows {
  Dtype dtype;
  const void* const* addresses;
};

template <class element>
using RightRows = std::conditional_t<std::is_same_v<element, float>, StoredRows, const element* const*>;

// Addresses of rows: the tensor's own where they are dense and of the products' elements, of converted copies otherwise.
template <class element>
class Rows {
 public:
  // With `takes_halves` dense rows of them may stay as they are: right() knows their type.
  Rows(Arena& arena, Dtype dtype, const View& view, int64_t capacity, int64_t size, bool takes_halves = false)
      : dtype_(dtype),
        takes_halves_(kConvertsInRegisters && std::is_same_v<element, float> && takes_halves),
        view_(view),
        size_(size),
        stride_(padded<element>(ElementTraits<element>::elements(size))),
        in_place_(may_be_in_place()),
        address_(arena.take<const void*>(capacity)),
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
    return addresses()[0];
  }

  const element* const* addresses() const {
    return reinterpret_cast<const element* const*>(address_);
  }

  RightRows<element> right() const {
    if constexpr (std::is_same_v<element, float>) {
      return {in_place_ ? dtype_ : Dtype::Float, address_};
    } else {
      return addresses();
    }
  }

 private:
  bool may_be_in_place() const {
    if constexpr (std::is_same_v<element, Pair>) {
      // dot_products() counts from row to row in whole pairs.
      return dtype_ == Dtype::BFloat16 && view_.element_stride == 1 && size_ % (2 * kPairsAtOnce) == 0 && view_.row_stride % 2 == 0;
    }
    return view_.data == nullptr ||
           ((dtype_ == kAccumulated<element> || takes_halves_) && (view_.element_stride == 1 || size_ <= 1));
  }

  void load_one(int64_t i, int64_t b, int64_t row) {
    if (in_place_) {
      const int64_t place = b * view_.batch_stride + row * view_.row_stride;
      address_[i] = static_cast<const char*>(view_.data) + place * width_of(dtype_);
    } else {
      element* const copy = copies_ + i * stride_;
      address_[i] = copy;
      load_row(copy, dtype_, view_, b, row, size_);
    }
  }

  Dtype dtype_;
  bool takes_halves_;
  View view_;
  int64_t size_;
  int64_t stride_;
  bool in_place_;
  const void** address_;
  element* copies_;
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

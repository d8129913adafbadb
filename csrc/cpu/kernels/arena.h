// Scratch.
#pragma once

#include <cstddef>
#include <cstdint>

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

}  // namespace attn_ext::cpu::CPU_CAPABILITY

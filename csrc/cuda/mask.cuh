// What a query may attend, as the kernels ask for it.
#pragma once

#include "../problem.h"

namespace attn_ext::cuda {

// The source steps of one query.
class Attendable {
 public:
  __device__ __forceinline__ Attendable(const Problem& problem, int64_t b, int64_t t)
      : end_(problem.steps), mask_(static_cast<const bool*>(problem.mask.data)), stride_(problem.mask.element_stride) {
    if (problem.lengths != nullptr) {
      // Out of range it is wrong, but known to the device alone: nothing beyond S is read.
      const int64_t length = problem.lengths[b];
      end_ = length < 0 ? 0 : length < end_ ? length : end_;
    }
    if (mask_ != nullptr) {
      mask_ += b * problem.mask.batch_stride + t * problem.mask.row_stride;
    }
  }

  // What lengths and a [B, S] mask leave to any query at all.
  static __device__ __forceinline__ Attendable by_any(const Problem& problem, int64_t b) {
    Attendable all(problem, b, 0);
    all.mask_ = problem.mask_per_query ? nullptr : all.mask_;
    return all;
  }

  // Nothing from here on.
  __device__ __forceinline__ int64_t end() const {
    return end_;
  }

  // Whether something before the end is left out, too.
  __device__ __forceinline__ bool is_masked() const {
    return mask_ != nullptr;
  }

  __device__ __forceinline__ bool operator()(int64_t s) const {
    return s < end_ && (mask_ == nullptr || mask_[s * stride_]);
  }

 private:
  int64_t end_;
  const bool* mask_;
  int64_t stride_;
};

}  // namespace attn_ext::cuda

// Rows of memory that lengths or a mask [B, S] keep from every query: zeros in the place of what products with weights of 0 would
// meet, and of what they leave. Bound by memory.
#pragma once

#include "device.cuh"
#include "kernels.h"
#include "mask.cuh"
#include "view.cuh"

namespace attn_ext::cuda {

constexpr int kRowsBlock = 128;  // threads whose warps have a row each

// A warp's row.
template <class scalar>
class MemoryRow {
 public:
  __device__ __forceinline__ explicit MemoryRow(const MemoryRows& call)
      : problem_(call.problem),
        row_((int64_t{blockIdx.x} * kRowsBlock + threadIdx.x) / kWarp),
        lane_(threadIdx.x % kWarp),
        to_(static_cast<scalar*>(call.rows) + row_ * problem_.memory_size) {}

  __device__ __forceinline__ bool is_there() const {
    return row_ < problem_.batch * problem_.steps;
  }

  __device__ __forceinline__ bool is_masked() const {
    return !Attendable::by_any(problem_, row_ / problem_.steps)(row_ % problem_.steps);
  }

  __device__ __forceinline__ void clear(bool by_vectors) const {
    each(by_vectors, [&](int64_t d) { store16(to_ + d, Vector16{}); }, [&](int64_t d) { to_[d] = scalar{}; });
  }

  __device__ __forceinline__ void copy(bool by_vectors) const {
    const scalar* from = row_of<scalar>(problem_.memory, row_ / problem_.steps, row_ % problem_.steps);
    each(
        by_vectors,
        [&](int64_t d) { store16(to_ + d, load16_streaming(from + d)); },
        [&](int64_t d) { to_[d] = from[d * problem_.memory.element_stride]; });
  }

 private:
  __device__ __forceinline__ void each(bool by_vectors, const auto& of_vector, const auto& of_element) const {
    if (by_vectors) {
      for (int64_t d = lane_ * kLanes<scalar>; d < problem_.memory_size; d += kWarp * kLanes<scalar>) {
        of_vector(d);
      }
    } else {
      for (int64_t d = lane_; d < problem_.memory_size; d += kWarp) {
        of_element(d);
      }
    }
  }

  const Problem& problem_;
  int64_t row_;
  int lane_;
  scalar* to_;
};

// `by_vectors`: of memory and of the copy.
template <class scalar>
__global__ void __launch_bounds__(kRowsBlock, 1) copy_rows(const MemoryRows call, bool by_vectors) {
  const MemoryRow<scalar> row(call);
  if (row.is_there()) {
    row.is_masked() ? row.clear(by_vectors) : row.copy(by_vectors);
  }
}

template <class scalar>
__global__ void __launch_bounds__(kRowsBlock, 1) clear_rows(const MemoryRows call, bool by_vectors) {
  const MemoryRow<scalar> row(call);
  if (row.is_there() && row.is_masked()) {
    row.clear(by_vectors);
  }
}

}  // namespace attn_ext::cuda

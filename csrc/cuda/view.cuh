// Rows of a View, and whether they can be read 16 bytes at a time.
#pragma once

#include "../problem.h"
#include "device.cuh"

namespace attn_ext::cuda {

// The elements are view.element apart.
template <class scalar>
__device__ __forceinline__ const scalar* row_of(const View& view, int64_t b, int64_t row) {
  return static_cast<const scalar*>(view.data) + b * view.batch + row * view.row;
}

// Whether every row of `size` elements is whole vectors that lie on 16 bytes.
template <class scalar>
bool takes_vectors(const View& view, int64_t size) {
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  return view.element == 1 && address % 16 == 0 && (view.batch | view.row | size) % kLanes<scalar> == 0;
}

}  // namespace attn_ext::cuda

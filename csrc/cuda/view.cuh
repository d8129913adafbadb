// Rows of a View, and whether they can be read 16 bytes at a time.
#pragma once

#include "../problem.h"
#include "device.cuh"

namespace attn_ext::cuda {

// The elements are view.element_stride apart.
template <class scalar>
__device__ __forceinline__ const scalar* row_of(const View& view, int64_t b, int64_t row) {
  return static_cast<const scalar*>(view.data) + b * view.batch_stride + row * view.row_stride;
}

// An output from its element `first` on, null where it is not wanted.
template <class T>
__device__ __forceinline__ T* part_of(void* output, int64_t first) {
  return output == nullptr ? nullptr : static_cast<T*>(output) + first;
}

// Whether every row of `size` elements is whole vectors that lie on 16 bytes.
template <class scalar>
bool takes_vectors(const View& view, int64_t size) {
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  return view.element_stride == 1 && address % 16 == 0 && (view.batch_stride | view.row_stride | size) % kLanes<scalar> == 0;
}

// 16 bytes of a row of `size` elements, from element `at` on, and zeros beyond it.
template <class scalar, class Index>
__device__ __forceinline__ Vector16
load_piece(const scalar* row, int64_t element, Index at, std::type_identity_t<Index> size, bool by_vectors) {
  if (by_vectors) {
    return at < size ? load16(row + at) : Vector16{};
  }
  accumulated_t<scalar> x[kLanes<scalar>];
#pragma unroll
  for (int i = 0; i < kLanes<scalar>; ++i) {
    x[i] = at + i < size ? to_acc(row[(at + i) * element]) : accumulated_t<scalar>(0);
  }
  return pack<scalar>(x);
}

}  // namespace attn_ext::cuda

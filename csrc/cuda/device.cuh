// What the kernels take from the machine beyond C++. A GPU's answers stand here; in tests, tests/cuda/shim.h gives the host's, and
// the same kernels run on the CPU. Free of torch headers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>

namespace attn_ext::cuda {

constexpr int kWarp = 32;

template <class acc>
constexpr acc kInfinity = std::numeric_limits<acc>::infinity();

// The halves as they are stored.
struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// What sums are taken in: float, double's double.
template <class scalar>
using accumulated_t = std::conditional_t<std::is_same_v<scalar, double>, double, float>;

// 16 bytes of any type, the most that a thread moves at once.
struct alignas(16) Vector16 {
  uint32_t word[4];
};

// Elements of a vector.
template <class scalar>
constexpr int kLanes = 16 / sizeof(scalar);

// The PTX, as __CUDA_ARCH__ / 10, from which on kernels wait for the last launch.
constexpr int kLeastThatWaits = 90;

#if defined(__CUDACC__)

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char attn_ext_shared_memory[];
  return attn_ext_shared_memory;
}

__device__ __forceinline__ void sync_threads() {
  __syncthreads();
}

__device__ __forceinline__ void sync_warp() {
  __syncwarp();
}

// A barrier too.
__device__ __forceinline__ bool any_in_block(bool mine) {
  return __syncthreads_or(mine) != 0;
}

// Shuffles take the whole warp: every lane calls.
template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}

template <class T>
__device__ __forceinline__ T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

// A bit for each lane.
__device__ __forceinline__ uint32_t ballot(bool mine) {
  return __ballot_sync(0xffffffffu, mine);
}

// The same, but the compiler does not know: what is computed from it is computed anew, not kept in a register.
__device__ __forceinline__ uint32_t forgotten(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Subnormals are 0 to this and the next, as arguments and as results.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t bits_of(float x) {
  return __float_as_uint(x);
}

__device__ __forceinline__ float float_of(uint32_t bits) {
  return __uint_as_float(bits);
}

__device__ __forceinline__ float to_acc(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

__device__ __forceinline__ Half rounded_to_half(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Where the rounding counts: no part of a multiply-add.
__device__ __forceinline__ float product(float a, float b) {
  return __fmul_rn(a, b);
}

__device__ __forceinline__ double product(double a, double b) {
  return __dmul_rn(a, b);
}

__device__ __forceinline__ Vector16 load16(const void* from) {
  const uint4 x = *static_cast<const uint4*>(from);
  return {x.x, x.y, x.z, x.w};
}

__device__ __forceinline__ void store16(void* to, const Vector16& x) {
  *static_cast<uint4*>(to) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}

__device__ __forceinline__ void store8(void* to, uint32_t first, uint32_t second) {
  *static_cast<uint2*>(to) = make_uint2(first, second);
}

// Global memory that is read once, and that the launch does not write.
__device__ __forceinline__ Vector16 load16_streaming(const void* from) {
  Vector16 x;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
      : "l"(__cvta_generic_to_global(from)));
  return x;
}

// Global memory that is not read again soon.
__device__ __forceinline__ void store16_streaming(void* to, const Vector16& x) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(x.word[0]),
               "r"(x.word[1]),
               "r"(x.word[2]),
               "r"(x.word[3])
               : "memory");
}

// Global into shared memory past the registers, both aligned to 16 bytes; zeros where it is not `there` (the address is then not
// read). It has arrived after this thread's wait_copies, and for the other threads after a barrier more.
__device__ __forceinline__ void copy_async16(void* to, const void* from, bool there = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from)),
               "r"(there ? 16 : 0)
               : "memory");
#else
  store16(to, there ? load16(from) : Vector16{});
#endif
}

// What was copied since the last call is one group.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most the `pending` newest groups of this thread are under way.
template <int pending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// A launch_behind waits here for the launch before it, and then sees all that it wrote. It may come so far once every block of the
// launch before has said so or ended.
__device__ __forceinline__ void wait_for_last_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif  // __CUDACC__

// a b + c in one rounding, whatever stands around it: for sums that are to agree in every bit.
__device__ __forceinline__ float fused(float a, float b, float c) {
  return fmaf(a, b, c);
}

__device__ __forceinline__ double fused(double a, double b, double c) {
  return fma(a, b, c);
}

__device__ __forceinline__ float to_acc(float x) {
  return x;
}

__device__ __forceinline__ double to_acc(double x) {
  return x;
}

__device__ __forceinline__ float to_acc(BFloat16 x) {
  return float_of(static_cast<uint32_t>(x.bits) << 16);
}

__device__ __forceinline__ BFloat16 rounded_to_bfloat16(float x) {
#if __CUDA_ARCH__ >= 800
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = bits_of(x);
  return {static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

// Rounds to nearest, ties to even.
template <class scalar>
__device__ __forceinline__ scalar from_acc(accumulated_t<scalar> x) {
  if constexpr (std::is_same_v<scalar, BFloat16>) {
    return rounded_to_bfloat16(x);
  } else if constexpr (std::is_same_v<scalar, Half>) {
    return rounded_to_half(x);
  } else {
    return x;
  }
}

// A vector's elements, unpack<scalar>(to, from), and the way back.
template <class scalar>
__device__ __forceinline__ void unpack(accumulated_t<scalar> (&to)[kLanes<scalar>], const Vector16& from) {
#pragma unroll
  for (int i = 0; i < kLanes<scalar>; ++i) {
    if constexpr (sizeof(scalar) == 2) {
      to[i] = to_acc(scalar{static_cast<uint16_t>(from.word[i / 2] >> 16 * (i % 2))});
    } else if constexpr (sizeof(scalar) == 4) {
      to[i] = float_of(from.word[i]);
    } else {
      const uint64_t bits = static_cast<uint64_t>(from.word[2 * i + 1]) << 32 | from.word[2 * i];
      __builtin_memcpy(&to[i], &bits, 8);
    }
  }
}

template <class scalar>
__device__ __forceinline__ Vector16 pack(const accumulated_t<scalar> (&from)[kLanes<scalar>]) {
  Vector16 to;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(scalar) == 2) {
      const uint32_t high = from_acc<scalar>(from[2 * i + 1]).bits;
      to.word[i] = high << 16 | from_acc<scalar>(from[2 * i]).bits;
    } else if constexpr (sizeof(scalar) == 4) {
      to.word[i] = bits_of(from[i]);
    } else {
      uint64_t bits;
      __builtin_memcpy(&bits, &from[i / 2], 8);
      to.word[i] = static_cast<uint32_t>(bits >> 32 * (i % 2));
    }
  }
  return to;
}

// As many elements as make 16 bytes in the accumulation type, stored as T.
template <class T>
__device__ __forceinline__ void store_neighbours(T* to, const accumulated_t<T> (&x)[kLanes<accumulated_t<T>>]) {
  if constexpr (sizeof(T) == 2) {
    const auto pair = [&](int i) { return static_cast<uint32_t>(from_acc<T>(x[i + 1]).bits) << 16 | from_acc<T>(x[i]).bits; };
    store8(to, pair(0), pair(2));
  } else {
    store16(to, pack<T>(x));
  }
}

__device__ __forceinline__ float exponential(float x) {
  return expf(x);
}

__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}

// Of what is 0 at most: the error grows as the result vanishes.
__device__ __forceinline__ float exponential_of_negative(float x) {
  return exp2_approx(1.44269504f * x);
}

__device__ __forceinline__ double exponential_of_negative(double x) {
  return exp(x);
}

// What is taken off a softmax's scores: with nothing to attend, everything is exp(-inf) = 0.
template <class acc>
__device__ __forceinline__ acc shift_of(acc largest) {
  return largest == -kInfinity<acc> ? acc(0) : largest;
}

// Of exponentials, which are weights times their sum: all 0 where there is nothing to attend.
template <class acc>
__device__ __forceinline__ acc inverse_of_sum(acc total) {
  return total == 0 ? acc(0) : 1 / total;
}

// The plain one: tanh.approx is good to 2^-11 only.
__device__ __forceinline__ float tanh_of(float x) {
  return tanhf(x);
}

__device__ __forceinline__ double tanh_of(double x) {
  return tanh(x);
}

__device__ __forceinline__ float logarithm(float x) {
  return logf(x);
}

__device__ __forceinline__ double logarithm(double x) {
  return log(x);
}

// Every lane gets the result, in the same bits.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    x += shuffle_xor(x, lanes);
  }
  return x;
}

template <class T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const T other = shuffle_xor(x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace attn_ext::cuda

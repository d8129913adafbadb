// Vectors of the accumulation type, and the way between them and tensors of any dtype. Compiled once per instruction set.
#pragma once

#include "call.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#if defined(__x86_64__) && !defined(CPU_CAPABILITY_AVX2) && !defined(CPU_CAPABILITY_AVX512)
#include "sse2.h"
#define ATTN_EXT_SSE2
#endif

namespace attn_ext::cpu::CPU_CAPABILITY {

#if defined(ATTN_EXT_SSE2)
template <class acc>
using Vec = Lanes<acc>;
#else
template <class acc>
using Vec = at::vec::Vectorized<acc>;
#endif

// The dtype of what is kept in the accumulation type.
template <class acc>
constexpr Dtype kAccumulated = std::is_same_v<acc, double> ? Dtype::Double : Dtype::Float;

// Rows of scratch are an odd number of cache lines apart: a column of them would otherwise fall into a few cache sets when the size
// is a multiple of 1024, as sizes often are.
template <class acc>
constexpr int64_t padded(int64_t size) {
  constexpr int64_t line = 64 / sizeof(acc);
  return (ceil_div(size, line) | 1) * line;
}

// `count` filled up to whole vectors.
template <class acc>
constexpr int64_t whole_vectors(int64_t count) {
  return round_up(count, Vec<acc>::size());
}

// Whether a load or store of less than a vector is an instruction.
#if defined(CPU_CAPABILITY_AVX512)
constexpr bool kHasMasks = true;

// So many lanes of 16, from the first on.
inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}
#else
constexpr bool kHasMasks = false;
#endif

// f(first, count) over vectors of `size` elements. All counts but the last, of what is left, are constants: a load of less than a
// vector is a call on processors without masks, around which no register keeps anything.
template <class acc, class F>
[[gnu::always_inline]] inline void for_vectors(int64_t size, const F& f) {
  constexpr std::integral_constant<int64_t, Vec<acc>::size()> whole;
  int64_t i = 0;
  for (; i + whole <= size; i += whole) {
    f(i, whole);
  }
  if (i < size) {
    f(i, size - i);
  }
}

// The same over two vectors at a time.
template <class acc, class F>
[[gnu::always_inline]] inline void for_twos(int64_t size, const F& f) {
  constexpr std::integral_constant<int64_t, 2 * Vec<acc>::size()> both;
  int64_t i = 0;
  for (; i + both <= size; i += both) {
    f(i, both);
  }
  if (i < size) {
    f(i, size - i);
  }
}

// exp(factor x) where the result is a normal number, anything elsewhere; a NaN stays one. Floats are within 1 ulp of the result of
// some x (1 +- 2e-8), as if x had been rounded once more.
template <class acc>
inline Vec<acc> exponential(const Vec<acc>& x, acc factor = 1) {
  return (x * Vec<acc>(factor)).exp();
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__) || defined(ATTN_EXT_SSE2)
// Inlined: PyTorch's is a call for every vector, which spills all registers, or on ARM's processors for every number.
// exp(factor x) = 2^n 2^-r with n - r = x factor log2(e), |r| <= 1/2. A fused multiply-add leaves r no other error than the
// rounding of factor log2(e), where Cody and Waite's reduction subtracts ln(2) in two parts. x becomes 2^-r, a minimax polynomial;
// `shifted` is kShift + n, whose lowest bits are n's.
constexpr float kShift = 0x1.8p23f;

template <int count>
[[gnu::always_inline]] inline void take_significands(Vec<float> (&x)[count], float factor, Vec<float> (&shifted)[count]) {
  const Vec<float> scale(factor * 1.44269504f);
  Vec<float> p[count];
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    shifted[i] = fmadd(x[i], scale, Vec<float>(kShift));
  }
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    const Vec<float> n = shifted[i] - Vec<float>(kShift);
#if defined(ATTN_EXT_SSE2)
    // Without fused multiply-adds, ln(2) in two parts after all.
    const Vec<float> left = x[i] * Vec<float>(factor) - n * Vec<float>(0x1.62ep-1f);
    x[i] = (left - n * Vec<float>(0x1.0bfbe8p-15f)) * Vec<float>(-1.44269504f);
#else
    x[i] = fnmadd(x[i], scale, n);  // r: ARM's processors have no instruction for -r
#endif
    p[i] = Vec<float>(1.53533620e-4f);
  }
  for (const float coefficient : {-1.33988750e-3f, 9.61843692e-3f, -5.55033237e-2f, 2.40226477e-1f, -6.93147182e-1f, 1.0f}) {
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      p[i] = fmadd(p[i], x[i], Vec<float>(coefficient));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    x[i] = p[i];
  }
}

// p 2^n
inline Vec<float> times_power(const Vec<float>& p, const Vec<float>& shifted) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, shifted - Vec<float>(kShift));
  // To add n to the significand's own exponent would be an instruction less, but made numbers of some NaNs.
#elif defined(__aarch64__)
  const uint32x4_t biased = vaddq_u32(vreinterpretq_u32_f32(shifted), vdupq_n_u32(127));
  return vmulq_f32(p, vreinterpretq_f32_u32(vshlq_n_u32(biased, 23)));
#elif defined(ATTN_EXT_SSE2)
  const __m128i biased = _mm_add_epi32(_mm_castps_si128(shifted), _mm_set1_epi32(127));
  return p * Vec<float>(_mm_castsi128_ps(_mm_slli_epi32(biased, 23)));
#else
  const __m256i biased = _mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127));
  return p * Vec<float>(_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
#endif
}

template <int count>
[[gnu::always_inline]] inline void exponentiate(Vec<float> (&x)[count], float factor) {
  Vec<float> shifted[count];
  take_significands(x, factor, shifted);
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    x[i] = times_power(x[i], shifted[i]);
  }
}

template <>
inline Vec<float> exponential(const Vec<float>& x, float factor) {
  Vec<float> one[] = {x};
  exponentiate(one, factor);
  return one[0];
}
#endif

// x = exp(factor x) of several vectors. It is ten operations, each of which waits for the one before: they take them together.
template <int count, class acc>
[[gnu::always_inline]] inline void exponentiate(Vec<acc> (&x)[count], acc factor) {
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    x[i] = exponential(x[i], factor);
  }
}

// exp(x), 0 for an x below `least`.
template <class acc>
inline Vec<acc> exponential_from(acc least, const Vec<acc>& x) {
  return Vec<acc>::blendv(exponential(x), Vec<acc>(0), x < Vec<acc>(least));
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
inline Vec<float> exponential_from(float least, const Vec<float>& x) {
  Vec<float> p[] = {x}, shifted[1];
  take_significands(p, 1.f, shifted);
  const __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(kept, p[0], shifted[0] - Vec<float>(kShift));
}
#endif

// x, but 0 where the weight is: whatever it meets, it passes nothing on, and 0 * inf would be no number.
template <class acc>
inline Vec<acc> where_weighted(const Vec<acc>& weight, const Vec<acc>& x) {
  return Vec<acc>::blendv(x, Vec<acc>(0), weight == Vec<acc>(0));
}

#if defined(CPU_CAPABILITY_AVX512)
// PyTorch's masks are vectors, which a comparison's result becomes and a blend makes a mask of again.
template <>
inline Vec<float> where_weighted(const Vec<float>& weight, const Vec<float>& x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_UQ), x);
}
#endif

// x where its byte is not 0, of `count` of them, and y elsewhere.
template <class acc>
inline Vec<acc> where(const uint8_t* conditions, int64_t count, const Vec<acc>& x, const Vec<acc>& y) {
  acc numbers[Vec<acc>::size()] = {};
  std::copy_n(conditions, count, numbers);
  return Vec<acc>::blendv(x, y, Vec<acc>::loadu(numbers) == Vec<acc>(0));
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
inline Vec<float> where(const uint8_t* conditions, int64_t count, const Vec<float>& x, const Vec<float>& y) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(count), conditions);
  return _mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), y, x);
}
#endif

// The larger, and a where b is NaN: one instruction, where PyTorch's maximum() is a chain of four.
template <class acc>
Vec<acc> raised(const Vec<acc>& a, const Vec<acc>& b) {
  return clamp_min(a, b);
}

// All lanes of a vector, by an operation on two vectors.
template <class acc, class Op>
acc reduce(const Vec<acc>& x, const Op& op) {
  return vec_reduce_all<acc>(op, x);
}

// PyTorch's goes lane by lane, through memory.
#if defined(CPU_CAPABILITY_AVX512)
template <class Op>
inline double reduce(const Vec<double>& x, const Op& op) {
  const Vec<double> pairs = op(x, _mm512_permute_pd(x, 0x55));
  const Vec<double> fours = op(pairs, _mm512_shuffle_f64x2(pairs, pairs, 0xb1));
  return _mm512_cvtsd_f64(op(fours, _mm512_shuffle_f64x2(fours, fours, 0x4e)));
}
#elif defined(CPU_CAPABILITY_AVX2)
template <class Op>
inline double reduce(const Vec<double>& x, const Op& op) {
  const Vec<double> pairs = op(x, _mm256_permute_pd(x, 0x5));
  return _mm256_cvtsd_f64(op(pairs, _mm256_permute2f128_pd(pairs, pairs, 1)));
}
#endif

template <class acc>
acc largest(const Vec<acc>& x) {
  return reduce(x, [](const Vec<acc>& a, const Vec<acc>& b) { return maximum(a, b); });
}

template <class acc>
acc smallest(const Vec<acc>& x) {
  return reduce(x, [](const Vec<acc>& a, const Vec<acc>& b) { return minimum(a, b); });
}

// All sums of a vector, of one and of several together, add its lanes in the same order: a row's sum does not depend on its
// neighbours.
template <class acc>
acc sum(const Vec<acc>& x) {
  return reduce(x, [](const Vec<acc>& a, const Vec<acc>& b) { return a + b; });
}

// The sums of four vectors at once, which share the shuffles.
template <class acc>
inline void sum_four(acc* out, const Vec<acc>* x) {
  for (int i = 0; i < 4; ++i) {
    out[i] = sum(x[i]);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
template <>
inline void sum_four(double* out, const Vec<double>* x) {
  const __m512d a = _mm512_add_pd(_mm512_unpacklo_pd(x[0], x[1]), _mm512_unpackhi_pd(x[0], x[1]));
  const __m512d b = _mm512_add_pd(_mm512_unpacklo_pd(x[2], x[3]), _mm512_unpackhi_pd(x[2], x[3]));
  const __m512d fours = _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
  const __m256d even = _mm512_castpd512_pd256(_mm512_shuffle_f64x2(fours, fours, 0x08));
  _mm256_storeu_pd(out, _mm256_add_pd(even, _mm512_castpd512_pd256(_mm512_shuffle_f64x2(fours, fours, 0x0d))));
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
inline void sum_four(double* out, const Vec<double>* x) {
  const __m256d a = _mm256_add_pd(_mm256_unpacklo_pd(x[0], x[1]), _mm256_unpackhi_pd(x[0], x[1]));
  const __m256d b = _mm256_add_pd(_mm256_unpacklo_pd(x[2], x[3]), _mm256_unpackhi_pd(x[2], x[3]));
  _mm256_storeu_pd(out, _mm256_add_pd(_mm256_permute2f128_pd(a, b, 0x20), _mm256_permute2f128_pd(a, b, 0x31)));
}
#endif

#if defined(CPU_CAPABILITY_AVX512)
// Four vectors' sums of four lanes, in each quarter.
inline __m512 sums_of_quarters(const Vec<float>* x) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
  return _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
}

inline __m128 sum_of_quarters(__m512 x) {
  const __m256 low = _mm512_castps512_ps256(x), high = _mm512_extractf32x8_ps(x, 1);
  const __m128 first = _mm_add_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1));
  const __m128 second = _mm_add_ps(_mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1));
  return _mm_add_ps(first, second);
}

template <>
inline void sum_four(float* out, const Vec<float>* x) {
  _mm_storeu_ps(out, sum_of_quarters(sums_of_quarters(x)));
}

template <>
inline float sum(const Vec<float>& x) {
  const __m512 pairs = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
  return _mm_cvtss_f32(sum_of_quarters(_mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xb1))));
}

// out[j] = factor * (the sum of x[j]), four of them.
inline void store_four_sums(float* out, const Vec<float>* x, float factor) {
  _mm_storeu_ps(out, _mm_mul_ps(_mm_set1_ps(factor), sum_of_quarters(sums_of_quarters(x))));
}

// The same of four rows, which are `stride` apart in out: 16 sums for 30 shuffles.
inline void store_sixteen_sums(float* out, int64_t stride, const Vec<float> (*x)[4], float factor) {
  const __m512 quads[4] = {sums_of_quarters(x[0]), sums_of_quarters(x[1]), sums_of_quarters(x[2]), sums_of_quarters(x[3])};
  const auto fold = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  const __m512 sums = _mm512_mul_ps(_mm512_set1_ps(factor), fold(fold(quads[0], quads[1]), fold(quads[2], quads[3])));
  _mm_storeu_ps(out, _mm512_castps512_ps128(sums));
  _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(sums, 1));
  _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(sums, 2));
  _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(sums, 3));
}
#endif

// What is done with a row of a softmax. Of a short row a call is as long as the work; with half of the registers, and that many
// more instructions, it leaves the caller's loops what they need.
#if defined(CPU_CAPABILITY_AVX512)
#define ATTN_EXT_INLINE_OF_ROW [[gnu::always_inline]] inline
#else
#define ATTN_EXT_INLINE_OF_ROW inline
#endif

// out[i] = the sum of f(i), a vector, four at a time.
template <class acc, class F>
[[gnu::always_inline]] inline void sum_each(acc* out, int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const Vec<acc> four[] = {f(i), f(i + 1), f(i + 2), f(i + 3)};
    sum_four<acc>(out + i, four);
  }
  for (; i < count; ++i) {
    out[i] = sum(f(i));
  }
}

// to[i] = factor * from[i]
template <class acc>
void scale_row(acc* to, const acc* from, int64_t size, acc factor) {
  const Vec<acc> factors(factor);
  for_vectors<acc>(
      size, [&](int64_t i, auto count) { (Vec<acc>::loadu(from + i, count) * factors).store(to + i, static_cast<int>(count)); });
}

// f of a value of the dtype's, for f to see its type. The kernels are compiled for the accumulation type alone: float serves the
// halves, and a switch a row costs nothing. Inlined: a function of its own loads the addresses that its lambda captured as vectors,
// right after they were stored one by one. Store forwarding fails, and the wait is as long as a short row.
template <class acc, class F>
[[gnu::always_inline]] inline void with_type(Dtype dtype, const F& f) {
  if constexpr (std::is_same_v<acc, float>) {
    if (dtype == Dtype::BFloat16) {
      return f(c10::BFloat16());
    }
    if (dtype == Dtype::Half) {
      return f(c10::Half());
    }
  }
  f(acc());
}

// f of a constant that is the condition.
template <class F>
[[gnu::always_inline]] inline void with_bool(bool condition, const F& f) {
  condition ? f(std::true_type()) : f(std::false_type());
}

// The first `count` elements, of at most a vector, and zeros.
template <class acc, class scalar>
[[gnu::always_inline]] inline Vec<acc> load_one(const scalar* from, int64_t count) {
  if constexpr (std::is_same_v<scalar, acc>) {
    return Vec<acc>::loadu(from, count);
  } else if (count < Vec<acc>::size()) {
    return std::get<0>(convert_to_float<scalar>(Vec<scalar>::loadu(from, count)));
  } else {
    Vec<acc> x;
    load_to_float<scalar>(from, x);
    return x;
  }
}

// The same of at most two.
template <class acc, class scalar>
[[gnu::always_inline]] inline void load_two(Vec<acc> (&to)[2], const scalar* from, int64_t count) {
  constexpr int64_t lanes = Vec<acc>::size();
  if constexpr (std::is_same_v<scalar, acc>) {
    to[0] = Vec<acc>::loadu(from, std::min(count, lanes));
    to[1] = count > lanes ? Vec<acc>::loadu(from + lanes, count - lanes) : Vec<acc>(0);
  } else if (count < 2 * lanes) {
    std::tie(to[0], to[1]) = convert_to_float<scalar>(Vec<scalar>::loadu(from, count));
  } else {
    load_to_float<scalar>(from, to[0]);
    load_to_float<scalar>(from + lanes, to[1]);
  }
}

// Elements that are `stride` apart, in the accumulation type.
template <class acc, class scalar>
void load_row(acc* to, const scalar* from, int64_t stride, int64_t size) {
  if (stride != 1) {
    for (int64_t i = 0; i < size; ++i) {
      to[i] = static_cast<acc>(from[i * stride]);
    }
  } else if constexpr (kHasMasks || !std::is_same_v<scalar, acc>) {
    // Of one type, too: a short row is a few vectors, not worth a call of memmove.
    for_vectors<acc>(size, [&](int64_t i, auto count) { load_one<acc>(from + i, count).store(to + i, static_cast<int>(count)); });
  } else {
    std::copy_n(from, size, to);
  }
}

// The same of a tensor of any dtype, from element `first` on.
template <class acc>
void load_row(acc* to, Dtype dtype, const void* data, int64_t first, int64_t stride, int64_t size) {
  with_type<acc>(dtype, [&](auto example) { load_row(to, static_cast<const decltype(example)*>(data) + first, stride, size); });
}

// Two vectors' numbers rounded to halves, one behind the other.
template <class scalar>
inline Vec<scalar> rounded(const Vec<float>& low, const Vec<float>& high) {
#if defined(__AVX512BF16__)
  // An instruction for PyTorch's 17. It takes subnormal numbers for zeros.
  if constexpr (std::is_same_v<scalar, c10::BFloat16>) {
    return std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  }
#endif
  return convert_from_float<scalar>(low, high);
}

// The way back, into consecutive elements: to[i] = factor * from[i]
template <class acc, class scalar>
void store_row(scalar* to, const acc* from, int64_t size, acc factor) {
  if constexpr (std::is_same_v<scalar, acc>) {
    scale_row(to, from, size, factor);
  } else {
    const Vec<acc> factors(factor);
    for_twos<acc>(size, [&](int64_t i, auto count) {
      Vec<acc> x[2];
      load_two(x, from + i, count);
      rounded<scalar>(x[0] * factors, x[1] * factors).store(to + i, static_cast<int>(count));
    });
  }
}

template <class acc>
void store_row(Dtype dtype, void* data, int64_t first, const acc* from, int64_t size, acc factor = 1) {
  with_type<acc>(dtype, [&](auto example) { store_row(static_cast<decltype(example)*>(data) + first, from, size, factor); });
}

// out[first .. first + size] = 0. All the dtypes have an all-zero-bits 0.
inline void zero_row(Dtype dtype, void* data, int64_t first, int64_t size) {
  std::memset(static_cast<char*>(data) + first * width_of(dtype), 0, std::max<int64_t>(size, 0) * width_of(dtype));
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

// Vectors of x86-64 processors without AVX2, in the place of PyTorch's, which there are arrays: gcc keeps those in memory and takes
// their elements one by one.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

#include <emmintrin.h>

namespace attn_ext::cpu::CPU_CAPABILITY {

template <class scalar>
class Lanes;

template <>
class Lanes<float> {
 public:
  Lanes() = default;
  Lanes(__m128 x) : x_(x) {}
  explicit Lanes(float x) : x_(_mm_set1_ps(x)) {}

  static constexpr int64_t size() {
    return 4;
  }

  // The first `count`, and zeros.
  static Lanes loadu(const void* from, int64_t count = size()) {
    const auto* const numbers = static_cast<const float*>(from);
    if (count >= size()) {
      return _mm_loadu_ps(numbers);
    }
    const __m128 first = count > 0 ? _mm_load_ss(numbers) : _mm_setzero_ps();
    if (count <= 1) {
      return first;
    }
    return _mm_movelh_ps(_mm_unpacklo_ps(first, _mm_load_ss(numbers + 1)), count > 2 ? _mm_load_ss(numbers + 2) : _mm_setzero_ps());
  }

  void store(void* to, int64_t count = size()) const {
    auto* const numbers = static_cast<float*>(to);
    if (count >= size()) {
      return _mm_storeu_ps(numbers, x_);
    }
    if (count > 0) {
      _mm_store_ss(numbers, x_);
    }
    if (count > 1) {
      _mm_store_ss(numbers + 1, _mm_shuffle_ps(x_, x_, 1));
    }
    if (count > 2) {
      _mm_store_ss(numbers + 2, _mm_movehl_ps(x_, x_));
    }
  }

  // b where the mask's bits are ones, a where they are zeros.
  static Lanes blendv(const Lanes& a, const Lanes& b, const Lanes& mask) {
    return _mm_or_ps(_mm_and_ps(mask, b), _mm_andnot_ps(mask, a));
  }

  operator __m128() const {
    return x_;
  }

  Lanes abs() const {
    return _mm_andnot_ps(_mm_set1_ps(-0.f), x_);
  }

  friend Lanes operator+(const Lanes& a, const Lanes& b) {
    return _mm_add_ps(a, b);
  }
  friend Lanes operator-(const Lanes& a, const Lanes& b) {
    return _mm_sub_ps(a, b);
  }
  friend Lanes operator*(const Lanes& a, const Lanes& b) {
    return _mm_mul_ps(a, b);
  }
  friend Lanes operator/(const Lanes& a, const Lanes& b) {
    return _mm_div_ps(a, b);
  }
  friend Lanes operator&(const Lanes& a, const Lanes& b) {
    return _mm_and_ps(a, b);
  }
  friend Lanes operator==(const Lanes& a, const Lanes& b) {
    return _mm_cmpeq_ps(a, b);
  }
  friend Lanes operator<(const Lanes& a, const Lanes& b) {
    return _mm_cmplt_ps(a, b);
  }
  friend Lanes operator>=(const Lanes& a, const Lanes& b) {
    return _mm_cmpge_ps(a, b);
  }

  // b where either is NaN.
  friend Lanes larger(const Lanes& a, const Lanes& b) {
    return _mm_max_ps(a, b);
  }
  friend Lanes smaller(const Lanes& a, const Lanes& b) {
    return _mm_min_ps(a, b);
  }
  friend Lanes where_nan(const Lanes& a, const Lanes& x) {
    return _mm_or_ps(_mm_cmpunord_ps(a, a), x);
  }

  Lanes log() const {
    float numbers[size()];
    store(numbers);
    return _mm_setr_ps(std::log(numbers[0]), std::log(numbers[1]), std::log(numbers[2]), std::log(numbers[3]));
  }

  // All lanes, by an operation on two vectors.
  template <class Op>
  float reduce(const Op& op) const {
    const Lanes pairs = op(x_, Lanes(_mm_movehl_ps(x_, x_)));
    return _mm_cvtss_f32(op(pairs, Lanes(_mm_shuffle_ps(pairs, pairs, 1))));
  }

 private:
  __m128 x_;
};

template <>
class Lanes<double> {
 public:
  Lanes() = default;
  Lanes(__m128d x) : x_(x) {}
  explicit Lanes(double x) : x_(_mm_set1_pd(x)) {}

  static constexpr int64_t size() {
    return 2;
  }

  static Lanes loadu(const void* from, int64_t count = size()) {
    const auto* const numbers = static_cast<const double*>(from);
    return count >= size() ? _mm_loadu_pd(numbers) : count > 0 ? _mm_load_sd(numbers) : _mm_setzero_pd();
  }

  void store(void* to, int64_t count = size()) const {
    auto* const numbers = static_cast<double*>(to);
    if (count >= size()) {
      _mm_storeu_pd(numbers, x_);
    } else if (count > 0) {
      _mm_store_sd(numbers, x_);
    }
  }

  static Lanes blendv(const Lanes& a, const Lanes& b, const Lanes& mask) {
    return _mm_or_pd(_mm_and_pd(mask, b), _mm_andnot_pd(mask, a));
  }

  operator __m128d() const {
    return x_;
  }

  Lanes abs() const {
    return _mm_andnot_pd(_mm_set1_pd(-0.), x_);
  }

  Lanes exp() const {
    return _mm_set_pd(std::exp(_mm_cvtsd_f64(_mm_unpackhi_pd(x_, x_))), std::exp(_mm_cvtsd_f64(x_)));
  }

  Lanes log() const {
    return _mm_set_pd(std::log(_mm_cvtsd_f64(_mm_unpackhi_pd(x_, x_))), std::log(_mm_cvtsd_f64(x_)));
  }

  friend Lanes operator+(const Lanes& a, const Lanes& b) {
    return _mm_add_pd(a, b);
  }
  friend Lanes operator-(const Lanes& a, const Lanes& b) {
    return _mm_sub_pd(a, b);
  }
  friend Lanes operator*(const Lanes& a, const Lanes& b) {
    return _mm_mul_pd(a, b);
  }
  friend Lanes operator/(const Lanes& a, const Lanes& b) {
    return _mm_div_pd(a, b);
  }
  friend Lanes operator==(const Lanes& a, const Lanes& b) {
    return _mm_cmpeq_pd(a, b);
  }
  friend Lanes operator<(const Lanes& a, const Lanes& b) {
    return _mm_cmplt_pd(a, b);
  }

  friend Lanes larger(const Lanes& a, const Lanes& b) {
    return _mm_max_pd(a, b);
  }
  friend Lanes smaller(const Lanes& a, const Lanes& b) {
    return _mm_min_pd(a, b);
  }
  friend Lanes where_nan(const Lanes& a, const Lanes& x) {
    return _mm_or_pd(_mm_cmpunord_pd(a, a), x);
  }

  template <class Op>
  double reduce(const Op& op) const {
    return _mm_cvtsd_f64(op(x_, Lanes(_mm_unpackhi_pd(x_, x_))));
  }

 private:
  __m128d x_;
};

// PyTorch's functions of vectors, under their names. Products are rounded before they are added.
template <class scalar>
Lanes<scalar> fmadd(const Lanes<scalar>& a, const Lanes<scalar>& b, const Lanes<scalar>& c) {
  return a * b + c;
}

template <class scalar>
Lanes<scalar> fnmadd(const Lanes<scalar>& a, const Lanes<scalar>& b, const Lanes<scalar>& c) {
  return c - a * b;
}

// NaN where either is.
template <class scalar>
Lanes<scalar> maximum(const Lanes<scalar>& a, const Lanes<scalar>& b) {
  return where_nan(a, larger(a, b));
}

template <class scalar>
Lanes<scalar> minimum(const Lanes<scalar>& a, const Lanes<scalar>& b) {
  return where_nan(a, smaller(a, b));
}

// These keep a NaN of x.
template <class scalar>
Lanes<scalar> clamp_min(const Lanes<scalar>& x, const Lanes<scalar>& least) {
  return larger(least, x);
}

template <class scalar>
Lanes<scalar> clamp_max(const Lanes<scalar>& x, const Lanes<scalar>& most) {
  return smaller(most, x);
}

template <class scalar>
Lanes<scalar> clamp(const Lanes<scalar>& x, const Lanes<scalar>& least, const Lanes<scalar>& most) {
  return clamp_max(clamp_min(x, least), most);
}

template <class scalar, class Op>
scalar vec_reduce_all(const Op& op, const Lanes<scalar>& x) {
  return x.reduce(op);
}

// Halves, as many as two vectors of floats.
template <class half>
class Lanes {
 public:
  Lanes() = default;

  static constexpr int64_t size() {
    return 8;
  }

  static Lanes loadu(const void* from, int64_t count = size()) {
    Lanes x;
    if (count >= size()) {
      std::memcpy(x.halves_, from, sizeof(x.halves_));
    } else {
      for (int64_t i = 0; i < size(); ++i) {
        x.halves_[i] = i < count ? static_cast<const half*>(from)[i] : half();
      }
    }
    return x;
  }

  void store(void* to, int64_t count = size()) const {
    if (count >= size()) {
      std::memcpy(to, halves_, sizeof(halves_));
    } else {
      std::copy_n(halves_, std::max<int64_t>(count, 0), static_cast<half*>(to));
    }
  }

  static Lanes of(const Lanes<float>& low, const Lanes<float>& high) {
    float numbers[size()];
    low.store(numbers);
    high.store(numbers + low.size());
    Lanes x;
    std::copy_n(numbers, size(), x.halves_);
    return x;
  }

  std::tuple<Lanes<float>, Lanes<float>> floats() const {
    float numbers[size()];
    std::copy_n(halves_, size(), numbers);
    return {Lanes<float>::loadu(numbers), Lanes<float>::loadu(numbers + 4)};
  }

 private:
  half halves_[size()];
};

// The upper halves of floats.
inline std::tuple<Lanes<float>, Lanes<float>> widened(__m128i bfloat16s) {
  const __m128i zero = _mm_setzero_si128();
  return {_mm_castsi128_ps(_mm_unpacklo_epi16(zero, bfloat16s)), _mm_castsi128_ps(_mm_unpackhi_epi16(zero, bfloat16s))};
}

// To the nearest, and of two as near to the even one; a NaN stays one.
inline __m128i upper_halves(const Lanes<float>& x) {
  const __m128i bits = _mm_castps_si128(x), is_odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i rounded = _mm_add_epi32(bits, _mm_add_epi32(_mm_set1_epi32(0x7fff), is_odd));
  const __m128i is_nan = _mm_castps_si128(_mm_cmpunord_ps(x, x)), nan = _mm_set1_epi32(0x7fc00000);
  return _mm_srai_epi32(_mm_or_si128(_mm_and_si128(is_nan, nan), _mm_andnot_si128(is_nan, rounded)), 16);
}

template <>
inline Lanes<c10::BFloat16> Lanes<c10::BFloat16>::of(const Lanes<float>& low, const Lanes<float>& high) {
  return std::bit_cast<Lanes<c10::BFloat16>>(_mm_packs_epi32(upper_halves(low), upper_halves(high)));
}

template <>
inline std::tuple<Lanes<float>, Lanes<float>> Lanes<c10::BFloat16>::floats() const {
  return widened(std::bit_cast<__m128i>(halves_));
}

template <class half>
std::tuple<Lanes<float>, Lanes<float>> convert_to_float(const Lanes<half>& x) {
  return x.floats();
}

template <class half>
Lanes<half> convert_from_float(const Lanes<float>& low, const Lanes<float>& high) {
  return Lanes<half>::of(low, high);
}

template <class half>
void load_to_float(const half* from, Lanes<float>& to) {
  to = std::get<0>(Lanes<half>::loadu(from, to.size()).floats());
}

template <>
inline void load_to_float(const c10::BFloat16* from, Lanes<float>& to) {
  to = std::get<0>(widened(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

// Reciprocals and exponentials as additive.cpp takes them: what shares one, and in what range.
#pragma once

#include "processor.h"
#include "products.h"
#include "vec.h"

namespace attn_ext::cpu::CPU_CAPABILITY {
namespace {  // one unit includes this: what it calls once is inlined

// exp(+-this) is finite and normal.
template <class acc>
constexpr acc kRange = std::is_same_v<acc, double> ? 700 : 86;

// So many features may share a reciprocal at most.
constexpr int kMostShared = 4;

// Whether additions have ports beside those for products. On Intel's with AMX they have not, and the estimate of a reciprocal takes
// three operations of the same; on ARM's they have not, and a division takes as long as several of either.
#if defined(__AMX_BF16__) || defined(__aarch64__)
constexpr bool kAddsBesideProducts = false;
#else
constexpr bool kAddsBesideProducts = true;
#endif

// Whether the scores of many queries are divided. A Zen 4 divides a vector in 6 cycles, a Zen 5 in 2.5: no longer than an estimate
// of the reciprocal, its Newton step and the product keep the ports for products. Intel's take 16.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
template <class acc>
constexpr bool kMayDivide = std::is_same_v<acc, float>;
#else
template <class acc>
constexpr bool kMayDivide = false;
#endif

inline bool divides() {
  return is_amd();
}

// Whether four features share a quotient, or two: from Zen 5 on another division is sooner done than the three products that a
// third and a fourth feature take to share one.
template <class acc>
bool shares_by_fours() {
  return !kMayDivide<acc> || !is_zen_5();
}

// The largest |2q| + |2k| at which `shared` factors 1 + E <= 2 exp(|2q| + |2k|) have a product in range.
template <class acc>
constexpr acc range_of(int shared) {
  return kRange<acc> / shared - acc(0.6931472);
}

template <class acc>
inline Vec<acc> reciprocal(const Vec<acc>& x) {
  return Vec<acc>(1) / x;
}

// h = 1 / x - 1 of x = (1 + E) / 2. Where tanh is small, 1 / x alone would leave dv the rounding of sum_s de_ts, which is 0,
// instead of dv itself.
template <class acc>
inline Vec<acc> negative_tanh(const Vec<acc>& x) {
  return Vec<acc>(1) / x - Vec<acc>(1);
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// What one Newton step makes a reciprocal of. |x| is in exp(+-kRange).
inline Vec<float> estimate(const Vec<float>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_rcp14_ps(x);
#else
  return _mm256_rcp_ps(x);
#endif
}
#endif

#if defined(CPU_CAPABILITY_AVX512)
// Where each number has a quotient of its own, the divider would be the bottleneck. AVX2's is not, and its estimate, of 12 bits for
// these 14, would leave 1 - h^2 a rounding where tanh is 1.
template <>
inline Vec<float> reciprocal(const Vec<float>& x) {
  const Vec<float> first = estimate(x);
  return first * fnmadd(x, first, Vec<float>(2));
}

template <>
inline Vec<float> negative_tanh(const Vec<float>& x) {
  const Vec<float> first = estimate(x);
  return fmadd(first, fnmadd(x, first, Vec<float>(2)), Vec<float>(-1));
}
#endif

// The same of one x or of two, which share a reciprocal.
template <int shared, class acc>
[[gnu::always_inline]] inline void negative_tanhs(Vec<acc> (&h)[shared], const Vec<acc> (&x)[shared]) {
  static_assert(shared == 1 || shared == 2);
  if constexpr (shared == 1) {
    h[0] = negative_tanh<acc>(x[0]);
  } else {
    const auto both = reciprocal<acc>(x[0] * x[1]);
    h[0] = fmadd(both, x[1], Vec<acc>(-1));
    h[1] = fmadd(both, x[0], Vec<acc>(-1));
  }
}

// sum + numerator / denominator: by the divider, or the Newton step's last product and the sum in one.
template <bool divides, class acc>
[[gnu::always_inline]] inline Vec<acc> add_quotient(const Vec<acc>& sum, const Vec<acc>& numerator, const Vec<acc>& denominator) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<acc, float> && !divides) {
    const Vec<float> first = estimate(denominator);
    return fmadd(numerator * first, fnmadd(denominator, first, Vec<float>(2)), sum);
  }
#endif
  return sum + numerator / denominator;
}

// 1 + exp(2 sum) of a sum q + k, with the exponent limited to `limit`: what is lost of 1 / (1 + E) is at most exp(-limit). Keeps a
// NaN.
template <class acc>
[[gnu::always_inline]] inline Vec<acc> direct_denominator(const Vec<acc>& sum, acc limit) {
  return Vec<acc>(1) + exponential<acc>(clamp(sum, Vec<acc>(-kRange<acc> / 2), Vec<acc>(limit / 2)), 2);
}

// The same of several, in their place.
template <int count, class acc>
[[gnu::always_inline]] inline void direct_denominators(Vec<acc> (&x)[count], acc limit) {
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    x[i] = clamp(x[i], Vec<acc>(-kRange<acc> / 2), Vec<acc>(limit / 2));
  }
  exponentiate(x, acc(2));
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    x[i] = Vec<acc>(1) + x[i];
  }
}

// numerators[0] / denominators[0] = the sum of all their quotients.
template <int shared, class acc>
[[gnu::always_inline]] inline void share_denominator(Vec<acc> (&numerators)[shared], Vec<acc> (&denominators)[shared]) {
#pragma GCC unroll 2
  for (int left = shared / 2; left > 0; left /= 2) {
#pragma GCC unroll 2
    for (int i = 0; i < left; ++i) {
      const int j = i + left;
      numerators[i] = fmadd(numerators[i], denominators[j], numerators[j] * denominators[i]);
      denominators[i] = denominators[i] * denominators[j];
    }
  }
}

// Sums of v / (1 + E) begin with -sum(v) / 2: those of v of one sign would grow, and lose to rounding what the steps differ by.
// Sums of few lanes are longer, and grow all the same: they begin again in the middle.
template <class acc>
constexpr bool kBeginsTwice = std::is_same_v<acc, float> && Vec<acc>::size() < 8;

template <class acc>
struct HalfOff {
  Vec<acc> first{0};
  Vec<acc> second{0};  // at feature `middle`, if there is one
  int64_t middle = 0;

  HalfOff() = default;

  // By lanes, of whole vectors. What is not finite stays out.
  HalfOff(const acc* v, int64_t size, acc unit = 1) {
    constexpr int64_t lanes = Vec<acc>::size();
    middle = kBeginsTwice<acc> ? round_up(size / 2, kMostShared * lanes) : size;
    Vec<acc> of_first(0), of_second(0);
    for (int64_t a = 0; a < size; a += lanes) {
      Vec<acc>& part = a < middle ? of_first : of_second;
      part = part - Vec<acc>(0.5) * Vec<acc>::loadu(v + a);
    }
    if (std::isfinite(sum(of_first + of_second))) {
      first = of_first * Vec<acc>(1 / unit);
      second = of_second * Vec<acc>(1 / unit);
    }
  }

  // Sums as they go on from feature a.
  template <int count>
  [[gnu::always_inline]] void go_on(int64_t a, Vec<acc> (&sums)[count]) const {
    if constexpr (kBeginsTwice<acc>) {
      if (a == middle) [[unlikely]] {
        for (Vec<acc>& each : sums) {
          each = each + second;
        }
      }
    }
  }
};

// sum_a v_a / x_a - sum(v) / 2, by lanes: meet(a, filled) is x, or what direct_denominators() make it of, of a vector of features,
// of which so many are there, and v ends in zeros.
template <int shared, bool direct, class acc, class Meet>
[[gnu::always_inline]] inline Vec<acc> sum_of_quotients(const HalfOff<acc>& off, const acc* v, int64_t size, const Meet& meet) {
  constexpr int64_t lanes = Vec<acc>::size();
  Vec<acc> total[1] = {off.first};
  const auto add = [&](int64_t a, auto block, int64_t last) {
    off.go_on(a, total);
    Vec<acc> numerators[block.value], denominators[block.value];
#pragma GCC unroll 4
    for (int n = 0; n < block.value; ++n) {
      numerators[n] = Vec<acc>::loadu(v + a + n * lanes);
      denominators[n] = meet(a + n * lanes, n + 1 < block.value ? lanes : last);
      if constexpr (direct && !kHasManyRegisters) {  // they would be stored on their way
        denominators[n] = direct_denominator(denominators[n], range_of<acc>(shared));
      }
    }
    if constexpr (direct && kHasManyRegisters) {
      direct_denominators(denominators, range_of<acc>(shared));
    }
    share_denominator<block.value, acc>(numerators, denominators);
    total[0] = add_quotient<false, acc>(total[0], numerators[0], denominators[0]);
  };
  int64_t a = 0;
  for (; a + shared * lanes <= size; a += shared * lanes) {
    add(a, std::integral_constant<int, shared>(), lanes);
  }
  for (; a + lanes <= size; a += lanes) {
    add(a, std::integral_constant<int, 1>(), lanes);
  }
  if (a < size) {
    add(a, std::integral_constant<int, 1>(), size - a);
  }
  return total[0];
}

// sum + all 1 / x, of which so many share a quotient.
template <int shared, bool divides, class acc, int count>
inline Vec<acc> add_reciprocals(const Vec<acc>& sum, Vec<acc> (&x)[count]) {
  static_assert(shared == count || (shared == 2 && count == 4));
  Vec<acc> numerators[count / 2];
#pragma GCC unroll 2
  for (int i = 0; i < count / 2; ++i) {
    numerators[i] = x[i] + x[i + count / 2];
    x[i] = x[i] * x[i + count / 2];
  }
  if constexpr (shared < count) {
    return sum + (numerators[0] / x[0] + numerators[1] / x[1]);  // rounded once, not twice, by as much as the sum is large
  }
  if constexpr (shared == 4) {
    numerators[0] = fmadd(numerators[0], x[1], numerators[1] * x[0]);
    x[0] = x[0] * x[1];
  }
  return add_quotient<divides, acc>(sum, numerators[0], x[0]);
}

// to[a] = exp(2 from[a]), scaled by `scale(exponentials, a)`, and ones from there to `end`, whole vectors; the largest |from[a]|
// goes into `magnitudes`. A NaN may drop out of that: it makes its row's results NaN on either way.
template <class acc, class Scale>
inline void exponentiate_row(acc* to, const acc* from, int64_t size, int64_t end, Vec<acc>& magnitudes, const Scale& scale) {
  for_vectors<acc>(size, [&](int64_t a, auto count) {
    const auto x = Vec<acc>::loadu(from + a, count);
    scale(exponential<acc>(x, 2), a).store(to + a);
    magnitudes = raised(magnitudes, x.abs());
  });
  std::fill(to + size, to + end, acc(1));
}

// Numerators that share take factors on: v must leave them room.
template <class acc>
bool is_moderate(acc largest_v) {
  return largest_v < acc(1e6);
}

// As they are.
constexpr auto kUnscaled = [](const auto& exponentials, int64_t) { return exponentials; };

}  // namespace
}  // namespace attn_ext::cpu::CPU_CAPABILITY

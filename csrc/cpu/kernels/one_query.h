// Attention of one query, a decoder's step: a few rows of memory at a time, a group, serve all that is wanted of them while they
// are near.
//
//   forward    e_s the scores;  p_s = exp(e_s - row_max), the running maximum;  c = sum_s p_s m_s / sum_s p_s
//   backward   da_s = g . m_s + gw_s;  delta = g . c + sum_s a_s gw_s;  de_s = scale a_s (da_s - delta);  dm_s = a_s g, and the
//              score's own share of the gradients from de, which may also be given
//
// It is bound by the memory's bandwidth. Rows are read one after the other, as they lie, and whoever reads a row first has later
// ones fetched, line by line: the prefetchers in hardware stop at each page's end. A gradient that no cache holds is written past
// all of them, which spares its lines' being read. And what is read, written and computed in turns adds up: of a large memory, what
// is left to do with a group's rows once their coefficients are known is done beside the next group's, row by row.
#pragma once

#include "cache.h"
#include "products.h"
#include "softmax.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// Whether a row's scores are all there at once.
inline bool is_one_group(const Problem& problem, const Plan& plan) {
  return plan.splits == 1 && problem.steps <= plan.group;
}

// How far ahead of what is read lines are fetched.
constexpr int64_t kAheadBytes = 1 << 14;

// Rows below which four are read at once, which saves their sums' ends; of others, one stream of lines is faster than four, whose
// places in the caches may be the same. From half as long ones on something else may go on beside their products.
constexpr int64_t kLongRow = 1 << 10;

// What is worked on after a group: of the same batch element or, behind its last, of the next one.
struct Upcoming {
  int64_t batch;
  Tile tile;
};

// f(first, count) over two vectors of features after the other. All counts but the last, of what is left, are constants.
template <class acc, class F>
[[gnu::always_inline]] inline void for_twos(int64_t size, const F& f) {
  constexpr std::integral_constant<int64_t, 2 * Vec<acc>::size()> both;
  int64_t d = 0;
  for (; d + both <= size; d += both) {
    f(d, both);
  }
  if (d < size) {
    f(d, size - d);
  }
}

// The first `count` elements, of at most a vector, and zeros.
template <class acc, class scalar>
[[gnu::always_inline]] inline Vec<acc> load_one(const scalar* from, int64_t count) {
  if constexpr (std::is_same_v<scalar, acc>) {
    return Vec<acc>::loadu(from, count);
  } else if (count < Vec<acc>::size()) {
    return std::get<0>(at::vec::convert_to_float<scalar>(Vec<scalar>::loadu(from, count)));
  } else {
    Vec<acc> x;
    at::vec::load_to_float<scalar>(from, x);
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
    std::tie(to[0], to[1]) = at::vec::convert_to_float<scalar>(Vec<scalar>::loadu(from, count));
  } else {
    at::vec::load_to_float<scalar>(from, to[0]);
    at::vec::load_to_float<scalar>(from + lanes, to[1]);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// Two vectors of bfloat16 in the order that takes the fewest instructions: the numbers at even places, and those at odd ones, which
// are floats but for their neighbours' bits.
template <class scalar>
constexpr bool kComesApart = std::is_same_v<scalar, c10::BFloat16>;

[[gnu::always_inline]] inline void load_apart(Vec<float> (&to)[2], const c10::BFloat16* from) {
  const __m512i pairs = _mm512_loadu_si512(from);
  to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  to[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}

// And back into the order of memory.
[[gnu::always_inline]] inline void join(Vec<float> (&x)[2]) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512 even = x[0], odd = x[1];
  x[0] = _mm512_permutex2var_ps(even, low, odd);
  x[1] = _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd);
}
#else
template <class scalar>
constexpr bool kComesApart = false;

template <class acc, class scalar>
inline void load_apart(Vec<acc> (&)[2], const scalar*) {}

template <class acc>
inline void join(Vec<acc> (&)[2]) {}
#endif

// Whether all of two vectors are there, as for_twos() tells by the type of its count.
template <class Count>
constexpr bool kAreWhole = !std::is_same_v<Count, int64_t>;

// load_two() in whatever order is the quickest.
template <class acc, class scalar, class Count>
[[gnu::always_inline]] inline void load_two_apart(Vec<acc> (&to)[2], const scalar* from, Count count) {
  if constexpr (kComesApart<scalar> && kAreWhole<Count>) {
    load_apart(to, from);
  } else {
    load_two(to, from, count);
  }
}

// Two vectors of bfloat16, where pairs of them have a product of their own. It takes subnormal numbers for zeros.
template <class scalar>
using Paired = std::conditional_t<std::is_same_v<scalar, c10::BFloat16>, Pair, scalar>;

#if defined(__AVX512BF16__)
template <class scalar>
constexpr bool kMultipliesPairs = std::is_same_v<scalar, c10::BFloat16>;

template <class Count>
[[gnu::always_inline]] inline __m512i load_pairs(const c10::BFloat16* from, Count count) {
  if constexpr (kAreWhole<Count>) {
    return _mm512_loadu_si512(from);
  } else {
    return _mm512_maskz_loadu_epi16((__mmask32(1) << count) - 1, from);
  }
}
#else
template <class scalar>
constexpr bool kMultipliesPairs = false;
#endif

template <bool streams, class acc, class scalar>
[[gnu::always_inline]] inline void store_two(scalar* to, const Vec<acc> (&x)[2], int64_t count) {
  constexpr int64_t lanes = Vec<acc>::size();
  const auto store = [](scalar* at, const auto& vector, int64_t filled) {
    if constexpr (streams) {
      stream(at, vector);
    } else if (filled > 0) {
      vector.store(at, static_cast<int>(filled));
    }
  };
  if constexpr (std::is_same_v<scalar, acc>) {
    store(to, x[0], std::min(count, lanes));
    store(to + lanes, x[1], count - lanes);
  } else {
    store(to, rounded<scalar>(x[0], x[1]), count);
  }
}

#if defined(__AVX512BF16__)
// a . b as rows are multiplied in pairs: b is of bfloat16, and what a is rounded by is added.
inline float dot_product_by_pairs(const float* a, const float* b, int64_t size) {
  Vec<float> sums[2] = {Vec<float>(0), Vec<float>(0)}, rests[2] = {Vec<float>(0), Vec<float>(0)}, left[2], right[2];
  for_twos<float>(size, [&](int64_t d, auto count) {
    load_two(left, a + d, count);
    load_two(right, b + d, count);
    const Vec<c10::BFloat16> rounded_left = rounded<c10::BFloat16>(left[0], left[1]);
    const auto [low, high] = at::vec::convert_to_float<c10::BFloat16>(rounded_left);
    sums[0] = Factors<Pair>::multiply_add(rounded<c10::BFloat16>(right[0], right[1]), rounded_left, sums[0]);
    std::swap(sums[0], sums[1]);
    rests[0] = at::vec::fmadd(left[0] - low, right[0], rests[0]);
    rests[1] = at::vec::fmadd(left[1] - high, right[1], rests[1]);
  });
  return sum(sums[0] + sums[1]) + sum(rests[0] + rests[1]);
}
#endif

// a . b as RowGroup multiplies rows of the dtype: where all the weight is on one step, and the context a is its row, delta is to be
// its da.
template <class acc>
acc dot_product_by_twos([[maybe_unused]] Dtype dtype, const acc* a, const acc* b, int64_t size) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<acc, float>) {
    if (dtype == Dtype::BFloat16) {
      return dot_product_by_pairs(a, b, size);
    }
  }
#endif
  Vec<acc> sums[2] = {Vec<acc>(0), Vec<acc>(0)}, left[2], right[2];
  for_twos<acc>(size, [&](int64_t d, auto count) {
    load_two(left, a + d, count);
    load_two(right, b + d, count);
    sums[0] = at::vec::fmadd(left[0], right[0], sums[0]);
    sums[1] = at::vec::fmadd(left[1], right[1], sums[1]);
  });
  return sum(sums[0] + sums[1]);
}

// f of a constant that is the condition.
template <class F>
inline void with_bool(bool condition, const F& f) {
  condition ? f(std::true_type()) : f(std::false_type());
}

// What is left to do with a row, two vectors of features at a time: it is added to a sum and, where it `streams`, its gradient is
// written past the caches.
template <class acc, class scalar, bool streams>
struct RestOfRow {
  const scalar* row;
  acc* sum;
  Vec<acc> factor;
  scalar* gradient = nullptr;
  const acc *g = nullptr, *q = nullptr;
  Vec<acc> weight{0};

  template <class Count>
  [[gnu::always_inline]] void operator()(int64_t d, Count count) const {
    Vec<acc> sums[2], x[2];
    load_two(sums, sum + d, count);
    load_two_apart(x, row + d, count);
    sums[0] = at::vec::fmadd(factor, x[0], sums[0]);
    sums[1] = at::vec::fmadd(factor, x[1], sums[1]);
    store_two<false>(sum + d, sums, count);
    if constexpr (streams) {
      Vec<acc> of_g[2], of_q[2];
      load_two(of_g, g + d, count);
      load_two(of_q, q + d, count);
      x[0] = at::vec::fmadd(factor, of_q[0], weight * of_g[0]);
      x[1] = at::vec::fmadd(factor, of_q[1], weight * of_g[1]);
      store_two<true>(gradient + d, x, count);
    }
  }
};

// What is left to do with a group's rows: sum += sum_r factors[r] row_r and, where there is a place for them, gradients
// weights[r] g + factors[r] q. The sum is kept in scratch for a few groups, there in the order of load_two_apart().
template <class acc>
class Rest {
 public:
  Rest(Arena& arena, Dtype dtype, int64_t size, bool is_used)
      : dtype_(dtype), size_(size), part_(is_used ? arena.take<acc>(padded<acc>(size)) : nullptr) {}

  void begin(acc* sum, const void* const* rows, const acc* factors, int64_t count) {
    if (in_part_ == 0) {
      std::fill_n(part_, size_, acc(0));
    }
    in_part_ += count;
    sum_ = sum;
    done_ = 0;
    count_ = count;
    streams_ = false;
    std::copy_n(rows, count, rows_);
    std::copy_n(factors, count, factors_);
  }

  // place(r) is where row r's gradient belongs.
  template <class Place>
  void add_gradients(const acc* weights, const acc* g, const acc* q, const Place& place) {
    streams_ = true;
    g_ = g;
    q_ = q;
    std::copy_n(weights, count_, weights_);
    for (int64_t r = 0; r < count_; ++r) {
      gradients_[r] = place(r);
    }
  }

  bool streams() const {
    return streams_;
  }

  // Rows.
  int64_t left() const {
    return count_ - done_;
  }

  // The next row, which whoever asks for it takes.
  template <class scalar, bool streams>
  RestOfRow<acc, scalar, streams> take() {
    const int64_t r = done_++;
    RestOfRow<acc, scalar, streams> taken{static_cast<const scalar*>(rows_[r]), part_, Vec<acc>(factors_[r])};
    if constexpr (streams) {
      taken.gradient = static_cast<scalar*>(gradients_[r]);
      taken.g = g_;
      taken.q = q_;
      taken.weight = Vec<acc>(weights_[r]);
    }
    return taken;
  }

  // Once there is none.
  void add_part(int64_t least = 1) {
    if (in_part_ < least) {
      return;
    }
    in_part_ = 0;
    with_type<acc>(dtype_, [&](auto example) {
      using scalar = decltype(example);
      for_twos<acc>(size_, [&](int64_t d, auto count) {
        Vec<acc> part[2], sums[2];
        load_two(part, part_ + d, count);
        if constexpr (kComesApart<scalar> && kAreWhole<decltype(count)>) {
          join(part);
        }
        load_two(sums, sum_ + d, count);
        sums[0] = sums[0] + part[0];
        sums[1] = sums[1] + part[1];
        store_two<false>(sum_ + d, sums, count);
      });
    });
  }

 private:
  Dtype dtype_;
  int64_t size_;
  acc* part_;
  int64_t in_part_ = 0;  // rows
  acc* sum_ = nullptr;
  int64_t done_ = 0;
  int64_t count_ = 0;
  bool streams_ = false;
  const acc* g_ = nullptr;
  const acc* q_ = nullptr;
  const void* rows_[kGroupRows];
  void* gradients_[kGroupRows];
  acc factors_[kGroupRows];
  acc weights_[kGroupRows];
};

// A group's rows of a tensor: where they stand and as they are, or copied where their elements stand apart.
template <class acc>
class RowGroup {
 public:
  RowGroup(Arena& arena, Dtype dtype, const View& view, const Plan& plan, int64_t size)
      : source_(dtype),
        fetches_(plan.fetches),
        view_(view),
        size_(size),
        line_(64 / width_of(dtype)),
        in_place_(view.element == 1 || size <= 1),
        is_long_(size * width_of(dtype) >= kLongRow),
        overlaps_(plan.overlaps && fetches_ && in_place_ && 2 * size * width_of(dtype) >= kLongRow),
        leaves_gradients_(overlaps_ && is_long_ && source_ == kAccumulated<acc>),
        ahead_(
            plan.streams && !leaves_gradients_
                ? plan.group
                : std::clamp<int64_t>(kAheadBytes / std::max<int64_t>(size * width_of(dtype), 1), 1, plan.group)),
        dtype_(in_place_ ? source_ : kAccumulated<acc>),
        stride_(padded<acc>(size)),
        copies_(in_place_ ? nullptr : arena.take<acc>(plan.group * stride_)),
        rest_(arena, dtype_, size, overlaps_),
        pairs_(in_place_ && source_ == Dtype::BFloat16 ? arena.take<c10::BFloat16>(whole_vectors<c10::BFloat16>(size)) : nullptr) {}

  // Those of a tile; `next` follows.
  void load(int64_t b, const Tile& tile, const Upcoming& next) {
    count_ = tile.count;
    const auto address = [&](int64_t batch, int64_t step) {
      return static_cast<const char*>(view_.data) + (batch * view_.batch + step * view_.row) * width_of(source_);
    };
    for (int64_t r = 0; r < count_; ++r) {
      rows_[r] = address(b, tile.steps[r]);
    }
    if (fetches_) {
      const int64_t here = std::max<int64_t>(count_ - ahead_, 0);
      std::copy_n(rows_ + count_ - here, here, next_);
      for (int64_t r = here; r < count_; ++r) {
        next_[r] = r - here < next.tile.count ? address(next.batch, next.tile.steps[r - here]) : rows_[r];
      }
    }
    for (int64_t r = 0; !in_place_ && r < count_; ++r) {
      rows_[r] = copies_ + r * stride_;
      load_row(copies_ + r * stride_, source_, view_, b, tile.steps[r], size_);
    }
  }

  int64_t count() const {
    return count_;
  }

  bool in_place() const {
    return in_place_;
  }

  const void* address(int64_t r) const {
    return rows_[r];
  }

  // Of the rows as they are read.
  Dtype dtype() const {
    return dtype_;
  }

  // Where rows are as they are accumulated.
  const acc* row(int64_t r) const {
    return static_cast<const acc*>(rows_[r]);
  }

  // Whoever reads rows by address has later ones fetched: the line of feature d of the one that is due at row r.
  bool fetches() const {
    return fetches_;
  }

  [[gnu::always_inline]] void fetch_next(int64_t r, int64_t d) const {
    fetch(next(r) + d * width_of(source_));
  }

  // For whoever reads one vector of features after the other, of which a line may have several; of `scalar` where that is known.
  template <class scalar = char>
  [[gnu::always_inline]] void fetch_next_line(int64_t r, int64_t d) const {
    constexpr bool is_line = Vec<acc>::size() * sizeof(scalar) >= 64;
    if (is_line || (d & (line_ - 1)) == 0) {
      fetch_next(r, d);
    }
  }

  // From feature d on.
  void fetch_rest_of_next(int64_t r, int64_t d) const {
    for (const int64_t line = 64 / width_of(source_); d < size_; d += line) {
      fetch_next(r, d);
    }
  }

  // Of what comes kAheadBytes after row r; a whole group after it where it is fetched beside gradients that are streamed.
  const char* next(int64_t r) const {
    return static_cast<const char*>(next_[r]);
  }

  // Whether what is left to do with a group's rows, of a large memory, is done beside the next ones' products; and with what is
  // left their gradients, where those are streamed: of halves and of short rows they are sooner taken at once, four of them.
  bool overlaps() const {
    return overlaps_;
  }

  bool leaves_gradients() const {
    return leaves_gradients_;
  }

  // sum += sum_r factors[r] row_r, complete after finish().
  Rest<acc>& add_later(acc* sum, const acc* factors) {
    finish_rows();
    rest_.begin(sum, rows_, factors, count_);
    return rest_;
  }

  // For whoever reads other rows meanwhile: one of those that are left, if there is one.
  void go_on() {
    if (rest_.left() > 0) {
      take_one_left();
    }
  }

  // What was left for later.
  void finish() {
    finish_rows();
    rest_.add_part();
  }

  // out[r] = factor x . row_r, of an x that is of the rows' dtype. `fetches`: here, where the rows are read first.
  void dot_products(acc* out, const acc* x, acc factor, bool fetches = true) {
    with_type<acc>(dtype_, [&](auto example) {
      using scalar = decltype(example);
      const auto* const left = left_of<scalar>(x);
      if (rest_.left() > 0) {
        rest_.streams() ? multiply_beside<scalar, true>(out, left, factor) : multiply_beside<scalar, false>(out, left, factor);
        finish_rows();
        rest_.add_part(kGroupRows);
        return;
      }
      with_bool(fetches && fetches_, [&](auto fetching) {
        const bool one_by_one = fetching.value && is_long_;
        for_blocks<4>(count_, [&](auto rows, int64_t first) {
          Vec<acc> totals[1][rows.value];
          if (one_by_one) {
            for (int r = 0; r < rows.value; ++r) {
              multiply<1, fetching.value, scalar>(totals[0] + r, left, first + r);
            }
          } else {
            multiply<rows.value, fetching.value, scalar>(totals[0], left, first);
          }
          store_sums<1, rows.value>(out + first, 0, totals, factor);
        });
      });
    });
  }

  // to += sum_r factors[r] row_r
  void add_to(acc* to, const acc* factors) const {
    sum_to(to, factors, 1, true);
  }

  // to = factor sum_r factors[r] row_r, or to += where it `adds`. A few vectors of the sums stay in registers while the rows pass.
  void sum_to(acc* to, const acc* factors, acc factor, bool adds) const {
    constexpr std::integral_constant<int64_t, 2 * Vec<acc>::size()> both;
    with_type<acc>(dtype_, [&](auto example) {
      using scalar = decltype(example);
      const auto add = [&](int64_t d, auto width, auto count) {
        Vec<acc> sums[width.value][2], right[2];
#pragma GCC unroll 4
        for (int w = 0; w < width.value; ++w) {
          sums[w][0] = sums[w][1] = Vec<acc>(0);
        }
        for (int64_t r = 0; r < count_; ++r) {
          const Vec<acc> of_row(factors[r]);
#pragma GCC unroll 4
          for (int w = 0; w < width.value; ++w) {
            load_two_apart(right, static_cast<const scalar*>(rows_[r]) + d + w * both, count);
            sums[w][0] = at::vec::fmadd(of_row, right[0], sums[w][0]);
            sums[w][1] = at::vec::fmadd(of_row, right[1], sums[w][1]);
          }
        }
#pragma GCC unroll 4
        for (int w = 0; w < width.value; ++w) {
          if constexpr (kComesApart<scalar> && kAreWhole<decltype(count)>) {
            join(sums[w]);
          }
          right[0] = right[1] = Vec<acc>(0);
          if (adds) {
            load_two(right, to + d + w * both, count);
          }
          sums[w][0] = at::vec::fmadd(sums[w][0], Vec<acc>(factor), right[0]);
          sums[w][1] = at::vec::fmadd(sums[w][1], Vec<acc>(factor), right[1]);
          store_two<false>(to + d + w * both, sums[w], count);
        }
      };
      const int64_t whole = size_ / both;
      for_blocks<4>(whole, [&](auto width, int64_t first) { add(first * both, width, both); });
      if (whole * both < size_) {
        add(whole * both, std::integral_constant<int, 1>(), size_ - whole * both);
      }
    });
  }

 private:
  // Not inlined: the loops of whoever calls have no registers to spare.
  [[gnu::noinline]] void take_one_left() {
    with_type<acc>(dtype_, [&](auto example) { for_twos<acc>(size_, rest_.template take<decltype(example), false>()); });
    if (rest_.left() == 0) {
      rest_.add_part(kGroupRows);
    }
  }

  // x as it meets the rows.
  template <class scalar>
  auto left_of(const acc* x) const {
    if constexpr (kMultipliesPairs<scalar>) {
      store_row(Dtype::BFloat16, pairs_, 0, x, size_);
      return static_cast<const scalar*>(pairs_);
    } else {
      return x;
    }
  }

  // out[r] = factor x . row_r, each beside one of the rows that are left, as far as there are some.
  template <class scalar, bool streams, class Left>
  void multiply_beside(acc* out, const Left* x, acc factor) {
    for_blocks<4>(count_, [&](auto rows, int64_t first) {
      Vec<acc> totals[1][rows.value];
      for (int r = 0; r < rows.value; ++r) {
        if (rest_.left() > 0) {
          multiply<1, true, scalar>(totals[0] + r, x, first + r, rest_.template take<scalar, streams>());
        } else {
          multiply<1, true, scalar>(totals[0] + r, x, first + r);
        }
      }
      store_sums<1, rows.value>(out + first, 0, totals, factor);
    });
  }

  void finish_rows() {
    with_type<acc>(dtype_, [&](auto example) {
      with_bool(rest_.streams(), [&](auto streams) {
        while (rest_.left() > 0) {
          for_twos<acc>(size_, rest_.template take<decltype(example), streams.value>());
        }
      });
    });
  }

  struct Nothing {
    template <class Count>
    void operator()(int64_t, Count) const {}
  };

  // Vectors that add up to x . row_r each, of `rows` rows from `first` on, with what is done beside them.
  template <int rows, bool fetches, class scalar, class Left, class Beside = Nothing>
  [[gnu::always_inline]] void multiply(Vec<acc>* totals, const Left* x, int64_t first, const Beside& beside = {}) const {
    const scalar* row[rows];
    const char* later[rows];
    Vec<acc> sums[rows][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      row[r] = static_cast<const scalar*>(rows_[first + r]);
      later[r] = fetches ? next(first + r) : nullptr;
      sums[r][0] = sums[r][1] = Vec<acc>(0);
    }
    for_twos<acc>(size_, [&](int64_t d, auto count) __attribute__((always_inline)) {
      const auto ask = [&](int r) __attribute__((always_inline)) {
        for (size_t at = 0; fetches && at < 2 * sizeof(scalar) * Vec<acc>::size(); at += 64) {
          fetch(later[r] + d * sizeof(scalar) + at);
        }
      };
      if constexpr (kMultipliesPairs<scalar>) {
        const auto left = load_pairs(x + d, count);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          ask(r);
          sums[r][0] = Factors<Paired<scalar>>::multiply_add(left, load_pairs(row[r] + d, count), sums[r][0]);
          std::swap(sums[r][0], sums[r][1]);  // two chains
        }
      } else {
        Vec<acc> left[2], right[2];
        load_two(left, x + d, count);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          ask(r);
          load_two(right, row[r] + d, count);
          sums[r][0] = at::vec::fmadd(left[0], right[0], sums[r][0]);
          sums[r][1] = at::vec::fmadd(left[1], right[1], sums[r][1]);
        }
      }
      beside(d, count);
    });
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      totals[r] = sums[r][0] + sums[r][1];
    }
  }

  Dtype source_;
  bool fetches_;
  View view_;
  int64_t size_;
  int64_t line_;  // elements
  bool in_place_;
  bool is_long_;
  bool overlaps_;
  bool leaves_gradients_;
  int64_t ahead_;  // rows
  Dtype dtype_;    // of the rows as they are read
  int64_t stride_;
  acc* copies_;
  Rest<acc> rest_;
  int64_t count_ = 0;
  const void* rows_[kGroupRows];
  const void* next_[kGroupRows];
  c10::BFloat16* pairs_;
};

// The rows of a [B, S, size] gradient, each written once and in their order, with zeros for the steps that nobody attends: where
// they belong, or by way of scratch if they are of another type or streamed.
template <class acc>
class GradientRows {
 public:
  // `at_once` rows may be under way.
  GradientRows(Arena& arena, void* out, const Problem& problem, const Plan& plan, int64_t size, int64_t at_once)
      : out_(static_cast<char*>(out)),
        dtype_(problem.dtype),
        steps_(problem.steps),
        size_(size),
        streams_(plan.streams && reinterpret_cast<uintptr_t>(out) % 64 == 0 && size % (2 * Vec<acc>::size()) == 0),
        in_place_(dtype_ == kAccumulated<acc> && !streams_),
        stride_(padded<acc>(size)),
        scratch_(out == nullptr || in_place_ ? nullptr : arena.take<acc>(at_once * stride_)) {}

  bool wanted() const {
    return out_ != nullptr;
  }

  // Past the caches.
  bool streams() const {
    return wanted() && streams_;
  }

  void begin(const Item& item) {
    first_row_ = item.batch * steps_;
    written_ = item.first_step;
  }

  // The tile's rows: a_r g + de_r q, of the coefficients a and, kGroupRows behind them, de. g or q may be null.
  void combine(const Tile& tile, const acc* coefficients, const acc* g, const acc* q) {
    with_bool(streams_, [&](auto streams) { combine_terms<streams.value, false>(tile, coefficients, g, q, nullptr); });
  }

  // The same of rows that are streamed, while the memory's next ones are fetched.
  void combine_and_fetch(const Tile& tile, const acc* coefficients, const acc* g, const acc* q, const RowGroup<acc>& memory) {
    combine_terms<true, true>(tile, coefficients, g, q, &memory);
  }

  // Where a step's row belongs, for it to be written now.
  void* place(int64_t step) {
    zero(step);
    written_ = step + 1;
    return at(step);
  }

  // Room for a step's row, which write() then brings where it belongs; `i` numbers those that are under way.
  acc* row(int64_t step, int64_t i = 0) {
    void* const belongs = place(step);
    return in_place_ ? static_cast<acc*>(belongs) : scratch_ + i * stride_;
  }

  void write(int64_t step, const acc* row) const {
    if (in_place_) {
      return;
    }
    with_type<acc>(dtype_, [&](auto example) {
      auto* to = static_cast<decltype(example)*>(at(step));
      const auto copy = [&](auto streams) {
        for_twos<acc>(size_, [&](int64_t d, auto count) {
          Vec<acc> x[2];
          load_two(x, row + d, count);
          store_two<streams.value>(to + d, x, count);
        });
      };
      with_bool(streams_, copy);
    });
  }

  void end(const Item& item) {
    zero(item.end_step);
    if (streams_) {
      finish_streaming();
    }
  }

 private:
  template <bool streams, bool fetches>
  void combine_terms(const Tile& tile, const acc* coefficients, const acc* g, const acc* q, const RowGroup<acc>* memory) {
    const acc* const rows[] = {g, q};
    const auto take = [&](auto terms, const acc* const* from, const acc* factors) {
      with_type<acc>(dtype_, [&](auto example) {
        for_blocks<4>(tile.count, [&](auto count, int64_t first) {
          const char* next[count.value] = {};
          for (int r = 0; fetches && r < count.value; ++r) {
            next[r] = memory->next(first + r);
          }
          combine_block<terms.value, count.value, streams, fetches, decltype(example)>(
              tile.steps + first, from, factors + first, next);
        });
      });
    };
    if (g != nullptr && q != nullptr) {
      take(std::integral_constant<int, 2>(), rows, coefficients);
    } else if (g != nullptr) {
      take(std::integral_constant<int, 1>(), rows, coefficients);
    } else if (q != nullptr) {
      take(std::integral_constant<int, 1>(), rows + 1, coefficients + kGroupRows);
    }
  }

  template <int terms, int count, bool streams, bool fetches, class scalar>
  void combine_block(const int64_t* steps, const acc* const* rows, const acc* coefficients, const char* const* next) {
    scalar* to[count];
    Vec<acc> factors[terms][count];
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) {
      to[r] = static_cast<scalar*>(place(steps[r]));
#pragma GCC unroll 2
      for (int k = 0; k < terms; ++k) {
        factors[k][r] = Vec<acc>(coefficients[k * kGroupRows + r]);
      }
    }
    for_twos<acc>(size_, [&](int64_t d, auto filled) {
      Vec<acc> x[terms][2];
#pragma GCC unroll 2
      for (int k = 0; k < terms; ++k) {
        load_two(x[k], rows[k] + d, filled);
      }
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r) {
        Vec<acc> result[2] = {factors[0][r] * x[0][0], factors[0][r] * x[0][1]};
        if constexpr (terms == 2) {
          result[0] = at::vec::fmadd(factors[1][r], x[1][0], result[0]);
          result[1] = at::vec::fmadd(factors[1][r], x[1][1], result[1]);
        }
        store_two<streams>(to[r] + d, result, filled);
        for (size_t at = 0; fetches && at < 2 * sizeof(scalar) * Vec<acc>::size(); at += 64) {
          fetch(next[r] + d * sizeof(scalar) + at);
        }
      }
    });
  }

  void* at(int64_t step) const {
    return out_ + (first_row_ + step) * size_ * width_of(dtype_);
  }

  void zero(int64_t end) const {
    if (wanted() && written_ < end) {
      zero_row(dtype_, out_, (first_row_ + written_) * size_, (end - written_) * size_);
    }
  }

  char* out_;
  Dtype dtype_;
  int64_t steps_;
  int64_t size_;
  bool streams_;
  bool in_place_;
  int64_t stride_;
  acc* scratch_;
  int64_t first_row_ = 0;
  int64_t written_ = 0;  // up to here
};

// f(tile, next) over the groups of an item, the index-th, each with the one after it; of a large memory the next item's is that of
// the last, elsewhere it is empty.
template <class F>
void for_groups(const Problem& problem, const Plan& plan, int64_t index, const F& f) {
  const Item item = plan.item(problem, index);
  SourceWalk walk(problem, item, plan.group);
  Upcoming two[2];
  two[0].batch = two[1].batch = item.batch;
  bool more = walk.next(two[0].tile);
  for (int i = 0; more; i = 1 - i) {
    Upcoming& next = two[1 - i];
    more = walk.next(next.tile);
    if (!more && plan.fetches && index + 1 < plan.items(problem)) {
      const Item after = plan.item(problem, index + 1);
      next.batch = after.batch;
      SourceWalk(problem, after, plan.group).next(next.tile);
    }
    f(two[i].tile, next);
  }
}

// A group's values to and from where their steps are in a row; a few are sooner moved one by one.
template <class acc>
bool moves_by_vectors(const Tile& tile) {
  return tile.count >= Vec<acc>::size() && tile.contiguous();
}

template <class acc>
void scatter(acc* row, const acc* values, const Tile& tile) {
  if (moves_by_vectors<acc>(tile)) {
    return scale_row(row + tile.steps[0], values, tile.count, acc(1));
  }
  for (int64_t j = 0; j < tile.count; ++j) {
    row[tile.steps[j]] = values[j];
  }
}

template <class acc>
void gather(acc* values, const acc* row, const Tile& tile) {
  if (moves_by_vectors<acc>(tile)) {
    return scale_row(values, row + tile.steps[0], tile.count, acc(1));
  }
  for (int64_t j = 0; j < tile.count; ++j) {
    values[j] = row[tile.steps[j]];
  }
}

// What a group's gradients are made of, and go to.
template <class acc>
struct GroupGradients {
  const Tile& tile;
  RowGroup<acc>& memory;
  const acc* coefficients;  // the weights, and kGroupRows behind them the gradients of the scores
  const acc* grad_context;  // null: none came in
  GradientRows<acc>& grad_memory;
  acc* grad_query;

  const acc* grad_scores() const {
    return coefficients + kGroupRows;
  }

  // a_s g + de_s q; q may be null.
  void combine_memory(const acc* q) const {
    if (grad_memory.wanted()) {
      grad_memory.combine(tile, coefficients, grad_context, q);
    }
  }

  // The same, and grad_query += sum_s de_s m_s, as far as that gains beside the next group's products.
  void add_later(const acc* q) const {
    const bool streams = grad_memory.streams(), all = streams && memory.leaves_gradients() && grad_context != nullptr;
    if (!streams) {
      combine_memory(q);
    } else if (!all) {
      grad_memory.combine_and_fetch(tile, coefficients, grad_context, q, memory);
    }
    Rest<acc>& rest = memory.add_later(grad_query, grad_scores());
    if (all) {
      rest.add_gradients(coefficients, grad_context, q, [&](int64_t r) { return grad_memory.place(tile.steps[r]); });
    }
  }
};

// Score is OneQueryDot or OneQueryAdditive.
template <class Score>
struct OneQueryForward {
  using acc = typename Score::acc;

  // One item's scratch. Until merge() it holds the result of one of several splits.
  struct Slot {
    Slot(const Forward& f, char* base)
        : arena(base),
          row_max(arena.take<acc>(1)),
          row_sum(arena.take<acc>(1)),
          context(arena.take<acc>(f.problem.memory_size)),
          weights(f.weights == nullptr ? nullptr : arena.take<acc>(f.plan.split_size)),
          memory(arena, f.problem.dtype, f.problem.memory, f.plan, f.problem.memory_size),
          score(f.problem, f.plan, arena) {}

    Arena arena;
    acc* row_max;
    acc* row_sum;
    acc* context;  // not yet divided by row_sum; but of one group it is, and may be the output itself
    acc* weights;  // of the split's steps, where they are wanted, not yet divided either
    RowGroup<acc> memory;
    Score score;
  };

  static size_t slot_size(const Forward& f) {
    return Slot(f, nullptr).arena.used();
  }

  static void run(const Forward& f, int64_t index, char* base) {
    const Problem& problem = f.problem;
    const Item item = f.plan.item(problem, index);
    Slot slot(f, base);
    acc row_max = kNothing<acc>, row_sum = 0;
    // Of one group the sum is known before the context is taken, which then goes where it belongs.
    const bool one_group = is_one_group(problem, f.plan);
    if (one_group && f.exact_context != nullptr) {
      slot.context = static_cast<acc*>(f.exact_context) + item.batch * problem.memory_size;
    }
    if (f.weights != nullptr) {
      std::fill_n(slot.weights, item.end_step - item.first_step, acc(0));
    }
    const bool adds_later = slot.memory.overlaps() && !one_group;
    if (adds_later) {
      std::fill_n(slot.context, problem.memory_size, acc(0));
    }
    slot.score.begin(item.batch);
    for_groups(problem, f.plan, index, [&](const Tile& tile, const Upcoming& next) {
      alignas(64) acc row[kGroupRows];
      slot.memory.load(item.batch, tile, next);
      slot.score.load_keys(item.batch, tile, next);
      slot.score.scores(row, slot.memory);
      const int64_t whole = whole_vectors<acc>(tile.count);
      std::fill(row + tile.count, row + whole, kNothing<acc>);
      const acc before = row_max;
      row_max = maximum(row, whole, before);
      if (row_max == kNothing<acc>) {
        return;
      }
      if (row_max != before && row_sum != 0) {
        const acc correction = std::exp(before - row_max);
        row_sum *= correction;
        slot.memory.finish();
        scale_row(slot.context, slot.context, problem.memory_size, correction);
        if (f.weights != nullptr) {
          scale_row(slot.weights, slot.weights, tile.steps[0] - item.first_step, correction);
        }
      }
      const bool adds = row_sum != 0;
      row_sum += exponentials(row, whole, row_max);
      if (f.weights != nullptr) {
        scatter(slot.weights - item.first_step, row, tile);
      }
      if (adds_later) {
        slot.memory.add_later(slot.context, row);
      } else {
        slot.memory.sum_to(slot.context, row, one_group ? 1 / row_sum : acc(1), adds);
      }
    });
    slot.memory.finish();
    if (row_sum == 0) {
      std::fill_n(slot.context, problem.memory_size, acc(0));
    }
    *slot.row_max = row_max;
    *slot.row_sum = row_sum;
    if (f.plan.splits == 1) {
      store_context(f, item, slot, one_group ? acc(1) : inverse(row_sum));
      store_weights(f, item, slot, inverse(row_sum));
    }
  }

  // The splits' partial results, in their order, into the outputs, by the first of them.
  static void merge(const Forward& f, int64_t first, char* slots, size_t slot_size) {
    if (first % f.plan.splits != 0) {
      return;
    }
    slots += first * slot_size;
    Slot slot(f, slots);
    const acc first_max = *slot.row_max;
    for (int64_t z = 1; z < f.plan.splits; ++z) {
      const Slot other(f, slots + z * slot_size);
      Part<acc>{*slot.row_max, *slot.row_sum, slot.context}.absorb(
          {*other.row_max, *other.row_sum, other.context}, f.problem.memory_size);
    }
    const acc row_max = *slot.row_max, factor = inverse(*slot.row_sum);
    store_context(f, f.plan.item(f.problem, first), slot, factor);
    for (int64_t z = 0; z < f.plan.splits; ++z) {
      const Slot part(f, slots + z * slot_size);
      const acc part_max = z == 0 ? first_max : *part.row_max;
      store_weights(
          f, f.plan.item(f.problem, first + z), part, part_max == row_max ? factor : std::exp(part_max - row_max) * factor);
    }
  }

 private:
  static acc inverse(acc row_sum) {
    return row_sum == 0 ? acc(0) : 1 / row_sum;
  }

  static void store_context(const Forward& f, const Item& item, const Slot& slot, acc factor) {
    const int64_t size = f.problem.memory_size;
    static_cast<acc*>(f.logsumexp)[item.batch] = *slot.row_max + std::log(*slot.row_sum);
    store(f.problem.dtype, f.context, f.exact_context, item.batch * size, slot.context, size, factor);
  }

  static void store_weights(const Forward& f, const Item& item, const Slot& slot, acc factor) {
    if (f.weights == nullptr) {
      return;
    }
    const int64_t steps = item.end_step - item.first_step, first = item.batch * f.problem.steps + item.first_step;
    if (std::isnan(factor)) {  // times which the zeros of what is not attended would be none
      for (int64_t j = 0; j < steps; ++j) {
        slot.weights[j] = is_attended(f.problem, item.batch, 0, item.first_step + j) ? factor : acc(0);
      }
      factor = 1;
    }
    store(f.problem.dtype, f.weights, f.exact_weights, first, slot.weights, steps, factor);
  }

  // Rounded, and as it was accumulated where that is wanted and it is not there yet.
  static void store(Dtype dtype, void* out, void* exact, int64_t first, const acc* from, int64_t size, acc factor) {
    if (exact != nullptr && static_cast<acc*>(exact) + first != from) {
      store_row(kAccumulated<acc>, exact, first, from, size, factor);
    }
    if (out != exact) {
      store_row(dtype, out, first, from, size, factor);
    }
  }
};

template <class Score>
struct OneQueryBackward {
  using acc = typename Score::acc;

  struct Slot {
    Slot(const Backward& f, char* base)
        : arena(base),
          grad_query(arena.take<acc>(f.problem.key_size)),
          grad_context(arena, f.problem.dtype, f.grad_context, 1, f.problem.memory_size),
          context(arena, kAccumulated<acc>, f.context, 1, f.problem.memory_size),
          weights(arena, kAccumulated<acc>, f.weights, 1, f.problem.steps),
          grad_weights(arena, f.problem.dtype, f.grad_weights, 1, f.problem.steps),
          score_gradients(arena, kAccumulated<acc>, f.score_gradients, 1, f.problem.steps),
          memory(arena, f.problem.dtype, f.problem.memory, f.plan, f.problem.memory_size),
          grad_memory(arena, f.grad_memory, f.problem, f.plan, f.problem.memory_size, 0),
          score(f.problem, f.plan, arena, &f) {}

    Arena arena;
    acc* grad_query;  // the split's share
    Rows<acc> grad_context;
    Rows<acc> context;
    Rows<acc> weights;
    Rows<acc> grad_weights;
    Rows<acc> score_gradients;
    RowGroup<acc> memory;
    GradientRows<acc> grad_memory;
    Score score;
  };

  static size_t slot_size(const Backward& f) {
    return Slot(f, nullptr).arena.used();
  }

  static void run(const Backward& f, int64_t index, char* base) {
    const Problem& problem = f.problem;
    const Item item = f.plan.item(problem, index);
    Slot slot(f, base);
    const Incoming incoming(f, item.batch, slot);
    acc* grad_scores = f.grad_scores == nullptr ? nullptr : static_cast<acc*>(f.grad_scores) + item.batch * problem.steps;
    if (grad_scores != nullptr) {
      std::fill(grad_scores + item.first_step, grad_scores + item.end_step, acc(0));
    }
    std::fill_n(slot.grad_query, problem.key_size, acc(0));
    slot.score.begin(item.batch);
    slot.score.begin_gradients(item);
    slot.grad_memory.begin(item);
    const bool fetches = !slot.score.fetches_beside_gradients(slot.memory, slot.grad_memory, incoming.grad_context);
    acc excess = 0;
    for_groups(problem, f.plan, index, [&](const Tile& tile, const Upcoming& next) {
      acc coefficients[2 * kGroupRows];
      const GroupGradients<acc> group{tile, slot.memory, coefficients, incoming.grad_context, slot.grad_memory, slot.grad_query};
      slot.memory.load(item.batch, tile, next);
      slot.score.load_keys(item.batch, tile, next);
      excess += incoming.find_coefficients(f, tile, slot, coefficients, coefficients + kGroupRows, fetches);
      if (grad_scores != nullptr) {
        scatter(grad_scores, group.grad_scores(), tile);
      }
      slot.score.add_gradients(group);
    });
    slot.memory.finish();
    slot.grad_memory.end(item);
    slot.score.end_gradients(item, index, slot.grad_query);
    if (problem.method == Method::Dot && f.grad_query != nullptr && incoming.context != nullptr) {
      add_row(slot.grad_query, -excess, incoming.context, problem.key_size);
    }
    if (f.plan.splits == 1) {
      merge_query(f, item, slot, 0);
    }
  }

  // The splits' shares of the query's gradient, in their order.
  static void merge(const Backward& f, int64_t index, char* slots, size_t slot_size) {
    if (index % f.plan.splits == 0) {
      merge_query(f, f.plan.item(f.problem, index), Slot(f, slots + index * slot_size), slot_size);
    }
  }

 private:
  static void merge_query(const Backward& f, const Item& item, const Slot& first, size_t slot_size) {
    if (f.grad_query != nullptr) {
      merge_row(f.problem.dtype, f.grad_query, item.batch, first.grad_query, f.plan.splits, slot_size, f.problem.key_size);
    }
  }

  // A batch element's rows of what came in and what the forward left, null where there are none.
  struct Incoming {
    const acc* grad_context;
    const acc* weights;
    const acc* grad_weights;
    const acc* score_gradients;
    int64_t batch;
    acc delta = 0;
    const acc* context = nullptr;  // where delta is of it

    Incoming(const Backward& f, int64_t b, Slot& slot)
        : grad_context(slot.grad_context.load_only(b)),
          weights(slot.weights.load_only(b)),
          grad_weights(slot.grad_weights.load_only(b)),
          score_gradients(slot.score_gradients.load_only(b)),
          batch(b) {
      if (score_gradients != nullptr || is_one_group(f.problem, f.plan)) {
        return;
      }
      if (grad_context != nullptr) {
        context = slot.context.load_only(b);
        delta = dot_product_by_twos(slot.memory.dtype(), context, grad_context, f.problem.memory_size);
      }
      if (grad_weights != nullptr) {
        delta += dot_product(weights, grad_weights, f.problem.steps);
      }
    }

    // Returns the sum of de. `fetches`: the memory's next rows here, unless its scores have.
    acc find_coefficients(const Backward& f, const Tile& tile, Slot& slot, acc* a, acc* de, bool fetches) const {
      // Of one group delta is sum_s a_s da_s, of what is there, and the context is not read.
      const bool one_group = is_one_group(f.problem, f.plan);
      if (score_gradients != nullptr) {
        gather(de, score_gradients, tile);
        return 0;
      }
      if (weights != nullptr) {
        gather(a, weights, tile);
      } else {
        slot.score.scores(a, slot.memory);
        std::fill(a + tile.count, a + whole_vectors<acc>(tile.count), kNothing<acc>);
        const acc total = recompute_softmax(a, tile.count, static_cast<const acc*>(f.logsumexp)[batch]);
        if (one_group) {
          scale_row(a, a, tile.count, 1 / total);
        }
      }
      std::fill_n(de, tile.count, acc(0));
      if (grad_context != nullptr) {
        slot.memory.dot_products(de, grad_context, 1, fetches && weights != nullptr);
      }
      for (int64_t j = 0; grad_weights != nullptr && j < tile.count; ++j) {
        de[j] += grad_weights[tile.steps[j]];
      }
      const acc scale = static_cast<acc>(f.problem.scale);
      const acc subtract = one_group ? dot_product(a, de, tile.count) : delta;
      const acc excess = differentiate_softmax(de, a, tile.count, subtract, scale);
      if (one_group) {
        take_off_excess(de, a, tile.count, excess);
      }
      return excess;
    }
  };
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

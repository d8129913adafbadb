// Additive scores, e_ts = scale v . tanh(q_t + k_s), without a tanh.
//
// With E = exp(2q) exp(2k), tanh(q + k) = 1 - 2 / (1 + E). The exponentials are taken once per feature of a query and of a key, so
// that the loop over (t, s, feature) is a multiply-add, a reciprocal and an addition; sums begin with -sum(v) / 2:
//
//   forward    e_ts = -2 scale (sum_a 1 / x_tsa - sum(v) / 2),  x = (1 + E) / v
//   backward   h = 2 / (1 + E) - 1 = -tanh,  u_ts = de_ts h_ts,  y_ts = de_ts - u_ts h_ts = de_ts tanh'
//              dq_t = v sum_s y_ts,  dk_s = v sum_t y_ts,  dv = -sum_ts u_ts
//
// It is bound by arithmetic, and the reciprocal is most of it: three instructions of an estimate and a Newton step, or a division.
// Forward, four features share one, 1/x0 + 1/x1 = (x0 + x1) / (x0 x1) and so on: 17 instructions on four vectors, two of them
// additions, instead of 24. Their numerators are one because x, a multiply-add of exp(2k) with exp(2q) / v and 1 / v, has v in it.
// The backward needs every reciprocal by itself: 11 operations a vector, of which three are additions, for which many processors
// have ports of their own. Where they have not, two source steps share a reciprocal, multiply-adds take the sums, and 9 are left.
//
// x, and the product of those that share, must neither overflow nor lose its factors to underflow. While the exponentials are taken
// the largest |2q| and |2k| are found; their sum, and how far the v are apart, decide how many features share a reciprocal. Where
// even two could leave the type's range, E = exp(2 (q + k)) is taken directly, which is exact for any input; a backward of many
// queries decides so for each vector of features. A single query takes it so too: for it the exponentials are as many either way,
// and the keys are read where they stand. A decoder's steps share their keys: their exponentials come prepared.
#include "kernels.h"
#include "many_queries.h"
#include "one_query.h"

#include <numeric>
#include <optional>

namespace attn_ext::cpu::CPU_CAPABILITY {
namespace {

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

// So many source steps may share a reciprocal in a backward of many queries. Not queries: a NaN of one would come into the next.
constexpr int kSharedSteps = kAddsBesideProducts ? 1 : 2;

// Whether the scores of many queries are divided: a Zen 4 divides a vector in 6 cycles, which an estimate of the reciprocal, its
// Newton step and the product would have kept the ports for products for; Intel's take 16.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
template <class acc>
constexpr bool kMayDivide = std::is_same_v<acc, float>;

inline bool divides() {
  return __builtin_cpu_is("amdfam19h");
}
#else
template <class acc>
constexpr bool kMayDivide = false;

constexpr bool divides() {
  return false;
}
#endif

// Queries of a register tile of scores, by kColumns keys.
constexpr int kScoreRows = std::min(kRows, 4);

// The largest |2q| + |2k| at which `shared` factors 1 + E <= 2 exp(|2q| + |2k|) have a product in range.
template <class acc>
constexpr acc range_of(int shared) {
  return kRange<acc> / shared - acc(0.6931472);
}

// A smaller |v|, relative to the largest, adds nothing to a score: it counts as this much.
template <class acc>
constexpr acc kLeastV = std::is_same_v<acc, double> ? acc(0x1p-62) : acc(0x1p-32);

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
// An estimate and one Newton step: where each number has a quotient of its own, the divider would be the bottleneck. |x| is in
// exp(+-kRange).
inline Vec<float> estimate(const Vec<float>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_rcp14_ps(x);
#else
  return _mm256_rcp_ps(x);
#endif
}

template <>
inline Vec<float> reciprocal(const Vec<float>& x) {
  const Vec<float> first = estimate(x);
  return first * at::vec::fnmadd(x, first, Vec<float>(2));
}

template <>
inline Vec<float> negative_tanh(const Vec<float>& x) {
  const Vec<float> first = estimate(x);
  return at::vec::fmadd(first, at::vec::fnmadd(x, first, Vec<float>(2)), Vec<float>(-1));
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
    h[0] = at::vec::fmadd(both, x[1], Vec<acc>(-1));
    h[1] = at::vec::fmadd(both, x[0], Vec<acc>(-1));
  }
}

// sum + numerator / denominator: by the divider, or the Newton step's last product and the sum in one.
template <bool divides, class acc>
[[gnu::always_inline]] inline Vec<acc> add_quotient(const Vec<acc>& sum, const Vec<acc>& numerator, const Vec<acc>& denominator) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<acc, float> && !divides) {
    const Vec<float> first = estimate(denominator);
    return at::vec::fmadd(numerator * first, at::vec::fnmadd(denominator, first, Vec<float>(2)), sum);
  }
#endif
  return sum + numerator / denominator;
}

// 1 + exp(2 (q + k)), with the exponent limited to `limit`: what is lost of 1 / (1 + E) is at most exp(-limit). Keeps a NaN.
template <class acc>
[[gnu::always_inline]] inline Vec<acc> direct_denominator(const Vec<acc>& query, const Vec<acc>& key, acc limit) {
  const Vec<acc> sum = at::vec::clamp(query + key, Vec<acc>(-kRange<acc> / 2), Vec<acc>(limit / 2));
  return Vec<acc>(1) + exponential<acc>(sum, 2);
}

// numerators[0] / denominators[0] = the sum of all their quotients.
template <int shared, class acc>
[[gnu::always_inline]] inline void share_denominator(Vec<acc> (&numerators)[shared], Vec<acc> (&denominators)[shared]) {
#pragma GCC unroll 2
  for (int left = shared / 2; left > 0; left /= 2) {
#pragma GCC unroll 2
    for (int i = 0; i < left; ++i) {
      const int j = i + left;
      numerators[i] = at::vec::fmadd(numerators[i], denominators[j], numerators[j] * denominators[i]);
      denominators[i] = denominators[i] * denominators[j];
    }
  }
}

// -sum(v) / 2 by lanes, of whole vectors, for sums of v / (1 + E) to begin with: those of v of one sign would grow, and lose to
// rounding what the steps differ by. What is not finite stays out.
template <class acc>
Vec<acc> half_off(const acc* v, int64_t size) {
  Vec<acc> total(0);
  for (int64_t a = 0; a < size; a += Vec<acc>::size()) {
    total = total - Vec<acc>(0.5) * Vec<acc>::loadu(v + a);
  }
  return std::isfinite(sum(total)) ? total : Vec<acc>(0);
}

// total + sum_a v_a / denominator(a), by lanes: denominator(a, filled) is of a vector of features, of which so many are there, and
// v ends in zeros.
template <int shared, class acc, class Denominator>
[[gnu::always_inline]] inline Vec<acc> sum_of_quotients(
    Vec<acc> total, const acc* v, int64_t size, const Denominator& denominator) {
  constexpr int64_t lanes = Vec<acc>::size();
  const auto add = [&](int64_t a, auto block, int64_t last) {
    Vec<acc> numerators[block.value], denominators[block.value];
#pragma GCC unroll 4
    for (int n = 0; n < block.value; ++n) {
      numerators[n] = Vec<acc>::loadu(v + a + n * lanes);
      denominators[n] = denominator(a + n * lanes, n + 1 < block.value ? lanes : last);
    }
    share_denominator<block.value, acc>(numerators, denominators);
    total = add_quotient<false, acc>(total, numerators[0], denominators[0]);
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
  return total;
}

// numerator / x[0] = the sum of all 1 / x.
template <int shared, class acc>
inline Vec<acc> share_denominator(Vec<acc> (&x)[shared]) {
  Vec<acc> numerators[shared / 2];
#pragma GCC unroll 2
  for (int i = 0; i < shared / 2; ++i) {
    numerators[i] = x[i] + x[i + shared / 2];
    x[i] = x[i] * x[i + shared / 2];
  }
  if constexpr (shared == 4) {
    numerators[0] = at::vec::fmadd(numerators[0], x[1], numerators[1] * x[0]);
    x[0] = x[0] * x[1];
  }
  return numerators[0];
}

// to[a] = exp(2 from[a]), scaled by `scale(exponentials, a)`, and ones from there to `end`, whole vectors; the largest |from[a]|
// goes into `magnitudes`. A NaN may drop out of that: it makes its row's results NaN on either way.
template <class acc, class Scale>
inline void take_exponentials(acc* to, const acc* from, int64_t size, int64_t end, Vec<acc>& magnitudes, const Scale& scale) {
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

// exp(2x) of rows, scaled or not, in scratch or as they were prepared, and the largest |2x|. Rows end in ones, behind a whole
// number of blocks of features that share a reciprocal.
template <class acc>
class Exponentials {
 public:
  Exponentials(Arena& arena, int64_t capacity, int64_t size, const View& prepared = {})
      : size_(size),
        stride_(padded<acc>(shared_size(size))),
        prepared_(prepared),
        address_(arena.take<const acc*>(capacity)),
        rows_(arena.take<acc>(is_prepared() ? 0 : capacity * stride_)) {}

  bool is_prepared() const {
    return prepared_.data != nullptr;
  }

  // `size` in whole blocks.
  static int64_t shared_size(int64_t size) {
    constexpr int64_t block = kMostShared * Vec<acc>::size();
    return (size + block - 1) / block * block;
  }

  template <class Scale>
  void take(const acc* const* rows, int64_t count, const Scale& scale) {
    Vec<acc> magnitudes(0);
    for (int64_t i = 0; i < count; ++i) {
      address_[i] = rows_ + i * stride_;
      take_exponentials(rows_ + i * stride_, rows[i], size_, stride_, magnitudes, scale);
    }
    range_ = 2 * largest(magnitudes);
  }

  void find(int64_t b, const Tile& tile) {
    range_ = 0;
    for (int64_t i = 0; i < tile.count; ++i) {
      address_[i] = static_cast<const acc*>(prepared_.data) + b * prepared_.batch + tile.steps[i] * prepared_.row;
      range_ = std::max(range_, address_[i][prepared_size(size_) - kPreparedLine]);
    }
  }

  const acc* const* addresses() const {
    return address_;
  }

  acc range() const {
    return range_;
  }

  int64_t stride() const {
    return stride_;
  }

 private:
  int64_t size_;
  int64_t stride_;  // of rows in scratch
  View prepared_;
  const acc** address_;
  acc* rows_;
  acc range_ = 0;
};

// What is asked of an AdditiveScore: scores(), its keys' exponentials, and its keys even where those would do.
struct Wanted {
  bool scores = true;
  bool exponentials = true;
  bool keys = false;
};

// `element` is what the memory's products multiply; the scores are sums in the accumulation type.
template <class element_>
class AdditiveScore {
 public:
  using element = element_;
  using acc = typename Factors<element>::acc;

  static bool takes_tiles(const Problem& problem, const Plan& plan) {
    const TileExcess excess(problem, plan);
    return is_worth_tiles<element>(excess.of_rows() + excess.of_exponentials());
  }

  AdditiveScore(const Problem& problem, int64_t queries, int64_t tile, Arena& arena, Wanted wanted = {})
      : size_(problem.key_size),
        scale_(static_cast<acc>(problem.scale)),
        query_(arena, problem.dtype, problem.query, queries, size_),
        keys_(arena, problem.dtype, problem.keys, tile, size_),
        has_exponentials_(wanted.exponentials || problem.prepared_keys.data != nullptr),
        key_exponentials_(arena, has_exponentials_ ? tile : 0, size_, problem.prepared_keys),
        v_(arena.take<acc>(Exponentials<acc>::shared_size(size_))),
        problem_(problem),
        wanted_(wanted),
        inverse_v_(arena.take<acc>(Exponentials<acc>::shared_size(size_))),
        query_over_v_(arena, wanted.scores ? queries : 0, size_) {}

  void load_queries(int64_t b, int64_t first, int64_t count) {
    query_.load(b, first, count);
    load_row(v_, problem_.dtype, problem_.v, 0, 0, size_);
    if (wanted_.scores) {
      invert_v();
    }
    std::fill(v_ + size_, v_ + Exponentials<acc>::shared_size(size_), acc(0));
    if (wanted_.scores) {
      query_over_v_.take(query_.addresses(), count, [&](const Vec<acc>& exponentials, int64_t a) {
        return exponentials * Vec<acc>::loadu(inverse_v_ + a);
      });
      query_range_ = query_over_v_.range();
    }
  }

  void load_keys(int64_t b, const Tile& tile, const Rows<element>&) {
    if (key_exponentials_.is_prepared()) {
      key_exponentials_.find(b, tile);
      if (!wanted_.keys && may_share(2)) {  // nobody looks at the keys themselves
        return;
      }
    }
    keys_.load(b, tile);
    if (has_exponentials_ && !key_exponentials_.is_prepared()) {
      key_exponentials_.take(keys_.addresses(), tile.count, kUnscaled);
    }
  }

  // The keys `first` to `end` of all B S: their exponentials, ones, and the largest |2k|.
  static void prepare(const Preparation& p, int64_t first, int64_t end) {
    const int64_t stride = prepared_size(p.key_size);
    for (int64_t i = first; i < end; ++i) {
      acc* row = static_cast<acc*>(p.prepared) + i * stride;
      load_row(row, p.dtype, p.keys, i / p.steps, i % p.steps, p.key_size);
      Vec<acc> magnitudes(0);
      take_exponentials(row, row, p.key_size, stride, magnitudes, kUnscaled);
      row[stride - kPreparedLine] = 2 * largest(magnitudes);
    }
  }

  // Features first .. end of the items' partial sums, in their order.
  static void sum_v(const Backward& f, void* grad_v, int64_t first, int64_t end) {
    const Dtype dtype = f.problem.dtype;
    void* const out = static_cast<char*>(grad_v) + first * width_of(dtype);
    const size_t distance = f.problem.key_size * sizeof(acc);
    merge_row(dtype, out, 0, static_cast<acc*>(f.grad_v) + first, f.plan.items(f.problem), distance, end - first);
  }

  void scores(acc* out, int64_t out_stride, int64_t first, int64_t count, int64_t steps, Workspace<element>&) const {
    if (may_share(4)) {
      factored_scores<4>(out, out_stride, first, count, steps);
    } else if (may_share(2)) {
      factored_scores<2>(out, out_stride, first, count, steps);
    } else if (v_is_moderate_) {
      direct_scores<4>(out, out_stride, first, count, steps);
    } else {
      direct_scores<1>(out, out_stride, first, count, steps);
    }
  }

 protected:
  // Whether exponentials may be factored at all.
  bool may_factor() const {
    return range() <= range_of<acc>(1);
  }

  // Whether so many features may share a reciprocal: the x lie between exp(-kCentre) and 2 exp(range + spread - kCentre).
  bool may_share(int features) const {
    return range() + spread_ <= range_of<acc>(features) + kCentre;
  }

  int64_t size_;
  acc scale_;
  Rows<acc> query_;
  Rows<acc> keys_;
  bool has_exponentials_;  // of the keys
  Exponentials<acc> key_exponentials_;
  acc query_range_ = 0;  // the largest |2q|
  acc* v_;               // ends in zeros, as the exponentials in ones
  bool v_is_moderate_ = true;
  const Problem& problem_;

 private:
  // As far below 1 as the product of kMostShared may get: it leaves them twice the range.
  static constexpr acc kCentre = kRange<acc> / kMostShared;

  acc range() const {
    return query_range_ + key_exponentials_.range();
  }

  // unit / v, of a unit that is exp(-kCentre) of the largest |v|; ends in ones.
  void invert_v() {
    constexpr int64_t lanes = Vec<acc>::size();
    const int64_t end = whole_vectors<acc>(size_);
    std::fill(v_ + size_, v_ + end, size_ > 0 ? v_[0] : acc(0));
    Vec<acc> largest_v(0), smallest_v(std::numeric_limits<acc>::max());
    for (int64_t a = 0; a < end; a += lanes) {
      const auto magnitude = Vec<acc>::loadu(v_ + a).abs();
      largest_v = at::vec::maximum(largest_v, magnitude);
      smallest_v = at::vec::minimum(smallest_v, magnitude);
    }
    const acc most = largest(largest_v), least = smallest(smallest_v);
    v_is_moderate_ = is_moderate(most);
    const acc floor = kLeastV<acc> * (most > 0 ? most : acc(1));
    unit_ = (most > 0 ? most : acc(1)) * std::exp(-kCentre);
    // What is not finite, or next to nothing, has no inverse.
    const bool has_inverse = most < std::numeric_limits<acc>::max() && std::min(floor, unit_) >= std::numeric_limits<acc>::min();
    spread_ = has_inverse ? std::log(most > floor ? most / std::max(least, floor) : 1 / kLeastV<acc>) : 2 * kRange<acc>;
    for (int64_t a = 0; a < end; a += lanes) {
      const auto v = Vec<acc>::loadu(v_ + a);
      (Vec<acc>(unit_) / Vec<acc>::blendv(v, Vec<acc>(floor), v.abs() < Vec<acc>(floor))).store(inverse_v_ + a);
    }
    const int64_t shared_end = Exponentials<acc>::shared_size(size_);
    std::fill(inverse_v_ + size_, inverse_v_ + shared_end, acc(1));
    std::fill(v_ + size_, v_ + shared_end, unit_);  // to which those ones belong
    half_off_ = half_off(v_, shared_end) * Vec<acc>(1 / unit_);
  }

  template <int shared>
  void factored_scores(acc* out, int64_t out_stride, int64_t first, int64_t count, int64_t steps) const {
    divides() ? factored_scores<shared, kMayDivide<acc>>(out, out_stride, first, count, steps)
              : factored_scores<shared, false>(out, out_stride, first, count, steps);
  }

  template <int shared, bool divides>
  void factored_scores(acc* out, int64_t out_stride, int64_t first, int64_t count, int64_t steps) const {
    constexpr int64_t lanes = Vec<acc>::size();
    const int64_t end = Exponentials<acc>::shared_size(size_);
    for_blocks<kScoreRows>(count, [&](auto rows, int64_t t0) {
      for_blocks<kColumns>(steps, [&](auto columns, int64_t j0) {
        const acc* const* q = query_over_v_.addresses() + first + t0;
        const acc* k[columns.value];
        std::copy_n(key_exponentials_.addresses() + j0, columns.value, k);
        Vec<acc> sums[rows.value][columns.value];
        for (int i = 0; i < rows.value; ++i) {
          for (int j = 0; j < columns.value; ++j) {
            sums[i][j] = half_off_;
          }
        }
        for (int64_t a = 0; a < end; a += shared * lanes) {
          Vec<acc> inverse_v[shared];
#pragma GCC unroll 4
          for (int n = 0; n < shared; ++n) {
            inverse_v[n] = Vec<acc>::loadu(inverse_v_ + a + n * lanes);
          }
#pragma GCC unroll 8
          for (int i = 0; i < rows.value; ++i) {
            Vec<acc> query[shared];
#pragma GCC unroll 4
            for (int n = 0; n < shared; ++n) {
              query[n] = Vec<acc>::loadu(q[i] + a + n * lanes);
            }
#pragma GCC unroll 8
            for (int j = 0; j < columns.value; ++j) {
              Vec<acc> x[shared];
#pragma GCC unroll 4
              for (int n = 0; n < shared; ++n) {
                x[n] = at::vec::fmadd(query[n], Vec<acc>::loadu(k[j] + a + n * lanes), inverse_v[n]);
              }
              const auto numerator = share_denominator<shared, acc>(x);
              sums[i][j] = add_quotient<divides, acc>(sums[i][j], numerator, x[0]);
            }
          }
        }
        store_sums<rows.value, columns.value>(out + t0 * out_stride + j0, out_stride, sums, -2 * scale_ * unit_);
      });
    });
  }

  template <int shared>
  void direct_scores(acc* out, int64_t out_stride, int64_t first, int64_t count, int64_t steps) const {
    const Vec<acc> begin = half_off(v_, whole_vectors<acc>(size_));
    for (int64_t t = 0; t < count; ++t) {
      const acc* q = query_.addresses()[first + t];
      for (int64_t j = 0; j < steps; ++j) {
        const acc* k = keys_.addresses()[j];
        const auto total = sum_of_quotients<shared>(begin, v_, size_, [&](int64_t a, int64_t filled) {
          return direct_denominator<acc>(Vec<acc>::loadu(q + a, filled), Vec<acc>::loadu(k + a, filled), range_of<acc>(shared));
        });
        out[t * out_stride + j] = -2 * scale_ * sum(total);
      }
    }
  }

  Wanted wanted_;
  acc* inverse_v_;  // times unit_; ends in ones
  Exponentials<acc> query_over_v_;
  acc unit_ = 1;
  acc spread_ = 0;        // of log |v|
  Vec<acc> half_off_{0};  // in units
};

template <class element>
class AdditiveGradient : public AdditiveScore<element> {
 public:
  using acc = typename AdditiveScore<element>::acc;
  static constexpr bool kMultipliesKeys = false;

  static bool takes_tiles(const Problem& problem, const Plan& plan) {
    const TileExcess excess(problem, plan);
    return is_worth_tiles<element>(excess.of_scores(problem.memory_size) + excess.of_rows() + excess.of_exponentials());
  }

  AdditiveGradient(const Backward& f, Arena& arena)
      : AdditiveScore<element>(f.problem, f.plan.chunk, f.plan.tile, arena, wanted(f)),
        f_(f),
        half_exponentials_(arena, only_queries(f) ? f.plan.chunk : 0, f.problem.key_size),
        grad_keys_(arena, f.grad_keys, f.problem, f.plan, f.problem.key_size, crowds(f.problem)),
        grad_v_(arena.take<acc>(padded<acc>(f.problem.key_size))) {
    for (Column& column : columns_) {
      for (acc** rows : {&column.queries, &column.grad_queries}) {
        *rows = arena.take<acc>(std::min(f.plan.chunk, kChunk) * lanes);
      }
      for (acc** rows : {&column.keys, &column.grad_keys}) {
        *rows = arena.take<acc>(f.plan.tile * lanes);
      }
    }
  }

  // Vectors of a row are stored whole.
  static bool query_in_place(const Problem& problem) {
    return problem.key_size % lanes == 0 && !crowds(problem);
  }

  void begin(const Item& item) {
    this->load_queries(item.batch, item.first_query, item.queries);
    if (only_queries(f_)) {
      half_exponentials_.take(this->query_.addresses(), item.queries, [](const Vec<acc>& exponentials, int64_t) {
        return exponentials * Vec<acc>(0.5);
      });
      this->query_range_ = half_exponentials_.range();
    }
    grad_keys_.begin_item(item);
    std::fill_n(grad_v_, padded<acc>(this->size_), acc(0));
  }

  void begin_tile(int64_t b, const Tile& tile, int64_t written, const Rows<element>& memory) {
    this->load_keys(b, tile, memory);
    grad_keys_.begin(tile, written);
  }

  const element** queries_of_memory(const element** rows, int64_t, int64_t) const {
    return rows;
  }

  void add(
      const acc* grad_scores,
      int64_t scores_stride,
      int64_t first,
      int64_t count,
      int64_t steps,
      Result<acc> grad_query,
      Workspace<element>&) {
    if (only_queries(f_) && this->may_factor()) {
      add_to_queries(grad_scores, scores_stride, first, count, steps, grad_query);
    } else if (f_.grad_query == nullptr) {
      add_by_columns<false>(grad_scores, scores_stride, first, count, steps, grad_query);
    } else {
      add_by_columns<true>(grad_scores, scores_stride, first, count, steps, grad_query);
    }
  }

  void end_tile(const Tile& tile) {
    grad_keys_.end(tile);
  }

  void end(const Item& item, int64_t index, int64_t written) {
    grad_keys_.zero(written, item.end_step);
    if (f_.grad_v != nullptr) {
      acc* out = static_cast<acc*>(f_.grad_v) + index * this->size_;
      scale_row(out, grad_v_, this->size_, acc(-1));
    }
  }

  void merge(const Item& item, int64_t first, int64_t end, size_t distance) const {
    grad_keys_.merge(item, first, end, distance);
  }

 private:
  static constexpr int64_t lanes = Vec<acc>::size();

  // The lines of a column of such rows share a few sets of the caches: their gradients are summed in rows of scratch.
  static bool crowds(const Problem& problem) {
    return problem.key_size * sizeof(acc) % 4096 == 0;
  }

  static bool only_queries(const Backward& f) {
    return f.grad_keys == nullptr && f.grad_v == nullptr;
  }

  static Wanted wanted(const Backward& f) {
    const bool scores = f.weights.data == nullptr && f.score_gradients.data == nullptr;
    return {scores, scores || only_queries(f), !only_queries(f)};
  }

  // The queries' gradients alone: rows of keys are read from left to right, several vectors of them abreast.
  void add_to_queries(
      const acc* grad_scores, int64_t scores_stride, int64_t first, int64_t count, int64_t steps, Result<acc> grad_query) {
    const int64_t stride = half_exponentials_.stride();
    constexpr int most = kAccumulators / 3;
    const Vec<acc> half(0.5);
    for_blocks<most>(count, [&](auto rows, int64_t t0) {
      for_blocks<most / rows.value>((this->size_ + lanes - 1) / lanes, [&](auto width, int64_t vector) {
        const int64_t a = vector * lanes;
        const acc* query = half_exponentials_.addresses()[first + t0] + a;
        const acc* scores = grad_scores + t0 * scores_stride;
        Vec<acc> q[rows.value][width.value];
        Vec<acc> grad_q[rows.value][width.value];
#pragma GCC unroll 8
        for (int i = 0; i < rows.value; ++i) {
#pragma GCC unroll 8
          for (int w = 0; w < width.value; ++w) {
            q[i][w] = Vec<acc>::loadu(query + i * stride + w * lanes);
            grad_q[i][w] = Vec<acc>(0);
          }
        }
        for (int64_t j = 0; j < steps; ++j) {
          const acc* key = this->key_exponentials_.addresses()[j] + a;
#pragma GCC unroll 8
          for (int i = 0; i < rows.value; ++i) {
            const Vec<acc> grad_score(scores[i * scores_stride + j]);
#pragma GCC unroll 8
            for (int w = 0; w < width.value; ++w) {
              const auto h = negative_tanh<acc>(at::vec::fmadd(q[i][w], Vec<acc>::loadu(key + w * lanes), half));
              grad_q[i][w] = at::vec::fmadd(grad_score, at::vec::fnmadd(h, h, Vec<acc>(1)), grad_q[i][w]);
            }
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows.value; ++i) {
#pragma GCC unroll 8
          for (int w = 0; w < width.value; ++w) {
            put(grad_query, t0 + i, a + w * lanes, grad_q[i][w]);
          }
        }
      });
    });
  }

  // Times v, into a row of a result or added to what is there.
  void put(const Result<acc>& result, int64_t row, int64_t a, const Vec<acc>& gradient) const {
    const auto total = gradient * Vec<acc>::loadu(this->v_ + a);
    const auto at = result.at(row, a);
    (at.plus == nullptr ? total : total + Vec<acc>::loadu(at.plus)).store(at.to);
  }

  // A vector of features of the queries, the keys and their gradients, row by row.
  struct Column {
    acc* queries;  // exp(2q) / 2 and
    acc* keys;     // exp(2k) if their range allows, else q and k
    acc* grad_queries;
    acc* grad_keys;
    int shared;  // so many steps share a reciprocal; 0: q and k
  };

  // So many columns are taken out of the rows at a time: every row is in a page of its own.
  static constexpr int64_t kAbreast = 4;

  // Column by column, so that all that the sums run over, exponentials and gradients, is in the first-level cache and nowhere else.
  // The rows' own lines are read and written once, and fetched while the columns before them are at work.
  template <bool to_queries>
  void add_by_columns(
      const acc* grad_scores, int64_t scores_stride, int64_t first, int64_t count, int64_t steps, Result<acc> grad_query) {
    const acc* const* queries = this->query_.addresses() + first;
    const acc* const* keys = this->has_exponentials_ ? this->key_exponentials_.addresses() : this->keys_.addresses();
    const Result<acc> grad_keys = grad_keys_.rows(first > 0);
    constexpr int64_t strip = kAbreast * lanes;
    for (int64_t a = 0; a < this->size_; a += strip) {
      const int64_t width = std::min(ceil_div(this->size_ - a, lanes), kAbreast);
      take_columns(queries, count, steps, a, width);
      for (int64_t w = 0; w < width; ++w) {
        const Column& column = columns_[w];
        std::fill_n(column.grad_keys, steps * lanes, acc(0));
        // Two registers a query, and half a dozen.
        for_even_blocks<kAccumulators / 3>(count, [&](auto rows, int64_t t0) {
          // Meanwhile a line of every row that comes next.
          const int64_t next = a + strip + w * lanes;
          for (int64_t t = t0; next < this->size_ && t < t0 + rows.value; ++t) {
            fetch(queries[t] + next);
            fetch(grad_query.to + t * grad_query.stride + next);
          }
          for (int64_t j = steps * t0 / count; next < this->size_ && j < steps * (t0 + rows.value) / count; ++j) {
            fetch(keys[j] + next);
            fetch(grad_keys.to + j * grad_keys.stride + next);
          }
          const auto add = column.shared == kSharedSteps ? add_column<kSharedSteps, to_queries, rows.value>
                           : column.shared == 1          ? add_column<1, to_queries, rows.value>
                                                         : add_column<0, true, rows.value>;
          add(column, t0, grad_v_ + a + w * lanes, grad_scores + t0 * scores_stride, scores_stride, steps);
        });
      }
      for (int64_t t = 0; to_queries && t < count; ++t) {
        for (int64_t w = 0; w < width; ++w) {
          put(grad_query, t, a + w * lanes, Vec<acc>::loadu(columns_[w].grad_queries + t * lanes));
        }
      }
      for (int64_t j = 0; grad_keys_.wanted() && j < steps; ++j) {
        for (int64_t w = 0; w < width; ++w) {
          put(grad_keys, j, a + w * lanes, Vec<acc>::loadu(columns_[w].grad_keys + j * lanes));
        }
      }
    }
  }

  // `width` of them, of the features from a on.
  void take_columns(const acc* const* queries, int64_t count, int64_t steps, int64_t a, int64_t width) {
    const auto for_vectors = [&](const acc* const* rows, int64_t end, const auto& f) {
      for (int64_t i = 0; i < end; ++i) {
        for (int64_t w = 0; w < width; ++w) {
          const int64_t first = a + w * lanes;
          f(w, i * lanes, Vec<acc>::loadu(rows[i] + first, std::min(lanes, this->size_ - first)));
        }
      }
    };
    // Kept here, not with the columns, where each would be waited for: an eighth of a few queries' backward.
    Vec<acc> query_magnitudes[kAbreast], key_magnitudes[kAbreast];
    std::fill_n(query_magnitudes, kAbreast, Vec<acc>(0));
    std::fill_n(key_magnitudes, kAbreast, Vec<acc>(this->has_exponentials_ ? this->key_exponentials_.range() / 2 : acc(0)));
    for_vectors(queries, count, [&](int64_t w, int64_t i, const Vec<acc>& q) {
      (exponential<acc>(q, 2) * Vec<acc>(0.5)).store(columns_[w].queries + i);
      query_magnitudes[w] = raised(query_magnitudes[w], q.abs());
    });
    if (this->has_exponentials_) {
      for_vectors(this->key_exponentials_.addresses(), steps, [&](int64_t w, int64_t j, const Vec<acc>& e) {
        e.store(columns_[w].keys + j);
      });
    } else {
      for_vectors(this->keys_.addresses(), steps, [&](int64_t w, int64_t j, const Vec<acc>& k) {
        exponential<acc>(k, 2).store(columns_[w].keys + j);
        key_magnitudes[w] = raised(key_magnitudes[w], k.abs());
      });
    }
    bool all_factor = true;
    for (int64_t w = 0; w < width; ++w) {
      const acc range = 2 * largest(query_magnitudes[w] + key_magnitudes[w]);
      columns_[w].shared = range <= range_of<acc>(kSharedSteps) ? kSharedSteps : range <= range_of<acc>(1) ? 1 : 0;
      all_factor &= columns_[w].shared > 0;
    }
    if (!all_factor) {
      for_vectors(queries, count, [&](int64_t w, int64_t i, const Vec<acc>& q) {
        if (columns_[w].shared == 0) {
          q.store(columns_[w].queries + i);
        }
      });
      for_vectors(this->keys_.addresses(), steps, [&](int64_t w, int64_t j, const Vec<acc>& k) {
        if (columns_[w].shared == 0) {
          k.store(columns_[w].keys + j);
        }
      });
    }
  }

  // The gradients of a few queries, from t0 on, stay in registers while the steps go by. Not inlined: sums that the caller could
  // look at would be stored at every step.
  template <int shared, bool to_queries, int rows>
  [[gnu::noinline]] static void add_column(
      const Column& column, int64_t t0, acc* grad_v_sum, const acc* scores, int64_t scores_stride, int64_t steps) {
    const acc* const keys = column.keys;
    acc* const grad_keys = column.grad_keys;
    const Vec<acc> half(0.5);
    Vec<acc> q[rows];
    Vec<acc> grad_q[rows];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      q[i] = Vec<acc>::loadu(column.queries + (t0 + i) * lanes);
      grad_q[i] = Vec<acc>(0);
    }
    constexpr int most = std::max(shared, 1);
    Vec<acc> grad_v[most];
    std::fill_n(grad_v, most, Vec<acc>(0));
    grad_v[0] = Vec<acc>::loadu(grad_v_sum);
    const auto add_steps = [&](int64_t j, auto count) __attribute__((always_inline)) {
      Vec<acc> k[count.value], grad_k[count.value];
#pragma GCC unroll 2
      for (int c = 0; c < count.value; ++c) {
        k[c] = Vec<acc>::loadu(keys + (j + c) * lanes);
        grad_k[c] = Vec<acc>::loadu(grad_keys + (j + c) * lanes);
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        Vec<acc> x[count.value], h[count.value];
#pragma GCC unroll 2
        for (int c = 0; c < count.value; ++c) {
          x[c] = shared > 0 ? at::vec::fmadd(q[i], k[c], half) : direct_denominator<acc>(q[i], k[c], kRange<acc>) * half;
        }
        negative_tanhs<count.value, acc>(h, x);
#pragma GCC unroll 2
        for (int c = 0; c < count.value; ++c) {
          const Vec<acc> grad_score(scores[i * scores_stride + j + c]);
          if constexpr (kAddsBesideProducts) {
            const auto u = grad_score * h[c];
            const auto y = at::vec::fnmadd(u, h[c], grad_score);
            grad_q[i] = grad_q[i] + y;
            grad_k[c] = grad_k[c] + y;
            grad_v[c] = grad_v[c] + u;
          } else {
            const auto slope = at::vec::fnmadd(h[c], h[c], Vec<acc>(1));
            grad_q[i] = at::vec::fmadd(grad_score, slope, grad_q[i]);
            grad_k[c] = at::vec::fmadd(grad_score, slope, grad_k[c]);
            grad_v[c] = at::vec::fmadd(grad_score, h[c], grad_v[c]);
          }
        }
      }
#pragma GCC unroll 2
      for (int c = 0; c < count.value; ++c) {
        grad_k[c].store(grad_keys + (j + c) * lanes);
      }
    };
    int64_t j = 0;
    for (; j + most <= steps; j += most) {
      add_steps(j, std::integral_constant<int, most>());
    }
    for (; j < steps; ++j) {
      add_steps(j, std::integral_constant<int, 1>());
    }
    std::accumulate(grad_v + 1, grad_v + most, grad_v[0]).store(grad_v_sum);
#pragma GCC unroll 8
    for (int i = 0; to_queries && i < rows; ++i) {
      grad_q[i].store(column.grad_queries + (t0 + i) * lanes);
    }
  }

  const Backward& f_;
  Exponentials<acc> half_exponentials_;  // exp(2q) / 2, where queries alone have gradients
  TileGradient<acc> grad_keys_;
  acc* grad_v_;  // not yet times -1
  Column columns_[kAbreast];
};

// Of one query, both ways. Its exponentials are as many as the keys', or all prepared.
template <class acc_>
class OneQueryAdditive {
 public:
  using acc = acc_;

  OneQueryAdditive(const Problem& problem, const Plan& plan, Arena& arena, const Backward* f = nullptr)
      : problem_(problem),
        f_(f),
        size_(problem.key_size),
        shared_size_(Exponentials<acc>::shared_size(size_)),
        is_prepared_(problem.prepared_keys.data != nullptr),
        query_rows_(arena, problem.dtype, problem.query, 1, size_),
        query_exponentials_(is_prepared_ ? arena.take<acc>(shared_size_) : nullptr),
        keys_(arena, problem.dtype, problem.keys, plan, size_),
        prepared_keys_(arena, kAccumulated<acc>, problem.prepared_keys, plan, prepared_size(size_)),
        v_(arena.take<acc>(shared_size_)),
        grad_v_(f == nullptr ? nullptr : arena.take<acc>(size_)) {
    if (f != nullptr) {
      grad_keys_.emplace(arena, f->grad_keys, problem, f->plan, size_, kAtOnce);
    }
  }

  void begin(int64_t b) {
    query_ = query_rows_.load_only(b);
    if (is_prepared_) {
      Vec<acc> magnitudes(0);
      take_exponentials(query_exponentials_, query_, size_, shared_size_, magnitudes, kUnscaled);
      query_range_ = 2 * largest(magnitudes);
    }
    load_row(v_, problem_.dtype, problem_.v, 0, 0, size_);
    std::fill(v_ + size_, v_ + shared_size_, acc(0));
    half_off_ = half_off(v_, shared_size_);
    v_is_moderate_ = std::all_of(v_, v_ + size_, [](acc v) { return is_moderate(std::abs(v)); });
  }

  void load_keys(int64_t b, const Tile& tile, const Upcoming& next) {
    range_ = std::numeric_limits<acc>::infinity();
    if (is_prepared_) {
      prepared_keys_.load(b, tile, next);
      range_ = query_range_;
      for (int64_t r = 0; r < tile.count; ++r) {
        range_ = std::max(range_, query_range_ + prepared_keys_.row(r)[prepared_size(size_) - kPreparedLine]);
      }
    }
    if (!is_factored()) {
      keys_.load(b, tile, next);
    }
  }

  // The memory's rows, which are read after the keys, are fetched with them; those of the group before are added up.
  void scores(acc* out, RowGroup<acc>& memory) const {
    if (!v_is_moderate_) {
      is_factored() ? find_scores<1, true>(out, memory) : find_scores<1, false>(out, memory);
    } else if (range_ <= range_of<acc>(4)) {
      find_scores<4, true>(out, memory);
    } else if (range_ <= range_of<acc>(2)) {
      find_scores<2, true>(out, memory);
    } else if (is_factored()) {
      find_scores<1, true>(out, memory);
    } else {
      find_scores<4, false>(out, memory);
    }
  }

  void begin_gradients(const Item& item) {
    grad_keys_->begin(item);
    std::fill_n(grad_v_, size_, acc(0));
  }

  // The memory's gradient is taken with that of keys, neither of which a cache holds, and its next rows are fetched with theirs.
  bool fetches_beside_gradients(const RowGroup<acc>&, const GradientRows<acc>& grad_memory, const acc* grad_context) const {
    return problem_.dtype == kAccumulated<acc> && grad_context != nullptr && grad_memory.streams() && grad_keys_->streams();
  }

  void add_gradients(const GroupGradients<acc>& group) {
    if (fetches_beside_gradients(group.memory, group.grad_memory, group.grad_context)) {
      return is_factored() ? add<true, kAll>(group) : add<false, kAll>(group);
    }
    group.combine_memory(nullptr);
    if (!grad_keys_->wanted() && f_->grad_v == nullptr) {
      is_factored() ? add<true, kQuery>(group) : add<false, kQuery>(group);
    } else {
      is_factored() ? add<true, kInputs>(group) : add<false, kInputs>(group);
    }
  }

  void end_gradients(const Item& item, int64_t index, acc* grad_query) {
    grad_keys_->end(item);
    for (int64_t a = 0; a < size_; ++a) {
      grad_query[a] *= v_[a];
    }
    if (f_->grad_v != nullptr) {
      scale_row(static_cast<acc*>(f_->grad_v) + index * size_, grad_v_, size_, acc(-1));
    }
  }

 private:
  // Rows of keys at a time.
  static constexpr int kAtOnce = 4;

  // Whether the group's exponentials are products of prepared ones.
  bool is_factored() const {
    return range_ <= range_of<acc>(1);
  }

  const RowGroup<acc>& rows() const {
    return is_factored() ? prepared_keys_ : keys_;
  }

  // f of an element of the keys as they are read, for f to see its type; prepared ones are accumulated.
  template <bool prepared, class F>
  void with_key_type(const F& f) const {
    if constexpr (prepared) {
      f(acc());
    } else {
      with_type<acc>(keys_.dtype(), f);
    }
  }

  // 1 + exp(2 (q + k)) of features from a on.
  template <bool factored, int shared, class scalar>
  [[gnu::always_inline]] Vec<acc> denominator(const scalar* key, int64_t a, int64_t count) const {
    if constexpr (factored) {
      return at::vec::fmadd(Vec<acc>::loadu(query_exponentials_ + a), Vec<acc>::loadu(key + a), Vec<acc>(1));
    } else {
      return direct_denominator<acc>(Vec<acc>::loadu(query_ + a, count), load_one<acc>(key + a, count), range_of<acc>(shared));
    }
  }

  template <int shared, bool factored>
  void find_scores(acc* out, RowGroup<acc>& memory) const {
    const RowGroup<acc>& keys = rows();
    const bool fetches = keys.fetches();
    const int64_t end = factored ? shared_size_ : size_;
    with_key_type<factored>([&](auto example) {
      using scalar = decltype(example);
      using of_memory = std::conditional_t<factored, char, scalar>;  // prepared keys say nothing about it
      for_blocks<4>(keys.count(), [&](auto rows, int64_t first) {
        Vec<acc> totals[1][rows.value];
        for (int r = 0; r < rows.value; ++r) {
          const auto* key = static_cast<const scalar*>(keys.address(first + r));
          totals[0][r] =
              sum_of_quotients<shared>(half_off_, v_, end, [&](int64_t a, int64_t filled) __attribute__((always_inline)) {
                if (fetches) {
                  keys.template fetch_next_line<scalar>(first + r, a);
                  memory.template fetch_next_line<of_memory>(first + r, a);
                }
                return denominator<factored, shared>(key, a, filled);
              });
          if (fetches) {
            memory.fetch_rest_of_next(first + r, end);
          }
          memory.go_on();
        }
        store_sums<1, rows.value>(out + first, 0, totals, static_cast<acc>(-2 * problem_.scale));
      });
    });
  }

  // The gradients that a pass over a group's keys takes: the query's; those of keys and of v besides; the memory's, too, where
  // both tensors' are streamed.
  enum Taken { kQuery, kInputs, kAll };

  template <bool factored, Taken taken>
  void add(const GroupGradients<acc>& group) {
    constexpr int64_t lanes = Vec<acc>::size();
    const RowGroup<acc>& keys = rows();
    const int64_t memory_size = problem_.memory_size;
    with_key_type<factored || taken == kAll>([&](auto example) {
      using scalar = decltype(example);
      for_blocks<kAtOnce>(keys.count(), [&](auto rows, int64_t first) {
        const int64_t* steps = group.tile.steps + first;
        const acc* weights = group.coefficients + first;
        const bool to_keys = taken != kQuery && grad_keys_->wanted();
        acc *grad_keys[rows.value], *grad_memory[rows.value];
        const char* next[rows.value];
        for (int r = 0; to_keys && r < rows.value; ++r) {
          grad_keys[r] = taken == kAll ? static_cast<acc*>(grad_keys_->place(steps[r])) : grad_keys_->row(steps[r], r);
          if constexpr (taken == kAll) {
            grad_memory[r] = static_cast<acc*>(group.grad_memory.place(steps[r]));
            next[r] = group.memory.next(first + r);
          }
        }
        const auto stream_memory = [&](int64_t d) {
          const auto g = Vec<acc>::loadu(group.grad_context + d);
#pragma GCC unroll 4
          for (int r = 0; r < rows.value; ++r) {
            stream(grad_memory[r] + d, Vec<acc>(weights[r]) * g);
            fetch(next[r] + d * sizeof(acc));
          }
        };
        for_vectors<acc>(size_, [&](int64_t a, auto count) {
          const auto factor = Vec<acc>::loadu(v_ + a);
          auto grad_q = Vec<acc>::loadu(group.grad_query + a, count);
          auto grad_v = taken != kQuery ? Vec<acc>::loadu(grad_v_ + a, count) : Vec<acc>(0);
          Vec<acc> grad_k[rows.value];
#pragma GCC unroll 4
          for (int r = 0; r < rows.value; ++r) {
            if (keys.fetches()) {
              keys.template fetch_next_line<scalar>(first + r, a);
            }
            const Vec<acc> grad_score(group.grad_scores()[first + r]);
            const auto* key = static_cast<const scalar*>(keys.address(first + r));
            const auto h = negative_tanh<acc>(denominator<factored, 1>(key, a, count) * Vec<acc>(0.5));
            const auto u = grad_score * h;
            const auto grad = at::vec::fnmadd(u, h, grad_score);
            grad_q = grad_q + grad;
            grad_v = grad_v + u;
            grad_k[r] = grad * factor;
            if (taken == kInputs && to_keys) {
              grad_k[r].store(grad_keys[r] + a, static_cast<int>(count));
            }
          }
          // After all reads: rows are often multiples of a page apart, and a read waits for a write that seems to be to its place.
          if constexpr (taken == kAll) {
#pragma GCC unroll 4
            for (int r = 0; r < rows.value; ++r) {
              stream(grad_keys[r] + a, grad_k[r]);
            }
            if (a < memory_size) {
              stream_memory(a);
            }
          }
          grad_q.store(group.grad_query + a, static_cast<int>(count));
          if constexpr (taken != kQuery) {
            grad_v.store(grad_v_ + a, static_cast<int>(count));
          }
        });
        for (int64_t d = size_; taken == kAll && d < memory_size; d += lanes) {
          stream_memory(d);
        }
        for (int r = 0; taken == kInputs && to_keys && r < rows.value; ++r) {
          grad_keys_->write(steps[r], grad_keys[r]);
        }
      });
    });
  }

  const Problem& problem_;
  const Backward* f_;
  int64_t size_;
  int64_t shared_size_;
  bool is_prepared_;
  Rows<acc> query_rows_;
  acc* query_exponentials_;
  RowGroup<acc> keys_;
  RowGroup<acc> prepared_keys_;
  acc* v_;       // ends in zeros, as the exponentials in ones
  acc* grad_v_;  // not yet times -1
  std::optional<GradientRows<acc>> grad_keys_;
  const acc* query_ = nullptr;
  Vec<acc> half_off_{0};
  bool v_is_moderate_ = true;
  acc query_range_ = 0;
  acc range_ = 0;  // the largest |2q| + |2k|, infinite where nothing is prepared
};

}  // namespace

const Kernels& additive_kernels(Dtype factors, bool one_query, int64_t chunk) {
  return kernels_of<AdditiveScore, AdditiveGradient, OneQueryAdditive>(factors, one_query, chunk);
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

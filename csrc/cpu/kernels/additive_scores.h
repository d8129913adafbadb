// The scores of additive.cpp, of many queries.
#pragma once

#include "many_queries.h"
#include "reciprocals.h"

#include <numeric>
#include <optional>

namespace attn_ext::cpu::CPU_CAPABILITY {
namespace {  // one unit includes this: what it calls once is inlined

// Queries of a register tile of scores, by kColumns keys.
constexpr int kScoreRows = std::min(kRows, 4);

// A smaller |v|, relative to the largest, adds nothing to a score: it counts as this much.
template <class acc>
constexpr acc kLeastV = std::is_same_v<acc, double> ? acc(0x1p-62) : acc(0x1p-32);

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
    static_assert(kPreparedBlock % block == 0, "prepared rows are read by whole blocks");
    return round_up(size, block);
  }

  template <class Scale>
  void compute(const acc* const* rows, int64_t count, const Scale& scale) {
    Vec<acc> magnitudes(0);
    for (int64_t i = 0; i < count; ++i) {
      address_[i] = rows_ + i * stride_;
      exponentiate_row(rows_ + i * stride_, rows[i], size_, stride_, magnitudes, scale);
    }
    range_ = 2 * largest(magnitudes);
  }

  void use_prepared(int64_t b, const Tile& tile) {
    range_ = 0;
    for (int64_t i = 0; i < tile.count; ++i) {
      address_[i] = static_cast<const acc*>(prepared_.data) + b * prepared_.batch_stride + tile.steps[i] * prepared_.row_stride;
      range_ = std::max(range_, address_[i][prepared_range_at(size_)]);
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
struct Needs {
  bool scores = true;
  bool exponentials = true;
  bool keys = false;
};

// `element` is what the memory's products multiply; the scores are sums in the accumulation type.
template <class element_>
class AdditiveScore {
 public:
  using element = element_;
  using acc = typename ElementTraits<element>::acc;

  static bool goes_by_amx(const Problem& problem, const Plan& plan) {
    const AmxExcess excess(problem, plan);
    return is_worth_amx<element>(excess.of_rows() + excess.of_exponentials());
  }

  AdditiveScore(const Problem& problem, int64_t queries, int64_t tile, Arena& arena, const Workspace<element>&, Needs needs = {})
      : size_(problem.key_size),
        scale_(static_cast<acc>(problem.scale)),
        query_(arena, problem.dtype, problem.query, queries, size_),
        keys_(arena, problem.dtype, problem.keys, tile, size_),
        has_exponentials_(needs.exponentials || problem.prepared_keys.data != nullptr),
        key_exponentials_(arena, has_exponentials_ ? tile : 0, size_, problem.prepared_keys),
        v_(arena.take<acc>(Exponentials<acc>::shared_size(size_))),
        problem_(problem),
        needs_(needs),
        inverse_v_(arena.take<acc>(Exponentials<acc>::shared_size(size_))),
        query_over_v_(arena, needs.scores ? queries : 0, size_) {}

  void load_queries(int64_t b, int64_t first, int64_t count) {
    query_.load(b, first, count);
    load_row(v_, problem_.dtype, problem_.v, 0, 0, size_);
    if (needs_.scores) {
      invert_v();
    }
    std::fill(v_ + size_, v_ + Exponentials<acc>::shared_size(size_), acc(0));
    if (needs_.scores) {
      query_over_v_.compute(query_.addresses(), count, [&](const Vec<acc>& exponentials, int64_t a) {
        return exponentials * Vec<acc>::loadu(inverse_v_ + a);
      });
      query_range_ = query_over_v_.range();
    }
  }

  void load_keys(int64_t b, const Tile& tile, const Rows<element>&) {
    if (key_exponentials_.is_prepared()) {
      key_exponentials_.use_prepared(b, tile);
      if (!needs_.keys && may_share(2)) {  // nobody looks at the keys themselves
        return;
      }
    }
    keys_.load(b, tile);
    if (has_exponentials_ && !key_exponentials_.is_prepared()) {
      key_exponentials_.compute(keys_.addresses(), tile.count, kUnscaled);
    }
  }

  // The keys `first` to `end` of all B S: their exponentials, ones, and the largest |2k|.
  static void prepare(const Preparation& p, int64_t first, int64_t end) {
    const int64_t stride = prepared_size(p.key_size);
    for (int64_t i = first; i < end; ++i) {
      acc* row = static_cast<acc*>(p.prepared) + i * stride;
      load_row(row, p.dtype, p.keys, i / p.steps, i % p.steps, p.key_size);
      Vec<acc> magnitudes(0);
      exponentiate_row(row, row, p.key_size, stride, magnitudes, kUnscaled);
      row[prepared_range_at(p.key_size)] = 2 * largest(magnitudes);
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
    if (shares_by_fours<acc>() && may_share(4)) {
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
      largest_v = maximum(largest_v, magnitude);
      smallest_v = minimum(smallest_v, magnitude);
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
    half_off_ = HalfOff<acc>(v_, shared_end, unit_);
  }

  template <int shared>
  void factored_scores(acc* out, int64_t out_stride, int64_t first, int64_t count, int64_t steps) const {
    divides() ? factored_scores<shared, kMayDivide<acc>>(out, out_stride, first, count, steps)
              : factored_scores<shared, false>(out, out_stride, first, count, steps);
  }

  template <int shared, bool divides>
  void factored_scores(acc* out, int64_t out_stride, int64_t first, int64_t count, int64_t steps) const {
    constexpr int64_t lanes = Vec<acc>::size();
    constexpr int abreast = divides ? kMostShared : shared;
    const int64_t end = Exponentials<acc>::shared_size(size_);
    for_blocks<kScoreRows>(count, [&](auto rows, int64_t t0) {
      for_blocks<kColumns>(steps, [&](auto columns, int64_t j0) {
        const acc* const* q = query_over_v_.addresses() + first + t0;
        const acc* k[columns.value];
        std::copy_n(key_exponentials_.addresses() + j0, columns.value, k);
        Vec<acc> sums[rows.value][columns.value];
        for (int i = 0; i < rows.value; ++i) {
          for (int j = 0; j < columns.value; ++j) {
            sums[i][j] = half_off_.first;
          }
        }
        for (int64_t a = 0; a < end; a += abreast * lanes) {
          Vec<acc> inverse_v[abreast];
#pragma GCC unroll 4
          for (int n = 0; n < abreast; ++n) {
            inverse_v[n] = Vec<acc>::loadu(inverse_v_ + a + n * lanes);
          }
#pragma GCC unroll 4
          for (int i = 0; i < rows.value; ++i) {
            half_off_.go_on(a, sums[i]);
          }
#pragma GCC unroll 8
          for (int i = 0; i < rows.value; ++i) {
            Vec<acc> query[abreast];
#pragma GCC unroll 4
            for (int n = 0; n < abreast; ++n) {
              query[n] = Vec<acc>::loadu(q[i] + a + n * lanes);
            }
#pragma GCC unroll 8
            for (int j = 0; j < columns.value; ++j) {
              Vec<acc> x[abreast];
#pragma GCC unroll 4
              for (int n = 0; n < abreast; ++n) {
                x[n] = fmadd(query[n], Vec<acc>::loadu(k[j] + a + n * lanes), inverse_v[n]);
              }
              sums[i][j] = add_reciprocals<shared, divides, acc>(sums[i][j], x);
            }
          }
        }
        store_sums<rows.value, columns.value>(out + t0 * out_stride + j0, out_stride, sums, -2 * scale_ * unit_);
      });
    });
  }

  template <int shared>
  void direct_scores(acc* out, int64_t out_stride, int64_t first, int64_t count, int64_t steps) const {
    const HalfOff<acc> begin(v_, whole_vectors<acc>(size_));
    for (int64_t t = 0; t < count; ++t) {
      const acc* q = query_.addresses()[first + t];
      for (int64_t j = 0; j < steps; ++j) {
        const acc* k = keys_.addresses()[j];
        const auto total = sum_of_quotients<shared, true>(begin, v_, size_, [&](int64_t a, int64_t filled) {
          return Vec<acc>::loadu(q + a, filled) + Vec<acc>::loadu(k + a, filled);
        });
        out[t * out_stride + j] = -2 * scale_ * sum(total);
      }
    }
  }

  Needs needs_;
  acc* inverse_v_;  // times unit_; ends in ones
  Exponentials<acc> query_over_v_;
  acc unit_ = 1;
  acc spread_ = 0;         // of log |v|
  HalfOff<acc> half_off_;  // in units
};

}  // namespace
}  // namespace attn_ext::cpu::CPU_CAPABILITY

// Additive scores, e_ts = scale v . tanh(q_t + k_s), without a tanh.
//
// With E = exp(2q) exp(2k) and r = 1 / (1 + E), tanh(q + k) = 1 - 2r. The exponentials are taken once per feature of a query and of
// a key, so that the loop over (t, s, feature) is a multiply-add, a reciprocal and a multiply-add; sum(v) is the same for every
// step and cancels in the softmax:
//
//   forward    e_ts ~ -2 scale sum_a v_a r_tsa
//   backward   y = r - r^2 = tanh' / 4:  dq_t = 4v sum_s de_ts y_ts,  dk_s = 4v sum_t de_ts y_ts,  dv = -2 sum_ts de_ts r_ts
//              (the 1 of the tanh falls out of dv because sum_s de_ts = 0)
//
// It is bound by arithmetic, and the reciprocal, three instructions and a Newton step, is most of it. Forward, four features share
// one, v0/x0 + v1/x1 = (v0 x1 + v1 x0) / (x0 x1) and so on: 19 instructions on four vectors instead of 28. The backward needs every
// r by itself: 10 instructions a vector.
//
// E, and the product of those that share, must neither overflow nor lose its factors to underflow. While the tiles are prepared
// their largest |2q| and |2k| are found; the sum of both decides how many features share a reciprocal. Where even a single E could
// leave the type's range, E = exp(2q + 2k) is taken directly, which is exact for any input.
#include "attention.h"
#include "kernels.h"

namespace attn_ext::cpu::CPU_CAPABILITY {
namespace {

// exp(+-this) is finite and normal.
template <class acc>
constexpr acc kRange = std::is_same_v<acc, double> ? 700 : 86;

// So many features may share a reciprocal at most.
constexpr int kMostShared = 4;

// The largest |2q| + |2k| at which `shared` features may: their product, of factors 1 + E <= 2 exp(|2q| + |2k|), is in range.
template <class acc>
constexpr acc range_of(int shared) {
  return kRange<acc> / shared - acc(0.6931472);
}

template <class acc>
inline Vec<acc> reciprocal(const Vec<acc>& x) {
  return Vec<acc>(1) / x;
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// An estimate and one Newton step: the divider would be the bottleneck of the whole loop. x is in [1, exp(kRange) + 1].
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
#endif

// sum + numerator / denominator, the Newton step's last product and the sum in one.
template <class acc>
inline Vec<acc> add_quotient(const Vec<acc>& sum, const Vec<acc>& numerator, const Vec<acc>& denominator) {
  return sum + numerator / denominator;
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
template <>
inline Vec<float> add_quotient(const Vec<float>& sum, const Vec<float>& numerator, const Vec<float>& denominator) {
  const Vec<float> first = estimate(denominator);
  return at::vec::fmadd(numerator * first, at::vec::fnmadd(denominator, first, Vec<float>(2)), sum);
}
#endif

// 1 / (1 + E) for one vector of features.
template <bool factored, class acc>
inline Vec<acc> sigmoid_of_minus(const Vec<acc>& query, const Vec<acc>& key) {
  if constexpr (factored) {
    return reciprocal<acc>(at::vec::fmadd(query, key, Vec<acc>(1)));
  } else {
    return Vec<acc>(1) / (Vec<acc>(1) + exponential<acc>(query + key));
  }
}

// `size` in whole blocks of features that may share a reciprocal.
template <class acc>
constexpr int64_t shared_size(int64_t size) {
  constexpr int64_t block = kMostShared * Vec<acc>::size();
  return (size + block - 1) / block * block;
}

// Projected rows in scratch: doubled, their exponentials, and the largest magnitude among the doubled. Rows end in zeros, behind
// a whole number of blocks of features that share a reciprocal.
template <class acc>
class DoubledRows {
 public:
  DoubledRows(Arena& arena, Dtype dtype, const View& view, int64_t capacity, int64_t size)
      : dtype_(dtype),
        view_(view),
        size_(size),
        stride_(padded<acc>(shared_size<acc>(size))),
        doubled_(arena.take<acc>(capacity * stride_)),
        exponentials_(arena.take<acc>(capacity * stride_)) {}

  void begin() {
    range_ = 0;
  }

  void load(int64_t i, int64_t b, int64_t row) {
    acc* doubled = doubled_ + i * stride_;
    acc* exponentials = exponentials_ + i * stride_;
    load_row(doubled, dtype_, view_, b, row, size_);
    std::fill(doubled + size_, doubled + stride_, acc(0));
    Vec<acc> magnitudes(0);
    for (int64_t a = 0; a < stride_; a += Vec<acc>::size()) {
      const Vec<acc> x = Vec<acc>::loadu(doubled + a) * Vec<acc>(2);
      x.store(doubled + a);
      exponential(x).store(exponentials + a);
      magnitudes = at::vec::maximum(magnitudes, x.abs());
    }
    const acc row_range = largest(magnitudes);
    // A NaN may drop out: it makes its row's results NaN on either way.
    range_ = row_range > range_ ? row_range : range_;
  }

  const acc* doubled(int64_t i) const {
    return doubled_ + i * stride_;
  }

  const acc* exponentials(int64_t i) const {
    return exponentials_ + i * stride_;
  }

  acc range() const {
    return range_;
  }

  int64_t stride() const {
    return stride_;
  }

 private:
  Dtype dtype_;
  View view_;
  int64_t size_;
  int64_t stride_;
  acc* doubled_;
  acc* exponentials_;
  acc range_ = 0;
};

template <class acc_>
class AdditiveScore {
 public:
  using acc = acc_;

  AdditiveScore(const Problem& problem, int64_t queries, int64_t tile, Arena& arena)
      : scale_(static_cast<acc>(problem.scale)),
        query_(arena, problem.dtype, problem.query, queries, problem.key_size),
        keys_(arena, problem.dtype, problem.keys, tile, problem.key_size),
        v_(arena.take<acc>(keys_.stride())),
        problem_(problem) {}

  void load_queries(int64_t b, int64_t first, int64_t count) {
    query_.begin();
    for (int64_t t = 0; t < count; ++t) {
      query_.load(t, b, first + t);
    }
    load_row(v_, problem_.dtype, problem_.v, 0, 0, problem_.key_size);
    std::fill(v_ + problem_.key_size, v_ + keys_.stride(), acc(0));
    v_size_ = 0;
    for (int64_t a = 0; a < problem_.key_size; ++a) {
      v_size_ = std::max(v_size_, std::abs(v_[a]));
    }
  }

  void load_keys(int64_t b, const Tile& tile, const Rows<acc>&) {
    keys_.begin();
    for (int64_t j = 0; j < tile.count; ++j) {
      keys_.load(j, b, tile.steps[j]);
    }
    range_ = query_.range() + keys_.range();
  }

  void scores(acc* out, int64_t out_stride, int64_t first, int64_t count, int64_t steps, acc*) const {
    if (range_ <= range_of<acc>(4) && v_size_ <= kLargestShared) {
      scores_of<4>(out, out_stride, first, count, steps);
    } else if (range_ <= range_of<acc>(2) && v_size_ <= kLargestShared) {
      scores_of<2>(out, out_stride, first, count, steps);
    } else if (factored()) {
      scores_of<1>(out, out_stride, first, count, steps);
    } else {
      direct_scores(out, out_stride, first, count, steps);
    }
  }

 protected:
  bool factored() const {
    return range_ <= range_of<acc>(1);
  }

  template <bool factored>
  const acc* query_row(int64_t i) const {
    return factored ? query_.exponentials(i) : query_.doubled(i);
  }

  template <bool factored>
  const acc* key_row(int64_t i) const {
    return factored ? keys_.exponentials(i) : keys_.doubled(i);
  }

  acc scale_;
  DoubledRows<acc> query_;
  DoubledRows<acc> keys_;
  acc* v_;
  acc range_ = 0;
  acc v_size_ = 0;  // the largest |v|
  const Problem& problem_;

 private:
  // Numerators that share a denominator take other features' factors on, each at most exp(kRange / 4).
  static constexpr acc kLargestShared = 1e6;

  // sums[i][j] = sum over blocks of `shared` vectors of features, in a register tile; add(sum, q, k, v) for one block.
  template <int shared, int most_rows, int most_columns, class Add>
  void tile_scores(
      acc* out, int64_t out_stride, const acc* queries, int64_t count, const acc* keys, int64_t steps, const Add& add) const {
    const int64_t stride = keys_.stride();
    const int64_t size = shared_size<acc>(problem_.key_size);
    for_blocks<most_rows>(count, [&](auto rows, int64_t t0) {
      for_blocks<most_columns>(steps, [&](auto columns, int64_t j0) {
        const acc* q = queries + t0 * stride;
        const acc* k = keys + j0 * stride;
        Vec<acc> sums[rows.value][columns.value];
        for (int i = 0; i < rows.value; ++i) {
          for (int j = 0; j < columns.value; ++j) {
            sums[i][j] = Vec<acc>(0);
          }
        }
        for (int64_t a = 0; a < size; a += shared * Vec<acc>::size()) {
#pragma GCC unroll 8
          for (int i = 0; i < rows.value; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < columns.value; ++j) {
              sums[i][j] = add(sums[i][j], q + i * stride + a, k + j * stride + a, v_ + a);
            }
          }
        }
        store_sums<rows.value, columns.value>(out + t0 * out_stride + j0, out_stride, sums, -2 * scale_);
      });
    });
  }

  template <int shared>
  void scores_of(acc* out, int64_t out_stride, int64_t first, int64_t count, int64_t steps) const {
    const auto add = [](const Vec<acc>& sum, const acc* q, const acc* k, const acc* v) {
      Vec<acc> numerators[shared], denominators[shared];
#pragma GCC unroll 4
      for (int i = 0; i < shared; ++i) {
        const int64_t a = i * Vec<acc>::size();
        numerators[i] = Vec<acc>::loadu(v + a);
        denominators[i] = at::vec::fmadd(Vec<acc>::loadu(q + a), Vec<acc>::loadu(k + a), Vec<acc>(1));
      }
#pragma GCC unroll 2
      for (int left = shared / 2; left > 0; left /= 2) {
#pragma GCC unroll 2
        for (int i = 0; i < left; ++i) {
          const int j = i + left;
          numerators[i] = at::vec::fmadd(numerators[i], denominators[j], numerators[j] * denominators[i]);
          denominators[i] = denominators[i] * denominators[j];
        }
      }
      return add_quotient<acc>(sum, numerators[0], denominators[0]);
    };
    tile_scores<shared, kRows, kColumns>(out, out_stride, query_row<true>(first), count, key_row<true>(0), steps, add);
  }

  void direct_scores(acc* out, int64_t out_stride, int64_t first, int64_t count, int64_t steps) const {
    const auto add = [](const Vec<acc>& sum, const acc* q, const acc* k, const acc* v) {
      const auto r = sigmoid_of_minus<false>(Vec<acc>::loadu(q), Vec<acc>::loadu(k));
      return at::vec::fmadd(Vec<acc>::loadu(v), r, sum);
    };
    tile_scores<1, 1, 1>(out, out_stride, query_row<false>(first), count, key_row<false>(0), steps, add);
  }
};

template <class acc>
class AdditiveGradient : public AdditiveScore<acc> {
 public:
  AdditiveGradient(const Backward& f, Arena& arena)
      : AdditiveScore<acc>(f.problem, f.problem.queries, f.plan.tile, arena),
        f_(f),
        grad_stride_(padded<acc>(f.problem.key_size)),
        grad_keys_(arena, f.grad_keys, f.problem, f.plan.tile, f.problem.key_size, true),
        grad_v_(arena.take<acc>(grad_stride_)) {}

  void begin(int64_t b, int64_t queries) {
    this->load_queries(b, 0, queries);
    std::fill_n(grad_v_, grad_stride_, acc(0));
  }

  void begin_tile(int64_t b, const Tile& tile, int64_t written, const Rows<acc>& memory) {
    this->load_keys(b, tile, memory);
    grad_keys_.begin(b, tile, written);
  }

  const acc** queries_of_memory(const acc** rows, int64_t, int64_t) const {
    return rows;
  }

  void add(const acc* grad_scores, int64_t stride, int64_t first, int64_t count, int64_t steps, acc* grad_query, int64_t) {
    if (this->factored()) {
      add_of<true>(grad_scores, stride, first, count, steps, grad_query);
    } else {
      add_of<false>(grad_scores, stride, first, count, steps, grad_query);
    }
  }

  void end_tile(int64_t b, const Tile& tile) {
    if (grad_keys_.wanted()) {
      for (int64_t j = 0; j < tile.count; ++j) {
        times_v(grad_keys_.rows() + j * grad_stride_);
      }
      grad_keys_.end(b, tile);
    }
  }

  void end(const Item& item, int64_t index, int64_t written, acc* grad_query) {
    grad_keys_.zero(item.batch, written, item.end_step);
    if (f_.grad_query != nullptr) {
      for (int64_t t = 0; t < f_.problem.queries; ++t) {
        times_v(grad_query + t * grad_stride_);
      }
    }
    if (f_.grad_v != nullptr) {
      acc* out = static_cast<acc*>(f_.grad_v) + index * f_.problem.key_size;
      scale_row(out, grad_v_, f_.problem.key_size, acc(-2));
    }
  }

 private:
  void times_v(acc* row) const {
    for (int64_t a = 0; a < grad_stride_; a += Vec<acc>::size()) {
      (Vec<acc>::loadu(row + a) * Vec<acc>::loadu(this->v_ + a) * Vec<acc>(4)).store(row + a);
    }
  }

  // A vector of features at a time: the gradients of a few queries stay in registers while the steps go by.
  template <bool factored>
  void add_of(const acc* grad_scores, int64_t scores_stride, int64_t first, int64_t count, int64_t steps, acc* grad_query) {
    const int64_t stride = this->keys_.stride();
    for (int64_t a = 0; a < f_.problem.key_size; a += Vec<acc>::size()) {
      auto grad_v = Vec<acc>::loadu(grad_v_ + a);
      for_blocks<factored ? kRows : 1>(count, [&](auto rows, int64_t t0) {
        const acc* query = this->template query_row<factored>(first + t0) + a;
        acc* grad_query_rows = grad_query + (first + t0) * grad_stride_ + a;
        acc* grad_keys = grad_keys_.rows() + a;
        const bool adds = first + t0 > 0;
        Vec<acc> q[rows.value];
        Vec<acc> grad_q[rows.value];
#pragma GCC unroll 8
        for (int i = 0; i < rows.value; ++i) {
          q[i] = Vec<acc>::loadu(query + i * stride);
          grad_q[i] = Vec<acc>::loadu(grad_query_rows + i * grad_stride_);
        }
        for (int64_t j = 0; j < steps; ++j) {
          const auto k = Vec<acc>::loadu(this->template key_row<factored>(j) + a);
          auto grad_k = adds ? Vec<acc>::loadu(grad_keys + j * grad_stride_) : Vec<acc>(0);
#pragma GCC unroll 8
          for (int i = 0; i < rows.value; ++i) {
            const Vec<acc> grad_score(grad_scores[(t0 + i) * scores_stride + j]);
            const auto r = sigmoid_of_minus<factored>(q[i], k);
            const auto y = at::vec::fnmadd(r, r, r);
            grad_q[i] = at::vec::fmadd(grad_score, y, grad_q[i]);
            grad_k = at::vec::fmadd(grad_score, y, grad_k);
            grad_v = at::vec::fmadd(grad_score, r, grad_v);
          }
          grad_k.store(grad_keys + j * grad_stride_);
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows.value; ++i) {
          grad_q[i].store(grad_query_rows + i * grad_stride_);
        }
      });
      grad_v.store(grad_v_ + a);
    }
  }

  const Backward& f_;
  int64_t grad_stride_;          // of every gradient in scratch
  TileGradient<acc> grad_keys_;  // not yet times 4v
  acc* grad_v_;                  // not yet times -2
};

}  // namespace

const Kernels& additive_kernels(Dtype dtype) {
  return kernels_of<AdditiveScore, AdditiveGradient>(dtype);
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

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
// It is bound by arithmetic: 4 instructions and a reciprocal a vector forward, 7 and one backward.
// E must neither overflow nor lose its factors to underflow. While the tiles are prepared their largest |2q| and |2k| are found;
// where the sum of both exceeds the type's range, E = exp(2q + 2k) is taken directly, which is exact for any input.
#include "attention.h"
#include "kernels.h"

namespace attn_ext::cpu::CPU_CAPABILITY {
namespace {

// exp(+-this) is finite and normal.
template <class acc>
constexpr acc kRange = std::is_same_v<acc, double> ? 700 : 86;

template <class acc>
inline Vec<acc> reciprocal(const Vec<acc>& x) {
  return Vec<acc>(1) / x;
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// An estimate and one Newton step: the divider would be the bottleneck of the whole loop. x is in [1, exp(kRange) + 1].
template <>
inline Vec<float> reciprocal(const Vec<float>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const Vec<float> estimate = _mm512_rcp14_ps(x);
#else
  const Vec<float> estimate = _mm256_rcp_ps(x);
#endif
  return estimate * at::vec::fnmadd(x, estimate, Vec<float>(2));
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

// Projected rows in scratch: doubled, their exponentials, and the largest magnitude among the doubled. Rows end in zeros.
template <class acc>
class DoubledRows {
 public:
  DoubledRows(Arena& arena, Dtype dtype, const View& view, int64_t capacity, int64_t size)
      : dtype_(dtype),
        view_(view),
        size_(size),
        stride_(padded<acc>(size)),
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

  AdditiveScore(const Problem& problem, int64_t queries, Arena& arena)
      : scale_(static_cast<acc>(problem.scale)),
        query_(arena, problem.dtype, problem.query, queries, problem.key_size),
        keys_(arena, problem.dtype, problem.keys, kTile, problem.key_size),
        v_(arena.take<acc>(keys_.stride())),
        problem_(problem) {}

  void load_queries(int64_t b, int64_t first, int64_t count) {
    query_.begin();
    for (int64_t t = 0; t < count; ++t) {
      query_.load(t, b, first + t);
    }
    load_row(v_, problem_.dtype, problem_.v, 0, 0, problem_.key_size);
    std::fill(v_ + problem_.key_size, v_ + keys_.stride(), acc(0));
  }

  void load_keys(int64_t b, const Tile& tile, const Rows<acc>&) {
    keys_.begin();
    for (int64_t j = 0; j < tile.count; ++j) {
      keys_.load(j, b, tile.steps[j]);
    }
    factored_ = query_.range() + keys_.range() <= kRange<acc>;
  }

  void scores(acc* out, int64_t first, int64_t count, int64_t steps) const {
    if (factored_) {
      scores_of<true>(out, first, count, steps);
    } else {
      scores_of<false>(out, first, count, steps);
    }
  }

 protected:
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
  bool factored_ = false;
  const Problem& problem_;

 private:
  template <bool factored>
  void scores_of(acc* out, int64_t first, int64_t count, int64_t steps) const {
    const int64_t stride = keys_.stride();
    for_blocks<factored ? kRows : 1>(count, [&](auto rows, int64_t t0) {
      for_blocks<factored ? kColumns : 1>(steps, [&](auto columns, int64_t j0) {
        const acc* query = query_row<factored>(first + t0);
        const acc* keys = key_row<factored>(j0);
        Vec<acc> sums[rows.value][columns.value];
        for (int i = 0; i < rows.value; ++i) {
          for (int j = 0; j < columns.value; ++j) {
            sums[i][j] = Vec<acc>(0);
          }
        }
        for (int64_t a = 0; a < stride; a += Vec<acc>::size()) {
          const auto v = Vec<acc>::loadu(v_ + a);
#pragma GCC unroll 8
          for (int i = 0; i < rows.value; ++i) {
            const auto q = Vec<acc>::loadu(query + i * stride + a);
#pragma GCC unroll 8
            for (int j = 0; j < columns.value; ++j) {
              const auto k = Vec<acc>::loadu(keys + j * stride + a);
              sums[i][j] = at::vec::fmadd(v, sigmoid_of_minus<factored>(q, k), sums[i][j]);
            }
          }
        }
        store_sums<rows.value, columns.value>(out + t0 * kTile + j0, sums, -2 * scale_);
      });
    });
  }
};

template <class acc>
class AdditiveGradient : public AdditiveScore<acc> {
 public:
  AdditiveGradient(const Backward& f, Arena& arena)
      : AdditiveScore<acc>(f.problem, f.problem.queries, arena),
        f_(f),
        grad_keys_(arena.take<acc>(kTile * this->keys_.stride())),
        grad_v_(arena.take<acc>(this->keys_.stride())) {}

  void begin(int64_t b, int64_t queries) {
    this->load_queries(b, 0, queries);
    std::fill_n(grad_v_, this->keys_.stride(), acc(0));
  }

  void load_keys(int64_t b, const Tile& tile, const Rows<acc>& memory) {
    AdditiveScore<acc>::load_keys(b, tile, memory);
    std::fill_n(grad_keys_, tile.count * this->keys_.stride(), acc(0));
  }

  void add(const acc* grad_scores, int64_t first, int64_t count, int64_t steps, acc* grad_query, int64_t, acc*, int64_t) {
    if (this->factored_) {
      add_of<true>(grad_scores, first, count, steps, grad_query);
    } else {
      add_of<false>(grad_scores, first, count, steps, grad_query);
    }
  }

  void end_tile(int64_t b, const Tile& tile, int64_t written) {
    if (f_.grad_keys == nullptr) {
      return;
    }
    for (int64_t j = 0; j < tile.count; ++j) {
      times_v(grad_keys_ + j * this->keys_.stride());
    }
    store_tile(f_.grad_keys, f_.problem, b, tile, written, grad_keys_, this->keys_.stride(), f_.problem.key_size);
  }

  void end(const Item& item, int64_t index, int64_t written, acc* grad_query) {
    if (f_.grad_keys != nullptr) {
      zero_steps(f_.grad_keys, f_.problem, item.batch, written, item.end_step, f_.problem.key_size);
    }
    if (f_.grad_query != nullptr) {
      for (int64_t t = 0; t < f_.problem.queries; ++t) {
        times_v(grad_query + t * this->keys_.stride());
      }
    }
    if (f_.grad_v != nullptr) {
      acc* out = static_cast<acc*>(f_.grad_v) + index * f_.problem.key_size;
      scale_row(out, grad_v_, f_.problem.key_size, acc(-2));
    }
  }

 private:
  void times_v(acc* row) const {
    for (int64_t a = 0; a < this->keys_.stride(); a += Vec<acc>::size()) {
      (Vec<acc>::loadu(row + a) * Vec<acc>::loadu(this->v_ + a) * Vec<acc>(4)).store(row + a);
    }
  }

  // A vector of features at a time: the gradients of a few queries stay in registers while the steps go by.
  template <bool factored>
  void add_of(const acc* grad_scores, int64_t first, int64_t count, int64_t steps, acc* grad_query) {
    const int64_t stride = this->keys_.stride();
    for (int64_t a = 0; a < stride; a += Vec<acc>::size()) {
      auto grad_v = Vec<acc>::loadu(grad_v_ + a);
      for_blocks<factored ? kRows : 1>(count, [&](auto rows, int64_t t0) {
        const acc* query = this->template query_row<factored>(first + t0) + a;
        acc* grad_query_rows = grad_query + (first + t0) * stride + a;
        Vec<acc> q[rows.value];
        Vec<acc> grad_q[rows.value];
#pragma GCC unroll 8
        for (int i = 0; i < rows.value; ++i) {
          q[i] = Vec<acc>::loadu(query + i * stride);
          grad_q[i] = Vec<acc>::loadu(grad_query_rows + i * stride);
        }
        for (int64_t j = 0; j < steps; ++j) {
          const auto k = Vec<acc>::loadu(this->template key_row<factored>(j) + a);
          auto grad_k = Vec<acc>::loadu(grad_keys_ + j * stride + a);
#pragma GCC unroll 8
          for (int i = 0; i < rows.value; ++i) {
            const Vec<acc> grad_score(grad_scores[(t0 + i) * kTile + j]);
            const auto r = sigmoid_of_minus<factored>(q[i], k);
            const auto y = at::vec::fnmadd(r, r, r);
            grad_q[i] = at::vec::fmadd(grad_score, y, grad_q[i]);
            grad_k = at::vec::fmadd(grad_score, y, grad_k);
            grad_v = at::vec::fmadd(grad_score, r, grad_v);
          }
          grad_k.store(grad_keys_ + j * stride + a);
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows.value; ++i) {
          grad_q[i].store(grad_query_rows + i * stride);
        }
      });
      grad_v.store(grad_v_ + a);
    }
  }

  const Backward& f_;
  acc* grad_keys_;  // [kTile][key_size], not yet times 4v
  acc* grad_v_;     // not yet times -2
};

}  // namespace

const Kernels& additive_kernels(Dtype dtype) {
  return kernels_of<AdditiveScore, AdditiveGradient>(dtype);
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

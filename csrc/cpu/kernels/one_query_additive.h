// The scores of additive.cpp and their gradients, of one query.
#pragma once

#include "additive_scores.h"
#include "one_query.h"

namespace attn_ext::cpu::CPU_CAPABILITY {
namespace {  // one unit includes this: what it calls once is inlined

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
      exponentiate_row(query_exponentials_, query_, size_, shared_size_, magnitudes, kUnscaled);
      query_range_ = 2 * largest(magnitudes);
    }
    load_row(v_, problem_.dtype, problem_.v, 0, 0, size_);
    std::fill(v_ + size_, v_ + shared_size_, acc(0));
    half_off_ = HalfOff<acc>(v_, shared_size_);
    v_is_moderate_ = std::all_of(v_, v_ + size_, [](acc v) { return is_moderate(std::abs(v)); });
  }

  void load_keys(int64_t b, const Tile& tile, const Upcoming& next) {
    range_ = std::numeric_limits<acc>::infinity();
    if (is_prepared_) {
      prepared_keys_.load(b, tile, next);
      range_ = query_range_;
      for (int64_t r = 0; r < tile.count; ++r) {
        range_ = std::max(range_, query_range_ + prepared_keys_.row(r)[prepared_range_at(size_)]);
      }
    }
    if (!is_factored()) {
      keys_.load(b, tile, next);
    }
  }

  // The memory's rows, which are read after the keys, are prefetched with them; those of the group before are added up.
  void scores(acc* out, RowGroup<acc>& memory) const {
    if (!v_is_moderate_) {
      is_factored() ? compute_scores<1, true>(out, memory) : compute_scores<1, false>(out, memory);
    } else if (range_ <= range_of<acc>(4)) {
      compute_scores<4, true>(out, memory);
    } else if (range_ <= range_of<acc>(2)) {
      compute_scores<2, true>(out, memory);
    } else if (is_factored()) {
      compute_scores<1, true>(out, memory);
    } else {
      compute_scores<4, false>(out, memory);
    }
  }

  void begin_gradients(const Item& item) {
    grad_keys_->begin(item);
    std::fill_n(grad_v_, size_, acc(0));
  }

  // The memory's gradient is taken with that of keys, neither of which a cache holds, and its next rows are prefetched with theirs.
  bool prefetches_beside_gradients(const RowGroup<acc>&, const GradientRows<acc>& grad_memory, const acc* grad_context) const {
    return problem_.dtype == kAccumulated<acc> && grad_context != nullptr && grad_memory.streams() && grad_keys_->streams();
  }

  void add_gradients(const GroupGradients<acc>& group) {
    if (prefetches_beside_gradients(group.memory, group.grad_memory, group.grad_context)) {
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

  // Of a key and the query, a vector of features from a on: 1 + exp(2 (q + k)) where that is a product, or else q + k.
  template <bool factored, class scalar>
  [[gnu::always_inline]] Vec<acc> meet(const scalar* key, int64_t a, int64_t count) const {
    if constexpr (factored) {
      return fmadd(Vec<acc>::loadu(query_exponentials_ + a), Vec<acc>::loadu(key + a), Vec<acc>(1));
    } else {
      return Vec<acc>::loadu(query_ + a, count) + load_one<acc>(key + a, count);
    }
  }

  template <int shared, bool factored>
  void compute_scores(acc* out, RowGroup<acc>& memory) const {
    const RowGroup<acc>& keys = rows();
    const bool prefetches = keys.prefetches();
    const int64_t end = factored ? shared_size_ : size_;
    with_key_type<factored>([&](auto example) {
      using scalar = decltype(example);
      using of_memory = std::conditional_t<factored, char, scalar>;  // prepared keys say nothing about it
      for_blocks<4>(keys.count(), [&](auto rows, int64_t first) {
        Vec<acc> totals[1][rows.value];
        for (int r = 0; r < rows.value; ++r) {
          const auto* key = static_cast<const scalar*>(keys.address(first + r));
          totals[0][r] = sum_of_quotients<shared, !factored>(
              half_off_, v_, end, [&](int64_t a, int64_t filled) __attribute__((always_inline)) {
                if (prefetches) {
                  keys.template prefetch_next_line<scalar>(first + r, a);
                  memory.template prefetch_next_line<of_memory>(first + r, a);
                }
                return meet<factored>(key, a, filled);
              });
          if (prefetches) {
            memory.prefetch_rest_of_next(first + r, end);
          }
          memory.run_deferred_row();
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
            prefetch(next[r] + d * sizeof(acc));
          }
        };
        for_vectors<acc>(size_, [&](int64_t a, auto count) {
          const auto factor = Vec<acc>::loadu(v_ + a);
          auto grad_q = Vec<acc>::loadu(group.grad_query + a, count);
          auto grad_v = taken != kQuery ? Vec<acc>::loadu(grad_v_ + a, count) : Vec<acc>(0);
          Vec<acc> x[rows.value], grad_k[rows.value];
#pragma GCC unroll 4
          for (int r = 0; r < rows.value; ++r) {
            if (keys.prefetches()) {
              keys.template prefetch_next_line<scalar>(first + r, a);
            }
            x[r] = meet<factored>(static_cast<const scalar*>(keys.address(first + r)), a, count);
          }
          if constexpr (!factored) {
            direct_denominators(x, range_of<acc>(1));
          }
#pragma GCC unroll 4
          for (int r = 0; r < rows.value; ++r) {
            const Vec<acc> grad_score(group.grad_scores()[first + r]);
            const auto h = negative_tanh<acc>(x[r] * Vec<acc>(0.5));
            const auto u = grad_score * h;
            const auto grad = fnmadd(u, h, grad_score);
            grad_q = grad_q + grad;
            grad_v = grad_v + u;
            grad_k[r] = grad * factor;
            if (taken == kInputs && to_keys) {
              grad_k[r].store(grad_keys[r] + a, static_cast<int>(count));
            }
          }
          // After all loads: rows are often a multiple of a page apart, and a load waits for a store to the same offset within a
          // page (4K aliasing).
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
  HalfOff<acc> half_off_;
  bool v_is_moderate_ = true;
  acc query_range_ = 0;
  acc range_ = 0;  // the largest |2q| + |2k|, infinite where nothing is prepared
};

}  // namespace
}  // namespace attn_ext::cpu::CPU_CAPABILITY

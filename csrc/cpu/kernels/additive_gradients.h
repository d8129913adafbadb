// The gradients of additive.cpp's scores, of many queries.
#pragma once

#include "additive_scores.h"
#include "tile_gradient.h"

namespace attn_ext::cpu::CPU_CAPABILITY {
namespace {  // one unit includes this: what it calls once is inlined

// So many source steps may share a reciprocal in a backward of many queries. Not queries: a NaN of one would come into the next.
constexpr int kSharedSteps = kAddsBesideProducts ? 1 : 2;

// Whether the loop over source steps is pipelined by software: the next one begins beside this one's sums.
constexpr bool kPipelines = kSharedSteps == 1 && kHasManyRegisters;

template <class element>
class AdditiveGradient : public AdditiveScore<element> {
 public:
  using acc = typename AdditiveScore<element>::acc;
  static constexpr bool kMultipliesKeys = false;

  static bool goes_by_amx(const Problem& problem, const Plan& plan) {
    const AmxExcess excess(problem, plan);
    return is_worth_amx<element>(excess.of_scores(problem.memory_size) + excess.of_rows() + excess.of_exponentials());
  }

  AdditiveGradient(const Backward& f, Arena& arena, const Workspace<element>& work)
      : AdditiveScore<element>(f.problem, f.plan.chunk, f.plan.tile, arena, work, needs(f)),
        f_(f),
        half_exponentials_(arena, only_queries(f) ? f.plan.chunk : 0, f.problem.key_size),
        grad_keys_(arena, f.grad_keys, f.problem, f.plan, f.problem.key_size, !stores_in_place(f.problem)),
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

  static bool query_in_place(const Problem& problem) {
    return stores_in_place(problem);
  }

  void begin(const Item& item) {
    this->load_queries(item.batch, item.first_query, item.queries);
    if (only_queries(f_)) {
      half_exponentials_.compute(this->query_.addresses(), item.queries, [](const Vec<acc>& exponentials, int64_t) {
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
  // Of queries and of keys: vectors of a row are stored whole.
  static bool stores_in_place(const Problem& problem) {
    return problem.key_size % lanes == 0 && !crowds(problem);
  }

  static constexpr int64_t lanes = Vec<acc>::size();

  // The lines of a column of such rows share a few sets of the caches: their gradients are summed in rows of scratch.
  static bool crowds(const Problem& problem) {
    return problem.key_size * sizeof(acc) % 4096 == 0;
  }

  static bool only_queries(const Backward& f) {
    return f.grad_keys == nullptr && f.grad_v == nullptr;
  }

  static Needs needs(const Backward& f) {
    const bool scores = f.weights.data == nullptr && f.given_grad_scores.data == nullptr;
    return {scores, scores || only_queries(f), !only_queries(f)};
  }

  // The queries' gradients alone: rows of keys are read from left to right, several vectors of them abreast.
  void add_to_queries(
      const acc* grad_scores, int64_t scores_stride, int64_t first, int64_t count, int64_t steps, Result<acc> grad_query) {
    const int64_t stride = half_exponentials_.stride();
    constexpr int most = kAccumulators / 3;
    const Vec<acc> half(0.5);
    for_blocks<most>(count, [&](auto rows, int64_t t0) {
      for_blocks<most / rows.value>(ceil_div(this->size_, lanes), [&](auto width, int64_t vector) {
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
              const auto h = negative_tanh<acc>(fmadd(q[i][w], Vec<acc>::loadu(key + w * lanes), half));
              grad_q[i][w] = fmadd(grad_score, fnmadd(h, h, Vec<acc>(1)), grad_q[i][w]);
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

  // So many columns are loaded out of the rows at a time, since every row is in a page of its own; with half of the registers,
  // whose vectors are half as long, half as many.
  static constexpr int kAbreast = kHasManyRegisters ? 4 : 2;

  // Column by column, so that all that the sums run over, exponentials and gradients, is in the first-level cache and nowhere else.
  // The rows' own lines are read and written once, and prefetched while the columns before them are at work.
  template <bool to_queries>
  void add_by_columns(
      const acc* grad_scores, int64_t scores_stride, int64_t first, int64_t count, int64_t steps, Result<acc> grad_query) {
    const acc* const* queries = this->query_.addresses() + first;
    const acc* const* keys = this->has_exponentials_ ? this->key_exponentials_.addresses() : this->keys_.addresses();
    const Result<acc> grad_keys = grad_keys_.rows(first > 0);
    for_blocks<kAbreast>(ceil_div(this->size_, lanes), [&](auto width, int64_t vector) {
      const int64_t a = vector * lanes;
      load_columns<width.value>(queries, count, steps, a);
      for (int w = 0; w < width.value; ++w) {
        const Column& column = columns_[w];
        std::fill_n(column.grad_keys, steps * lanes, acc(0));
        // Two registers a query, and half a dozen.
        for_even_blocks<kAccumulators / 3>(count, [&](auto rows, int64_t t0) {
          // Meanwhile a line of every row that comes next.
          const int64_t next = a + (width.value + w) * lanes;
          for (int64_t t = t0; next < this->size_ && t < t0 + rows.value; ++t) {
            prefetch(queries[t] + next);
            prefetch(grad_query.to + t * grad_query.stride + next);
          }
          for (int64_t j = steps * t0 / count; next < this->size_ && j < steps * (t0 + rows.value) / count; ++j) {
            prefetch(keys[j] + next);
            prefetch(grad_keys.to + j * grad_keys.stride + next);
          }
          const auto add = column.shared == kSharedSteps ? add_column<kSharedSteps, to_queries, rows.value>
                           : column.shared == 1          ? add_column<1, to_queries, rows.value>
                                                         : add_column<0, true, rows.value>;
          add(column, t0, grad_v_ + a + w * lanes, grad_scores + t0 * scores_stride, scores_stride, steps);
        });
      }
      for (int64_t t = 0; to_queries && t < count; ++t) {
        for (int w = 0; w < width.value; ++w) {
          put(grad_query, t, a + w * lanes, Vec<acc>::loadu(columns_[w].grad_queries + t * lanes));
        }
      }
      for (int64_t j = 0; grad_keys_.wanted() && j < steps; ++j) {
        for (int w = 0; w < width.value; ++w) {
          put(grad_keys, j, a + w * lanes, Vec<acc>::loadu(columns_[w].grad_keys + j * lanes));
        }
      }
    });
  }

  // `width` of them, of the features from a on.
  template <int width>
  void load_columns(const acc* const* queries, int64_t count, int64_t steps, int64_t a) {
    const int64_t last = std::min(lanes, this->size_ - a - (width - 1) * lanes);
    const auto for_rows = [&](const acc* const* rows, int64_t end, const auto& f) __attribute__((always_inline)) {
      for (int64_t i = 0; i < end; ++i) {
        Vec<acc> x[width];
#pragma GCC unroll 4
        for (int w = 0; w < width; ++w) {
          x[w] = Vec<acc>::loadu(rows[i] + a + w * lanes, w + 1 < width ? lanes : last);
        }
        f(x, i * lanes);
      }
    };
    const auto store = [&](acc* Column::* to, const Vec<acc>(&x)[width], int64_t place) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int w = 0; w < width; ++w) {
        x[w].store(columns_[w].*to + place);
      }
    };
    const auto raise = [](Vec<acc>(&magnitudes)[width], const Vec<acc>(&x)[width]) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int w = 0; w < width; ++w) {
        magnitudes[w] = raised(magnitudes[w], x[w].abs());
      }
    };
    // Kept here, not with the columns, where each would be waited for: an eighth of a few queries' backward.
    Vec<acc> query_magnitudes[width], key_magnitudes[width];
    std::fill_n(query_magnitudes, width, Vec<acc>(0));
    std::fill_n(key_magnitudes, width, Vec<acc>(this->has_exponentials_ ? this->key_exponentials_.range() / 2 : acc(0)));
    for_rows(queries, count, [&](Vec<acc>(&q)[width], int64_t place) __attribute__((always_inline)) {
      raise(query_magnitudes, q);
      exponentiate(q, acc(2));
#pragma GCC unroll 4
      for (int w = 0; w < width; ++w) {
        q[w] = q[w] * Vec<acc>(0.5);
      }
      store(&Column::queries, q, place);
    });
    if (this->has_exponentials_) {
      for_rows(this->key_exponentials_.addresses(), steps, [&](Vec<acc>(&e)[width], int64_t place) __attribute__((always_inline)) {
        store(&Column::keys, e, place);
      });
    } else {
      for_rows(this->keys_.addresses(), steps, [&](Vec<acc>(&k)[width], int64_t place) __attribute__((always_inline)) {
        raise(key_magnitudes, k);
        exponentiate(k, acc(2));
        store(&Column::keys, k, place);
      });
    }
    bool all_factor = true;
    for (int w = 0; w < width; ++w) {
      const acc range = 2 * largest(query_magnitudes[w] + key_magnitudes[w]);
      columns_[w].shared = range <= range_of<acc>(kSharedSteps) ? kSharedSteps : range <= range_of<acc>(1) ? 1 : 0;
      all_factor &= columns_[w].shared > 0;
    }
    if (!all_factor) {
      const auto store_direct = [&](acc* Column::* to) {
        return [to, this](const Vec<acc>(&x)[width], int64_t place) {
          for (int w = 0; w < width; ++w) {
            if (columns_[w].shared == 0) {
              x[w].store(columns_[w].*to + place);
            }
          }
        };
      };
      for_rows(queries, count, store_direct(&Column::queries));
      for_rows(this->keys_.addresses(), steps, store_direct(&Column::keys));
    }
  }

  // The gradients of a few queries, from t0 on, stay in registers while the steps go by. Not inlined: sums that the caller could
  // look at would be stored at every step.
  template <int shared, bool to_queries, int rows>
  [[gnu::noinline]] static void add_column(
      const Column& column, int64_t t0, acc* grad_v, const acc* scores, int64_t scores_stride, int64_t steps) {
    if constexpr (kPipelines) {
      constexpr auto each = std::make_integer_sequence<int, rows>();
      add_pipelined<shared, to_queries>(each, column, t0, grad_v, scores, scores_stride, steps);
    } else {
      add_together<shared, to_queries, rows>(column, t0, grad_v, scores, scores_stride, steps);
    }
  }

  // Pipelined: while a step's h are added, the next step's are computed. h is the end of four operations, each of which waits for
  // the one before, and three sums wait for h. A pack of queries rather than a loop: an array that a loop fills would be stored at
  // every step.
  template <int shared, bool to_queries, int... query>
  [[gnu::always_inline]] static void add_pipelined(
      std::integer_sequence<int, query...>,
      const Column& column,
      int64_t t0,
      acc* grad_v_sum,
      const acc* scores,
      int64_t scores_stride,
      int64_t steps) {
    const acc* const keys = column.keys;
    const acc* const queries = column.queries + t0 * lanes;
    acc* const grad_keys = column.grad_keys;
    Vec<acc> k = Vec<acc>::loadu(keys);
    Vec<acc> grad_v = Vec<acc>::loadu(grad_v_sum);
    const auto compute = [&](int i) __attribute__((always_inline)) {
      return negative_tanh<acc>(half_denominator<shared>(Vec<acc>::loadu(queries + i * lanes), k));
    };
    Vec<acc> h[] = {compute(query)...};
    Vec<acc> grad_q[] = {(static_cast<void>(query), Vec<acc>(0))...};
    for (int64_t j = 0; j < steps; ++j) {
      k = Vec<acc>::loadu(keys + std::min(j + 1, steps - 1) * lanes);
      Vec<acc> grad_k = Vec<acc>::loadu(grad_keys + j * lanes);
      const auto add = [&](int i) __attribute__((always_inline)) {
        add_slope(grad_q[i], grad_k, grad_v, Vec<acc>(scores[i * scores_stride + j]), h[i]);
        asm("" : "+v"(grad_k.values));  // in its place: put off to the store, all terms would wait in registers
        h[i] = compute(i);
      };
      (add(query), ...);
      grad_k.store(grad_keys + j * lanes);
    }
    grad_v.store(grad_v_sum);
    if constexpr (to_queries) {
      (grad_q[query].store(column.grad_queries + (t0 + query) * lanes), ...);
    }
  }

  // The same, one step after the other, or those together that share a reciprocal.
  template <int shared, bool to_queries, int rows>
  [[gnu::always_inline]] static void add_together(
      const Column& column, int64_t t0, acc* grad_v_sum, const acc* scores, int64_t scores_stride, int64_t steps) {
    const acc* const keys = column.keys;
    acc* const grad_keys = column.grad_keys;
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
    const auto add = [&](int64_t j, auto count) __attribute__((always_inline)) {
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
          x[c] = half_denominator<shared>(q[i], k[c]);
        }
        negative_tanhs<count.value, acc>(h, x);
#pragma GCC unroll 2
        for (int c = 0; c < count.value; ++c) {
          add_slope(grad_q[i], grad_k[c], grad_v[c], Vec<acc>(scores[i * scores_stride + j + c]), h[c]);
        }
      }
#pragma GCC unroll 2
      for (int c = 0; c < count.value; ++c) {
        grad_k[c].store(grad_keys + (j + c) * lanes);
      }
    };
    int64_t j = 0;
    for (; j + most <= steps; j += most) {
      add(j, std::integral_constant<int, most>());
    }
    for (; j < steps; ++j) {
      add(j, std::integral_constant<int, 1>());
    }
    std::accumulate(grad_v + 1, grad_v + most, grad_v[0]).store(grad_v_sum);
#pragma GCC unroll 8
    for (int i = 0; to_queries && i < rows; ++i) {
      grad_q[i].store(column.grad_queries + (t0 + i) * lanes);
    }
  }

  // (1 + E) / 2, of what a Column with so many that share has.
  template <int shared>
  [[gnu::always_inline]] static Vec<acc> half_denominator(const Vec<acc>& q, const Vec<acc>& k) {
    const Vec<acc> half(0.5);
    return shared > 0 ? fmadd(q, k, half) : direct_denominator<acc>(q + k, kRange<acc>) * half;
  }

  // y and u of a score's gradient.
  [[gnu::always_inline]] static void add_slope(
      Vec<acc>& grad_q, Vec<acc>& grad_k, Vec<acc>& grad_v, const Vec<acc>& grad_score, const Vec<acc>& h) {
    if constexpr (kAddsBesideProducts) {
      const auto u = grad_score * h;
      const auto y = fnmadd(u, h, grad_score);
      grad_q = grad_q + y;
      grad_k = grad_k + y;
      grad_v = grad_v + u;
    } else {
      const auto slope = fnmadd(h, h, Vec<acc>(1));
      grad_q = fmadd(grad_score, slope, grad_q);
      grad_k = fmadd(grad_score, slope, grad_k);
      grad_v = fmadd(grad_score, h, grad_v);
    }
  }

  const Backward& f_;
  Exponentials<acc> half_exponentials_;  // exp(2q) / 2, where queries alone have gradients
  TileGradient<acc> grad_keys_;
  acc* grad_v_;  // not yet times -1
  Column columns_[kAbreast];
};

}  // namespace
}  // namespace attn_ext::cpu::CPU_CAPABILITY

// Attention of one query, a decoder's step: a few rows of memory at a time, a group, serve all that is wanted of them while they
// are near.
//
//   forward    e_s the scores;  p_s = exp(e_s - row_max), the running maximum;  c = sum_s p_s m_s / sum_s p_s
//   backward   da_s = g . m_s + gw_s;  delta = g . c + sum_s a_s gw_s;  de_s = scale a_s (da_s - delta);  dm_s = a_s g, and the
//              score's own share of the gradients from de, which may also be given
//
// Of one group, delta is sum_s a_s da_s, which is the same, and no context is read.
//
// It is bound by the memory's bandwidth. Rows are read one after the other, as they lie, and whoever reads a row first has later
// ones prefetched, line by line: the prefetchers in hardware stop at each page's end. A gradient that no cache holds is written
// past all of them, which spares its lines' being read. And what is read, written and computed in turns adds up: of a large memory,
// what is left to do with a group's rows once their coefficients are known is done beside the next group's, row by row.
#pragma once

#include "cache.h"
#include "gradient_rows.h"
#include "products.h"
#include "row_group.h"
#include "softmax.h"
#include "twos.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

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
    if (!more && plan.prefetches && index + 1 < plan.items(problem)) {
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
  void defer_sum(const acc* q) const {
    const bool streams = grad_memory.streams(), all = streams && memory.defers_gradients() && grad_context != nullptr;
    if (!streams) {
      combine_memory(q);
    } else if (!all) {
      grad_memory.combine_and_prefetch(tile, coefficients, grad_context, q, memory);
    }
    DeferredRows<acc>& rest = memory.defer_sum(grad_query, grad_scores());
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
    Slot(const Forward& f, char* base) : f(f), arena(base) {}

    const Forward& f;
    Arena arena;
    acc* row_max = arena.take<acc>(1);
    acc* row_sum = arena.take<acc>(1);
    // Not yet divided by row_sum; but of one group it is, and may be the output itself.
    acc* context = arena.take<acc>(f.problem.memory_size);
    // Of the split's steps, where they are wanted, not yet divided either.
    acc* weights = f.weights == nullptr ? nullptr : arena.take<acc>(f.plan.split_size);
    RowGroup<acc> memory{arena, f.problem.dtype, f.problem.memory, f.plan, f.problem.memory_size};
    Score score{f.problem, f.plan, arena};
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
    const bool is_whole = f.plan.has_whole_rows(problem);
    if (is_whole && f.exact_context != nullptr) {
      slot.context = static_cast<acc*>(f.exact_context) + item.batch * problem.memory_size;
    }
    if (f.weights != nullptr) {
      std::fill_n(slot.weights, item.end_step - item.first_step, acc(0));
    }
    const bool adds_later = slot.memory.overlaps() && !is_whole;
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
        slot.memory.finish_deferred();
        scale_row(slot.context, slot.context, problem.memory_size, correction);
        if (f.weights != nullptr) {
          scale_row(slot.weights, slot.weights, tile.steps[0] - item.first_step, correction);
        }
      }
      const bool adds = row_sum != 0;
      row_sum += sum(exponentials(row, whole, row_max));
      if (f.weights != nullptr) {
        scatter(slot.weights - item.first_step, row, tile);
      }
      if (adds_later) {
        slot.memory.defer_sum(slot.context, row);
      } else {
        slot.memory.sum_to(slot.context, row, is_whole ? 1 / row_sum : acc(1), adds);
      }
    });
    slot.memory.finish_deferred();
    if (row_sum == 0) {
      std::fill_n(slot.context, problem.memory_size, acc(0));
    }
    *slot.row_max = row_max;
    *slot.row_sum = row_sum;
    if (f.plan.splits == 1) {
      store_context(f, item, slot, is_whole ? acc(1) : inverse(row_sum));
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
    Slot(const Backward& f, char* base) : f(f), arena(base) {}

    const Backward& f;
    Arena arena;
    acc* grad_query = arena.take<acc>(f.problem.key_size);  // the split's share
    Rows<acc> grad_context{arena, f.problem.dtype, f.grad_context, 1, f.problem.memory_size};
    Rows<acc> context{arena, kAccumulated<acc>, f.context, 1, f.problem.memory_size};
    Rows<acc> weights{arena, kAccumulated<acc>, f.weights, 1, f.problem.steps};
    Rows<acc> grad_weights{arena, f.problem.dtype, f.grad_weights, 1, f.problem.steps};
    Rows<acc> given_grad_scores{arena, kAccumulated<acc>, f.given_grad_scores, 1, f.problem.steps};
    RowGroup<acc> memory{arena, f.problem.dtype, f.problem.memory, f.plan, f.problem.memory_size};
    GradientRows<acc> grad_memory{arena, f.grad_memory, f.problem, f.plan, f.problem.memory_size, 0};
    Score score{f.problem, f.plan, arena, &f};
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
    const bool prefetches = !slot.score.prefetches_beside_gradients(slot.memory, slot.grad_memory, incoming.grad_context);
    acc excess = 0;
    for_groups(problem, f.plan, index, [&](const Tile& tile, const Upcoming& next) {
      acc coefficients[2 * kGroupRows];
      const GroupGradients<acc> group{tile, slot.memory, coefficients, incoming.grad_context, slot.grad_memory, slot.grad_query};
      slot.memory.load(item.batch, tile, next);
      slot.score.load_keys(item.batch, tile, next);
      excess += incoming.compute_coefficients(f, tile, slot, coefficients, coefficients + kGroupRows, prefetches);
      if (grad_scores != nullptr) {
        scatter(grad_scores, group.grad_scores(), tile);
      }
      slot.score.add_gradients(group);
    });
    slot.memory.finish_deferred();
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
    const acc* given_grad_scores;
    int64_t batch;
    acc delta = 0;
    const acc* context = nullptr;  // where delta is of it

    Incoming(const Backward& f, int64_t b, Slot& slot)
        : grad_context(slot.grad_context.load_only(b)),
          weights(slot.weights.load_only(b)),
          grad_weights(slot.grad_weights.load_only(b)),
          given_grad_scores(slot.given_grad_scores.load_only(b)),
          batch(b) {
      if (given_grad_scores != nullptr || f.plan.has_whole_rows(f.problem)) {
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

    // Returns the sum of de. `prefetches`: the memory's next rows here, unless its scores have.
    acc compute_coefficients(const Backward& f, const Tile& tile, Slot& slot, acc* a, acc* de, bool prefetches) const {
      // Of one group delta is sum_s a_s da_s, of what is there, and the context is not read.
      const bool is_whole = f.plan.has_whole_rows(f.problem);
      if (given_grad_scores != nullptr) {
        gather(de, given_grad_scores, tile);
        return 0;
      }
      if (weights != nullptr) {
        gather(a, weights, tile);
      } else {
        slot.score.scores(a, slot.memory);
        std::fill(a + tile.count, a + whole_vectors<acc>(tile.count), kNothing<acc>);
        const acc total = sum(recompute_softmax(a, tile.count, static_cast<const acc*>(f.logsumexp)[batch], is_whole));
        if (is_whole && total != 0) {
          scale_row(a, a, tile.count, 1 / total);
        }
      }
      std::fill_n(de, tile.count, acc(0));
      if (grad_context != nullptr) {
        slot.memory.dot_products(de, grad_context, 1, prefetches && weights != nullptr);
      }
      for (int64_t j = 0; grad_weights != nullptr && j < tile.count; ++j) {
        de[j] += grad_weights[tile.steps[j]];
      }
      const acc scale = static_cast<acc>(f.problem.scale);
      const acc subtract = is_whole ? dot_product(a, de, tile.count) : delta;
      const acc excess = sum(differentiate_softmax(de, a, tile.count, subtract, scale, !is_whole && weights != nullptr));
      if (is_whole) {
        subtract_excess(de, a, tile.count, excess);
      }
      return excess;
    }
  };
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

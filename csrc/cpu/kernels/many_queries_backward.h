// The gradients of attention over tiles of memory, for any score:
//
//   da_ts = g_t . m_s + gw_ts;  delta_t = g_t . c_t + sum_s a_ts gw_ts;  de_ts = scale a_ts (da_ts - delta_t)
//   dm_s = sum_t a_ts g_t, and the score's own share of the gradients from de, which may also be given
//
// Where an item has all of a query's steps in one tile, delta_t is sum_s a_ts da_ts, which is the same, and no context is read.
//
// sum_s de_ts is 0, but delta_t is rounded apart from the da_ts: an excess r_t is left, a share a_ts r_t of it in every de_ts. What
// the rows of the memory have in common multiplies it in dq_t = sum_s de_ts m_s, where it can outweigh the rest; it is r_t c_t
// there, and is taken off.
#pragma once

#include "many_queries.h"
#include "tile_gradient.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// Gradient is DotGradient or AdditiveGradient.
template <class Gradient>
struct ManyQueriesBackward {
  using element = typename Gradient::element;
  using acc = typename ElementTraits<element>::acc;

  struct Slot {
    Slot(const Backward& f, char* base) : f(f), arena(base) {}

    const Backward& f;
    Arena arena;
    bool query_in_place = f.grad_query != nullptr && Gradient::query_in_place(f.problem) && f.plan.splits == 1 &&
                          f.problem.dtype == kAccumulated<acc>;
    int64_t query_stride = query_in_place ? f.problem.key_size : padded<acc>(f.problem.key_size);
    // [chunk][key_size]: the split's share, or the output itself.
    acc* grad_query = query_in_place ? nullptr : arena.take<acc>(f.plan.chunk * query_stride);
    acc* delta = arena.take<acc>(f.plan.chunk);
    acc* excess = arena.take<acc>(f.plan.chunk);  // sum_s de_ts of the item's steps
    int64_t tile_stride = padded<acc>(f.plan.tile);
    // [count][tile_stride], of the chunk at hand, its weights, and right behind them its scores' gradients.
    acc* coefficients = arena.take<acc>(2 * std::min(kChunk, f.plan.chunk) * tile_stride);
    Workspace<element> work{arena, f.problem.product_dtype, f.plan.chunk, Gradient::goes_by_amx(f.problem, f.plan)};
    bool transposes = kTransposesCoefficients && !work.by_amx && f.plan.chunk >= kMany;
    int64_t columns_stride = padded<acc>(2 * std::min(kChunk, f.plan.chunk));
    // [tile][2 kChunk] the coefficients transposed, if they are.
    acc* columns = transposes ? arena.take<acc>(f.plan.tile * columns_stride) : nullptr;
    acc* weights_row = arena.take<acc>(f.problem.steps);
    acc* grad_weights_row = arena.take<acc>(f.problem.steps);
    Rows<element> grad_context{arena, f.problem.dtype, f.grad_context, f.plan.chunk, f.problem.memory_size};
    Rows<acc> context{arena, kAccumulated<acc>, f.context, f.plan.chunk, f.problem.memory_size};
    Rows<element> memory{arena, f.problem.dtype, f.problem.memory, f.plan.tile, f.problem.memory_size, work.takes_halves()};
    TileGradient<acc> grad_memory{arena, f.grad_memory, f.problem, f.plan, f.problem.memory_size};
    Gradient gradient{f, arena, work};
  };

  static size_t slot_size(const Backward& f) {
    return Slot(f, nullptr).arena.used();
  }

  static void run(const Backward& f, int64_t index, char* base) {
    const Problem& problem = f.problem;
    const Item item = f.plan.item(problem, index);
    Slot slot(f, base);
    const AmxScope amx_scope(slot.work.by_amx);
    if (slot.query_in_place) {
      slot.grad_query = static_cast<acc*>(f.grad_query) + item.first_row(problem) * slot.query_stride;
    }
    if (f.grad_context.data != nullptr) {
      slot.grad_context.load(item.batch, item.first_query, item.queries);
    }
    if (!has_whole_rows(f)) {
      compute_delta(f, item, slot);
    }
    std::fill_n(slot.excess, item.queries, acc(0));
    slot.gradient.begin(item);
    slot.grad_memory.begin_item(item);
    int64_t written = item.first_step;  // up to here the memory's gradient is written
    SourceWalk walk(problem, item, f.plan.tile);
    for (Tile tile; item.queries > 0 && walk.next(tile);) {
      queue_prefetches(f, index, item, tile, slot);
      slot.memory.load(item.batch, tile);
      slot.gradient.begin_tile(item.batch, tile, written, slot.memory);
      slot.grad_memory.begin(tile, written);
      for (int64_t t = 0; t < item.queries; t += kChunk) {
        process_block(f, item, t, std::min(kChunk, item.queries - t), tile, written, slot);
      }
      slot.grad_memory.end(tile);
      slot.gradient.end_tile(tile);
      written = tile.steps[tile.count - 1] + 1;
    }
    slot.grad_memory.zero(written, item.end_step);
    if (f.grad_scores != nullptr) {
      grad_scores_rows(f, item, 0, item.queries).zero(written, item.end_step);
    }
    slot.gradient.end(item, index, written);
    if (written == item.first_step && f.grad_query != nullptr) {
      std::fill_n(slot.grad_query, item.queries * slot.query_stride, acc(0));
    }
    if (problem.method == Method::Dot && f.grad_query != nullptr && f.grad_context.data != nullptr && !has_whole_rows(f)) {
      for (int64_t t = 0; t < item.queries; ++t) {
        add_row(slot.grad_query + t * slot.query_stride, -slot.excess[t], slot.context.addresses()[t], problem.key_size);
      }
    }
    if (f.plan.splits == 1 && !slot.query_in_place) {
      merge_queries(f, item, 0, item.queries, slot, 0);
    }
    if (f.plan.streams || f.plan.streams_queries) {
      finish_streaming();
    }
  }

  // The splits' shares of the query's gradient, and the chunks' of the memory's, in their order. Of the rows that an item has in
  // common with others it takes an even part.
  static void merge(const Backward& f, int64_t index, char* slots, size_t slot_size) {
    const Plan& plan = f.plan;
    const Item item = plan.item(f.problem, index);
    const int64_t split = index % plan.splits;
    const int64_t chunk = index / plan.splits % plan.chunks;
    if (plan.splits > 1) {
      const Slot first(f, slots + (index - split) * slot_size);
      merge_queries(f, item, item.queries * split / plan.splits, item.queries * (split + 1) / plan.splits, first, slot_size);
    }
    if (plan.chunks > 1) {
      const Slot first(f, slots + (index - chunk * plan.splits) * slot_size);
      const int64_t steps = item.end_step - item.first_step;
      const int64_t begin = item.first_step + steps * chunk / plan.chunks;
      const int64_t end = item.first_step + steps * (chunk + 1) / plan.chunks;
      first.grad_memory.merge(item, begin, end, plan.splits * slot_size);
      first.gradient.merge(item, begin, end, plan.splits * slot_size);
    }
  }

 private:
  // Rows begin .. end of an item's chunk; `first` is the slot of its first split.
  static void merge_queries(const Backward& f, const Item& item, int64_t begin, int64_t end, const Slot& first, size_t slot_size) {
    const Problem& problem = f.problem;
    for (int64_t t = begin; f.grad_query != nullptr && t < end; ++t) {
      const int64_t row = item.first_row(problem) + t;
      acc* share = first.grad_query + t * first.query_stride;
      if (f.plan.splits == 1) {
        write_row(f.plan.streams_queries, problem.dtype, f.grad_query, row * problem.key_size, share, problem.key_size);
      } else {
        merge_row(problem.dtype, f.grad_query, row, share, f.plan.splits, slot_size, problem.key_size);
      }
    }
  }

  static void queue_prefetches(const Backward& f, int64_t index, const Item& item, const Tile& tile, Slot& slot) {
    if (!slot.work.may_prefetch(f.plan.prefetches, tile.count)) {
      return;
    }
    PrefetchQueue& prefetches = slot.work.prefetches;
    const Next next(f.problem, f.plan, index, item, tile.steps[tile.count - 1] + 1);
    if (next.is_item()) {
      next.queries_to(prefetches, f.problem.dtype, f.grad_context, f.problem.memory_size);
      next.queries_to(prefetches, kAccumulated<acc>, f.weights, f.problem.steps);
    }
    next.template steps_to<acc>(prefetches);
    if (next.is_item()) {
      next.queries_to(prefetches, f.problem.dtype, f.problem.query, f.problem.key_size);
    }
    spread(slot.work, item.queries, tile.count, f.problem.memory_size);
  }

  // A few of an item's queries against a tile: their weights, the gradient of their scores, and what both add to the other
  // gradients.
  static void process_block(
      const Backward& f, const Item& item, int64_t first, int64_t count, const Tile& tile, int64_t written, Slot& slot) {
    const Problem& problem = f.problem;
    const int64_t stride = slot.tile_stride;
    acc* weights = slot.coefficients;
    acc* grad_scores = weights + count * stride;
    if (f.given_grad_scores.data != nullptr) {
      gather(grad_scores, stride, kAccumulated<acc>, f.given_grad_scores, item.batch, item.first_query + first, count, tile);
    } else {
      compute_grad_scores(f, item, first, count, tile, slot, weights, grad_scores);
    }
    if (f.grad_scores != nullptr) {
      grad_scores_rows(f, item, first, count).scatter<acc>(grad_scores, stride, nullptr, tile, written);
    }
    if (slot.grad_memory.wanted()) {
      // sum_t a_ts g_t and, where the memory is its own keys, sum_t de_ts q_t: one product of twice the depth.
      const element* rows[2 * kChunk];
      const element** end = rows;
      if (f.grad_context.data != nullptr) {
        end = std::copy_n(slot.grad_context.addresses() + first, count, rows);
      }
      const acc* coefficients = end == rows ? grad_scores : weights;
      end = slot.gradient.queries_of_memory(end, first, count);
      multiply(
          slot.grad_memory.rows(first > 0),
          tile.count,
          columns_of(slot, coefficients, end - rows, tile.count),
          rows,
          end - rows,
          problem.memory_size,
          &slot.work);
    }
    if constexpr (Gradient::kMultipliesKeys) {
      if (slot.gradient.wants_keys()) {
        slot.gradient.add_to_keys(columns_of(slot, grad_scores, count, tile.count), first, count, tile.count, slot.work);
      }
    }
    const Result<acc> grad_query(slot.grad_query + first * slot.query_stride, slot.query_stride, written > item.first_step);
    const bool streams = f.plan.streams_queries && slot.query_in_place && has_whole_rows(f);
    slot.gradient.add(grad_scores, stride, first, count, tile.count, streams ? grad_query.streamed() : grad_query, slot.work);
  }

  // The coefficients of the memory's gradient, by source step. A column of many rows is in as many pages, more than the first-level
  // TLB has entries for: they are transposed. What goes by matrix tiles, or in pairs, is copied anyhow.
  static constexpr bool kTransposesCoefficients = kTransposes<acc> && !kIsPaired<element>;

  static Coefficients<acc> columns_of(Slot& slot, const acc* coefficients, int64_t rows, int64_t steps) {
    const int64_t stride = slot.tile_stride;
    if constexpr (kTransposesCoefficients) {
      if (slot.transposes && rows >= kMany && steps >= kMany) {
        const acc* from[2 * kChunk];
        for (int64_t k = 0; k < rows; ++k) {
          from[k] = coefficients + k * stride;
        }
        transpose(slot.columns, slot.columns_stride, from, rows, 0, steps);
        return {slot.columns, slot.columns_stride, 1};
      }
    }
    return {coefficients, 1, stride};
  }

  static StepsRows grad_scores_rows(const Backward& f, const Item& item, int64_t first, int64_t count) {
    const int64_t steps = f.problem.steps;
    return {kAccumulated<acc>, f.grad_scores, (item.first_row(f.problem) + first) * steps, count, steps};
  }

  static void compute_grad_scores(
      const Backward& f,
      const Item& item,
      int64_t first,
      int64_t count,
      const Tile& tile,
      Slot& slot,
      acc* weights,
      acc* grad_scores) {
    const Problem& problem = f.problem;
    const int64_t first_query = item.first_query + first;
    const int64_t stride = slot.tile_stride;
    const element* const* grad_context = slot.grad_context.addresses() + first;
    if (f.weights.data != nullptr) {
      gather(weights, stride, kAccumulated<acc>, f.weights, item.batch, first_query, count, tile);
    } else {
      recompute_weights(f, item, first, count, tile, slot, weights);
    }
    if (f.grad_context.data != nullptr) {
      const int64_t size = ElementTraits<element>::elements(problem.memory_size);
      dot_products(grad_scores, stride, grad_context, count, slot.memory.right(), tile.count, size, acc(1), slot.work);
    } else {
      std::fill_n(grad_scores, count * stride, acc(0));
    }
    for (int64_t t = 0; f.grad_weights.data != nullptr && t < count; ++t) {
      acc grad_weights[kTile];
      gather(grad_weights, 0, problem.dtype, f.grad_weights, item.batch, first_query + t, 1, tile);
      acc* row = grad_scores + t * stride;
      for (int64_t j = 0; j < tile.count; ++j) {
        row[j] += grad_weights[j];
      }
    }
    // As in a forward, a loop for each pass.
    acc* delta = slot.delta + first;
    acc* excess = slot.excess + first;
    if (has_whole_rows(f)) {
      sum_each(delta, count, [&](int64_t t) __attribute__((always_inline)) {
        return partial_dot_products(weights + t * stride, grad_scores + t * stride, tile.count);
      });
    }
    const acc scale = static_cast<acc>(problem.scale);
    const bool delta_from_context = !has_whole_rows(f) && f.weights.data != nullptr;
    acc sums[kChunk];
    sum_each(sums, count, [&](int64_t t) __attribute__((always_inline)) {
      return differentiate_softmax(grad_scores + t * stride, weights + t * stride, tile.count, delta[t], scale, delta_from_context);
    });
    for (int64_t t = 0; t < count; ++t) {
      excess[t] += sums[t];
      if (has_whole_rows(f)) {
        subtract_excess(grad_scores + t * stride, weights + t * stride, tile.count, sums[t]);
      }
    }
  }

  static void recompute_weights(
      const Backward& f, const Item& item, int64_t first, int64_t count, const Tile& tile, Slot& slot, acc* weights) {
    const int64_t stride = slot.tile_stride;
    const int64_t first_query = item.first_query + first;
    slot.gradient.scores(weights, stride, first, count, tile.count, slot.work);
    mask_scores(weights, stride, f.problem, item.batch, first_query, count, tile);
    const acc* logsumexp = static_cast<const acc*>(f.logsumexp) + item.batch * f.problem.queries + first_query;
    acc sums[kChunk];
    sum_each(sums, count, [&](int64_t t) __attribute__((always_inline)) {
      return recompute_softmax(weights + t * stride, tile.count, logsumexp[t], has_whole_rows(f));
    });
    for (int64_t t = 0; t < count; ++t) {
      if (std::isnan(sums[t])) {
        spoil_weights(weights + t * stride, f.problem, item.batch, first_query + t, tile);
      } else if (has_whole_rows(f) && sums[t] != 0) {
        scale_row(weights + t * stride, weights + t * stride, tile.count, 1 / sums[t]);
      }
    }
  }

  static bool has_whole_rows(const Backward& f) {
    return f.plan.has_whole_rows(f.problem);
  }

  static void compute_delta(const Backward& f, const Item& item, Slot& slot) {
    const Problem& problem = f.problem;
    if (f.grad_context.data != nullptr) {
      slot.context.load(item.batch, item.first_query, item.queries);
    }
    for (int64_t t = 0; t < item.queries; ++t) {
      slot.delta[t] = 0;
      if (f.grad_context.data != nullptr) {
        slot.delta[t] = dot_product(slot.context.addresses()[t], slot.grad_context.addresses()[t], problem.memory_size);
      }
      if (f.grad_weights.data != nullptr) {
        load_row(slot.weights_row, kAccumulated<acc>, f.weights, item.batch, item.first_query + t, problem.steps);
        load_row(slot.grad_weights_row, problem.dtype, f.grad_weights, item.batch, item.first_query + t, problem.steps);
        slot.delta[t] += dot_product(slot.weights_row, slot.grad_weights_row, problem.steps);
      }
    }
  }

  // A tile's columns of `count` rows from t on.
  static void gather(
      acc* rows, int64_t stride, Dtype dtype, const View& view, int64_t b, int64_t t, int64_t count, const Tile& tile) {
    with_type<acc>(dtype, [&](auto example) {
      const auto* from = static_cast<const decltype(example)*>(view.data) + b * view.batch_stride + t * view.row_stride;
      for (int64_t i = 0; i < count; ++i, from += view.row_stride) {
        acc* const row = rows + i * stride;
        for (int64_t j = 0; tile.is_fragmented && j < tile.count; ++j) {
          row[j] = static_cast<acc>(from[tile.steps[j] * view.element_stride]);
        }
        for (int64_t j = 0, end; !tile.is_fragmented && j < tile.count; j = end) {
          end = tile.run_end(j);
          load_row(row + j, from + tile.steps[j] * view.element_stride, view.element_stride, end - j);
        }
      }
    });
  }
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

// Attention over tiles of memory, for any score.
//
//   forward    p_ts = exp(e_ts - row_max_t), the running maximum;  c_t = sum_s p_ts m_s / sum_s p_ts
//   backward   da_ts = g_t . m_s + gw_ts;  delta_t = g_t . c_t + sum_s a_ts gw_ts;  de_ts = scale a_ts (da_ts - delta_t)
//              dm_s = sum_t a_ts g_t, and the score's own share of the gradients from de
//
// Each tile of memory is read once and serves the scores and the context (forward), or all of its gradients (backward), while it
// is in cache. One query is bound by that read; many are bound by the products in tile.h.
#pragma once

#include "problem.h"
#include "rows.h"
#include "tile.h"

#include <limits>

namespace attn_ext::cpu::CPU_CAPABILITY {

template <class acc>
constexpr acc kNothing = -std::numeric_limits<acc>::infinity();

// The scores of a chunk of queries against a tile, [kChunk][kTile]: masked pairs become -inf, and rows are filled up to the tile's
// width with it, for full vectors.
template <class acc>
void mask_scores(acc* scores, const Problem& problem, int64_t b, int64_t first_query, int64_t queries, const Tile& tile) {
  for (int64_t t = 0; t < queries; ++t) {
    acc* row = scores + t * kTile;
    if (problem.mask_per_query) {
      for (int64_t j = 0; j < tile.count; ++j) {
        row[j] = may_attend(problem, b, first_query + t, tile.steps[j]) ? row[j] : kNothing<acc>;
      }
    }
    std::fill(row + tile.count, row + kTile, kNothing<acc>);
  }
}

// Below this exp() is subnormal, and every product with a subnormal costs the processor a microcode assist.
template <class acc>
constexpr acc kSmallestExponent = std::is_same_v<acc, double> ? -708 : -87;

// row[j] = exp(row[j] - subtract), 0 where that is subnormal; returns the sum.
template <class acc>
acc exponentials(acc* row, int64_t count, acc subtract) {
  Vec<acc> total(0);
  const Vec<acc> shift(subtract);
  const auto flushed = [](const Vec<acc>& x) {
    return Vec<acc>::blendv(exponential(x), Vec<acc>(0), x < Vec<acc>(kSmallestExponent<acc>));
  };
  int64_t j = 0;
  for (; j + Vec<acc>::size() <= count; j += Vec<acc>::size()) {
    const Vec<acc> p = flushed(Vec<acc>::loadu(row + j) - shift);
    p.store(row + j);
    total = total + p;
  }
  acc result = sum(total);
  const int64_t rest = count - j;
  if (rest > 0) {
    acc last[Vec<acc>::size()];
    flushed(Vec<acc>::loadu(row + j, rest) - shift).store(last);
    for (int64_t i = 0; i < rest; ++i) {
      row[j + i] = last[i];
      result += last[i];
    }
  }
  return result;
}

template <class acc>
acc maximum(const acc* row, acc start) {
  Vec<acc> all(start);
  for (int64_t j = 0; j < kTile; j += Vec<acc>::size()) {
    all = at::vec::maximum(all, Vec<acc>::loadu(row + j));
  }
  return largest(all);
}

// Score is DotScore or AdditiveScore: what the queries are scored against, tile by tile.
template <class Score>
struct AttentionForward {
  using acc = typename Score::acc;

  // One item's scratch. Until merge() the first four hold its result.
  struct Slot {
    Slot(const Forward& f, char* base)
        : arena(base),
          context_stride(padded<acc>(f.problem.memory_size)),
          row_max(arena.take<acc>(f.plan.chunk)),
          row_sum(arena.take<acc>(f.plan.chunk)),
          context(arena.take<acc>(f.plan.chunk * context_stride)),
          scores(f.weights == nullptr ? nullptr : arena.take<acc>(f.plan.chunk * f.plan.split_size)),
          tile_scores(arena.take<acc>(f.plan.chunk * kTile)),
          memory(arena, f.problem.dtype, f.problem.memory, kTile, f.problem.memory_size),
          score(f.problem, f.plan.chunk, arena) {}

    Arena arena;
    int64_t context_stride;
    acc* row_max;
    acc* row_sum;
    acc* context;  // not yet divided by row_sum
    acc* scores;   // of all steps of the split, -inf where none; only if the weights are asked for
    acc* tile_scores;
    Rows<acc> memory;
    Score score;
  };

  static size_t slot_size(const Forward& f) {
    return Slot(f, nullptr).arena.used();
  }

  static void run(const Forward& f, int64_t index, char* base) {
    const Problem& problem = f.problem;
    const Item item = f.plan.item(problem, index);
    Slot slot(f, base);
    std::fill_n(slot.row_max, item.queries, kNothing<acc>);
    std::fill_n(slot.row_sum, item.queries, acc(0));
    std::fill_n(slot.context, item.queries * slot.context_stride, acc(0));
    if (slot.scores != nullptr) {
      std::fill_n(slot.scores, item.queries * f.plan.split_size, kNothing<acc>);
    }
    slot.score.load_queries(item.batch, item.first_query, item.queries);
    SourceWalk walk(problem, item);
    for (Tile tile; walk.next(tile);) {
      slot.memory.load(item.batch, tile);
      slot.score.load_keys(item.batch, tile, slot.memory);
      slot.score.scores(slot.tile_scores, 0, item.queries, tile.count);
      mask_scores(slot.tile_scores, problem, item.batch, item.first_query, item.queries, tile);
      for (int64_t t = 0; t < item.queries; ++t) {
        acc* row = slot.tile_scores + t * kTile;
        if (slot.scores != nullptr) {
          keep(slot.scores + t * f.plan.split_size, item.first_step, row, tile);
        }
        enter(slot, t, row, problem.memory_size);
      }
      add_product<acc>(
          slot.context,
          slot.context_stride,
          item.queries,
          {slot.tile_scores, kTile, 1},
          slot.memory.addresses(),
          tile.count,
          problem.memory_size);
    }
    if (f.plan.splits == 1) {
      merge(f, index, base, 0);
    }
  }

  // The splits' partial results, in their order, into the outputs.
  static void merge(const Forward& f, int64_t group, char* slots, size_t slot_size) {
    const Problem& problem = f.problem;
    const Item item = f.plan.item(problem, group * f.plan.splits);
    const int64_t first_row = item.batch * problem.queries + item.first_query;
    Slot slot(f, slots);
    for (int64_t z = 1; z < f.plan.splits; ++z) {
      absorb(slot, Slot(f, slots + z * slot_size), item.queries, problem.memory_size);
    }
    for (int64_t t = 0; t < item.queries; ++t) {
      const acc row_sum = slot.row_sum[t];
      const acc factor = row_sum == 0 ? acc(0) : 1 / row_sum;
      acc* context = static_cast<acc*>(f.context) + (first_row + t) * problem.memory_size;
      scale_row(context, slot.context + t * slot.context_stride, problem.memory_size, factor);
      static_cast<acc*>(f.logsumexp)[first_row + t] = slot.row_max[t] + std::log(row_sum);
    }
    if (f.weights == nullptr) {
      return;
    }
    for (int64_t z = 0; z < f.plan.splits; ++z) {
      const Item part = f.plan.item(problem, group * f.plan.splits + z);
      acc* scores = Slot(f, slots + z * slot_size).scores;
      for (int64_t t = 0; t < item.queries; ++t) {
        store_weights(f, first_row + t, part, scores + t * f.plan.split_size, slot.row_max[t], slot.row_sum[t]);
      }
    }
  }

 private:
  // A row of tile scores enters the running softmax: it becomes exp(e - row_max), and what was summed before is rescaled.
  static void enter(Slot& slot, int64_t t, acc* row, int64_t size) {
    const acc row_max = maximum(row, slot.row_max[t]);
    if (row_max == kNothing<acc>) {
      std::fill_n(row, kTile, acc(0));
      return;
    }
    const acc correction = std::exp(slot.row_max[t] - row_max);
    slot.row_sum[t] = slot.row_sum[t] * correction + exponentials(row, kTile, row_max);
    if (correction != 1) {
      acc* context = slot.context + t * slot.context_stride;
      scale_row(context, context, size, correction);
    }
    slot.row_max[t] = row_max;
  }

  static void absorb(Slot& slot, const Slot& other, int64_t queries, int64_t size) {
    for (int64_t t = 0; t < queries; ++t) {
      const acc row_max = std::max(slot.row_max[t], other.row_max[t]);
      if (row_max == kNothing<acc>) {
        continue;
      }
      const acc kept = std::exp(slot.row_max[t] - row_max);
      const acc entering = std::exp(other.row_max[t] - row_max);
      acc* context = slot.context + t * slot.context_stride;
      const acc* other_context = other.context + t * slot.context_stride;
      scale_row(context, context, size, kept);
      add_product<acc>(context, slot.context_stride, 1, {&entering, 0, 0}, &other_context, 1, size);
      slot.row_sum[t] = slot.row_sum[t] * kept + other.row_sum[t] * entering;
      slot.row_max[t] = row_max;
    }
  }

  static void keep(acc* scores, int64_t first_step, const acc* row, const Tile& tile) {
    if (tile.contiguous()) {
      std::copy_n(row, tile.count, scores + tile.steps[0] - first_step);
      return;
    }
    for (int64_t j = 0; j < tile.count; ++j) {
      scores[tile.steps[j] - first_step] = row[j];
    }
  }

  static void store_weights(const Forward& f, int64_t row, const Item& part, acc* scores, acc row_max, acc row_sum) {
    const int64_t count = part.end_step - part.first_step;
    acc* weights = static_cast<acc*>(f.weights) + row * f.problem.steps + part.first_step;
    if (row_sum == 0) {
      std::fill_n(weights, count, acc(0));
      return;
    }
    exponentials(scores, count, row_max);
    scale_row(weights, scores, count, 1 / row_sum);
  }
};

// The gradient of source steps that nobody attends: out[b][first .. end] = 0, for a [B, S, size] output.
inline void zero_steps(void* out, const Problem& problem, int64_t b, int64_t first, int64_t end, int64_t size) {
  zero_row(problem.dtype, out, (b * problem.steps + first) * size, (end - first) * size);
}

// The gradient of a tile's steps, and zeros for the steps between them from `written` on.
template <class acc>
void store_tile(
    void* out,
    const Problem& problem,
    int64_t b,
    const Tile& tile,
    int64_t written,
    const acc* rows,
    int64_t stride,
    int64_t size) {
  for (int64_t j = 0; j < tile.count; ++j) {
    zero_steps(out, problem, b, written, tile.steps[j], size);
    store_row(problem.dtype, out, (b * problem.steps + tile.steps[j]) * size, rows + j * stride, size);
    written = tile.steps[j] + 1;
  }
}

// Gradient is DotGradient or AdditiveGradient.
template <class Gradient>
struct AttentionBackward {
  using acc = typename Gradient::acc;

  struct Slot {
    Slot(const Backward& f, char* base)
        : arena(base),
          memory_stride(padded<acc>(f.problem.memory_size)),
          query_stride(padded<acc>(f.problem.key_size)),
          grad_query(arena.take<acc>(f.problem.queries * query_stride)),
          delta(arena.take<acc>(f.problem.queries)),
          weights(arena.take<acc>(kChunk * kTile)),
          grad_scores(arena.take<acc>(kChunk * kTile)),
          grad_memory(arena.take<acc>(kTile * memory_stride)),
          long_row(arena.take<acc>(std::max(f.problem.memory_size, f.problem.steps))),
          other_long_row(arena.take<acc>(f.problem.steps)),
          grad_context(arena, kAccumulated<acc>, f.grad_context, f.problem.queries, f.problem.memory_size),
          memory(arena, f.problem.dtype, f.problem.memory, kTile, f.problem.memory_size),
          gradient(f, arena) {}

    Arena arena;
    int64_t memory_stride;
    int64_t query_stride;
    acc* grad_query;  // [queries][key_size]: until merge() the split's share
    acc* delta;
    acc* weights;      // [kChunk][kTile]
    acc* grad_scores;  // [kChunk][kTile]
    acc* grad_memory;  // [kTile][memory_size]
    acc* long_row;
    acc* other_long_row;
    Rows<acc> grad_context;
    Rows<acc> memory;
    Gradient gradient;
  };

  static size_t slot_size(const Backward& f) {
    return Slot(f, nullptr).arena.used();
  }

  static void run(const Backward& f, int64_t index, char* base) {
    const Problem& problem = f.problem;
    const Item item = f.plan.item(problem, index);
    Slot slot(f, base);
    std::fill_n(slot.grad_query, problem.queries * slot.query_stride, acc(0));
    if (f.grad_context.data != nullptr) {
      slot.grad_context.load(item.batch, 0, problem.queries);
    }
    find_delta(f, item.batch, slot);
    slot.gradient.begin(item.batch, problem.queries);
    int64_t written = item.first_step;  // up to here the memory's gradient is written
    SourceWalk walk(problem, item);
    for (Tile tile; walk.next(tile);) {
      slot.memory.load(item.batch, tile);
      slot.gradient.load_keys(item.batch, tile, slot.memory);
      if (f.grad_memory != nullptr) {
        std::fill_n(slot.grad_memory, tile.count * slot.memory_stride, acc(0));
      }
      for (int64_t t = 0; t < problem.queries; t += kChunk) {
        take_chunk(f, item.batch, t, std::min(kChunk, problem.queries - t), tile, slot);
      }
      if (f.grad_memory != nullptr) {
        store_tile(f.grad_memory, problem, item.batch, tile, written, slot.grad_memory, slot.memory_stride, problem.memory_size);
      }
      slot.gradient.end_tile(item.batch, tile, written);
      written = tile.steps[tile.count - 1] + 1;
    }
    if (f.grad_memory != nullptr) {
      zero_steps(f.grad_memory, problem, item.batch, written, item.end_step, problem.memory_size);
    }
    slot.gradient.end(item, index, written, slot.grad_query);
    if (f.plan.splits == 1) {
      merge(f, index, base, 0);
    }
  }

  // The splits' shares of the query's gradient, in their order.
  static void merge(const Backward& f, int64_t group, char* slots, size_t slot_size) {
    if (f.grad_query == nullptr) {
      return;
    }
    const Problem& problem = f.problem;
    Slot slot(f, slots);
    for (int64_t t = 0; t < problem.queries; ++t) {
      acc* row = slot.grad_query + t * slot.query_stride;
      for (int64_t z = 1; z < f.plan.splits; ++z) {
        const acc one = 1;
        const acc* other = Slot(f, slots + z * slot_size).grad_query + t * slot.query_stride;
        add_product<acc>(row, slot.query_stride, 1, {&one, 0, 0}, &other, 1, problem.key_size);
      }
      const int64_t first = (group * problem.queries + t) * problem.key_size;
      store_row(problem.dtype, f.grad_query, first, row, problem.key_size);
    }
  }

 private:
  // A chunk of queries against a tile: its weights, the gradient of its scores, and what both add to the other gradients.
  static void take_chunk(const Backward& f, int64_t b, int64_t first, int64_t count, const Tile& tile, Slot& slot) {
    const Problem& problem = f.problem;
    if (f.weights.data != nullptr) {
      for (int64_t t = 0; t < count; ++t) {
        gather(slot.weights + t * kTile, kAccumulated<acc>, f.weights, b, first + t, tile);
      }
    } else {
      recompute_weights(f, b, first, count, tile, slot);
    }
    if (f.grad_context.data != nullptr) {
      const acc* const* g = slot.grad_context.addresses() + first;
      product_rows<acc>(slot.grad_scores, g, count, slot.memory.addresses(), tile.count, problem.memory_size, 1);
      if (f.grad_memory != nullptr) {
        add_product<acc>(slot.grad_memory, slot.memory_stride, tile.count, {slot.weights, 1, kTile}, g, count, problem.memory_size);
      }
    } else {
      std::fill_n(slot.grad_scores, count * kTile, acc(0));
    }
    const acc scale = static_cast<acc>(problem.scale);
    for (int64_t t = 0; t < count; ++t) {
      const acc* weights = slot.weights + t * kTile;
      acc* row = slot.grad_scores + t * kTile;
      if (f.grad_weights.data != nullptr) {
        acc grad_weights[kTile];
        gather(grad_weights, kAccumulated<acc>, f.grad_weights, b, first + t, tile);
        for (int64_t j = 0; j < tile.count; ++j) {
          row[j] += grad_weights[j];
        }
      }
      const acc delta = slot.delta[first + t];
      for (int64_t j = 0; j < tile.count; ++j) {
        // A weight of 0 passes nothing on, whatever came in: 0 * inf is no gradient.
        row[j] = weights[j] == 0 ? acc(0) : scale * weights[j] * (row[j] - delta);
      }
    }
    slot.gradient.add(
        slot.grad_scores, first, count, tile.count, slot.grad_query, slot.query_stride, slot.grad_memory, slot.memory_stride);
  }

  static void recompute_weights(const Backward& f, int64_t b, int64_t first, int64_t count, const Tile& tile, Slot& slot) {
    slot.gradient.scores(slot.weights, first, count, tile.count);
    mask_scores(slot.weights, f.problem, b, first, count, tile);
    for (int64_t t = 0; t < count; ++t) {
      const acc logsumexp = static_cast<const acc*>(f.logsumexp)[b * f.problem.queries + first + t];
      if (logsumexp == kNothing<acc>) {
        std::fill_n(slot.weights + t * kTile, kTile, acc(0));
      } else {
        exponentials(slot.weights + t * kTile, kTile, logsumexp);
      }
    }
  }

  static void find_delta(const Backward& f, int64_t b, Slot& slot) {
    const Problem& problem = f.problem;
    for (int64_t t = 0; t < problem.queries; ++t) {
      slot.delta[t] = 0;
      if (f.grad_context.data != nullptr) {
        load_row(slot.long_row, kAccumulated<acc>, f.context, b, t, problem.memory_size);
        const acc* context = slot.long_row;
        acc product[kTile];
        product_rows<acc>(product, &context, 1, slot.grad_context.addresses() + t, 1, problem.memory_size, 1);
        slot.delta[t] = product[0];
      }
      if (f.grad_weights.data != nullptr) {
        load_row(slot.long_row, kAccumulated<acc>, f.weights, b, t, problem.steps);
        load_row(slot.other_long_row, kAccumulated<acc>, f.grad_weights, b, t, problem.steps);
        for (int64_t s = 0; s < problem.steps; ++s) {
          slot.delta[t] += slot.long_row[s] == 0 ? acc(0) : slot.long_row[s] * slot.other_long_row[s];
        }
      }
    }
  }

  // A tile's columns of row t.
  static void gather(acc* row, Dtype dtype, const View& view, int64_t b, int64_t t, const Tile& tile) {
    const int64_t start = b * view.batch + t * view.row;
    for (int64_t j = 0; j < tile.count;) {
      // Steps that follow each other, as without a mask all do, are loaded together.
      int64_t run = 1;
      while (j + run < tile.count && tile.steps[j + run] == tile.steps[j] + run) {
        ++run;
      }
      load_row(row + j, dtype, view.data, start + tile.steps[j] * view.element, view.element, run);
      j += run;
    }
  }
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

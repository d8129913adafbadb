// Attention over tiles of memory, for any score:
//
//   p_ts = exp(e_ts - row_max_t), the running maximum;  c_t = sum_s p_ts m_s / sum_s p_ts
#pragma once

#include "many_queries.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// Of rows that go past the caches by way of scratch, so much at a time.
constexpr int64_t kNearBytes = int64_t{1} << 15;

// Score is DotScore or AdditiveScore: what the queries are scored against, tile by tile.
template <class Score>
struct ManyQueriesForward {
  using element = typename Score::element;  // of the memory's rows in the products
  using acc = typename ElementTraits<element>::acc;

  // One item's scratch. Until merge() it holds the result of one of several splits.
  struct Slot {
    Slot(const Forward& f, char* base) : f(f), arena(base) {}

    const Forward& f;
    Arena arena;
    bool counts_gained = kIsPaired<element> && f.is_read_back;
    // The memory's, and what rounding has added to the sum of the weights, if that counts.
    int64_t context_size = f.problem.memory_size + counts_gained;
    int64_t context_stride = padded<acc>(context_size);
    // Tiles whose exponentials are kept: all, until they can be divided by their sums; without weights one.
    int64_t kept = f.weights == nullptr ? 1 : f.plan.split_tiles;
    int64_t stride = padded<acc>(kept * f.plan.tile);  // of tile_scores
    bool rounds = f.problem.dtype != kAccumulated<acc>;
    acc* row_max = arena.take<acc>(f.plan.chunk);
    acc* row_sum = arena.take<acc>(f.plan.chunk);
    acc* factors = arena.take<acc>(f.plan.chunk);                   // of a product's rows
    acc* context = arena.take<acc>(f.plan.chunk * context_stride);  // not yet divided by the sum of the weights
    Tile* tiles = arena.take<Tile>(kept + 1);                       // those that are kept, and the next one
    acc* tile_max = arena.take<acc>(f.plan.chunk * kept);           // [chunk][kept] row_max when the tile's exponentials were taken
    int64_t* used = arena.take<int64_t>(1);                         // so many tiles have steps
    // [chunk][stride], those of the tiles that are kept one behind the other.
    acc* tile_scores = arena.take<acc>(f.plan.chunk * stride);
    int64_t residuals_stride = padded<acc>(f.plan.tile);
    // [chunk][residuals_stride] what a tile's exponentials lose as they are rounded, or null.
    acc* residuals = counts_gained && f.problem.method != Method::Dot ? arena.take<acc>(f.plan.chunk * residuals_stride) : nullptr;
    Workspace<element> work{arena, f.problem.product_dtype, f.plan.chunk, Score::goes_by_amx(f.problem, f.plan)};
    Rows<element> memory{arena, f.problem.dtype, f.problem.memory, f.plan.tile, f.problem.memory_size, work.takes_halves()};
    Score score{f.problem, f.plan.chunk, f.plan.tile, arena, work};
  };

  static size_t slot_size(const Forward& f) {
    return Slot(f, nullptr).arena.used();
  }

  static void run(const Forward& f, int64_t index, char* base) {
    const Problem& problem = f.problem;
    const Item item = f.plan.item(problem, index);
    Slot slot(f, base);
    const AmxScope amx_scope(slot.work.by_amx);
    const int64_t stride = slot.stride;
    std::fill_n(slot.row_max, item.queries, kNothing<acc>);
    std::fill_n(slot.row_sum, item.queries, acc(0));
    slot.score.load_queries(item.batch, item.first_query, item.queries);
    SourceWalk walk(problem, item, f.plan.tile);
    const RowRange all{0, item.queries};
    int64_t tiles = *slot.used = 0;
    for (bool more = walk.next(slot.tiles[0]); more; ++tiles) {
      const Tile& tile = slot.tiles[tiles % (slot.kept + 1)];
      more = walk.next(slot.tiles[(tiles + 1) % (slot.kept + 1)]);
      const int64_t place = tiles % slot.kept;
      acc* const scores = slot.tile_scores + place * f.plan.tile;
      queue_prefetches(f, index, item, tile, slot);
      slot.memory.load(item.batch, tile);
      slot.score.load_keys(item.batch, tile, slot.memory);
      slot.score.scores(scores, stride, 0, item.queries, tile.count, slot.work);
      mask_scores(scores, stride, problem, item.batch, item.first_query, item.queries, tile);
      // The last product of an item that stands alone goes where it belongs.
      const bool final = !more && f.plan.splits == 1;
      enter(slot, scores, item.queries, tile.count, tiles == 0);
      for (int64_t t = 0; t < item.queries; ++t) {
        slot.factors[t] = final && slot.row_sum[t] != 0 ? 1 / sum_of_context(slot, t) : acc(1);
      }
      for (int64_t t = 0; t < item.queries; ++t) {
        slot.tile_max[t * slot.kept + place] = slot.row_max[t];
      }
      *slot.used = tiles + 1;
      if (final && f.weights != nullptr) {
        store_weights(f, item, all, slot, slot.row_max, slot.row_sum);
      }
      if (slot.residuals != nullptr) {
        const Coefficients<acc> residuals{slot.residuals, slot.residuals_stride, 1};
        const Result<acc> context(slot.context, slot.context_stride, tiles > 0);
        multiply(context, item.queries, residuals, slot.memory.right(), tile.count, problem.memory_size, &slot.work);
      }
      const Coefficients<acc> coefficients{scores, stride, 1};
      const bool in_place = final && f.exact_context != nullptr;
      if (in_place && f.plan.streams_queries && tiles == 0 && !slot.rounds && slot.residuals == nullptr) {
        stream_context(f, item, slot, coefficients, tile.count);
        continue;
      }
      const Result<acc> context{
          in_place ? context_of(f, item) : slot.context,
          in_place ? problem.memory_size : slot.context_stride,
          tiles > 0 || slot.residuals != nullptr ? slot.context : nullptr,
          slot.context_stride,
          slot.factors,
          1};
      multiply(context, item.queries, coefficients, slot.memory.right(), tile.count, problem.memory_size, &slot.work);
    }
    for (int64_t t = 0; tiles == 0 && t < item.queries; ++t) {
      std::fill_n(slot.context + t * slot.context_stride, slot.context_size, acc(0));
    }
    if (f.plan.splits == 1) {
      if (tiles == 0) {
        scale_context(f, item, all, slot);
        if (f.weights != nullptr) {
          store_weights(f, item, all, slot, slot.row_max, slot.row_sum);
        }
      }
      finish(f, item, all, slot);
    }
  }

  // The splits' partial results, in their order, into the outputs. Of the rows that an item has in common with others it takes an
  // even part.
  static void merge(const Forward& f, int64_t index, char* slots, size_t slot_size) {
    const Problem& problem = f.problem;
    const int64_t split = index % f.plan.splits, first = index - split;
    slots += first * slot_size;
    const Item item = f.plan.item(problem, first);
    const RowRange rows{item.queries * split / f.plan.splits, item.queries * (split + 1) / f.plan.splits};
    Slot slot(f, slots);
    for (int64_t z = 1; z < f.plan.splits; ++z) {
      const Slot other(f, slots + z * slot_size);
      for (int64_t t = rows.first; t < rows.end; ++t) {
        part_of(slot, t).absorb(part_of(other, t), slot.context_size);
      }
    }
    scale_context(f, item, rows, slot);
    for (int64_t z = 0; f.weights != nullptr && z < f.plan.splits; ++z) {
      store_weights(f, f.plan.item(problem, first + z), rows, Slot(f, slots + z * slot_size), slot.row_max, slot.row_sum);
    }
    finish(f, item, rows, slot);
  }

 private:
  static void queue_prefetches(const Forward& f, int64_t index, const Item& item, const Tile& tile, Slot& slot) {
    if (!slot.work.may_prefetch(f.plan.prefetches, tile.count)) {
      return;
    }
    PrefetchQueue& prefetches = slot.work.prefetches;
    const Next next(f.problem, f.plan, index, item, tile.steps[tile.count - 1] + 1);
    if (next.is_item()) {
      next.queries_to(prefetches, f.problem.dtype, f.problem.query, f.problem.key_size);
    }
    next.template steps_to<acc>(prefetches);
    spread(slot.work, item.queries, tile.count, f.problem.memory_size);
  }

  // What the context is divided by. Pairs' exponentials are rounded, so the context is a sum with rounded weights, and is divided
  // by the sum of those. Divided by the exact sum it would be off by a share of what all rows have in common, which is far more
  // than the differences that a backward reads from it.
  static acc sum_of_context(const Slot& slot, int64_t t) {
    return slot.counts_gained ? slot.row_sum[t] + gained(slot, t) : slot.row_sum[t];
  }

  static acc& gained(const Slot& slot, int64_t t) {
    return slot.context[t * slot.context_stride + slot.context_size - 1];
  }

  // What was summed, divided by its weights' sums.
  static void scale_context(const Forward& f, const Item& item, const RowRange& rows, const Slot& slot) {
    const int64_t size = f.problem.memory_size;
    for (int64_t t = rows.first; t < rows.end; ++t) {
      acc* row = slot.context + t * slot.context_stride;
      acc* to = f.exact_context == nullptr ? row : context_of(f, item) + t * size;
      scale_row(to, row, size, slot.row_sum[t] == 0 ? acc(0) : 1 / sum_of_context(slot, t));
    }
  }

  // The context of a lone tile past the caches; rows that are not whole lines by way of scratch, a few at a time.
  static void stream_context(const Forward& f, const Item& item, Slot& slot, const Coefficients<acc>& coefficients, int64_t steps) {
    const int64_t size = f.problem.memory_size;
    const Result<acc> context = Result<acc>{context_of(f, item), size, nullptr, 0, slot.factors, 1}.streamed();
    const int64_t few = context.streams ? item.queries : std::max<int64_t>(kNearBytes / (slot.context_stride * sizeof(acc)), 1);
    for (int64_t first = 0; first < item.queries; first += few) {
      const int64_t count = std::min(few, item.queries - first);
      const Result<acc> scratch{slot.context, slot.context_stride, nullptr, 0, slot.factors + first, 1};
      const Coefficients<acc> of_rows{
          coefficients.data + first * coefficients.row_stride, coefficients.row_stride, coefficients.column_stride};
      multiply(context.streams ? context : scratch, count, of_rows, slot.memory.right(), steps, size, &slot.work);
      for (int64_t t = 0; !context.streams && t < count; ++t) {
        stream_row(kAccumulated<acc>, context.to, (first + t) * size, slot.context + t * slot.context_stride, size);
      }
    }
    finish_streaming();
  }

  static void finish(const Forward& f, const Item& item, const RowRange& rows, const Slot& slot) {
    const int64_t first_row = item.first_row(f.problem);
    store_logsumexp(static_cast<acc*>(f.logsumexp) + first_row, slot, rows);
    if (slot.rounds) {
      round_results(f, item, rows, slot);
    }
  }

  // As they are accumulated.
  static acc* context_of(const Forward& f, const Item& item) {
    return static_cast<acc*>(f.exact_context) + item.first_row(f.problem) * f.problem.memory_size;
  }

  static void round_results(const Forward& f, const Item& item, const RowRange& rows, const Slot& slot) {
    const Problem& problem = f.problem;
    const acc* context = f.exact_context == nullptr ? slot.context : context_of(f, item);
    const int64_t stride = f.exact_context == nullptr ? slot.context_stride : problem.memory_size;
    const int64_t first_row = item.first_row(problem);
    const int64_t size = problem.memory_size;
    for (int64_t t = rows.first; t < rows.end; ++t) {
      write_row(f.plan.streams_queries, problem.dtype, f.context, (first_row + t) * size, context + t * stride, size);
    }
    if (f.plan.streams_queries) {
      finish_streaming();
    }
  }

  static void store_logsumexp(acc* out, const Slot& slot, const RowRange& rows) {
    constexpr int64_t lanes = Vec<acc>::size();
    for (int64_t t = rows.first; t < rows.end; t += lanes) {
      const int64_t count = std::min(lanes, rows.end - t);
      (Vec<acc>::loadu(slot.row_max + t, count) + Vec<acc>::loadu(slot.row_sum + t, count).log())
          .store(out + t, static_cast<int>(count));
    }
  }

  // Rows of tile scores enter the running softmax: they become exp(e - row_max), and what was summed before is rescaled. Every pass
  // has a loop of its own, since a row's result waits for its maximum, and that for a chain of them: the next rows' need not.
  static void enter(Slot& slot, acc* scores, int64_t queries, int64_t steps, bool first) {
    const int64_t stride = slot.stride;
    if (steps == 1 && first) {
      // exp(0), or NaN where the score is NaN or infinite.
      for (int64_t t = 0; t < queries; ++t) {
        acc& score = scores[t * stride];
        slot.row_max[t] = score;
        slot.row_sum[t] = score = score == kNothing<acc> ? acc(0) : score - score + 1;
        if (slot.counts_gained) {
          gained(slot, t) = 0;
        }
        if (slot.residuals != nullptr) {
          slot.residuals[t * slot.residuals_stride] = 0;
        }
      }
      return;
    }
    const int64_t count = whole_vectors<acc>(steps);
    for (int64_t t = 0; t < queries; ++t) {
      const acc before = slot.row_max[t];
      const acc row_max = slot.row_max[t] = maximum(scores + t * stride, count, before);
      if (row_max != before && slot.row_sum[t] != 0) {
        const acc correction = std::exp(before - row_max);
        slot.row_sum[t] *= correction;
        acc* context = slot.context + t * slot.context_stride;
        scale_row(context, context, slot.context_size, correction);
      }
    }
    acc sums[kChunk];
    sum_each(sums, queries, [&](int64_t t) __attribute__((always_inline)) {
      acc* row = scores + t * stride;
      if (slot.row_max[t] == kNothing<acc>) {
        std::fill_n(row, count, acc(0));
        return Vec<acc>(0);
      }
      return exponentials(row, count, slot.row_max[t]);
    });
    for (int64_t t = 0; t < queries; ++t) {
      slot.row_sum[t] += sums[t];
    }
    if constexpr (kIsPaired<element>) {
      const acc* to_round = scores;
      int64_t to_round_stride = stride;
      if (slot.residuals != nullptr) {
        to_round = slot.residuals;
        to_round_stride = slot.residuals_stride;
        for (int64_t t = 0; t < queries; ++t) {
          lost_by_rounding(slot.residuals + t * to_round_stride, scores + t * stride, steps);
        }
      }
      if (slot.counts_gained) {
        sum_each(sums, queries, [&](int64_t t) __attribute__((always_inline)) {
          return gained_by_rounding(to_round + t * to_round_stride, steps);
        });
        for (int64_t t = 0; t < queries; ++t) {
          gained(slot, t) = (first ? acc(0) : gained(slot, t)) + sums[t];
        }
      }
    }
  }

  static Part<acc> part_of(const Slot& slot, int64_t t) {
    return {slot.row_max[t], slot.row_sum[t], slot.context + t * slot.context_stride};
  }

  // Of an item's steps: what is kept of a tile is relative to the maximum of its time.
  static void store_weights(
      const Forward& f, const Item& part, const RowRange& rows, const Slot& slot, const acc* row_max, const acc* row_sum) {
    const int64_t first = (part.first_row(f.problem) + rows.first) * f.problem.steps;
    const StepsRows weights{f.problem.dtype, f.weights, first, rows.end - rows.first, f.problem.steps};
    const StepsRows exact{kAccumulated<acc>, f.exact_weights, first, rows.end - rows.first, f.problem.steps};
    const bool is_stored_twice = f.exact_weights != nullptr && f.exact_weights != f.weights;
    int64_t written = part.first_step;
    for (int64_t i = 0; i < *slot.used; ++i) {
      const Tile& tile = slot.tiles[i];
      acc* const scores = slot.tile_scores + i * f.plan.tile;
      acc factors[kChunk];
      for (int64_t t = rows.first; t < rows.end; ++t) {
        const acc tile_max = slot.tile_max[t * slot.kept + i];
        acc factor = row_sum[t] == 0          ? acc(0)
                     : tile_max == row_max[t] ? 1 / row_sum[t]
                                              : std::exp(tile_max - row_max[t]) / row_sum[t];
        if (std::isnan(factor)) {
          spoil_weights(scores + t * slot.stride, f.problem, part.batch, part.first_query + t, tile);
          factor = 1;
        }
        factors[t - rows.first] = factor;
      }
      weights.scatter(scores + rows.first * slot.stride, slot.stride, factors, tile, written);
      if (is_stored_twice) {
        exact.scatter(scores + rows.first * slot.stride, slot.stride, factors, tile, written);
      }
      written = tile.steps[tile.count - 1] + 1;
    }
    weights.zero(written, part.end_step);
    if (is_stored_twice) {
      exact.zero(written, part.end_step);
    }
  }
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

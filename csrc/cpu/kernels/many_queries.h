// Attention over tiles of memory, for any score.
//
//   forward    p_ts = exp(e_ts - row_max_t), the running maximum;  c_t = sum_s p_ts m_s / sum_s p_ts
//   backward   da_ts = g_t . m_s + gw_ts;  delta_t = g_t . c_t + sum_s a_ts gw_ts;  de_ts = scale a_ts (da_ts - delta_t)
//              dm_s = sum_t a_ts g_t, and the score's own share of the gradients from de, which may also be given
//
// sum_s de_ts is 0, but delta_t is rounded apart from the da_ts: an excess r_t is left, a share a_ts r_t of it in every de_ts. What
// the rows of the memory have in common multiplies it in dq_t = sum_s de_ts m_s, where it can outweigh the rest; it is r_t c_t
// there, and is taken off.
//
// Each tile of memory is read once and serves the scores and the context (forward), or all of its gradients (backward), while it
// is in cache. It is bound by the products in products.h, which meanwhile fetch what comes next. One query, which is bound by the
// read, goes its own way: one_query.h.
#pragma once

#include "cache.h"
#include "call.h"
#include "products.h"
#include "rows.h"
#include "softmax.h"
#include "tile_gradient.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// The scores of a chunk of queries against a tile, rows `stride` apart: masked pairs become -inf, and rows are filled up with it to
// whole vectors.
template <class acc>
void mask_scores(
    acc* scores, int64_t stride, const Problem& problem, int64_t b, int64_t first_query, int64_t queries, const Tile& tile) {
  for (int64_t t = 0; t < queries; ++t) {
    acc* row = scores + t * stride;
    if (problem.mask_per_query) {
      for (int64_t j = 0; j < tile.count; ++j) {
        row[j] = may_attend(problem, b, first_query + t, tile.steps[j]) ? row[j] : kNothing<acc>;
      }
    }
    std::fill(row + tile.count, row + whole_vectors<acc>(tile.count), kNothing<acc>);
  }
}

// The weights of a query one of whose scores is NaN: so are they, but for those of what it does not attend, which NaN times 0 would
// not leave at 0.
template <class acc>
void spoil_weights(acc* row, const Problem& problem, int64_t b, int64_t t, const Tile& tile) {
  for (int64_t j = 0; j < tile.count; ++j) {
    row[j] = is_attended(problem, b, t, tile.steps[j]) ? std::numeric_limits<acc>::quiet_NaN() : acc(0);
  }
}

// A tensor's row of all steps, from element `first` on: what is written to it may be rounded.
struct StepsRow {
  Dtype dtype;
  void* data;
  int64_t first;

  void zero(int64_t begin, int64_t end) const {
    if (begin < end) {
      zero_row(dtype, data, first + begin, end - begin);
    }
  }

  // A tile's row, times a factor, into its places, and zeros for the steps before and between them.
  template <class acc>
  void scatter(const acc* row, const Tile& tile, int64_t written, acc factor) const {
    zero(written, tile.steps[0]);
    for (int64_t j = 0, end; j < tile.count; j = end) {
      end = tile.run_end(j);
      store_row(dtype, data, first + tile.steps[j], row + j, end - j, factor);
      if (end < tile.count) {
        zero(tile.steps[end - 1] + 1, tile.steps[end]);
      }
    }
  }
};

// Of rows that go past the caches by way of scratch, so much at a time.
constexpr int64_t kNearBytes = int64_t{1} << 15;

// Of what comes after the source steps before `written`: another tile of the item, or the item that most often comes next.
class Next {
 public:
  Next(const Problem& problem, const Plan& plan, int64_t index, const Item& item, int64_t written)
      : problem_(problem),
        is_item_(written >= end_of(item) && index + 1 < plan.items(problem)),
        item_(is_item_ ? plan.item(problem, index + 1) : item),
        first_step_(is_item_ ? item_.first_step : written),
        steps_(std::min(plan.tile, end_of(item_) - first_step_)) {}

  // Whether it is an item, of which queries are wanted, too.
  bool is_item() const {
    return is_item_;
  }

  void queries_to(Ahead& ahead, Dtype dtype, const View& view, int64_t size) const {
    ahead.add(dtype, view, item_.batch, item_.first_query, item_.queries, size);
  }

  template <class acc>
  void steps_to(Ahead& ahead) const {
    if (problem_.prepared_keys.data != nullptr) {
      const int64_t size = prepared_size(problem_.key_size);
      ahead.add(kAccumulated<acc>, problem_.prepared_keys, item_.batch, first_step_, steps_, size);
    } else {
      ahead.add(problem_.dtype, problem_.keys, item_.batch, first_step_, steps_, problem_.key_size);
    }
    ahead.add(problem_.dtype, problem_.memory, item_.batch, first_step_, steps_, problem_.memory_size);
  }

 private:
  int64_t end_of(const Item& item) const {
    return problem_.lengths == nullptr ? item.end_step : std::min(item.end_step, problem_.lengths[item.batch]);
  }

  const Problem& problem_;
  bool is_item_;
  Item item_;
  int64_t first_step_;
  int64_t steps_;
};

// Few queries' two products with a tile of so many steps are to last as long as what was planned.
template <class element>
void spread(Workspace<element>& work, int64_t queries, int64_t steps, int64_t size) {
  constexpr int64_t abreast = kWidest * Vec<typename Factors<element>::acc>::size();
  if (work.panel == nullptr) {
    work.ahead.spread(2 * ceil_div(queries, kRows) * steps * ceil_div(size, abreast));
  }
}

// Score is DotScore or AdditiveScore: what the queries are scored against, tile by tile.
template <class Score>
struct AttentionForward {
  using element = typename Score::element;  // of the memory's rows in the products
  using acc = typename Factors<element>::acc;

  // One item's scratch. Until merge() it holds the result of one of several splits.
  struct Slot {
    Slot(const Forward& f, char* base)
        : arena(base),
          counts_gained(kIsPaired<element> && f.is_read_back),
          context_size(f.problem.memory_size + counts_gained),
          context_stride(padded<acc>(context_size)),
          kept(f.weights == nullptr ? 1 : f.plan.split_tiles),
          stride(padded<acc>(kept * f.plan.tile)),
          rounds(f.problem.dtype != kAccumulated<acc>),
          row_max(arena.take<acc>(f.plan.chunk)),
          row_sum(arena.take<acc>(f.plan.chunk)),
          factors(arena.take<acc>(f.plan.chunk)),
          context(arena.take<acc>(f.plan.chunk * context_stride)),
          tiles(arena.take<Tile>(kept + 1)),
          tile_max(arena.take<acc>(f.plan.chunk * kept)),
          used(arena.take<int64_t>(1)),
          tile_scores(arena.take<acc>(f.plan.chunk * stride)),
          residuals_stride(padded<acc>(f.plan.tile)),
          residuals(counts_gained && f.problem.method != Method::Dot ? arena.take<acc>(f.plan.chunk * residuals_stride) : nullptr),
          work(arena, f.problem.factors, f.plan.chunk, Score::takes_tiles(f.problem, f.plan)),
          memory(arena, f.problem.dtype, f.problem.memory, f.plan.tile, f.problem.memory_size),
          score(f.problem, f.plan.chunk, f.plan.tile, arena) {}

    Arena arena;
    bool counts_gained;
    int64_t context_size;  // the memory's, and what rounding has added to the sum of the weights, if that counts
    int64_t context_stride;
    int64_t kept;    // tiles whose exponentials are: all, until they can be divided by their sums; without weights one
    int64_t stride;  // of tile_scores
    bool rounds;     // the results are of another type than acc
    acc* row_max;
    acc* row_sum;
    acc* factors;      // of a product's rows
    acc* context;      // not yet divided by the sum of the weights
    Tile* tiles;       // those that are kept, and the next one
    acc* tile_max;     // [chunk][kept] row_max when the tile's exponentials were taken
    int64_t* used;     // so many tiles have steps
    acc* tile_scores;  // [chunk][stride], those of the tiles that are kept one behind the other
    int64_t residuals_stride;
    acc* residuals;  // [chunk][residuals_stride] what a tile's exponentials lose as they are rounded, or null
    Workspace<element> work;
    Rows<element> memory;
    Score score;
  };

  static size_t slot_size(const Forward& f) {
    return Slot(f, nullptr).arena.used();
  }

  static void run(const Forward& f, int64_t index, char* base) {
    const Problem& problem = f.problem;
    const Item item = f.plan.item(problem, index);
    Slot slot(f, base);
    const MatrixTiles matrix_tiles(slot.work.by_tiles);
    const int64_t stride = slot.stride;
    std::fill_n(slot.row_max, item.queries, kNothing<acc>);
    std::fill_n(slot.row_sum, item.queries, acc(0));
    slot.score.load_queries(item.batch, item.first_query, item.queries);
    SourceWalk walk(problem, item, f.plan.tile);
    const Run all{0, item.queries};
    int64_t tiles = *slot.used = 0;
    for (bool more = walk.next(slot.tiles[0]); more; ++tiles) {
      const Tile& tile = slot.tiles[tiles % (slot.kept + 1)];
      more = walk.next(slot.tiles[(tiles + 1) % (slot.kept + 1)]);
      const int64_t place = tiles % slot.kept;
      acc* const scores = slot.tile_scores + place * f.plan.tile;
      plan_ahead(f, index, item, tile, slot);
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
        multiply(context, item.queries, residuals, slot.memory.addresses(), tile.count, problem.memory_size, &slot.work);
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
      multiply(context, item.queries, coefficients, slot.memory.addresses(), tile.count, problem.memory_size, &slot.work);
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
    const Run rows{item.queries * split / f.plan.splits, item.queries * (split + 1) / f.plan.splits};
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
  static void plan_ahead(const Forward& f, int64_t index, const Item& item, const Tile& tile, Slot& slot) {
    if (!slot.work.may_plan(f.plan.fetches, tile.count)) {
      return;
    }
    Ahead& ahead = slot.work.ahead;
    const Next next(f.problem, f.plan, index, item, tile.steps[tile.count - 1] + 1);
    if (next.is_item()) {
      next.queries_to(ahead, f.problem.dtype, f.problem.query, f.problem.key_size);
    }
    next.template steps_to<acc>(ahead);
    spread(slot.work, item.queries, tile.count, f.problem.memory_size);
  }

  // The sum of the weights that the context is of. Pairs' are rounded, and what the memory's rows have in common is in it as often
  // as the rounded sum up to: of the exact sum it would be wrong by far more than the differences that a backward wants it for.
  static acc sum_of_context(const Slot& slot, int64_t t) {
    return slot.counts_gained ? slot.row_sum[t] + gained(slot, t) : slot.row_sum[t];
  }

  static acc& gained(const Slot& slot, int64_t t) {
    return slot.context[t * slot.context_stride + slot.context_size - 1];
  }

  // What was summed, divided by its weights' sums.
  static void scale_context(const Forward& f, const Item& item, const Run& rows, const Slot& slot) {
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
      const Coefficients<acc> of_rows{coefficients.data + first * coefficients.row, coefficients.row, coefficients.column};
      multiply(context.streams ? context : scratch, count, of_rows, slot.memory.addresses(), steps, size, &slot.work);
      for (int64_t t = 0; !context.streams && t < count; ++t) {
        stream_row(kAccumulated<acc>, context.to, (first + t) * size, slot.context + t * slot.context_stride, size);
      }
    }
    finish_streaming();
  }

  static void finish(const Forward& f, const Item& item, const Run& rows, const Slot& slot) {
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

  static void round_results(const Forward& f, const Item& item, const Run& rows, const Slot& slot) {
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

  static void store_logsumexp(acc* out, const Slot& slot, const Run& rows) {
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
    for (int64_t t = 0; t < queries; ++t) {
      acc* row = scores + t * stride;
      if (slot.row_max[t] == kNothing<acc>) {
        std::fill_n(row, count, acc(0));
      } else {
        slot.row_sum[t] += exponentials(row, count, slot.row_max[t]);
      }
      if constexpr (kIsPaired<element>) {
        if (slot.residuals != nullptr) {
          acc* residuals = slot.residuals + t * slot.residuals_stride;
          lost_by_rounding(residuals, row, steps);
          row = residuals;
        }
        if (slot.counts_gained) {
          gained(slot, t) = (first ? acc(0) : gained(slot, t)) + gained_by_rounding(row, steps);
        }
      }
    }
  }

  static Part<acc> part_of(const Slot& slot, int64_t t) {
    return {slot.row_max[t], slot.row_sum[t], slot.context + t * slot.context_stride};
  }

  // Of an item's steps: what is kept of a tile is relative to the maximum of its time.
  static void store_weights(
      const Forward& f, const Item& part, const Run& rows, const Slot& slot, const acc* row_max, const acc* row_sum) {
    const auto store = [&](Dtype dtype, void* to) {
      for (int64_t t = rows.first; t < rows.end; ++t) {
        const StepsRow row{dtype, to, (part.batch * f.problem.queries + part.first_query + t) * f.problem.steps};
        int64_t written = part.first_step;
        for (int64_t i = 0; i < *slot.used; ++i) {
          const acc tile_max = slot.tile_max[t * slot.kept + i];
          acc* weights = slot.tile_scores + t * slot.stride + i * f.plan.tile;
          acc factor = row_sum[t] == 0          ? acc(0)
                       : tile_max == row_max[t] ? 1 / row_sum[t]
                                                : std::exp(tile_max - row_max[t]) / row_sum[t];
          if (std::isnan(factor)) {
            spoil_weights(weights, f.problem, part.batch, part.first_query + t, slot.tiles[i]);
            factor = 1;
          }
          row.scatter(weights, slot.tiles[i], written, factor);
          written = slot.tiles[i].steps[slot.tiles[i].count - 1] + 1;
        }
        row.zero(written, part.end_step);
      }
    };
    store(f.problem.dtype, f.weights);
    if (f.exact_weights != nullptr && f.exact_weights != f.weights) {
      store(kAccumulated<acc>, f.exact_weights);
    }
  }
};

// Gradient is DotGradient or AdditiveGradient.
template <class Gradient>
struct AttentionBackward {
  using element = typename Gradient::element;
  using acc = typename Factors<element>::acc;

  struct Slot {
    Slot(const Backward& f, char* base)
        : arena(base),
          query_in_place(
              f.grad_query != nullptr && Gradient::query_in_place(f.problem) && f.plan.splits == 1 &&
              f.problem.dtype == kAccumulated<acc>),
          query_stride(query_in_place ? f.problem.key_size : padded<acc>(f.problem.key_size)),
          grad_query(query_in_place ? nullptr : arena.take<acc>(f.plan.chunk * query_stride)),
          delta(arena.take<acc>(f.plan.chunk)),
          excess(arena.take<acc>(f.plan.chunk)),
          tile_stride(padded<acc>(f.plan.tile)),
          coefficients(arena.take<acc>(2 * std::min(kChunk, f.plan.chunk) * tile_stride)),
          work(arena, f.problem.factors, f.plan.chunk, Gradient::takes_tiles(f.problem, f.plan)),
          transposes(kTransposesCoefficients && !work.by_tiles && f.plan.chunk >= kMany),
          columns_stride(padded<acc>(2 * std::min(kChunk, f.plan.chunk))),
          columns(transposes ? arena.take<acc>(f.plan.tile * columns_stride) : nullptr),
          weights_row(arena.take<acc>(f.problem.steps)),
          grad_weights_row(arena.take<acc>(f.problem.steps)),
          grad_context(arena, f.problem.dtype, f.grad_context, f.plan.chunk, f.problem.memory_size),
          context(arena, kAccumulated<acc>, f.context, f.plan.chunk, f.problem.memory_size),
          memory(arena, f.problem.dtype, f.problem.memory, f.plan.tile, f.problem.memory_size),
          grad_memory(arena, f.grad_memory, f.problem, f.plan, f.problem.memory_size),
          gradient(f, arena) {}

    Arena arena;
    bool query_in_place;
    int64_t query_stride;
    acc* grad_query;  // [chunk][key_size]: the split's share, or the output itself
    acc* delta;
    acc* excess;  // sum_s de_ts of the item's steps
    int64_t tile_stride;
    acc* coefficients;  // [count][tile_stride], of the chunk at hand, its weights, and right behind them its scores' gradients
    Workspace<element> work;
    bool transposes;
    int64_t columns_stride;
    acc* columns;  // [tile][2 kChunk] the coefficients transposed, if they are
    acc* weights_row;
    acc* grad_weights_row;
    Rows<element> grad_context;
    Rows<acc> context;
    Rows<element> memory;
    TileGradient<acc> grad_memory;
    Gradient gradient;
  };

  static size_t slot_size(const Backward& f) {
    return Slot(f, nullptr).arena.used();
  }

  static void run(const Backward& f, int64_t index, char* base) {
    const Problem& problem = f.problem;
    const Item item = f.plan.item(problem, index);
    Slot slot(f, base);
    const MatrixTiles matrix_tiles(slot.work.by_tiles);
    if (slot.query_in_place) {
      slot.grad_query = static_cast<acc*>(f.grad_query) + item.first_row(problem) * slot.query_stride;
    }
    if (f.grad_context.data != nullptr) {
      slot.grad_context.load(item.batch, item.first_query, item.queries);
    }
    if (!has_whole_rows(f)) {
      find_delta(f, item, slot);
    }
    std::fill_n(slot.excess, item.queries, acc(0));
    slot.gradient.begin(item);
    slot.grad_memory.begin_item(item);
    int64_t written = item.first_step;  // up to here the memory's gradient is written
    SourceWalk walk(problem, item, f.plan.tile);
    for (Tile tile; item.queries > 0 && walk.next(tile);) {
      plan_ahead(f, index, item, tile, slot);
      slot.memory.load(item.batch, tile);
      slot.gradient.begin_tile(item.batch, tile, written, slot.memory);
      slot.grad_memory.begin(tile, written);
      for (int64_t t = 0; t < item.queries; t += kChunk) {
        take_chunk(f, item, t, std::min(kChunk, item.queries - t), tile, written, slot);
      }
      slot.grad_memory.end(tile);
      slot.gradient.end_tile(tile);
      written = tile.steps[tile.count - 1] + 1;
    }
    slot.grad_memory.zero(written, item.end_step);
    for (int64_t t = 0; f.grad_scores != nullptr && t < item.queries; ++t) {
      grad_scores_row(f, item, t).zero(written, item.end_step);
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

  static void plan_ahead(const Backward& f, int64_t index, const Item& item, const Tile& tile, Slot& slot) {
    if (!slot.work.may_plan(f.plan.fetches, tile.count)) {
      return;
    }
    Ahead& ahead = slot.work.ahead;
    const Next next(f.problem, f.plan, index, item, tile.steps[tile.count - 1] + 1);
    if (next.is_item()) {
      next.queries_to(ahead, f.problem.dtype, f.grad_context, f.problem.memory_size);
      next.queries_to(ahead, kAccumulated<acc>, f.weights, f.problem.steps);
    }
    next.template steps_to<acc>(ahead);
    if (next.is_item()) {
      next.queries_to(ahead, f.problem.dtype, f.problem.query, f.problem.key_size);
    }
    spread(slot.work, item.queries, tile.count, f.problem.memory_size);
  }

  // A few of an item's queries against a tile: their weights, the gradient of their scores, and what both add to the other
  // gradients.
  static void take_chunk(
      const Backward& f, const Item& item, int64_t first, int64_t count, const Tile& tile, int64_t written, Slot& slot) {
    const Problem& problem = f.problem;
    const int64_t stride = slot.tile_stride;
    acc* weights = slot.coefficients;
    acc* grad_scores = weights + count * stride;
    if (f.score_gradients.data != nullptr) {
      for (int64_t t = 0; t < count; ++t) {
        gather(grad_scores + t * stride, kAccumulated<acc>, f.score_gradients, item.batch, item.first_query + first + t, tile);
      }
    } else {
      find_grad_scores(f, item, first, count, tile, slot, weights, grad_scores);
    }
    for (int64_t t = 0; f.grad_scores != nullptr && t < count; ++t) {
      grad_scores_row(f, item, first + t).scatter(grad_scores + t * stride, tile, written, acc(1));
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

  static StepsRow grad_scores_row(const Backward& f, const Item& item, int64_t t) {
    return {kAccumulated<acc>, f.grad_scores, (item.first_row(f.problem) + t) * f.problem.steps};
  }

  static void find_grad_scores(
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
      for (int64_t t = 0; t < count; ++t) {
        gather(weights + t * stride, kAccumulated<acc>, f.weights, item.batch, first_query + t, tile);
      }
    } else {
      recompute_weights(f, item, first, count, tile, slot, weights);
    }
    if (f.grad_context.data != nullptr) {
      const int64_t size = Factors<element>::elements(problem.memory_size);
      dot_products<element>(grad_scores, stride, grad_context, count, slot.memory.addresses(), tile.count, size, acc(1), slot.work);
    } else {
      std::fill_n(grad_scores, count * stride, acc(0));
    }
    for (int64_t t = 0; f.grad_weights.data != nullptr && t < count; ++t) {
      acc grad_weights[kTile];
      gather(grad_weights, problem.dtype, f.grad_weights, item.batch, first_query + t, tile);
      acc* row = grad_scores + t * stride;
      for (int64_t j = 0; j < tile.count; ++j) {
        row[j] += grad_weights[j];
      }
    }
    // As in a forward, a loop for each pass.
    acc* delta = slot.delta + first;
    acc* excess = slot.excess + first;
    for (int64_t t = 0; has_whole_rows(f) && t < count; ++t) {
      delta[t] = dot_product(weights + t * stride, grad_scores + t * stride, tile.count);
    }
    const acc scale = static_cast<acc>(problem.scale);
    acc sums[kChunk];
    for (int64_t t = 0; t < count; ++t) {
      sums[t] = differentiate_softmax(grad_scores + t * stride, weights + t * stride, tile.count, delta[t], scale);
      excess[t] += sums[t];
    }
    for (int64_t t = 0; has_whole_rows(f) && t < count; ++t) {
      take_off_excess(grad_scores + t * stride, weights + t * stride, tile.count, sums[t]);
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
    for (int64_t t = 0; t < count; ++t) {
      sums[t] = recompute_softmax(weights + t * stride, tile.count, logsumexp[t]);
      if (std::isnan(sums[t])) {
        spoil_weights(weights + t * stride, f.problem, item.batch, first_query + t, tile);
        sums[t] = 1;
      }
    }
    for (int64_t t = 0; has_whole_rows(f) && t < count; ++t) {
      scale_row(weights + t * stride, weights + t * stride, tile.count, 1 / sums[t]);
    }
  }

  static bool has_whole_rows(const Backward& f) {
    return f.plan.has_whole_rows(f.problem);
  }

  static void find_delta(const Backward& f, const Item& item, Slot& slot) {
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

  // A tile's columns of row t.
  static void gather(acc* row, Dtype dtype, const View& view, int64_t b, int64_t t, const Tile& tile) {
    const int64_t start = b * view.batch + t * view.row;
    if (tile.contiguous()) {
      load_row(row, dtype, view.data, start + tile.steps[0] * view.element, view.element, tile.count);
      return;
    }
    for (int64_t j = 0; j < tile.count; ++j) {
      load_row(row + j, dtype, view.data, start + tile.steps[j] * view.element, view.element, 1);
    }
  }
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

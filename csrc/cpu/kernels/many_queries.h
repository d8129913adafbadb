// What both passes of attention over tiles of memory have of a tile's rows, for any score: many_queries_forward.h and
// many_queries_backward.h.
//
// Each tile of memory is read once and serves the scores and the context (forward), or all of its gradients (backward), while it
// is in cache. It is bound by the products in products.h, which meanwhile prefetch what comes next. One query, which is bound by
// the read, goes its own way: one_query.h.
#pragma once

#include "cache.h"
#include "call.h"
#include "products.h"
#include "rows.h"
#include "softmax.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// A query's scores of a tile; those of pairs that its row of the mask leaves out become -inf.
template <class acc>
void mask_row_of_scores(acc* row, const uint8_t* mask, int64_t stride, const Tile& tile) {
  if (stride != 1 || tile.is_fragmented) {
    for (int64_t j = 0; j < tile.count; ++j) {
      row[j] = mask[tile.steps[j] * stride] != 0 ? row[j] : kNothing<acc>;
    }
    return;
  }
  for (int64_t first = 0, end; first < tile.count; first = end) {
    end = tile.run_end(first);
    const uint8_t* const attends = mask + tile.steps[first];
    for_vectors<acc>(end - first, [&](int64_t j, auto count) {
      acc* const to = row + first + j;
      where(attends + j, count, Vec<acc>::loadu(to, count), Vec<acc>(kNothing<acc>)).store(to, static_cast<int>(count));
    });
  }
}

// The scores of a chunk of queries against a tile, rows `stride` apart: masked pairs become -inf, and rows are filled up with it to
// whole vectors.
template <class acc>
void mask_scores(
    acc* scores, int64_t stride, const Problem& problem, int64_t b, int64_t first_query, int64_t queries, const Tile& tile) {
  const int rest = static_cast<int>(whole_vectors<acc>(tile.count) - tile.count);
  for (int64_t t = 0; t < queries; ++t) {
    acc* row = scores + t * stride;
    if (problem.mask_per_query) {
      const uint8_t* const mask = mask_row(problem, b, first_query + t);
      mask_row_of_scores(row, mask, problem.mask.element_stride, tile);
    }
    if (rest > 0) {
      Vec<acc>(kNothing<acc>).store(row + tile.count, rest);
    }
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

// Rows of all steps of a [B, T, S] tensor, from element `first` on: what is written to them may be rounded.
struct StepsRows {
  Dtype dtype;
  void* data;
  int64_t first;
  int64_t count;
  int64_t steps;

  void zero(int64_t begin, int64_t end) const {
    for (int64_t t = 0; begin < end && t < count; ++t) {
      zero_row(dtype, data, first + t * steps + begin, end - begin);
    }
  }

  // A tile's rows, `stride` apart and each times its factor, if there are any, into their places, and zeros for the steps before
  // and between them.
  template <class acc>
  void scatter(const acc* rows, int64_t stride, const acc* factors, const Tile& tile, int64_t written) const {
    with_type<acc>(dtype, [&](auto example) {
      using scalar = decltype(example);
      for (int64_t t = 0; t < count; ++t) {
        scalar* const to = static_cast<scalar*>(data) + first + t * steps;
        const acc* const row = rows + t * stride;
        const acc factor = factors == nullptr ? acc(1) : factors[t];
        if (tile.is_fragmented) {
          scatter_one_by_one(to, row, factor, tile, written);
          continue;
        }
        int64_t before = written;
        for (int64_t j = 0, end; j < tile.count; j = end) {
          end = tile.run_end(j);
          std::fill(to + before, to + tile.steps[j], scalar(0));
          store_row(to + tile.steps[j], row + j, end - j, factor);
          before = tile.steps[end - 1] + 1;
        }
      }
    });
  }

 private:
  template <class scalar, class acc>
  [[gnu::noinline]] static void scatter_one_by_one(scalar* to, const acc* row, acc factor, const Tile& tile, int64_t written) {
    scalar values[kTile];
    store_row(values, row, tile.count, factor);
    std::fill(to + written, to + tile.steps[tile.count - 1], scalar(0));
    for (int64_t j = 0; j < tile.count; ++j) {
      to[tile.steps[j]] = values[j];
    }
  }
};

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

  void queries_to(PrefetchQueue& prefetches, Dtype dtype, const View& view, int64_t size) const {
    prefetches.add(dtype, view, item_.batch, item_.first_query, item_.queries, size);
  }

  template <class acc>
  void steps_to(PrefetchQueue& prefetches) const {
    if (problem_.prepared_keys.data != nullptr) {
      const int64_t size = prepared_size(problem_.key_size);
      prefetches.add(kAccumulated<acc>, problem_.prepared_keys, item_.batch, first_step_, steps_, size);
    } else {
      prefetches.add(problem_.dtype, problem_.keys, item_.batch, first_step_, steps_, problem_.key_size);
    }
    prefetches.add(problem_.dtype, problem_.memory, item_.batch, first_step_, steps_, problem_.memory_size);
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
  constexpr int64_t abreast = kWidest * Vec<typename ElementTraits<element>::acc>::size();
  if (work.few) {
    work.prefetches.spread(2 * ceil_div(queries, kRows) * steps * ceil_div(size, abreast));
  }
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

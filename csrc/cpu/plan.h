// How a call's work is divided among the threads. Free of torch headers.
#pragma once

#include "kernels/call.h"

#include <unistd.h>

#include <algorithm>

namespace attn_ext::cpu {

// Multiply-adds below which a thread is not worth waking, and what a tanh, and an item by itself, cost in them.
constexpr int64_t kGrain = 1 << 15;
constexpr int64_t kTanhCost = 8;
constexpr int64_t kItemCost = 1 << 9;

// The least that a part has where an item's queries are divided, since each part reads the tiles again and gradients are merged:
// queries, twice as many where every thread has work anyhow, since the products of fewer are slower; and multiply-adds.
constexpr int64_t kLeastQueries = 8;
constexpr int64_t kQueriesGrain = 8 * kGrain;

// What a split of the source has at least where the queries are too few to be divided instead, and is a multiple of.
constexpr int64_t kLeastSteps = 64, kSplitMultiple = 8;

// Items are divided further where idle threads would make a call so many times as long: into independent parts, or into parts whose
// results have to be merged, each of which needs scratch.
constexpr double kWait = 1.15;
constexpr double kWaitForMerges = 1.5;

// A memory of so many bytes, keys included, has left the second-level cache by a decoder's next step, whose products go through it
// too; a tensor of so many is in no cache.
constexpr int64_t kFarMemory = int64_t{1} << 19;
constexpr int64_t kLarge = int64_t{1} << 24;

// Bytes of a group of one query's rows, and of one whose rows come from afar and are only read, twice (for their scores, then for
// the context): the second read is to hit the first-level cache, where that has the room.
constexpr int64_t kGroupBytes = 1 << 17;
constexpr int64_t kTwiceReadBytes = 1 << 15;

// Queries, or source steps, whose products are over before the lines of a large result have come from afar to be written.
constexpr int64_t kShallow = 32;

// Whether the first-level cache keeps so many bytes beside what else is in use.
inline bool has_room_for(int64_t bytes) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  return size > bytes;
#else
  return false;
#endif
}

inline int64_t work_of_step(const Problem& problem) {
  const int64_t score = problem.method == Method::Additive ? kTanhCost * problem.key_size : problem.key_size;
  return problem.queries * (score + problem.memory_size);
}

// A tile of memory stays in the second-level cache from the scores to the context: 256 KiB of floats, half as much where a few
// queries pass by keys too. Many queries' dot products find in that cache the panels that they pack, however long the tile is: it
// is as long as they are deep. So is keyed dot's, whatever its queries: its gradients want whole rows (backward_plan).
inline int64_t tile_of(const Problem& problem, int64_t chunk) {
  const bool many = chunk >= kMany;
  if (problem.method == Method::KeyedDot || (many && problem.method == Method::Dot)) {
    return kTile;
  }
  const int64_t size = (many || problem.method == Method::Dot ? 1 << 18 : 1 << 17) / sizeof(float);
  const int64_t row = std::max<int64_t>({problem.memory_size, problem.key_size, 1});
  return std::clamp<int64_t>(size / row / 32 * 32, 32, kShortTile);
}

// Rows that stay near while they serve one query. What a group's softmax takes by itself, a chain of sums and exponentials, is
// small beside them.
inline int64_t group_of(const Problem& problem, int64_t bytes) {
  const int64_t keys = problem.method == Method::Dot ? 0 : problem.key_size;
  const int64_t row = std::max<int64_t>(keys + problem.memory_size, 1) * width_of(problem.dtype);
  const int64_t most = std::clamp<int64_t>(bytes / row / 4 * 4, 4, kGroupRows);
  // As even as can be: while a short one is worked on, no more rows than it has are prefetched.
  if (problem.steps <= most) {
    return most;
  }
  return round_up(ceil_div(problem.steps, ceil_div(problem.steps, most)), 4);
}

// How many parts, at most `most`, each of some items is best divided into, as if all were alike: the fewest with which the threads'
// time is within `wait`, or those with which it is shortest.
inline int64_t divisions_of(int64_t items, int64_t threads, int64_t most, double wait) {
  const auto time = [&](int64_t parts) {
    return static_cast<double>(ceil_div(items * parts, threads) * threads) / (items * parts);
  };
  const int64_t least = std::clamp<int64_t>(threads / items, 1, std::max<int64_t>(most, 1));
  int64_t best = least;
  for (int64_t parts = least + 1; time(best) > wait && parts <= std::min(most, least + 3); ++parts) {
    best = time(parts) < time(best) ? parts : best;
  }
  return best;
}

inline void plan_one_query(Plan& plan, const Problem& problem, int64_t bytes, bool writes_rows) {
  const bool is_dot = problem.method == Method::Dot, is_half = width_of(problem.dtype) < int64_t{sizeof(float)};
  const bool is_read_twice = plan.prefetches && !writes_rows && has_room_for(kTwiceReadBytes);
  // Not of a group that the first-level cache keeps, whose sum leaves the memory idle for less than it takes beside the reading.
  // Additive scores leave it less idle anyhow: of halves and within a last-level cache, 1.03 to 1.15 times as long.
  plan.overlaps = bytes >= (is_dot ? 1 : 2) * kLarge && !(is_dot ? is_read_twice : writes_rows || is_half);
  plan.group = group_of(problem, is_dot && (is_read_twice || plan.overlaps) ? kTwiceReadBytes : kGroupBytes);
}

// Items of `chunk` queries. Where some threads would wait for others, the source is split, and where that has too few tiles the
// queries are divided further, as far as a part is worth a thread.
inline Plan plan_of(
    const Problem& problem, int64_t chunk, int64_t threads, double wait_for_queries, bool may_split, bool writes_rows) {
  Plan plan{};
  plan.chunk = std::max<int64_t>(std::min(chunk, problem.queries), 1);
  plan.tile = tile_of(problem, plan.chunk);
  plan.chunks = std::max<int64_t>(ceil_div(problem.queries, plan.chunk), 1);
  const int64_t row = problem.memory_size + (problem.method == Method::Dot ? 0 : problem.key_size);
  const int64_t bytes = problem.batch * problem.steps * row * width_of(problem.dtype);
  plan.prefetches = bytes >= kFarMemory;
  plan.streams = writes_rows && problem.queries <= kShallow && bytes >= kLarge;
  if (problem.is_one_query()) {
    plan_one_query(plan, problem, bytes, writes_rows);
  }
  const int64_t groups = std::max<int64_t>(plan.groups(problem), 1);
  const int64_t work = problem.steps * work_of_step(problem) / plan.chunks;
  const bool may_be_short = plan.chunk < 2 * kMany && !problem.is_one_query();
  const int64_t shortest = may_be_short ? std::min(plan.tile, kLeastSteps) : plan.tile;
  const int64_t most_splits = std::max<int64_t>(std::min(work / kGrain, ceil_div(problem.steps, shortest)), 1);
  const int64_t splits = may_split ? divisions_of(groups, threads, most_splits, kWaitForMerges) : 1;
  const int64_t split = ceil_div(problem.steps, splits);
  plan.split_size = std::max(round_up(split, kSplitMultiple), kSplitMultiple);
  plan.split_tiles = ceil_div(plan.split_size, plan.tile);
  plan.splits = std::max<int64_t>(ceil_div(problem.steps, plan.split_size), 1);
  const int64_t items = groups * plan.splits;
  const int64_t queries = items < threads ? kLeastQueries : 2 * kLeastQueries;
  const int64_t most = std::min(work / plan.splits / kQueriesGrain, plan.chunk / queries);
  const int64_t parts = divisions_of(items, threads, most, wait_for_queries);
  if (parts > 1) {
    plan.chunk = ceil_div(plan.chunk, parts);
    plan.chunks = ceil_div(problem.queries, plan.chunk);
  }
  return plan;
}

// Whether a result of `size` elements a query is to go past the caches, `tensors` of that size being in use.
inline bool streams_queries(const Problem& problem, int64_t size, int64_t tensors) {
  const int64_t bytes = problem.batch * problem.queries * size * width_of(problem.dtype);
  return problem.steps <= kShallow && tensors * bytes >= kLarge;
}

// `has_context`: without it the source is not split. `writes_rows`: gradients of keys or memory. Keyed dot's source is not split
// either. What rounding leaves of a query's sum of score gradients multiplies all that its keys have in common, and no context
// tells what that is: of whole rows next to nothing is left.
inline Plan backward_plan(const Problem& problem, int64_t threads, bool has_context, bool writes_rows) {
  const bool may_split = has_context && problem.method != Method::KeyedDot;
  Plan plan = plan_of(problem, std::max<int64_t>(problem.queries, 1), threads, kWaitForMerges, may_split, writes_rows);
  plan.streams_queries = streams_queries(problem, problem.key_size, 1);
  return plan;
}

inline Plan forward_plan(const Problem& problem, int64_t threads) {
  Plan plan = plan_of(problem, kChunk, threads, kWait, /*may_split=*/true, /*writes_rows=*/false);
  plan.streams_queries = streams_queries(problem, problem.memory_size, 2);
  return plan;
}

}  // namespace attn_ext::cpu

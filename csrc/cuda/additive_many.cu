#include "additive_many.cuh"

#include "dtypes.h"
#include "launch.h"
#include "slabs.cuh"

#include <algorithm>

namespace attn_ext::cuda {
namespace {

// So many blocks keep a large GPU busy: a few on each of its multiprocessors.
constexpr int64_t kEnoughBlocks = 512;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// launch_of(n): the rows of a thread of the scores' tile, 64 or 16 queries. double has half the registers for them.
template <class acc, class Launch>
void for_rows_of_scores(int64_t queries, const Launch& launch_of) {
  if (kFactors<acc> && queries > 16) {
    launch_of(std::integral_constant<int, kFactors<acc> ? 8 : 2>());
  } else {
    launch_of(std::integral_constant<int, 2>());
  }
}

// launch_of(n): the queries of a warp of the backward's, as many as its tile needs.
template <class acc, class Launch>
void for_rows_of_gradient(int64_t queries, const Launch& launch_of) {
  if constexpr (kFactors<acc>) {
    if (queries > 16 * kAdditiveWarps) {
      return launch_of(std::integral_constant<int, 32>());
    }
    if (queries > 8 * kAdditiveWarps) {
      return launch_of(std::integral_constant<int, 16>());
    }
  }
  launch_of(std::integral_constant<int, 8>());
}

template <class Tile>
AdditiveBackwardPlan plan_of(const Problem& problem) {
  AdditiveBackwardPlan plan{};
  plan.query_tiles = std::max<int64_t>(ceil_div(problem.queries, Tile::kQueries), 1);
  plan.chunks = ceil_div(problem.key_size, kFeatures);
  const int64_t blocks = std::max<int64_t>(problem.batch * plan.query_tiles * plan.chunks, 1);
  const int64_t step_chunks = std::max<int64_t>(ceil_div(problem.steps, Tile::kSteps), 1);
  // A split of fewer chunks would not be worth its slab of the queries' gradient.
  constexpr int64_t least_chunks = 4;
  const int64_t splits = std::clamp<int64_t>(kEnoughBlocks / blocks, 1, ceil_div(step_chunks, least_chunks));
  plan.split_steps = ceil_div(step_chunks, splits) * Tile::kSteps;
  plan.splits = std::max<int64_t>(ceil_div(problem.steps, plan.split_steps), 1);
  return plan;
}

// Divides the workspace; returns its size. Of a call without one the slabs have no meaning but that.
template <class acc>
size_t place_slabs(const AdditiveBackward& call, AdditiveBackwardPlan& plan) {
  const Problem& problem = call.problem;
  size_t used = 0;
  const auto take = [&](bool wanted, int64_t count, int64_t size) -> void* {
    if (!wanted) {
      return nullptr;
    }
    char* at = static_cast<char*>(call.workspace) + used;
    used += count * size * sizeof(acc);
    return at;
  };
  plan.query_slabs = take(
      call.grad_query != nullptr && plan.splits > 1, plan.splits, problem.batch * problem.queries * problem.key_size);
  plan.key_slabs = take(
      call.grad_keys != nullptr && plan.query_tiles > 1, plan.query_tiles, problem.batch * problem.steps * problem.key_size);
  plan.v_slabs = take(call.grad_v != nullptr, problem.batch * plan.query_tiles * plan.splits, problem.key_size);
  return used;
}

template <class scalar>
void add_slabs(void* out, const void* slabs, int64_t count, int64_t size, Stream stream) {
  using acc = accumulated_t<scalar>;
  if (slabs == nullptr) {
    return;
  }
  const int groups = count >= 32 ? 8 : 1;
  const dim3 grid(ceil_div(size, kSlabThreads / groups));
  const size_t shared = groups > 1 ? kSlabThreads * sizeof(acc) : 0;
  launch(
      sum_slabs<scalar>, grid, kSlabThreads, shared, stream, static_cast<scalar*>(out), static_cast<const acc*>(slabs), count, size, groups);
}

}  // namespace

void additive_scores(const AdditiveScores& call, Stream stream) {
  const Problem& problem = call.problem;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    using acc = accumulated_t<scalar>;
    for_rows_of_scores<acc>(problem.queries, [&]<int rows>(std::integral_constant<int, rows>) {
      using Tile = ScoresTile<acc, rows>;
      const int64_t tiles = ceil_div(problem.steps, Tile::kSteps) * ceil_div(problem.queries, Tile::kQueries);
      launch(additive_scores_tile<scalar, rows>, dim3(problem.batch * tiles), kAdditiveThreads, Tile::kShared, stream, call);
    });
  });
}

size_t additive_backward_workspace(const AdditiveBackward& call) {
  size_t size = 0;
  for_dtype(call.problem.dtype, [&]<class scalar>(scalar) {
    using acc = accumulated_t<scalar>;
    for_rows_of_gradient<acc>(call.problem.queries, [&]<int rows>(std::integral_constant<int, rows>) {
      AdditiveBackwardPlan plan = plan_of<GradientTile<acc, rows>>(call.problem);
      size = place_slabs<acc>(call, plan);
    });
  });
  return size;
}

void additive_backward(const AdditiveBackward& call, Stream stream) {
  const Problem& problem = call.problem;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    using acc = accumulated_t<scalar>;
    for_rows_of_gradient<acc>(problem.queries, [&]<int rows>(std::integral_constant<int, rows>) {
      using Tile = GradientTile<acc, rows>;
      AdditiveBackwardPlan plan = plan_of<Tile>(problem);
      place_slabs<acc>(call, plan);
      const dim3 grid(problem.batch * plan.query_tiles * plan.splits * plan.chunks);
      launch(additive_backward_tile<scalar, rows>, grid, kAdditiveThreads, Tile::kShared, stream, call, plan);
      const int64_t rows_of_queries = problem.batch * problem.queries, rows_of_keys = problem.batch * problem.steps;
      const int64_t blocks = problem.batch * plan.query_tiles * plan.splits;
      add_slabs<scalar>(call.grad_query, plan.query_slabs, plan.splits, rows_of_queries * problem.key_size, stream);
      add_slabs<scalar>(call.grad_keys, plan.key_slabs, plan.query_tiles, rows_of_keys * problem.key_size, stream);
      add_slabs<scalar>(call.grad_v, plan.v_slabs, blocks, problem.key_size, stream);
    });
  });
}

}  // namespace attn_ext::cuda

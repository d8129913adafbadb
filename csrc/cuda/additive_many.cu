// Launches of the additive kernels of many queries: their tiles, and the workspace through which they hand each other results.
#include "additive_gradients.cuh"
#include "additive_scores.cuh"

#include "dtypes.h"
#include "launch.h"
#include "slabs.cuh"

#include <algorithm>

namespace attn_ext::cuda {
namespace {

// So many blocks keep a large GPU busy: a few on each of its multiprocessors.
constexpr int64_t kEnoughBlocks = 512;

// What follows one another in a workspace, each on 16 bytes; with no workspace, to know its size.
class Workspace {
 public:
  explicit Workspace(void* begin) : begin_(static_cast<char*>(begin)) {}

  template <class T>
  T* take(int64_t count) {
    char* at = begin_ == nullptr ? nullptr : begin_ + size_;
    size_ += (count * sizeof(T) + 15) / 16 * 16;
    return reinterpret_cast<T*>(at);
  }

  size_t size() const {
    return size_;
  }

 private:
  char* begin_;
  size_t size_ = 0;
};

ScoresFactors factors_in(Workspace& workspace, const Problem& problem) {
  const int64_t chunks = ceil_div(problem.key_size, kFeatures);
  const auto of_side = [&](int64_t rows) {
    const int64_t blocks = ceil_div(rows, kFactorRows), tiles = problem.batch * blocks * chunks;
    return RowsFactors{blocks, workspace.take<float>(tiles * kFactorTile), workspace.take<Factoring>(tiles)};
  };
  const RowsFactors queries = of_side(problem.queries), keys = of_side(problem.steps);
  return {chunks, queries, keys, workspace.take<float>(chunks * kChunkOfV), workspace.take<Factoring>(chunks)};
}

template <class Tile>
int64_t blocks_of_scores(const Problem& problem) {
  return problem.batch * ceil_div(problem.steps, Tile::kSteps) * ceil_div(problem.queries, Tile::kQueries);
}

// launch_of(rows, columns): a thread's. The larger a tile the fewer loads, but every multiprocessor is to have some; double has
// half the registers for them.
template <class acc, class Launch>
void for_tile_of_scores(const Problem& problem, const Launch& launch_of) {
  using std::integral_constant;
  if constexpr (kFactors<acc>) {
    if (problem.queries > 16) {
      if (blocks_of_scores<ScoresTile<acc, 8, 4>>(problem) >= kEnoughBlocks) {
        return launch_of(integral_constant<int, 8>(), integral_constant<int, 4>());
      }
      return launch_of(integral_constant<int, 4>(), integral_constant<int, 2>());
    }
  }
  launch_of(integral_constant<int, 2>(), integral_constant<int, 4>());
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

// Tiles of queries whose gradients of keys wait in slabs at a time: more of them would add to the workspace, and have no blocks to
// gain where these are enough.
constexpr int64_t kTilesAtOnce = 8;

// Of the first launch.
template <class Tile>
AdditiveBackwardPlan plan_of(const Problem& problem) {
  AdditiveBackwardPlan plan{};
  plan.chunks = ceil_div(problem.key_size, kFeatures);
  const int64_t of_tile = std::max<int64_t>(problem.batch * plan.chunks, 1);  // blocks; of no features there are none
  plan.query_tiles = std::min(ceil_div(problem.queries, Tile::kQueries), std::max(kTilesAtOnce, ceil_div(kEnoughBlocks, of_tile)));
  const int64_t step_chunks = ceil_div(problem.steps, Tile::kSteps);
  // A split of fewer chunks would not be worth its slab of the queries' gradient.
  constexpr int64_t least_chunks = 4;
  const int64_t splits = std::clamp<int64_t>(kEnoughBlocks / (of_tile * plan.query_tiles), 1, ceil_div(step_chunks, least_chunks));
  plan.split_steps = ceil_div(step_chunks, splits) * Tile::kSteps;
  plan.splits = ceil_div(problem.steps, plan.split_steps);
  return plan;
}

template <class scalar>
void launch_sum(scalar* out, const accumulated_t<scalar>* slabs, int64_t count, int64_t size, Stream stream) {
  const SlabBlocks blocks = slab_blocks(count, size);
  const size_t shared = blocks.groups > 1 ? kSlabThreads * sizeof(accumulated_t<scalar>) : 0;
  launch(sum_slabs<scalar>, dim3(blocks.count), kSlabThreads, shared, stream, out, slabs, count, size, blocks.groups);
}

// A call of one type and tile.
template <class scalar, int rows>
class BackwardRun {
 public:
  explicit BackwardRun(const AdditiveBackward& call)
      : call_(call),
        plan_(plan_of<Tile>(call.problem)),
        tiles_(ceil_div(call.problem.queries, Tile::kQueries)),
        query_size_(call.problem.batch * call.problem.queries * call.problem.key_size),
        keys_size_(call.problem.batch * call.problem.steps * call.problem.key_size),
        v_count_(call.problem.batch * tiles_ * plan_.splits),
        workspace_(call.workspace) {
    query_slabs_ = place(call.grad_query, plan_.splits, query_size_);
    key_slabs_ = place(call.grad_keys, plan_.query_tiles + (is_one_launch() ? 0 : 1), keys_size_);
    v_slabs_ = place(call.grad_v, v_count_, call.problem.key_size);
  }

  size_t workspace_size() const {
    return workspace_.size();
  }

  void launch_all(Stream stream) const {
    for (int64_t first_tile = 0; first_tile < tiles_; first_tile += plan_.query_tiles) {
      launch_tiles(first_tile, std::min(plan_.query_tiles, tiles_ - first_tile), stream);
    }
    if (query_slabs_ != nullptr) {
      launch_sum(static_cast<scalar*>(call_.grad_query), query_slabs_, plan_.splits, query_size_, stream);
    }
    if (v_slabs_ != nullptr) {
      launch_sum(static_cast<scalar*>(call_.grad_v), v_slabs_, v_count_, call_.problem.key_size, stream);
    }
  }

 private:
  using acc = accumulated_t<scalar>;
  using Tile = GradientTile<scalar, rows>;

  bool is_one_launch() const {
    return plan_.query_tiles == tiles_;
  }

  // Slabs, where several blocks add to one gradient: their part of the workspace.
  acc* place(const void* gradient, int64_t count, int64_t size) {
    return gradient == nullptr || count == 1 ? nullptr : workspace_.take<acc>(count * size);
  }

  // Of several launches each but the first finds the sum of those before it in the keys' first slab, and adds its own behind it.
  void launch_tiles(int64_t first_tile, int64_t tiles, Stream stream) const {
    const Problem& problem = call_.problem;
    const bool is_first = first_tile == 0, is_last = first_tile + tiles == tiles_;
    AdditiveBackwardPlan plan = plan_;
    plan.first_tile = first_tile;
    plan.query_tiles = tiles;
    plan.query_slabs = query_slabs_;
    plan.key_slabs = key_slabs_ == nullptr || is_first ? key_slabs_ : key_slabs_ + keys_size_;
    plan.v_slabs = v_slabs_ == nullptr ? nullptr : v_slabs_ + problem.batch * first_tile * plan.splits * problem.key_size;
    const bool grads_by_vectors =
        reinterpret_cast<uintptr_t>(call_.grad_scores) % 16 == 0 && problem.steps % kLanes<accumulated_t<scalar>> == 0;
    launch(
        additive_backward_tile<scalar, rows>,
        dim3(problem.batch * tiles * plan.splits * plan.chunks),
        kAdditiveThreads,
        Tile::kShared + sizeof(GradientBlock<scalar, rows>),
        stream,
        call_,
        plan,
        grads_by_vectors,
        takes_vectors<scalar>(problem.keys, problem.key_size));
    if (key_slabs_ == nullptr) {
      return;
    }
    const int64_t count = tiles + (is_first ? 0 : 1);
    if (is_last) {
      launch_sum(static_cast<scalar*>(call_.grad_keys), key_slabs_, count, keys_size_, stream);
    } else {
      launch_sum<acc>(key_slabs_, key_slabs_, count, keys_size_, stream);
    }
  }

  const AdditiveBackward& call_;
  AdditiveBackwardPlan plan_;
  int64_t tiles_, query_size_, keys_size_, v_count_;
  Workspace workspace_;
  acc* query_slabs_;
  acc* key_slabs_;
  acc* v_slabs_;
};

// run_of(BackwardRun)
template <class Run>
void for_backward(const AdditiveBackward& call, const Run& run_of) {
  for_dtype(call.problem.dtype, [&]<class scalar>(scalar) {
    for_rows_of_gradient<accumulated_t<scalar>>(
        call.problem.queries, [&]<int rows>(std::integral_constant<int, rows>) { run_of(BackwardRun<scalar, rows>(call)); });
  });
}

}  // namespace

size_t additive_scores_workspace(const Problem& problem) {
  Workspace workspace(nullptr);
  if (problem.dtype != Dtype::Double) {
    factors_in(workspace, problem);
  }
  return workspace.size();
}

void additive_scores(const AdditiveScores& call, Stream stream) {
  const Problem& problem = call.problem;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    using acc = accumulated_t<scalar>;
    ScoresFactors factors{};
    if constexpr (kFactors<acc>) {
      Workspace workspace(call.workspace);
      factors = factors_in(workspace, problem);
      launch(
          take_factors<scalar>,
          dim3(problem.batch * (factors.queries.blocks + factors.keys.blocks) * ceil_div(factors.chunks, kAdditiveWarps)),
          kAdditiveThreads,
          0,
          stream,
          call,
          factors,
          takes_vectors<scalar>(problem.query, problem.key_size),
          takes_vectors<scalar>(problem.keys, problem.key_size));
    }
    for_tile_of_scores<acc>(
        problem, [&]<int rows, int columns>(std::integral_constant<int, rows>, std::integral_constant<int, columns>) {
          using Tile = ScoresTile<acc, rows, columns>;
          launch(
              additive_scores_tile<scalar, rows, columns>,
              dim3(blocks_of_scores<Tile>(problem)),
              kAdditiveThreads,
              Tile::kShared,
              stream,
              call,
              factors,
              reinterpret_cast<uintptr_t>(call.scores) % 16 == 0 && problem.steps % kLanes<acc> == 0);
        });
  });
}

size_t additive_backward_workspace(const AdditiveBackward& call) {
  size_t size = 0;
  for_backward(call, [&](const auto& run) { size = run.workspace_size(); });
  return size;
}

void additive_backward(const AdditiveBackward& call, Stream stream) {
  for_backward(call, [&](const auto& run) { run.launch_all(stream); });
}

}  // namespace attn_ext::cuda

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

template <class Tile>
int64_t blocks_of_scores(const Problem& problem) {
  return problem.batch * ceil_div(problem.steps, Tile::kSteps) * ceil_div(problem.queries, Tile::kQueries);
}

// launch_of(rows, columns): a thread's. The larger a tile the fewer exponentials, but every multiprocessor is to have some; double
// has half the registers for them.
template <class scalar, class Launch>
void for_tile_of_scores(const Problem& problem, const Launch& launch_of) {
  using std::integral_constant;
  if constexpr (kFactors<accumulated_t<scalar>>) {
    if (problem.queries > 16) {
      if (blocks_of_scores<ScoresTile<scalar, 8, 4>>(problem) >= kEnoughBlocks) {
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

template <class Tile>
AdditiveBackwardPlan plan_of(const Problem& problem) {
  AdditiveBackwardPlan plan{};
  plan.query_tiles = ceil_div(problem.queries, Tile::kQueries);
  plan.chunks = ceil_div(problem.key_size, kFeatures);
  const int64_t blocks = std::max<int64_t>(problem.batch * plan.query_tiles * plan.chunks, 1);  // of no features there are none
  const int64_t step_chunks = ceil_div(problem.steps, Tile::kSteps);
  // A split of fewer chunks would not be worth its slab of the queries' gradient.
  constexpr int64_t least_chunks = 4;
  const int64_t splits = std::clamp<int64_t>(kEnoughBlocks / blocks, 1, ceil_div(step_chunks, least_chunks));
  plan.split_steps = ceil_div(step_chunks, splits) * Tile::kSteps;
  plan.splits = ceil_div(problem.steps, plan.split_steps);
  return plan;
}

// Where several blocks add to one gradient.
template <class scalar>
class Slabs {
 public:
  Slabs(void* out, int64_t count, int64_t size) : out_(out), count_(count), size_(size) {}

  // Its part of the workspace, from `used` on.
  void* place(void* workspace, size_t& used) const {
    if (!are_needed()) {
      return nullptr;
    }
    char* at = static_cast<char*>(workspace) + used;
    used += count_ * size_ * sizeof(acc);
    return at;
  }

  void sum(const void* slabs, Stream stream) const {
    if (are_needed()) {
      const SlabBlocks blocks = slab_blocks(count_, size_);
      launch(
          sum_slabs<scalar>,
          dim3(blocks.count),
          kSlabThreads,
          blocks.groups > 1 ? kSlabThreads * sizeof(acc) : 0,
          stream,
          static_cast<scalar*>(out_),
          static_cast<const acc*>(slabs),
          count_,
          size_,
          blocks.groups);
    }
  }

 private:
  using acc = accumulated_t<scalar>;

  bool are_needed() const {
    return out_ != nullptr && count_ > 1;
  }

  void* out_;
  int64_t count_;
  int64_t size_;
};

// A call of one type and tile.
template <class scalar, int rows>
class BackwardRun {
 public:
  explicit BackwardRun(const AdditiveBackward& call)
      : call_(call),
        plan_(plan_of<Tile>(call.problem)),
        query_(call.grad_query, plan_.splits, call.problem.batch * call.problem.queries * call.problem.key_size),
        keys_(call.grad_keys, plan_.query_tiles, call.problem.batch * call.problem.steps * call.problem.key_size),
        v_(call.grad_v, call.problem.batch * plan_.query_tiles * plan_.splits, call.problem.key_size) {
    plan_.query_slabs = query_.place(call.workspace, workspace_size_);
    plan_.key_slabs = keys_.place(call.workspace, workspace_size_);
    plan_.v_slabs = v_.place(call.workspace, workspace_size_);
  }

  size_t workspace_size() const {
    return workspace_size_;
  }

  void launch_all(Stream stream) const {
    const dim3 grid(call_.problem.batch * plan_.query_tiles * plan_.splits * plan_.chunks);
    const bool grads_by_vectors =
        reinterpret_cast<uintptr_t>(call_.grad_scores) % 16 == 0 && call_.problem.steps % kLanes<accumulated_t<scalar>> == 0;
    launch(
        additive_backward_tile<scalar, rows>,
        grid,
        kAdditiveThreads,
        Tile::kShared + sizeof(GradientBlock<scalar, rows>),
        stream,
        call_,
        plan_,
        grads_by_vectors,
        takes_vectors<scalar>(call_.problem.keys, call_.problem.key_size));
    query_.sum(plan_.query_slabs, stream);
    keys_.sum(plan_.key_slabs, stream);
    v_.sum(plan_.v_slabs, stream);
  }

 private:
  using Tile = GradientTile<scalar, rows>;

  const AdditiveBackward& call_;
  AdditiveBackwardPlan plan_;
  Slabs<scalar> query_;
  Slabs<scalar> keys_;
  Slabs<scalar> v_;
  size_t workspace_size_ = 0;
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

void additive_scores(const AdditiveScores& call, Stream stream) {
  const Problem& problem = call.problem;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    for_tile_of_scores<scalar>(
        problem, [&]<int rows, int columns>(std::integral_constant<int, rows>, std::integral_constant<int, columns>) {
          using Tile = ScoresTile<scalar, rows, columns>;
          launch(
              additive_scores_tile<scalar, rows, columns>,
              dim3(blocks_of_scores<Tile>(problem)),
              kAdditiveThreads,
              Tile::kShared,
              stream,
              call,
              takes_vectors<scalar>(problem.query, problem.key_size),
              takes_vectors<scalar>(problem.keys, problem.key_size));
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

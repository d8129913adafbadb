// Launches of the one-step additive kernels: rows that a warp holds and that can be read 16 bytes at a time are streamed, others
// taken as they are.
#include "one_step_additive.cuh"

#include "dtypes.h"
#include "launch.h"
#include "one_step_additive_streamed.cuh"
#include "one_step_merge.h"

#include <algorithm>

namespace attn_ext::cuda {
namespace {

template <class scalar, class Call>
void launch_one_step(void (*kernel)(Call, bool, bool), const Call& call, bool has_grads, Stream stream) {
  const Problem& problem = call.problem;
  launch(
      kernel,
      dim3(problem.batch * call.splits.count),
      kStepBlock,
      AdditiveStepShared<accumulated_t<scalar>>::size(call.splits, has_grads),
      stream,
      call,
      takes_vectors<scalar>(problem.keys, problem.key_size),
      takes_vectors<scalar>(problem.memory, problem.memory_size));
}

template <class scalar>
bool is_streamed(const Problem& problem) {
  const int64_t least = std::min(problem.key_size, problem.memory_size), most = std::max(problem.key_size, problem.memory_size);
  return least > 0 && most <= most_one_step_columns(sizeof(scalar)) && takes_vectors<scalar>(problem.keys, problem.key_size) &&
         takes_vectors<scalar>(problem.memory, problem.memory_size);
}

// launch_of(teams): how the longer of a step's rows is held.
template <class scalar, class Launch>
void for_streamed_teams(const Problem& problem, const View& grad_context, const Launch& launch_of) {
  const int64_t longer = std::max(problem.key_size, problem.memory_size);
  for_lanes_of_row<scalar>(longer, [&]<int pieces>(std::integral_constant<int, pieces>, int log_lanes) {
    launch_of(
        StreamedTeams<scalar, pieces>{
            {log_lanes},
            static_cast<int>(problem.key_size),
            static_cast<int>(problem.memory_size),
            takes_vectors<scalar>(problem.query, problem.key_size),
            takes_vectors<scalar>(problem.v, problem.key_size),
            takes_vectors<scalar>(grad_context, problem.memory_size)});
  });
}

// Shared memory of a streamed step: the stream, in whose place the results are merged, the rows that all rows meet, and what the
// warps have of a number or two.
template <class Teams>
size_t streamed_size(const Teams& teams, int64_t rows) {
  using acc = typename Teams::acc;
  const size_t met = rows * Teams::kPieces * teams.lanes() * sizeof(Vector16) + 2 * kStepWarps * sizeof(acc);
  static_assert(2 * kStepWarps * most_one_step_columns(sizeof(typename Teams::scalar)) * sizeof(acc) <= StepStream<Teams>::kShared);
  return StepStream<Teams>::kShared + met;
}

}  // namespace

int64_t one_step_additive_blocks(const Problem& problem, bool backward) {
  int64_t blocks = kStepBlocks;
  size_t shared = 0;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    if (is_streamed<scalar>(problem)) {
      for_streamed_teams<scalar>(problem, View{}, [&]<int pieces>(const StreamedTeams<scalar, pieces>& teams) {
        using Teams = StreamedTeams<scalar, pieces>;
        blocks = backward ? Teams::kBackwardBlocks : Teams::kForwardBlocks;
        shared = streamed_size(teams, backward ? 3 : 2);
      });
    } else {
      shared = AdditiveStepShared<accumulated_t<scalar>>::size({1, std::min(problem.steps, kMostSplitSteps), 1, nullptr}, backward);
    }
  });
  return std::min(blocks, blocks_by_shared_memory(shared));
}

void one_step_additive(const OneStep& call, Stream stream) {
  const Problem& problem = call.problem;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    if (!is_streamed<scalar>(problem)) {
      return launch_one_step<scalar>(attend_one_step_additive<scalar>, call, false, stream);
    }
    for_streamed_teams<scalar>(problem, View{}, [&]<int pieces>(const StreamedTeams<scalar, pieces>& teams) {
      const dim3 grid(problem.batch * call.splits.count);
      const size_t shared = streamed_size(teams, 2);
      launch(attend_one_step_additive_streamed<scalar, pieces>, grid, kStepBlock, shared, stream, call, teams);
    });
  });
  merge_splits(call, stream);
}

void one_step_additive_backward(const OneStepBackward& call, Stream stream) {
  const Problem& problem = call.problem;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    if (!is_streamed<scalar>(problem)) {
      return launch_one_step<scalar>(differentiate_one_step_additive<scalar>, call, true, stream);
    }
    for_streamed_teams<scalar>(problem, call.grad_context, [&]<int pieces>(const StreamedTeams<scalar, pieces>& teams) {
      const dim3 grid(problem.batch * call.splits.count);
      const size_t shared = streamed_size(teams, 3);
      launch(differentiate_one_step_additive_streamed<scalar, pieces>, grid, kStepBlock, shared, stream, call, teams);
    });
  });
  merge_splits(call, stream);
}

}  // namespace attn_ext::cuda

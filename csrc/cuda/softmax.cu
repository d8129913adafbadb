// Launches of the row kernels: how a row of scores is held.
#include "softmax.cuh"

#include "dtypes.h"
#include "launch.h"

namespace attn_ext::cuda {
namespace {

bool are_aligned(auto... addresses) {
  return ((reinterpret_cast<uintptr_t>(addresses) % 16 == 0) && ...);
}

// launch_of(held, width): the elements of a row that a lane holds, and those that it takes at once; or 0 for a block's row.
template <class acc, class Launch>
void for_steps(int64_t steps, bool aligned, const Launch& launch_of) {
  using std::integral_constant;
  const auto launch_held = [&]<int held>(integral_constant<int, held> count) {
    if (aligned && steps % kLanes<acc> == 0) {
      launch_of(count, integral_constant<int, kLanes<acc>>());
    } else {
      launch_of(count, integral_constant<int, 1>());
    }
  };
  if (steps <= 4 * kWarp) {
    launch_held(integral_constant<int, 4>());
  } else if (steps <= 16 * kWarp) {
    launch_held(integral_constant<int, 16>());
  } else if (steps <= kMostHeld<acc> * kWarp) {
    launch_held(integral_constant<int, kMostHeld<acc>>());
  } else {
    launch_of(integral_constant<int, 0>(), integral_constant<int, 1>());
  }
}

template <int held>
void launch_rows(auto kernel, int64_t rows, Stream stream, const auto&... arguments) {
  using Team = RowTeam<held>;
  const size_t shared = held > 0 ? 0 : kRowBlock / kWarp * sizeof(double);
  launch(kernel, dim3(ceil_div(rows, Team::kRows)), Team::kBlock, shared, stream, arguments...);
}

}  // namespace

void softmax(const Softmax& call, Stream stream) {
  const bool aligned = are_aligned(call.scores, call.weights, call.rounded);
  for_dtype(call.problem.dtype, [&]<class scalar>(scalar) {
    for_steps<accumulated_t<scalar>>(
        call.problem.steps,
        aligned,
        [&]<int held, int width>(std::integral_constant<int, held>, std::integral_constant<int, width>) {
          launch_rows<held>(softmax_rows<scalar, held, width>, call.problem.batch * call.problem.queries, stream, call);
        });
  });
}

void softmax_backward(const SoftmaxBackward& call, Stream stream) {
  const bool aligned =
      are_aligned(call.weights, call.scores, call.grad_from_context, call.recomputed, call.grad_scores, call.rounded);
  for_dtype(call.problem.dtype, [&]<class scalar>(scalar) {
    for_steps<accumulated_t<scalar>>(
        call.problem.steps,
        aligned,
        [&]<int held, int width>(std::integral_constant<int, held>, std::integral_constant<int, width>) {
          launch_rows<held>(softmax_backward_rows<scalar, held, width>, call.problem.batch * call.problem.queries, stream, call);
        });
  });
}

}  // namespace attn_ext::cuda

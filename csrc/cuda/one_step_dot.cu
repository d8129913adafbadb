// Launches of the one-step dot kernels: how a row of memory is held.
#include "one_step_dot.cuh"

#include "dtypes.h"
#include "launch.h"

#include <algorithm>

namespace attn_ext::cuda {
namespace {

// Pieces of rows that a lane has in flight. A backward holds three rows of sums and factors besides, a forward two.
constexpr int kForwardPieces = 8;
constexpr int kBackwardPieces = 4;

// launch_of(columns): the lanes and their pieces that hold a row. A short row is less than a warp's.
template <class scalar, int in_flight, int pieces = 1, class Launch>
void for_columns(const Problem& problem, const Launch& launch_of) {
  constexpr int64_t of_lane = int64_t{pieces} * kLanes<scalar>;
  const int64_t size = problem.memory_size;
  if constexpr (kWarp * of_lane < most_one_step_columns(sizeof(scalar))) {
    if (size > kWarp * of_lane) {
      return for_columns<scalar, in_flight, 2 * pieces>(problem, launch_of);
    }
  }
  int lanes = kWarp;
  while (lanes > 1 && size <= lanes / 2 * of_lane) {
    lanes /= 2;
  }
  constexpr int rows = std::clamp(in_flight / pieces, 1, 4);
  launch_of(Columns<scalar, pieces, rows>{lanes, size, takes_vectors<scalar>(problem.memory, size)});
}

}  // namespace

void one_step_dot(const OneStep& call, Stream stream) {
  const Problem& problem = call.problem;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    for_columns<scalar, kForwardPieces>(problem, [&]<int pieces, int rows>(const Columns<scalar, pieces, rows>& columns) {
      const int64_t factors = std::max<int64_t>(call.splits.count, kStepWarps);
      const size_t shared = (kStepWarps * (columns.size + 2) + factors) * sizeof(accumulated_t<scalar>);
      const dim3 grid(problem.batch * call.splits.count);
      launch(attend_one_step<scalar, pieces, rows>, grid, kStepBlock, shared, stream, call, columns);
    });
  });
}

void one_step_dot_backward(const OneStepBackward& call, Stream stream) {
  const Problem& problem = call.problem;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    for_columns<scalar, kBackwardPieces>(problem, [&]<int pieces, int rows>(const Columns<scalar, pieces, rows>& columns) {
      const size_t shared = kStepWarps * std::max<int64_t>(columns.size, 1) * sizeof(accumulated_t<scalar>);
      const dim3 grid(problem.batch * call.splits.count);
      launch(differentiate_one_step<scalar, pieces, rows>, grid, kStepBlock, shared, stream, call, columns);
    });
  });
}

}  // namespace attn_ext::cuda

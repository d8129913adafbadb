// Launches of the one-step dot kernels: how a row of memory is held, and how much is under way.
#include "one_step_dot.cuh"

#include "dtypes.h"
#include "launch.h"

#include <algorithm>

namespace attn_ext::cuda {
namespace {

// A thread's pieces under way, those that it computes with among them: 32 KB a block.
constexpr int kUnderWay = 16;

// launch_of(columns, rows, depth): the lanes and their pieces that hold a row. A short row is less than a warp's.
template <class scalar, int pieces = 1, class Launch>
void for_columns(const Problem& problem, bool query_by_vectors, const Launch& launch_of) {
  constexpr int64_t of_lane = int64_t{pieces} * kLanes<scalar>;
  const int64_t size = problem.memory_size;
  if constexpr (kWarp * of_lane < most_one_step_columns(sizeof(scalar))) {
    if (size > kWarp * of_lane) {
      return for_columns<scalar, 2 * pieces>(problem, query_by_vectors, launch_of);
    }
  }
  int lanes = kWarp;
  while (lanes > 1 && size <= lanes / 2 * of_lane) {
    lanes /= 2;
  }
  // Shuffles of several rows overlap; of long rows a warp has enough to do with one.
  constexpr int rows = std::clamp(4 / pieces, 1, 4);
  constexpr int depth = std::max(kUnderWay / (rows * pieces), 2);
  const Columns<scalar, pieces> columns{
      lanes, static_cast<int>(size), takes_vectors<scalar>(problem.memory, size), query_by_vectors};
  launch_of.template operator()<pieces, rows, depth>(columns);
}

unsigned parts_of(int64_t columns) {
  return static_cast<unsigned>((columns + kStepBlock - 1) / kStepBlock);
}

}  // namespace

void one_step_dot(const OneStep& call, Stream stream) {
  const Problem& problem = call.problem;
  const Splits& splits = call.splits;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    using acc = accumulated_t<scalar>;
    const auto scale = static_cast<acc>(problem.scale);
    const bool query_by_vectors = takes_vectors<scalar>(problem.query, problem.memory_size);
    for_columns<scalar>(problem, query_by_vectors, [&]<int pieces, int rows, int depth>(const Columns<scalar, pieces>& columns) {
      const dim3 grid(problem.batch * splits.count);
      const size_t shared = kOfWarps * sizeof(acc) + kStepShared<scalar, pieces, rows, depth>;
      launch(attend_one_step<scalar, pieces, rows, depth>, grid, kStepBlock, shared, stream, call, columns, scale);
    });
    if (splits.count > 1) {
      // Of weights, which are more than the columns as a rule, a thread takes several.
      const int64_t work = std::max<int64_t>({problem.memory_size, call.weights == nullptr ? 0 : problem.steps / 4, 1});
      const unsigned parts = parts_of(work);
      const size_t shared = 2 * (splits.count + kStepWarps) * sizeof(acc);
      launch_behind(merge_one_step<scalar>, dim3(problem.batch * parts), kStepBlock, shared, stream, call, parts);
    }
  });
}

void one_step_dot_backward(const OneStepBackward& call, Stream stream) {
  const Problem& problem = call.problem;
  const Splits& splits = call.splits;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    using acc = accumulated_t<scalar>;
    const auto scale = static_cast<acc>(problem.scale);
    const bool by_vectors = takes_vectors<scalar>(problem.query, problem.memory_size) &&
                            (call.grad_context.data == nullptr || takes_vectors<scalar>(call.grad_context, problem.memory_size));
    for_columns<scalar>(problem, by_vectors, [&]<int pieces, int rows, int depth>(const Columns<scalar, pieces>& columns) {
      const dim3 grid(problem.batch * splits.count);
      constexpr size_t query = kSharesQuery<scalar, pieces> ? pieces * kWarp * sizeof(Vector16) : 0;
      const size_t shared = kOfWarps * sizeof(acc) + kStepShared<scalar, pieces, rows, depth> + query;
      launch(differentiate_one_step<scalar, pieces, rows, depth>, grid, kStepBlock, shared, stream, call, columns, scale);
    });
    if (splits.count > 1 && call.grad_query != nullptr && problem.key_size > 0) {
      const unsigned parts = parts_of(problem.key_size);
      launch_behind(merge_grad_query<scalar>, dim3(problem.batch * parts), kStepBlock, 0, stream, call, parts);
    }
  });
}

}  // namespace attn_ext::cuda

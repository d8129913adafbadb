// Launches of the one-step dot kernels: how a row of memory is held, and how much is under way.
#include "one_step_dot.cuh"

#include "dtypes.h"
#include "launch.h"
#include "one_step_merge.h"

#include <algorithm>

namespace attn_ext::cuda {
namespace {

// A thread's pieces under way, those that it computes with among them: 32 KB a block.
constexpr int kUnderWay = 16;

// launch_of(columns, rows, depth): how a row is held.
template <class scalar, class Launch>
void for_columns(const Problem& problem, bool query_by_vectors, const Launch& launch_of) {
  const int64_t size = problem.memory_size;
  for_lanes_of_row<scalar>(size, [&]<int pieces>(std::integral_constant<int, pieces>, int log_lanes) {
    // Shuffles of several rows overlap; of long rows a warp has enough to do with one.
    constexpr int rows = std::clamp(4 / pieces, 1, 4);
    constexpr int depth = std::max(kUnderWay / (rows * pieces), 2);
    const Columns<scalar, pieces> columns{
        {log_lanes}, static_cast<int>(size), takes_vectors<scalar>(problem.memory, size), query_by_vectors};
    launch_of.template operator()<pieces, rows, depth>(columns);
  });
}

// Bytes of a block.
template <class scalar, int pieces, int rows, int depth>
constexpr size_t shared_size(bool backward, int64_t width = 1) {
  const size_t query = backward && kIsWide<scalar, pieces> ? pieces * kWarp * sizeof(Vector16) : 0;
  const size_t of_warp = kOfWarp * sizeof(accumulated_t<scalar>) + kStepShared<scalar, pieces, rows, depth>;
  return width * kStepWarps * of_warp + query;
}

}  // namespace

int64_t one_step_dot_blocks(const Problem& problem, bool backward) {
  int64_t blocks = 0;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    for_columns<scalar>(problem, false, [&]<int pieces, int rows, int depth>(const Columns<scalar, pieces>&) {
      blocks = std::min<int64_t>(
          kDotBlocks<scalar, pieces>, blocks_by_shared_memory(shared_size<scalar, pieces, rows, depth>(backward)));
    });
  });
  return blocks;
}

void one_step_dot(const OneStep& call, Stream stream) {
  const Problem& problem = call.problem;
  const Splits& splits = call.splits;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    using acc = accumulated_t<scalar>;
    const auto scale = static_cast<acc>(problem.scale);
    const bool query_by_vectors = takes_vectors<scalar>(problem.query, problem.memory_size);
    for_columns<scalar>(problem, query_by_vectors, [&]<int pieces, int rows, int depth>(const Columns<scalar, pieces>& columns) {
      const dim3 grid(problem.batch * splits.count);
      const int threads = kStepBlock * static_cast<int>(splits.width);
      const size_t shared = shared_size<scalar, pieces, rows, depth>(false, splits.width);
      launch(attend_one_step<scalar, pieces, rows, depth>, grid, threads, shared, stream, call, columns, scale);
    });
  });
  merge_splits(call, stream);
}

void one_step_dot_backward(const OneStepBackward& call, Stream stream) {
  const Problem& problem = call.problem;
  const Splits& splits = call.splits;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    using acc = accumulated_t<scalar>;
    const auto scale = static_cast<acc>(problem.scale);
    const bool by_vectors = takes_vectors<scalar>(problem.query, problem.memory_size) &&
                            (call.grad_context.data == nullptr || takes_vectors<scalar>(call.grad_context, problem.memory_size)) &&
                            reinterpret_cast<uintptr_t>(call.context) % sizeof(Vector16) == 0;
    for_columns<scalar>(problem, by_vectors, [&]<int pieces, int rows, int depth>(const Columns<scalar, pieces>& columns) {
      const dim3 grid(problem.batch * splits.count);
      const int threads = kStepBlock * static_cast<int>(splits.width);
      const size_t shared = shared_size<scalar, pieces, rows, depth>(true, splits.width);
      launch(differentiate_one_step<scalar, pieces, rows, depth>, grid, threads, shared, stream, call, columns, scale);
    });
  });
  merge_splits(call, stream);
}

}  // namespace attn_ext::cuda

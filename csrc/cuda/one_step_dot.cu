// Launches of the one-step dot kernels: how a row of memory is held, and how much is under way.
#include "one_step_dot.cuh"

#include "dtypes.h"
#include "launch.h"
#include "one_step_merge.h"

#include <algorithm>

namespace attn_ext::cuda {
namespace {

// A thread's pieces under way, those that it computes with among them: 32 KB a block of the usual width.
constexpr int kUnderWay = 16;

// launch_of<pieces, rows, depth>(log_lanes): how a row is held.
template <class scalar, class Launch>
void for_rows(const Problem& problem, const Launch& launch_of) {
  for_lanes_of_row<scalar>(problem.memory_size, [&]<int pieces>(std::integral_constant<int, pieces>, int log_lanes) {
    // Shuffles of several rows overlap; of long rows a warp has enough to do with one.
    constexpr int rows = std::clamp(4 / pieces, 1, 4);
    constexpr int depth = std::max(kUnderWay / (rows * pieces), 2);
    launch_of.template operator()<pieces, rows, depth>(log_lanes);
  });
}

template <class scalar, int pieces, bool any_width>
Columns<scalar, pieces, any_width> columns_of(const Problem& problem, int log_lanes, bool query_by_vectors) {
  const int64_t size = problem.memory_size;
  return {{log_lanes}, static_cast<int>(size), takes_vectors<scalar>(problem.memory, size), query_by_vectors};
}

// Bytes of a block.
template <class scalar, int pieces, int rows, int depth>
constexpr size_t shared_size(bool backward, int64_t width = 1) {
  const size_t query = backward && kIsLongRow<scalar, pieces> ? pieces * kWarp * sizeof(Vector16) : 0;
  const size_t of_warp = kOfWarp * sizeof(accumulated_t<scalar>) + kStepShared<scalar, pieces, rows, depth>;
  return width * kStepWarps * of_warp + query;
}

}  // namespace

int64_t one_step_dot_blocks(const Problem& problem, bool backward) {
  int64_t blocks = 0;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    for_rows<scalar>(problem, [&]<int pieces, int rows, int depth>(int) {
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
    const auto scale = static_cast<accumulated_t<scalar>>(problem.scale);
    const bool query_by_vectors = takes_vectors<scalar>(problem.query, problem.memory_size);
    for_rows<scalar>(problem, [&]<int pieces, int rows, int depth>(int log_lanes) {
      const dim3 grid(problem.batch * splits.count);
      const int threads = kStepBlock * static_cast<int>(splits.width);
      const size_t shared = shared_size<scalar, pieces, rows, depth>(false, splits.width);
      const auto columns = columns_of<scalar, pieces, true>(problem, log_lanes, query_by_vectors);
      launch(attend_one_step<scalar, pieces, rows, depth>, grid, threads, shared, stream, call, columns, scale);
    });
  });
  merge_splits(call, stream);
}

void one_step_dot_backward(const OneStepBackward& call, Stream stream) {
  const Problem& problem = call.problem;
  const Splits& splits = call.splits;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    const auto scale = static_cast<accumulated_t<scalar>>(problem.scale);
    const bool by_vectors = takes_vectors<scalar>(problem.query, problem.memory_size) &&
                            (call.grad_context.data == nullptr || takes_vectors<scalar>(call.grad_context, problem.memory_size)) &&
                            reinterpret_cast<uintptr_t>(call.context) % sizeof(Vector16) == 0;
    for_rows<scalar>(problem, [&]<int pieces, int rows, int depth>(int log_lanes) {
      // Not to know the width costs it 4 % of its instructions, where a forward's are the same.
      const auto launch_of_width = [&]<bool any_width>(std::bool_constant<any_width>) {
        const dim3 grid(problem.batch * splits.count);
        const int threads = kStepBlock * static_cast<int>(splits.width);
        const size_t shared = shared_size<scalar, pieces, rows, depth>(true, splits.width);
        const auto columns = columns_of<scalar, pieces, any_width>(problem, log_lanes, by_vectors);
        launch(differentiate_one_step<scalar, pieces, rows, depth, any_width>, grid, threads, shared, stream, call, columns, scale);
      };
      splits.width == 1 ? launch_of_width(std::false_type()) : launch_of_width(std::true_type());
    });
  });
  merge_splits(call, stream);
}

}  // namespace attn_ext::cuda

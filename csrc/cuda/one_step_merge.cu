// Launches of the merges: how many blocks share one, and how many threads a column.
#include "one_step_merge.h"

#include "one_step_merge.cuh"

#include "dtypes.h"
#include "launch.h"

#include <algorithm>

namespace attn_ext::cuda {
namespace {

// Threads to a column of `slabs`, so that each has few of them; columns of a block are a sector's of memory at least.
SlabBlocks blocks_of(int64_t slabs, int64_t size) {
  constexpr int each = 16, most = 32;
  int groups = 1;
  while (groups < most && groups * each < slabs) {
    groups *= 2;
  }
  const int width = kSlabThreads / groups;
  return {static_cast<unsigned>((size + width - 1) / width), groups};
}

}  // namespace

void merge_splits(const OneStep& call, Stream stream) {
  const Problem& problem = call.problem;
  if (call.splits.count == 1) {
    return;
  }
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    // Of weights, which are more than the columns as a rule, a thread takes several.
    const int64_t work = std::max<int64_t>({problem.memory_size, call.weights == nullptr ? 0 : problem.steps / 4, 1});
    const int parts = static_cast<int>((work + kStepBlock - 1) / kStepBlock);
    launch_behind<merge_one_step<scalar>>(dim3(problem.batch * parts), kStepBlock, 0, stream, call, parts);
  });
}

void merge_splits(const OneStepBackward& call, Stream stream) {
  const Problem& problem = call.problem;
  const int64_t splits = call.splits.count, size = problem.key_size;
  const bool has_query = call.grad_query != nullptr && splits > 1;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    const SlabBlocks of_v = call.grad_v == nullptr ? SlabBlocks{} : blocks_of(problem.batch * splits, size);
    const SlabBlocks of_query = has_query ? blocks_of(splits, size) : SlabBlocks{};
    const dim3 grid(of_v.count + problem.batch * of_query.count);
    const size_t shared = kSlabThreads * sizeof(accumulated_t<scalar>);
    launch_behind<merge_gradients<scalar>>(grid, kSlabThreads, shared, stream, call, of_v, of_query);
  });
}

}  // namespace attn_ext::cuda

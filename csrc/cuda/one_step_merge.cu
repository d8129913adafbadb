// Launches of the merges: how many blocks share one.
#include "one_step_merge.h"

#include "one_step_merge.cuh"

#include "dtypes.h"
#include "launch.h"

#include <algorithm>

namespace attn_ext::cuda {
void merge_splits(const OneStep& call, Stream stream) {
  const Problem& problem = call.problem;
  if (call.splits.count == 1) {
    return;
  }
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    // Of weights, which are more than the columns as a rule, a thread takes several.
    const int64_t work = std::max<int64_t>({problem.memory_size, call.weights == nullptr ? 0 : problem.steps / 4, 1});
    const int parts = static_cast<int>(ceil_div(work, kStepBlock));
    launch_behind<merge_one_step<scalar>>(dim3(problem.batch * parts), kStepBlock, 0, stream, call, parts);
  });
}

void merge_splits(const OneStepBackward& call, Stream stream) {
  const Problem& problem = call.problem;
  const int64_t splits = call.splits.count, size = problem.key_size;
  const bool has_query = call.grad_query != nullptr && splits > 1;
  for_dtype(problem.dtype, [&]<class scalar>(scalar) {
    const SlabBlocks of_v = call.grad_v == nullptr ? SlabBlocks{} : slab_blocks(problem.batch * splits, size);
    const SlabBlocks of_query = has_query ? slab_blocks(splits, size) : SlabBlocks{};
    const dim3 grid(of_v.count + problem.batch * of_query.count);
    const size_t shared = kSlabThreads * sizeof(accumulated_t<scalar>);
    launch_behind<merge_gradients<scalar>>(grid, kSlabThreads, shared, stream, call, of_v, of_query);
  });
}

}  // namespace attn_ext::cuda

// Launches of the kernels of masked rows.
#include "masked_rows.cuh"

#include "dtypes.h"
#include "launch.h"

namespace attn_ext::cuda {
namespace {

void launch_by_row(auto kernel, const MemoryRows& call, bool by_vectors, Stream stream) {
  const int64_t threads = call.problem.batch * call.problem.steps * kWarp;
  launch(kernel, dim3(ceil_div(threads, kRowsBlock)), kRowsBlock, 0, stream, call, by_vectors);
}

}  // namespace

void copy_attended_rows(const MemoryRows& call, Stream stream) {
  for_dtype(call.problem.dtype, [&]<class scalar>(scalar) {
    const bool by_vectors = takes_vectors<scalar>(call.problem.memory, call.problem.memory_size);  // the copy is fresh
    launch_by_row(copy_rows<scalar>, call, by_vectors, stream);
  });
}

void clear_masked_rows(const MemoryRows& call, Stream stream) {
  for_dtype(call.problem.dtype, [&]<class scalar>(scalar) {
    const auto address = reinterpret_cast<uintptr_t>(call.rows);
    const bool by_vectors = address % 16 == 0 && call.problem.memory_size % kLanes<scalar> == 0;
    launch_by_row(clear_rows<scalar>, call, by_vectors, stream);
  });
}

}  // namespace attn_ext::cuda

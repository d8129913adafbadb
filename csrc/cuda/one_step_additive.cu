#include "one_step_additive.cuh"

#include "dtypes.h"
#include "launch.h"

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

}  // namespace

void one_step_additive(const OneStep& call, Stream stream) {
  for_dtype(call.problem.dtype, [&]<class scalar>(scalar) {
    launch_one_step<scalar>(attend_one_step_additive<scalar>, call, false, stream);
  });
}

void one_step_additive_backward(const OneStepBackward& call, Stream stream) {
  for_dtype(call.problem.dtype, [&]<class scalar>(scalar) {
    launch_one_step<scalar>(differentiate_one_step_additive<scalar>, call, true, stream);
  });
}

}  // namespace attn_ext::cuda

// What a kernel file exports: its functions by dtype.
#pragma once

#include "many_queries.h"
#include "one_query.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

template <class Forwards, class Backwards, class Score>
constexpr Kernels kKernels = {
    Forwards::slot_size,
    Forwards::run,
    Forwards::merge,
    Backwards::slot_size,
    Backwards::run,
    Backwards::merge,
    Score::prepare,
    Score::sum_v};

// One query goes its own way. The halves share float's kernels, which convert as they load and store.
template <template <class> class Score, template <class> class Gradient, template <class> class OneQuery>
const Kernels& kernels_of(Dtype dtype, bool one_query) {
  const auto of = [&](auto example) -> const Kernels& {
    using acc = decltype(example);
    if (one_query) {
      return kKernels<OneQueryForward<OneQuery<acc>>, OneQueryBackward<OneQuery<acc>>, Score<acc>>;
    }
    return kKernels<AttentionForward<Score<acc>>, AttentionBackward<Gradient<acc>>, Score<acc>>;
  };
  return dtype == Dtype::Double ? of(double()) : of(float());
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

// What a kernel file exports: its functions by dtype.
#pragma once

#include "attention.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// The halves share float's kernels, which convert as they load and store.
template <template <class> class Score, template <class> class Gradient>
const Kernels& kernels_of(Dtype dtype) {
  const auto of = [](auto example) -> const Kernels& {
    using acc = decltype(example);
    using Forwards = AttentionForward<Score<acc>>;
    using Backwards = AttentionBackward<Gradient<acc>>;
    static constexpr Kernels kernels = {
        Forwards::slot_size,
        Forwards::run,
        Forwards::merge,
        Backwards::slot_size,
        Backwards::run,
        Backwards::merge,
        Score<acc>::prepare};
    return kernels;
  };
  return dtype == Dtype::Double ? of(double()) : of(float());
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

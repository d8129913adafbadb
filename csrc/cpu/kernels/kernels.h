// What a kernel file exports: its functions by dtype.
#pragma once

#include "attention.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

template <class Score, class Gradient>
constexpr Kernels kKernels = {
    AttentionForward<Score>::slot_size,
    AttentionForward<Score>::run,
    AttentionForward<Score>::merge,
    AttentionBackward<Gradient>::slot_size,
    AttentionBackward<Gradient>::run,
    AttentionBackward<Gradient>::merge,
    Score::prepare};

// The halves share float's kernels, which convert as they load and store.
template <template <class> class Score, template <class> class Gradient>
const Kernels& kernels_of(Dtype dtype) {
  return dtype == Dtype::Double ? kKernels<Score<double>, Gradient<double>> : kKernels<Score<float>, Gradient<float>>;
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

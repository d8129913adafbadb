// What a kernel file exports: its functions by dtype.
#pragma once

#include "many_queries_backward.h"
#include "many_queries_forward.h"
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

// One query goes its own way. The halves share float's kernels, which convert as they load and store, but for products of pairs.
template <template <class> class Score, template <class> class Gradient, template <class> class OneQuery>
const Kernels& kernels_of(Dtype product_dtype, bool one_query, [[maybe_unused]] int64_t chunk) {
#if defined(__AVX512BF16__)
  if (product_dtype == Dtype::BFloat16 && chunk >= kPairedRows) {
    return kKernels<ManyQueriesForward<Score<Pair>>, ManyQueriesBackward<Gradient<Pair>>, Score<Pair>>;
  }
#endif
  const auto of = [&](auto example) -> const Kernels& {
    using acc = decltype(example);
    if (one_query) {
      return kKernels<OneQueryForward<OneQuery<acc>>, OneQueryBackward<OneQuery<acc>>, Score<acc>>;
    }
    return kKernels<ManyQueriesForward<Score<acc>>, ManyQueriesBackward<Gradient<acc>>, Score<acc>>;
  };
  return product_dtype == Dtype::Double ? of(double()) : of(float());
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

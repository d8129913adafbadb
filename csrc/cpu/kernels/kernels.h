// What a kernel file exports: its functions by dtype.
#pragma once

#include "attention.h"
#include "one_query.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// One query goes its own way.
template <class One, class Many>
struct ByQueries {
  template <class Call>
  static size_t slot_size(const Call& f) {
    return f.problem.queries == 1 ? One::slot_size(f) : Many::slot_size(f);
  }

  template <class Call>
  static void run(const Call& f, int64_t item, char* slot) {
    f.problem.queries == 1 ? One::run(f, item, slot) : Many::run(f, item, slot);
  }

  template <class Call>
  static void merge(const Call& f, int64_t index, char* slots, size_t slot_size) {
    f.problem.queries == 1 ? One::merge(f, index, slots, slot_size) : Many::merge(f, index, slots, slot_size);
  }
};

// The halves share float's kernels, which convert as they load and store.
template <template <class> class Score, template <class> class Gradient, template <class> class OneQuery>
const Kernels& kernels_of(Dtype dtype) {
  const auto of = [](auto example) -> const Kernels& {
    using acc = decltype(example);
    using Forwards = ByQueries<OneQueryForward<OneQuery<acc>>, AttentionForward<Score<acc>>>;
    using Backwards = ByQueries<OneQueryBackward<OneQuery<acc>>, AttentionBackward<Gradient<acc>>>;
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

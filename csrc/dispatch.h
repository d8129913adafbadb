// The ops by name, from wherever they are called in C++, and what a call within one of them stands beneath.
#pragma once

#include "attention.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>
#include <vector>

namespace attn_ext {

using Forwards = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;  // what the forward ops return

// Beneath autograd, and beneath autocast, which has had its say when the arguments were made.
class BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below_autograd_;
  c10::impl::ExcludeDispatchKeyGuard below_autocast_{c10::autocast_dispatch_keyset};
};

template <class Signature>
auto find(const char* op) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(op, "").typed<Signature>();
}

}  // namespace attn_ext

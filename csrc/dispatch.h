// The ops by name, from wherever they are called in C++, and what a call within one of them stands beneath.
#pragma once

#include "attention.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>
#include <vector>

namespace attn_ext {

using Forwards = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;  // what the forward ops return

inline OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor.value_or(Tensor());
}

// Beneath autograd, and beneath autocast, which has had its say when the arguments were made: for what has products in it.
class BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below_autograd_;
  c10::impl::ExcludeDispatchKeyGuard below_autocast_{c10::autocast_dispatch_keyset};
};

// Of two tensors, query and memory, is dot; of three, query, keys and values, keyed dot; of four, query, keys, v
// and values, additive. Each has a backward op, of the same name and "_backward".
constexpr char kDot[] = "attn_ext::dot_attention";
constexpr char kKeyedDot[] = "attn_ext::keyed_dot_attention";
constexpr char kAdditive[] = "attn_ext::additive_attention";

// For each of an op's tensors, by its number.
template <size_t>
using Input = const Tensor&;
template <size_t>
using Gradient = Tensor;

// need_weights, need_exact
template <size_t... i>
using ForwardOp = Forwards(Input<i>..., const OptionalTensor& lengths, const OptionalTensor& mask, double scale, bool, bool);

template <class Signature>
auto find(const char* op) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(op, "").typed<Signature>();
}

}  // namespace attn_ext

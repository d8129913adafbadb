// Calls of the registered ops from C++, and the guards (autograd, autocast) beneath which they call each other.
#pragma once

#include "attention.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace attn_ext {

// What the op returns: context, weights, log-sum-exp, and the first two as they were accumulated.
using OpResults = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;
using NeedExact = std::array<bool, 2>;  // which of context and weights are wanted as they were accumulated
using Wanted = std::array<bool, 5>;     // which gradients, in their order

inline OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor.value_or(Tensor());
}

// Whether a backward of such tensors reads the context. A forward that asks leaves out, or does not keep, what nobody reads.
bool needs_context(const Inputs& inputs);

// What a backward is given of a forward's results: as they were accumulated, and undefined where it has no use for them.
struct Kept {
  Kept(const OpResults& outputs, bool needs_context, bool takes_weights) : logsumexp(std::get<2>(outputs)) {
    const auto& [given_context, given_weights, _, exact] = outputs;
    const bool rounded = !exact.empty();
    if (needs_context) {
      context = rounded ? exact[0] : given_context;
    }
    if (takes_weights) {
      weights = rounded ? exact[1] : given_weights;
    }
  }

  Tensor context, weights, logsumexp;
};

// Whether any of the tensors, optional or not, takes part in forward mode, which the ops do not have.
template <class... Tensors>
bool have_tangents(const Tensors&... tensors) {
  const auto has_tangent = []<class T>(const T& tensor) {
    if constexpr (std::is_same_v<T, Tensor>) {
      return tensor._fw_grad(0).defined();
    } else {
      return tensor && tensor->_fw_grad(0).defined();
    }
  };
  return (has_tangent(tensors) || ...);
}

// Beneath autograd, and beneath autocast, which has had its say when the arguments were made: for what has products in it.
class BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below_autograd_;
  c10::impl::ExcludeDispatchKeyGuard below_autocast_{c10::autocast_dispatch_keyset};
};

template <class Signature>
auto find(const char* op) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(op, "").typed<Signature>();
}

// The op `name` as a function; `Signature` tells what its arguments are.
template <const char* name, class Signature>
struct Op;

template <const char* name, class Result, class... Arguments>
struct Op<name, Result(Arguments...)> {
  static Result call(Arguments... arguments) {
    static const auto op = find<Result(Arguments...)>(name);
    return op.call(arguments...);
  }
};

inline constexpr char kAttention[] = "attn_ext::attention";
using Attention =
    Op<kAttention,
       OpResults(
           const Tensor& query,
           const Tensor& memory,
           const OptionalTensor& keys,
           const OptionalTensor& v,
           const OptionalTensor& prepared_keys,
           const OptionalTensor& lengths,
           const OptionalTensor& mask,
           double scale,
           bool need_weights,
           NeedExact need_exact)>;

inline OpResults attend(const Inputs& inputs, bool need_weights, NeedExact need_exact) {
  const auto& [query, memory, keys, v, prepared_keys, lengths, mask, scale] = inputs;
  return Attention::call(query, memory, keys, v, prepared_keys, lengths, mask, scale, need_weights, need_exact);
}

inline constexpr char kAttentionBackward[] = "attn_ext::attention_backward";
using AttentionBackward =
    Op<kAttentionBackward,
       std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
           const OptionalTensor& grad_context,
           const OptionalTensor& grad_weights,
           const Tensor& query,
           const Tensor& memory,
           const OptionalTensor& keys,
           const OptionalTensor& v,
           const OptionalTensor& prepared_keys,
           const OptionalTensor& lengths,
           const OptionalTensor& mask,
           double scale,
           const OptionalTensor& context,
           const OptionalTensor& weights,
           const Tensor& logsumexp,
           Wanted wanted)>;

// Of what is not wanted there is a tensor without elements.
inline Gradients differentiate(const Inputs& inputs, const BackwardInputs& saved, const Wanted& wanted) {
  const auto& [query, memory, keys, v, prepared_keys, lengths, mask, scale] = inputs;
  const auto& [grad_context, grad_weights, context, weights, logsumexp] = saved;
  auto [of_query, of_memory, of_keys, of_v, of_scores] = AttentionBackward::call(
      grad_context, grad_weights, query, memory, keys, v, prepared_keys, lengths, mask, scale, context, weights, logsumexp, wanted);
  return {std::move(of_query), std::move(of_memory), std::move(of_keys), std::move(of_v), std::move(of_scores)};
}

inline constexpr char kProjectedAttention[] = "attn_ext::projected_attention";
using ProjectedAttention =
    Op<kProjectedAttention,
       std::tuple<Tensor, Tensor>(
           const Tensor& query,
           const Tensor& weight,
           const Tensor& memory,
           const OptionalTensor& v,
           const OptionalTensor& bias,
           const OptionalTensor& lengths,
           const OptionalTensor& mask,
           double scale,
           bool need_weights,
           bool by_keys)>;

inline constexpr char kMemoryAttention[] = "attn_ext::memory_attention";
using MemoryAttention =
    Op<kMemoryAttention,
       std::tuple<Tensor, Tensor>(
           const Tensor& query,
           const OptionalTensor& query_weight,
           const Tensor& memory,
           const OptionalTensor& keys,
           const OptionalTensor& v,
           const OptionalTensor& prepared_keys,
           const OptionalTensor& lengths,
           const OptionalTensor& mask,
           double scale,
           bool need_weights,
           const OptionalTensor& node)>;

inline constexpr char kPrepareKeys[] = "attn_ext::prepare_keys";
using PrepareKeys = Op<kPrepareKeys, Tensor(const Tensor& keys)>;

inline constexpr char kAdditiveScoresBackward[] = "attn_ext::additive_scores_backward";
using AdditiveScoresBackward =
    Op<kAdditiveScoresBackward,
       std::tuple<Tensor, Tensor>(
           const Tensor& grad_scores,
           const Tensor& query,
           const Tensor& keys,
           const Tensor& v,
           const OptionalTensor& prepared_keys,
           const OptionalTensor& lengths,
           const OptionalTensor& mask,
           std::array<bool, 2> wanted)>;

}  // namespace attn_ext

// The op's autograd: what a forward saves, and the backward op that turns its outputs' gradients into its inputs'.
//
// Saved are the inputs, the context where the backward op reads it, the weights where the caller keeps them, both as they were
// accumulated, and the log-sum-exp of the scores, from which the backward op recomputes the weights where not. The backward op's
// own derivative is attn_ext/autograd.py's.
#include "dispatch.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace attn_ext {
namespace {

using at::AutoDispatchBelowADInplaceOrView;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct AttentionNode : torch::autograd::Function<AttentionNode> {
  // The tensors that have gradients: forward's first arguments. Each is there only if those before it are, so the numbers are those
  // of the edges.
  enum Input { kQuery, kMemory, kKeys, kV, kInputs };
  enum Saved { kPreparedKeys = kInputs, kLengths, kMask, kContext, kWeights, kLogsumexp };

  // The context, and the weights where they are asked for and have a derivative; all that the op returns goes to `outputs`.
  static variable_list forward(
      AutogradContext* ctx,
      const Tensor& query,
      const Tensor& memory,
      const OptionalTensor& keys,
      const OptionalTensor& v,
      const Inputs* inputs,
      bool need_weights,
      OpResults* outputs) {
    const AutoDispatchBelowADInplaceOrView guard;
    const bool with_context = needs_context(*inputs);
    *outputs = attend(*inputs, need_weights, {with_context, true});
    const Kept kept(*outputs, with_context, need_weights);
    ctx->set_materialize_grads(false);
    ctx->saved_data["scale"] = inputs->scale;
    ctx->save_for_backward(
        {query,
         memory,
         or_undefined(keys),
         or_undefined(v),
         or_undefined(inputs->prepared_keys),
         or_undefined(inputs->lengths),
         or_undefined(inputs->mask),
         kept.context,
         kept.weights,
         kept.logsumexp});
    const auto& [context, weights, _, exact] = *outputs;
    const bool scores_vary = query.requires_grad() || (keys ? *keys : memory).requires_grad() || (v && v->requires_grad());
    return need_weights && scores_vary ? variable_list{context, weights} : variable_list{context};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list results(kInputs + 3);  // as many as forward's arguments
    const Tensor grad_context = incoming[0], grad_weights = incoming.size() > 1 ? incoming[1] : Tensor();
    if (!grad_context.defined() && !grad_weights.defined()) {
      return results;
    }
    const variable_list saved = ctx->get_saved_variables();
    Wanted wanted{};
    for (size_t i = 0; i < kInputs; ++i) {
      wanted[i] = saved[i].defined() && ctx->needs_input_grad(i);
    }
    // Under create_graph=True this backward is itself to be differentiated.
    std::optional<AutoDispatchBelowADInplaceOrView> guard;
    if (!at::GradMode::is_enabled()) {
      guard.emplace();
    }
    const Gradients computed = differentiate(
        {saved[kQuery],
         saved[kMemory],
         if_defined(saved[kKeys]),
         if_defined(saved[kV]),
         if_defined(saved[kPreparedKeys]),
         if_defined(saved[kLengths]),
         if_defined(saved[kMask]),
         ctx->saved_data["scale"].toDouble()},
        {if_defined(grad_context),
         if_defined(grad_weights),
         if_defined(saved[kContext]),
         if_defined(saved[kWeights]),
         saved[kLogsumexp]},
        wanted);
    const Tensor* const gradients[] = {&computed.query, &computed.memory, &computed.keys, &computed.v};
    for (size_t i = 0; i < kInputs; ++i) {
      results[i] = wanted[i] ? *gradients[i] : Tensor();
    }
    return results;
  }
};

OpResults attention(
    const Tensor& query,
    const Tensor& memory,
    const OptionalTensor& keys,
    const OptionalTensor& v,
    const OptionalTensor& prepared_keys,
    const OptionalTensor& lengths,
    const OptionalTensor& mask,
    double scale,
    bool need_weights,
    NeedExact need_exact) {
  const Inputs inputs{query, memory, keys, v, prepared_keys, lengths, mask, scale};
  if (!have_tangents(query, memory, keys, v) && !torch::autograd::compute_requires_grad(query, memory, keys, v)) {
    const AutoDispatchBelowADInplaceOrView guard;
    return attend(inputs, need_weights, need_exact);
  }
  OpResults outputs;
  // Where there are tangents, apply() says that there is no forward mode.
  const variable_list differentiable = AttentionNode::apply(query, memory, keys, v, &inputs, need_weights, &outputs);
  std::get<0>(outputs) = differentiable[0];
  if (differentiable.size() > 1) {
    std::get<1>(outputs) = differentiable[1];
  }
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(attn_ext, Autograd, m) {
  m.impl("attention", attention);
}

}  // namespace attn_ext

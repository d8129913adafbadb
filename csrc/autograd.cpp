// The ops' autograd: what a forward op saves, and the backward op that turns its outputs' gradients into its inputs'.
//
// Saved are the inputs, the context where the backward op reads it, the weights where the caller keeps them, both as they were
// accumulated, and the log-sum-exp of the scores, from which the backward op recomputes the weights where not. A backward op's own
// derivative is attn_ext/autograd.py's.
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

// An op and its backward as a node of the graph. The first `scored` of its inputs make the scores; the weights depend on no other.
template <class Op, size_t scored, class = std::make_index_sequence<Op::kInputs>>
struct Autograd;

template <class Op, size_t scored, size_t... i>
struct Autograd<Op, scored, std::index_sequence<i...>> {
  static Forwards forward(
      Input<i>... inputs,
      const OptionalTensor& lengths,
      const OptionalTensor& mask,
      double scale,
      bool need_weights,
      NeedExact need_exact) {
    if (!have_tangents(inputs...) && !torch::autograd::compute_requires_grad(inputs...)) {
      const AutoDispatchBelowADInplaceOrView guard;
      return Op::forward(inputs..., lengths, mask, scale, need_weights, need_exact);
    }
    Forwards outputs;
    // Where there are tangents, apply() says that there is no forward mode.
    const variable_list differentiable = Differentiable::apply(inputs..., lengths, mask, scale, need_weights, &outputs);
    std::get<0>(outputs) = differentiable[0];
    if (differentiable.size() > 1) {
      std::get<1>(outputs) = differentiable[1];
    }
    return outputs;
  }

 private:
  struct Differentiable : torch::autograd::Function<Differentiable> {
    // The context, and the weights where they are asked for and have a derivative; all that the op returns goes to `outputs`.
    static variable_list forward(
        AutogradContext* ctx,
        Input<i>... inputs,
        const OptionalTensor& lengths,
        const OptionalTensor& mask,
        double scale,
        bool need_weights,
        Forwards* outputs) {
      const AutoDispatchBelowADInplaceOrView guard;
      const bool with_context = Op::takes_context(inputs...);
      *outputs = Op::forward(inputs..., lengths, mask, scale, need_weights, {with_context, true});
      const Kept kept(*outputs, with_context, need_weights);
      ctx->set_materialize_grads(false);
      ctx->saved_data["scale"] = scale;
      ctx->save_for_backward({inputs..., or_undefined(lengths), or_undefined(mask), kept.context, kept.weights, kept.logsumexp});
      const auto& [context, weights, _, exact] = *outputs;
      const bool weights_vary = need_weights && ((i < scored && inputs.requires_grad()) || ...);
      return weights_vary ? variable_list{context, weights} : variable_list{context};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
      variable_list results(Op::kInputs + 5);  // as many as forward's arguments
      const Tensor grad_context = grads[0], grad_weights = grads.size() > 1 ? grads[1] : Tensor();
      if (!grad_context.defined() && !grad_weights.defined()) {
        return results;
      }
      const variable_list saved = ctx->get_saved_variables();
      const Tensor &lengths = saved[Op::kInputs], &mask = saved[Op::kInputs + 1];
      const Tensor &context = saved[Op::kInputs + 2], &weights = saved[Op::kInputs + 3], &logsumexp = saved[Op::kInputs + 4];
      const std::array<bool, Op::kInputs> wanted{ctx->needs_input_grad(i)...};
      // Under create_graph=True this backward is itself to be differentiated.
      std::optional<AutoDispatchBelowADInplaceOrView> guard;
      if (!at::GradMode::is_enabled()) {
        guard.emplace();
      }
      const auto computed = Op::backward(
          if_defined(grad_context),
          if_defined(grad_weights),
          saved[i]...,
          if_defined(lengths),
          if_defined(mask),
          ctx->saved_data["scale"].toDouble(),
          if_defined(context),
          if_defined(weights),
          logsumexp,
          wanted);
      ((results[i] = wanted[i] ? std::get<i>(computed) : Tensor()), ...);
      return results;
    }
  };
};

}  // namespace

TORCH_LIBRARY_IMPL(attn_ext, Autograd, m) {
  m.impl("dot_attention", Autograd<DotOp, 2>::forward);
  m.impl("keyed_dot_attention", Autograd<KeyedDotOp, 2>::forward);
  m.impl("additive_attention", Autograd<AdditiveOp, 3>::forward);
}

}  // namespace attn_ext

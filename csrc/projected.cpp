// General and concat attention with their projections as one node of the graph.
//
//   general   (W q) . m = q . (W^T m)                 dot on W q, or keyed dot on the keys W^T m, halves' of m - average
//   concat    v . tanh(Wq q + Wk m + bias)            additive on both, with [Wq Wk] = W
//
// Between nodes of their own, the projections' gradients would be tensors of memory's size and small calls' time: here the memory's
// joins that of the op in place, and a weight's parts are written where they belong.
#include "dispatch.h"
#include "projection.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>
#include <vector>

namespace attn_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Options {
  bool by_keys;  // of general: whether the memory is what is projected
  const OptionalTensor& lengths;
  const OptionalTensor& mask;
  double scale;

  Masking masking() const {
    return {lengths, mask};
  }
};

// What is projected to keys.
Tensor rows_of_keys(const Tensor& memory, const Options& options) {
  return options.by_keys ? centred(memory, options.masking()) : memory;
}

// A call's tensors as they meet: the query and, if there are any, the keys, projected.
struct Projected {
  Tensor query;
  OptionalTensor keys;

  static Projected make(
      const Tensor& query, const Tensor& memory, const Parts& parts, const OptionalTensor& bias, const Options& options) {
    return {
        parts.of_query.defined() ? project(query, parts.of_query) : query,
        parts.of_keys.defined()
            ? OptionalTensor(project_memory(rows_of_keys(memory, options), parts.of_keys, bias, options.masking()))
            : std::nullopt};
  }

  Inputs with(const Tensor& memory, const OptionalTensor& v, const Options& options) const {
    static const OptionalTensor unprepared;
    return {query, memory, keys, v, unprepared, options.lengths, options.mask, options.scale};
  }
};

struct ProjectedNode : torch::autograd::Function<ProjectedNode> {
  // The tensors that have gradients: forward's first arguments. There is no bias without a v, so the numbers are those of the
  // edges.
  enum Input { kQuery, kWeight, kMemory, kV, kBias, kInputs };
  enum Saved { kLengths = kInputs, kMask, kProjected, kKeys, kContext, kWeights, kLogsumexp };

  // The context, and the weights where they are asked for. These always have a derivative: whatever has one takes part in the
  // scores.
  static variable_list forward(
      AutogradContext* ctx,
      const Tensor& query,
      const Tensor& weight,
      const Tensor& memory,
      const OptionalTensor& v,
      const OptionalTensor& bias,
      const Options* options,
      bool need_weights) {
    const BelowAutograd guard;
    const auto projected = Projected::make(query, memory, Parts(weight, memory, v.has_value(), options->by_keys), bias, *options);
    const Inputs inputs = projected.with(memory, v, *options);
    const bool with_context = needs_context(inputs);
    const OpResults outputs = attend(inputs, need_weights, {with_context, true});
    const Kept kept(outputs, with_context, need_weights);
    ctx->set_materialize_grads(false);
    ctx->saved_data["scale"] = options->scale;
    ctx->saved_data["by_keys"] = options->by_keys;
    ctx->save_for_backward(
        {query,
         weight,
         memory,
         or_undefined(v),
         or_undefined(bias),
         or_undefined(options->lengths),
         or_undefined(options->mask),
         projected.query.is_same(query) ? Tensor() : projected.query,
         or_undefined(projected.keys),
         kept.context,
         kept.weights,
         kept.logsumexp});
    const auto& [context, weights, _, exact] = outputs;
    return need_weights ? variable_list{context, weights} : variable_list{context};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    const variable_list grads{incoming[0], incoming.size() > 1 ? incoming[1] : Tensor()};
    variable_list results(kInputs + 2);  // as many as forward's arguments
    if (!grads[0].defined() && !grads[1].defined()) {
      return results;
    }
    refuse_batches(grads);
    const variable_list saved = ctx->get_saved_variables();
    const OptionalTensor lengths = if_defined(saved[kLengths]), mask = if_defined(saved[kMask]);
    const Options options{ctx->saved_data["by_keys"].toBool(), lengths, mask, ctx->saved_data["scale"].toDouble()};
    std::array<bool, kInputs> wanted{};
    for (size_t i = 0; i < kInputs; ++i) {
      wanted[i] = saved[i].defined() && ctx->needs_input_grad(i);
    }
    if (!at::GradMode::is_enabled()) {
      differentiate(grads, saved, options, wanted, results);
      return results;
    }
    const variable_list computed = differentiably(saved, wanted, grads, [&](const variable_list& inputs) -> variable_list {
      const Tensor& memory = inputs[kMemory];
      const OptionalTensor v = if_defined(inputs[kV]);
      const Parts parts(inputs[kWeight], memory, v.has_value(), options.by_keys);
      const Tensor attended = without_masked_rows(memory, options.masking());
      const auto projected = Projected::make(inputs[kQuery], attended, parts, if_defined(inputs[kBias]), options);
      auto [context, weights, logsumexp, exact] = attend(projected.with(memory, v, options), grads[1].defined(), {});
      return {std::move(context), std::move(weights)};
    });
    std::copy(computed.begin(), computed.end(), results.begin());
    return results;
  }

 private:
  static void differentiate(
      const variable_list& grads,
      const variable_list& saved,
      const Options& options,
      const std::array<bool, kInputs>& wanted,
      variable_list& results) {
    const BelowAutograd guard;
    const Tensor &query = saved[kQuery], &weight = saved[kWeight], &memory = saved[kMemory];
    const bool is_concat = saved[kV].defined();
    const Parts parts(weight, memory, is_concat, options.by_keys);
    const Projected projected{parts.of_query.defined() ? saved[kProjected] : query, if_defined(saved[kKeys])};
    const Gradients computed = attn_ext::differentiate(
        projected.with(memory, if_defined(saved[kV]), options),
        {if_defined(grads[0]), if_defined(grads[1]), if_defined(saved[kContext]), if_defined(saved[kWeights]), saved[kLogsumexp]},
        {wanted[kQuery] || (wanted[kWeight] && parts.of_query.defined()),
         wanted[kMemory],
         parts.of_keys.defined() && (wanted[kWeight] || wanted[kMemory] || wanted[kBias]),
         wanted[kV],
         false});
    const RowSubset attended = parts.of_keys.defined() ? rows_to_multiply(memory, options.masking()) : std::nullopt;
    if (wanted[kQuery]) {
      results[kQuery] = parts.of_query.defined() ? grad_of_input(computed.query, parts.of_query, query) : computed.query;
    }
    if (wanted[kWeight]) {
      results[kWeight] = at::empty_symint(weight.sym_sizes(), weight.options());
      const Parts into(results[kWeight], memory, is_concat, options.by_keys);
      if (into.of_query.defined()) {
        write_grad_of_weight(into.of_query, computed.query, query);
      }
      if (into.of_keys.defined()) {
        write_grad_of_key_weight(into.of_keys, computed.keys, rows_of_keys(memory, options), options.masking(), attended);
      }
    }
    if (wanted[kMemory]) {
      results[kMemory] =
          parts.of_keys.defined() ? add_grad_of_input(computed.memory, computed.keys, parts.of_keys, attended) : computed.memory;
    }
    if (wanted[kV]) {
      results[kV] = computed.v;
    }
    if (wanted[kBias]) {
      results[kBias] = at::sum(rows_of(computed.keys), 0, false, saved[kBias].scalar_type());
    }
  }
};

// A query [B, T, Dq] or [B, Dq] against a memory: concat with a v, general without.
std::tuple<Tensor, Tensor> projected_attention(
    const Tensor& query,
    const Tensor& weight,
    const Tensor& memory,
    const OptionalTensor& v,
    const OptionalTensor& bias,
    const OptionalTensor& lengths,
    const OptionalTensor& mask,
    double scale,
    bool need_weights,
    bool by_keys) {
  check_dense("query", query);
  TORCH_CHECK_VALUE(
      query.dim() == 3 || query.dim() == 2, "query has shape ", query.sym_sizes(), ", needed is [B, T, size] or [B, size]");
  check_projection(query, weight, memory, v, bias);
  const Options options{by_keys, lengths, mask, scale};
  if (!have_tangents(query, weight, memory, v, bias) && !torch::autograd::compute_requires_grad(query, weight, memory, v, bias)) {
    const BelowAutograd guard;
    const auto projected = Projected::make(query, memory, Parts(weight, memory, v.has_value(), by_keys), bias, options);
    auto [context, weights, logsumexp, exact] = attend(projected.with(memory, v, options), need_weights, {});
    return {std::move(context), std::move(weights)};
  }
  // Where there are tangents, apply() says that there is no forward mode.
  const variable_list outputs = ProjectedNode::apply(query, weight, memory, v, bias, &options, need_weights);
  return {outputs[0], outputs.size() > 1 ? outputs[1] : at::empty({0}, query.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(attn_ext, CompositeImplicitAutograd, m) {
  m.impl("projected_attention", projected_attention);
}

}  // namespace attn_ext

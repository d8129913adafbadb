// Every op's schema, registration and argument checks: the only file that says what exists.
#include "attention.h"
#include "cuda/build.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace attn_ext {
namespace {

using Forwards = std::tuple<Tensor, Tensor, Tensor>;

bool is_meta(const Tensor& tensor) {
  return tensor.is_meta();
}

at::ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The public functions check with friendlier words; these checks keep a direct call of an op from reading what is not there.
void check_argument(const char* name, const Tensor& tensor, at::ScalarType type, const Tensor& query, c10::SymIntArrayRef shape) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " is ", tensor.scalar_type(), ", needed is ", type);
  TORCH_CHECK_VALUE(tensor.device() == query.device(), name, " is on ", tensor.device(), ", but query is on ", query.device());
  TORCH_CHECK_VALUE(tensor.sym_sizes() == shape, name, " has shape ", tensor.sym_sizes(), ", needed is ", shape);
}

void check(const Inputs& inputs) {
  const Tensor& query = inputs.query;
  const Tensor& memory = inputs.memory;
  const auto type = query.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
      "query is ",
      type,
      "; needed is float32, float64, bfloat16 or float16");
  TORCH_CHECK_VALUE(query.dim() == 3, "query has shape ", query.sym_sizes(), ", needed is [B, T, size]");
  TORCH_CHECK_VALUE(memory.dim() == 3, "memory has shape ", memory.sym_sizes(), ", needed is [B, S, size]");
  const c10::SymInt B = query.sym_size(0), T = query.sym_size(1), S = memory.sym_size(1), size = query.sym_size(2);
  if (inputs.keys == nullptr) {
    check_argument("memory", memory, type, query, {B, S, size});
  } else {
    check_argument("values", memory, type, query, {B, S, memory.sym_size(2)});
    check_argument("keys", *inputs.keys, type, query, {B, S, size});
    check_argument("v", *inputs.v, type, query, {size});
  }
  if (inputs.lengths) {
    check_argument("lengths", *inputs.lengths, at::kLong, query, {B});
  }
  if (inputs.mask && inputs.mask->dim() == 2) {
    check_argument("mask", *inputs.mask, at::kBool, query, {B, S});
  } else if (inputs.mask) {
    check_argument("mask", *inputs.mask, at::kBool, query, {B, T, S});
  }
}

void check(const Inputs& inputs, const Saved& saved) {
  check(inputs);
  const Tensor& query = inputs.query;
  const auto type = query.scalar_type(), accumulated = accumulation_type(query);
  const c10::SymInt B = query.sym_size(0), T = query.sym_size(1), S = inputs.memory.sym_size(1);
  const c10::SymInt size = inputs.memory.sym_size(2);
  check_argument("context", saved.context, accumulated, query, {B, T, size});
  check_argument("logsumexp", saved.logsumexp, accumulated, query, {B, T});
  if (saved.weights) {
    check_argument("weights", *saved.weights, accumulated, query, {B, T, S});
  }
  if (saved.grad_context) {
    check_argument("grad_context", *saved.grad_context, type, query, {B, T, size});
  }
  if (saved.grad_weights) {
    TORCH_CHECK_VALUE(saved.weights.has_value(), "grad_weights came without weights");
    check_argument("grad_weights", *saved.grad_weights, type, query, {B, T, S});
  }
}

Forwards forward(const Inputs& inputs, bool need_weights) {
  check(inputs);
  const Tensor& query = inputs.query;
  const c10::SymInt B = query.sym_size(0), T = query.sym_size(1), S = inputs.memory.sym_size(1);
  const auto options = query.options().dtype(accumulation_type(query));
  Outputs outputs{
      at::empty_symint({B, T, inputs.memory.sym_size(2)}, options),
      need_weights ? at::empty_symint({B, T, S}, options) : at::empty({0}, options),
      at::empty_symint({B, T}, options)};
  if (!is_meta(query)) {
    cpu::forward(inputs, outputs);
  }
  return {outputs.context, outputs.weights, outputs.logsumexp};
}

Gradients backward(const Inputs& inputs, const Saved& saved, Gradients gradients) {
  check(inputs, saved);
  if (!is_meta(inputs.query)) {
    cpu::backward(inputs, saved, gradients);
  }
  return gradients;
}

// A gradient's tensor where it is wanted: contiguous, in the input's shape.
Tensor wanted_like(bool wanted, const Tensor& input) {
  return wanted ? at::empty_symint(input.sym_sizes(), input.options()) : Tensor();
}

// Ops return tensors, never none: what was not wanted has no elements.
Tensor or_empty(const Tensor& gradient, const Tensor& input) {
  return gradient.defined() ? gradient : at::empty({0}, input.options());
}

Forwards dot_attention(
    const Tensor& query,
    const Tensor& memory,
    const OptionalTensor& lengths,
    const OptionalTensor& mask,
    double scale,
    bool need_weights) {
  return forward({query, nullptr, nullptr, memory, lengths, mask, scale}, need_weights);
}

std::tuple<Tensor, Tensor> dot_attention_backward(
    const OptionalTensor& grad_context,
    const OptionalTensor& grad_weights,
    const Tensor& query,
    const Tensor& memory,
    const OptionalTensor& lengths,
    const OptionalTensor& mask,
    double scale,
    const Tensor& context,
    const OptionalTensor& weights,
    const Tensor& logsumexp,
    std::array<bool, 2> wanted) {
  const Gradients gradients = backward(
      {query, nullptr, nullptr, memory, lengths, mask, scale},
      {grad_context, grad_weights, context, weights, logsumexp},
      {wanted_like(wanted[0], query), {}, {}, wanted_like(wanted[1], memory)});
  return {or_empty(gradients.query, query), or_empty(gradients.memory, memory)};
}

Forwards additive_attention(
    const Tensor& query,
    const Tensor& keys,
    const Tensor& v,
    const Tensor& values,
    const OptionalTensor& lengths,
    const OptionalTensor& mask,
    double scale,
    bool need_weights) {
  return forward({query, &keys, &v, values, lengths, mask, scale}, need_weights);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    const OptionalTensor& grad_context,
    const OptionalTensor& grad_weights,
    const Tensor& query,
    const Tensor& keys,
    const Tensor& v,
    const Tensor& values,
    const OptionalTensor& lengths,
    const OptionalTensor& mask,
    double scale,
    const Tensor& context,
    const OptionalTensor& weights,
    const Tensor& logsumexp,
    std::array<bool, 4> wanted) {
  const Gradients gradients = backward(
      {query, &keys, &v, values, lengths, mask, scale},
      {grad_context, grad_weights, context, weights, logsumexp},
      {wanted_like(wanted[0], query), wanted_like(wanted[1], keys), wanted_like(wanted[2], v), wanted_like(wanted[3], values)});
  return {
      or_empty(gradients.query, query),
      or_empty(gradients.keys, keys),
      or_empty(gradients.v, v),
      or_empty(gradients.memory, values)};
}

// Which compilation of the CPU's kernels runs.
std::string cpu_capability() {
  return cpu::capability_name();
}

// What the CUDA half was compiled for; empty without one.
std::string cuda_build() {
#if defined(ATTN_EXT_WITH_CUDA)
  return cuda::build();
#else
  return "";
#endif
}

void implement(torch::Library& m) {
  m.impl("dot_attention", dot_attention);
  m.impl("dot_attention_backward", dot_attention_backward);
  m.impl("additive_attention", additive_attention);
  m.impl("additive_attention_backward", additive_attention_backward);
}

}  // namespace

// B batch, T queries, S source steps. query [B, T, D], memory [B, S, D]; additive: query [B, T, A], keys [B, S, A], v [A], values
// [B, S, D]; lengths [B] int64, mask [B, S] or [B, T, S] bool. The results of halves are float32, as they were accumulated:
// autograd.py rounds them for the caller and keeps them whole for the backward. weights has no elements if need_weights is false,
// nor has a gradient that is not wanted.
TORCH_LIBRARY(attn_ext, m) {
  m.def(
      "dot_attention(Tensor query, Tensor memory, Tensor? lengths, Tensor? mask, float scale, bool need_weights)"
      " -> (Tensor context, Tensor weights, Tensor logsumexp)");
  m.def(
      "dot_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor memory, Tensor? lengths,"
      " Tensor? mask, float scale, Tensor context, Tensor? weights, Tensor logsumexp, bool[2] wanted)"
      " -> (Tensor grad_query, Tensor grad_memory)");
  m.def(
      "additive_attention(Tensor query, Tensor keys, Tensor v, Tensor values, Tensor? lengths, Tensor? mask, float scale,"
      " bool need_weights) -> (Tensor context, Tensor weights, Tensor logsumexp)");
  m.def(
      "additive_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor keys, Tensor v,"
      " Tensor values, Tensor? lengths, Tensor? mask, float scale, Tensor context, Tensor? weights, Tensor logsumexp,"
      " bool[4] wanted) -> (Tensor grad_query, Tensor grad_keys, Tensor grad_v, Tensor grad_values)");
  m.def("cpu_capability() -> str", cpu_capability);
  m.def("cuda_build() -> str", cuda_build);
}

TORCH_LIBRARY_IMPL(attn_ext, CPU, m) {
  implement(m);
}

// Shapes alone, for torch.compile and export.
TORCH_LIBRARY_IMPL(attn_ext, Meta, m) {
  implement(m);
}

}  // namespace attn_ext

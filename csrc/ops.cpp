// Every op's schema, and the implementations by device with their argument checks. Attention's autograd is in autograd.cpp; what is
// composed of it, with its own, in projected.cpp and memory.cpp.
#include "cuda/build.h"
#include "dispatch.h"
#include "tensors.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace attn_ext {
namespace {

using at::ArrayRef;

// Below, Size is int64_t for tensors with data and c10::SymInt for shapes alone, which torch.compile may leave open.
template <class Size>
constexpr bool kHasData = std::is_same_v<Size, int64_t>;

template <class Size>
ArrayRef<Size> sizes_of(const Tensor& tensor) {
  if constexpr (kHasData<Size>) {
    return tensor.sizes();
  } else {
    return tensor.sym_sizes();
  }
}

// Without the dispatcher's share of a small call's time.
Tensor empty(ArrayRef<int64_t> shape, at::ScalarType type, const Tensor& like) {
  return like.is_cpu() ? Tensor(at::detail::empty_cpu(shape, type)) : at::empty(shape, like.options().dtype(type));
}

Tensor empty(ArrayRef<c10::SymInt> shape, at::ScalarType type, const Tensor& like) {
  return at::empty_symint(shape, like.options().dtype(type));
}

// The sizes that the arguments share.
template <class Size>
struct Sizes {
  using Shape = c10::SmallVector<Size, 3>;

  explicit Sizes(const Inputs& inputs)
      : rows(sizes_of<Size>(inputs.query).slice(0, inputs.query.dim() - 1)),
        size(sizes_of<Size>(inputs.query).back()),
        B(rows[0]),
        T(rows.size() == 2 ? rows[1] : Size(1)),
        S(sizes_of<Size>(inputs.memory)[1]),
        memory_size(sizes_of<Size>(inputs.memory)[2]) {}

  // [B, T, last], or [B, last]
  Shape of_rows(const Size& last) const {
    Shape shape(rows.begin(), rows.end());
    shape.push_back(last);
    return shape;
  }

  ArrayRef<Size> rows;  // [B, T], or [B]
  Size size, B, T, S, memory_size;
};

bool has_open_sizes(const Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

const EntryPoints& entries_of([[maybe_unused]] const Tensor& tensor) {
#if defined(ATTN_EXT_WITH_CUDA)
  if (tensor.is_cuda()) {
    return cuda::entry_points;
  }
#endif
  return cpu::entry_points;
}

at::ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// These checks keep an op from reading what is not there; what they refuse, the public functions explain in friendlier words.
template <class Size>
void check_argument(const char* name, const Tensor& tensor, at::ScalarType type, const Tensor& query, ArrayRef<Size> shape) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " is ", tensor.scalar_type(), ", needed is ", type);
  TORCH_CHECK_VALUE(tensor.device() == query.device(), name, " is on ", tensor.device(), ", but query is on ", query.device());
  TORCH_CHECK_VALUE(sizes_of<Size>(tensor) == shape, name, " has shape ", sizes_of<Size>(tensor), ", needed is ", shape);
}

void check_range(const Tensor& lengths, int64_t S) {
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < lengths.size(0); ++b, length += lengths.stride(0)) {
    TORCH_CHECK_VALUE(0 <= *length && *length <= S, "lengths[", b, "] is ", *length, ", needed is 0 <= length <= S=", S);
  }
}

void check_type(const char* name, const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
      name,
      " is ",
      type,
      "; needed is float32, float64, bfloat16 or float16");
}

void check_keys(const Tensor& keys) {
  TORCH_CHECK_VALUE(keys.dim() == 3, "keys has shape ", keys.sym_sizes(), ", needed is [B, S, A]");
}

template <class Size>
Sizes<Size> check(const Inputs& inputs) {
  const Tensor& query = inputs.query;
  const Tensor& memory = inputs.memory;
  const auto type = query.scalar_type();
  check_type("query", query);
  TORCH_CHECK_VALUE(
      query.dim() == 3 || query.dim() == 2, "query has shape ", query.sym_sizes(), ", needed is [B, T, size] or [B, size]");
  TORCH_CHECK_VALUE(memory.dim() == 3, "memory has shape ", memory.sym_sizes(), ", needed is [B, S, size]");
  const Sizes<Size> sizes(inputs);
  const auto& [rows, size, B, T, S, memory_size] = sizes;
  TORCH_CHECK_VALUE(inputs.keys || !inputs.v, "v came without keys, needed are both");
  TORCH_CHECK_VALUE(
      inputs.v || !inputs.prepared_keys, "prepared_keys came without v, needed are the keys and v of additive scores");
  check_argument<Size>("memory", memory, type, query, {B, S, inputs.keys ? memory_size : size});
  if (inputs.keys) {
    check_argument<Size>("keys", *inputs.keys, type, query, {B, S, size});
  }
  if (inputs.v) {
    check_argument<Size>("v", *inputs.v, type, query, {size});
  }
  if (inputs.prepared_keys) {
    check_argument<Size>("prepared_keys", *inputs.prepared_keys, accumulation_type(query), query, {B, S, prepared_size(size)});
    TORCH_CHECK_VALUE(
        inputs.prepared_keys->sym_stride(2) == 1,
        "prepared_keys must be what prepare_keys returned, got strides ",
        inputs.prepared_keys->sym_strides());
  }
  if (inputs.lengths) {
    check_argument<Size>("lengths", *inputs.lengths, at::kLong, query, {B});
    if constexpr (kHasData<Size>) {
      if (query.is_cpu()) {  // elsewhere a look at them would wait for the device
        check_range(*inputs.lengths, S);
      }
    }
  }
  if (inputs.mask && inputs.mask->dim() == 2) {
    check_argument<Size>("mask", *inputs.mask, at::kBool, query, {B, S});
  } else if (inputs.mask) {
    check_argument<Size>("mask", *inputs.mask, at::kBool, query, {B, T, S});
  }
  return sizes;
}

template <class Size>
Sizes<Size> check(const Inputs& inputs, const BackwardInputs& saved) {
  const auto sizes = check<Size>(inputs);
  const Tensor& query = inputs.query;
  const auto type = accumulation_type(query);
  if (saved.context) {
    check_argument<Size>("context", *saved.context, type, query, sizes.of_rows(sizes.memory_size));
  }
  check_argument<Size>("logsumexp", saved.logsumexp, type, query, sizes.rows);
  if (saved.weights) {
    check_argument<Size>("weights", *saved.weights, type, query, sizes.of_rows(sizes.S));
  }
  if (saved.grad_context) {
    check_argument<Size>("grad_context", *saved.grad_context, query.scalar_type(), query, sizes.of_rows(sizes.memory_size));
  }
  if (saved.grad_weights) {
    TORCH_CHECK_VALUE(saved.weights.has_value(), "grad_weights came without weights, needed are those that the forward returned");
    check_argument<Size>("grad_weights", *saved.grad_weights, query.scalar_type(), query, sizes.of_rows(sizes.S));
  }
  return sizes;
}

template <class Size>
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
  const auto sizes = check<Size>(inputs);
  const auto type = query.scalar_type(), exact_type = accumulation_type(query);
  const auto rows_of = [&](const Size& last, at::ScalarType of, bool wanted) {
    return wanted ? empty(sizes.of_rows(last), of, query) : empty(ArrayRef<Size>{Size(0)}, of, query);
  };
  Outputs outputs{
      rows_of(sizes.memory_size, type, true), rows_of(sizes.S, type, need_weights), empty(sizes.rows, exact_type, query), {}, {}};
  std::vector<Tensor> exact;
  const auto [need_exact_context, need_exact_weights] = need_exact;
  if ((need_exact_context || need_exact_weights) && type != exact_type) {
    outputs.exact_context = rows_of(sizes.memory_size, exact_type, need_exact_context);
    outputs.exact_weights = rows_of(sizes.S, exact_type, need_weights && need_exact_weights);
    exact = {outputs.exact_context, outputs.exact_weights};
  }
  if constexpr (kHasData<Size>) {
    entries_of(query).forward(inputs, outputs);
  }
  return {std::move(outputs.context), std::move(outputs.weights), std::move(outputs.logsumexp), std::move(exact)};
}

// A gradient's tensor where it is wanted, contiguous, in the input's shape. An input that is not there has none.
template <class Size>
Tensor wanted_like(bool wanted, const OptionalTensor& input) {
  return wanted && input ? empty(sizes_of<Size>(*input), input->scalar_type(), *input) : Tensor();
}

// Ops return tensors, never none: what was not wanted has no elements.
template <class Size>
Tensor or_empty(const Tensor& gradient, const Tensor& query) {
  return gradient.defined() ? gradient : empty(ArrayRef<Size>{Size(0)}, query.scalar_type(), query);
}

template <class Size>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
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
    Wanted wanted) {
  const Inputs inputs{query, memory, keys, v, prepared_keys, lengths, mask, scale};
  const BackwardInputs saved{grad_context, grad_weights, context, weights, logsumexp};
  const auto sizes = check<Size>(inputs, saved);
  const auto [of_query, of_memory, of_keys, of_v, of_scores] = wanted;
  Gradients gradients{
      wanted_like<Size>(of_query, query),
      wanted_like<Size>(of_memory, memory),
      wanted_like<Size>(of_keys, keys),
      wanted_like<Size>(of_v, v),
      of_scores ? empty(sizes.of_rows(sizes.S), accumulation_type(query), query) : Tensor()};
  if constexpr (kHasData<Size>) {
    entries_of(query).backward(inputs, saved, gradients);
  }
  return {
      or_empty<Size>(gradients.query, query),
      or_empty<Size>(gradients.memory, query),
      or_empty<Size>(gradients.keys, query),
      or_empty<Size>(gradients.v, query),
      or_empty<Size>(gradients.scores, query)};
}

template <class Size>
Tensor prepare_keys(const Tensor& keys) {
  check_type("keys", keys);
  check_keys(keys);
  const auto sizes = sizes_of<Size>(keys);
  Tensor prepared = empty(ArrayRef<Size>{sizes[0], sizes[1], prepared_size(sizes[2])}, accumulation_type(keys), keys);
  if constexpr (kHasData<Size>) {
    entries_of(keys).prepare_keys(keys, prepared);
  }
  return prepared;
}

template <class Size>
std::tuple<Tensor, Tensor> additive_scores_backward(
    const Tensor& grad_scores,
    const Tensor& query,
    const Tensor& keys,
    const Tensor& v,
    const OptionalTensor& prepared_keys,
    const OptionalTensor& lengths,
    const OptionalTensor& mask,
    std::array<bool, 2> wanted) {
  // No values take part: of the rows of memory, none has an element.
  check_keys(keys);
  const Tensor none = keys.narrow(2, 0, 0);
  const OptionalTensor given_keys = keys, given_v = v;
  const Inputs inputs{query, none, given_keys, given_v, prepared_keys, lengths, mask, 1.0};
  const auto sizes = check<Size>(inputs);
  check_argument<Size>("grad_scores", grad_scores, accumulation_type(query), query, sizes.of_rows(sizes.S));
  Gradients gradients{{}, {}, wanted_like<Size>(wanted[0], keys), wanted_like<Size>(wanted[1], v), {}};
  if constexpr (kHasData<Size>) {
    entries_of(query).backward_of_scores(inputs, grad_scores, gradients);
  }
  return {or_empty<Size>(gradients.keys, query), or_empty<Size>(gradients.v, query)};
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

template <class Size>
void implement(torch::Library& m) {
  m.impl("attention", attention<Size>);
  m.impl("attention_backward", attention_backward<Size>);
  m.impl("prepare_keys", prepare_keys<Size>);
  m.impl("additive_scores_backward", additive_scores_backward<Size>);
}

}  // namespace

bool needs_context(const Inputs& inputs) {
  const Tensor &query = inputs.query, &memory = inputs.memory;
  // What is no argument of the op it says; of sizes that torch.compile leaves open nothing is known.
  if ((query.dim() != 3 && query.dim() != 2) || memory.dim() != 3 || has_open_sizes(query) || has_open_sizes(memory)) {
    return true;
  }
  return entries_of(query).needs_context(problem_of_sizes(inputs.method(), query, memory));
}

// B batch, T queries, S source steps:
//   query [B, T, D]; or [B, D], one decoder step, of which no result has the T
//   memory [B, S, D], of which the scores are query . memory; with keys it is the values [B, S, Dm]
//   keys [B, S, D]: the scores are query . key; with v [D], too, v . tanh(query + key) (additive)
//   prepared_keys: what prepare_keys made of additive's keys, exp(2 keys) and what goes with it, where several calls share them
//   lengths [B] int64; mask [B, S] or [B, T, S] bool
//   wanted: the gradients of query, memory, keys, v and the scores [B, T, S]
// Results that are not wanted, weights without need_weights among them, have no elements. need_exact: which of context and weights
// a backward will read as they were accumulated; of halves, `exact` has them, in float32, and otherwise it is empty. Not every
// backward reads the context: needs_context().
TORCH_LIBRARY(attn_ext, m) {
  m.def(
      "attention(Tensor query, Tensor memory, Tensor? keys, Tensor? v, Tensor? prepared_keys, Tensor? lengths, Tensor? mask,"
      " float scale, bool need_weights, bool[2] need_exact)"
      " -> (Tensor context, Tensor weights, Tensor logsumexp, Tensor[] exact)");
  m.def(
      "attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor memory, Tensor? keys, Tensor? v,"
      " Tensor? prepared_keys, Tensor? lengths, Tensor? mask, float scale, Tensor? context, Tensor? weights, Tensor logsumexp,"
      " bool[5] wanted)"
      " -> (Tensor grad_query, Tensor grad_memory, Tensor grad_keys, Tensor grad_v, Tensor grad_scores)");
  m.def("prepare_keys(Tensor keys) -> Tensor");

  // Beneath general, without a v, and concat, [A, Dq + Dm] of whose weight projects queries and memory. by_keys: of general,
  // whether the memory is what is projected.
  m.def(
      "projected_attention(Tensor query, Tensor weight, Tensor memory, Tensor? v, Tensor? bias, Tensor? lengths, Tensor? mask,"
      " float scale, bool need_weights, bool by_keys) -> (Tensor context, Tensor weights)");

  // For the steps of a decoder's loop over one AttentionMemory (memory.cpp), whose backward takes the gradients of its query and of
  // the scores: what the memory's tensors get from all steps comes later.
  m.def(
      "additive_scores_backward(Tensor grad_scores, Tensor query, Tensor keys, Tensor v, Tensor? prepared_keys, Tensor? lengths,"
      " Tensor? mask, bool[2] wanted) -> (Tensor grad_keys, Tensor grad_v)");
  m.def(
      "memory_node(Tensor memory, Tensor? weight, Tensor? v, Tensor? bias, Tensor? lengths, Tensor? mask)"
      " -> (Tensor node, Tensor keys, Tensor prepared_keys)");
  m.def(
      "memory_attention(Tensor query, Tensor? query_weight, Tensor memory, Tensor? keys, Tensor? v, Tensor? prepared_keys,"
      " Tensor? lengths, Tensor? mask, float scale, bool need_weights, Tensor? node) -> (Tensor context, Tensor weights)");

  m.def("cpu_capability() -> str", cpu_capability);
  m.def("cpu_multiplies() -> bool", cpu::has_own_matmul);
  m.def("cuda_build() -> str", cuda_build);
}

TORCH_LIBRARY_IMPL(attn_ext, CPU, m) {
  implement<int64_t>(m);
}

#if defined(ATTN_EXT_WITH_CUDA)
TORCH_LIBRARY_IMPL(attn_ext, CUDA, m) {
  implement<int64_t>(m);
}
#endif

// Shapes alone, for torch.compile and export.
TORCH_LIBRARY_IMPL(attn_ext, Meta, m) {
  implement<c10::SymInt>(m);
}

}  // namespace attn_ext

// Every op's schema, and the implementations by device with their argument checks. What is composed of them, with its autograd, is
// in projected.cpp and memory.cpp; the others' autograd in autograd.cpp.
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
  if (inputs.keys == nullptr) {
    check_argument<Size>("memory", memory, type, query, {B, S, size});
  } else {
    check_argument<Size>("values", memory, type, query, {B, S, memory_size});
    check_argument<Size>("keys", *inputs.keys, type, query, {B, S, size});
  }
  if (inputs.v != nullptr) {
    check_argument<Size>("v", *inputs.v, type, query, {size});
  }
  if (inputs.prepared_keys != nullptr) {
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
void check(const Inputs& inputs, const Saved& saved) {
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
}

template <class Size>
Forwards forward(const Inputs& inputs, bool need_weights, NeedExact need_exact) {
  const auto sizes = check<Size>(inputs);
  const auto type = inputs.query.scalar_type(), exact_type = accumulation_type(inputs.query);
  const auto rows_of = [&](const Size& last, at::ScalarType of, bool wanted) {
    return wanted ? empty(sizes.of_rows(last), of, inputs.query) : empty(ArrayRef<Size>{Size(0)}, of, inputs.query);
  };
  Outputs outputs{
      rows_of(sizes.memory_size, type, true),
      rows_of(sizes.S, type, need_weights),
      empty(sizes.rows, exact_type, inputs.query),
      {},
      {}};
  std::vector<Tensor> exact;
  const auto [need_exact_context, need_exact_weights] = need_exact;
  if ((need_exact_context || need_exact_weights) && type != exact_type) {
    outputs.exact_context = rows_of(sizes.memory_size, exact_type, need_exact_context);
    outputs.exact_weights = rows_of(sizes.S, exact_type, need_weights && need_exact_weights);
    exact = {outputs.exact_context, outputs.exact_weights};
  }
  if constexpr (kHasData<Size>) {
    entries_of(inputs.query).forward(inputs, outputs);
  }
  return {std::move(outputs.context), std::move(outputs.weights), std::move(outputs.logsumexp), std::move(exact)};
}

template <class Size>
Gradients backward(const Inputs& inputs, const Saved& saved, Gradients gradients) {
  check<Size>(inputs, saved);
  if constexpr (kHasData<Size>) {
    entries_of(inputs.query).backward(inputs, saved, gradients);
  }
  return gradients;
}

template <class Size>
Gradients backward_of_scores(const Inputs& inputs, const Tensor& grad_scores, Gradients gradients) {
  const auto sizes = check<Size>(inputs);
  check_argument<Size>("grad_scores", grad_scores, accumulation_type(inputs.query), inputs.query, sizes.of_rows(sizes.S));
  if constexpr (kHasData<Size>) {
    entries_of(inputs.query).backward_of_scores(inputs, grad_scores, gradients);
  }
  return gradients;
}

// A gradient's tensor where it is wanted: contiguous, in the input's shape.
template <class Size>
Tensor wanted_like(bool wanted, const Tensor& input) {
  return wanted ? empty(sizes_of<Size>(input), input.scalar_type(), input) : Tensor();
}

// Ops return tensors, never none: what was not wanted has no elements.
template <class Size>
Tensor or_empty(const Tensor& gradient, const Tensor& input) {
  return gradient.defined() ? gradient : empty(ArrayRef<Size>{Size(0)}, input.scalar_type(), input);
}

// dot_attention, keyed_dot_attention and additive_attention, by how many tensors they have.
template <class Size, class>
struct Attention;

template <class Size, size_t... i>
struct Attention<Size, std::index_sequence<i...>> {
  static constexpr size_t kMemory = sizeof...(i) - 1;  // the last

  static Inputs inputs_of(Input<i>... tensors, const OptionalTensor& lengths, const OptionalTensor& mask, double scale) {
    const Tensor* const all[] = {&tensors...};
    return {*all[0], kMemory > 1 ? all[1] : nullptr, kMemory > 2 ? all[2] : nullptr, *all[kMemory], lengths, mask, scale};
  }

  static constexpr Tensor Gradients::* gradient(size_t position) {
    constexpr Tensor Gradients::* others[] = {&Gradients::query, &Gradients::keys, &Gradients::v};
    return position == kMemory ? &Gradients::memory : others[position];
  }

  static Forwards forward(
      Input<i>... tensors,
      const OptionalTensor& lengths,
      const OptionalTensor& mask,
      double scale,
      bool need_weights,
      NeedExact need_exact) {
    return attn_ext::forward<Size>(inputs_of(tensors..., lengths, mask, scale), need_weights, need_exact);
  }

  static std::tuple<Gradient<i>...> backward(
      const OptionalTensor& grad_context,
      const OptionalTensor& grad_weights,
      Input<i>... tensors,
      const OptionalTensor& lengths,
      const OptionalTensor& mask,
      double scale,
      const OptionalTensor& context,
      const OptionalTensor& weights,
      const Tensor& logsumexp,
      std::array<bool, sizeof...(i)> wanted) {
    Gradients gradients;
    ((gradients.*gradient(i) = wanted_like<Size>(wanted[i], tensors)), ...);
    gradients = attn_ext::backward<Size>(
        inputs_of(tensors..., lengths, mask, scale),
        {grad_context, grad_weights, context, weights, logsumexp},
        std::move(gradients));
    return {or_empty<Size>(gradients.*gradient(i), tensors)...};
  }
};

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

const Tensor* if_given(const OptionalTensor& tensor) {
  return tensor ? &*tensor : nullptr;
}

Inputs step_inputs(
    const Tensor& query,
    const OptionalTensor& keys,
    const OptionalTensor& prepared_keys,
    const OptionalTensor& v,
    const Tensor& memory,
    const OptionalTensor& lengths,
    const OptionalTensor& mask,
    double scale) {
  TORCH_CHECK_VALUE(keys || !v, "v came without keys, needed are both or neither");
  TORCH_CHECK_VALUE(v || !keys, "keys came without v, needed are both or neither");
  TORCH_CHECK_VALUE(keys || !prepared_keys, "prepared_keys came without keys, needed are those that prepare_keys was given");
  return {query, if_given(keys), if_given(v), memory, lengths, mask, scale, if_given(prepared_keys)};
}

template <class Size>
Forwards step_attention(
    const Tensor& query,
    const OptionalTensor& keys,
    const OptionalTensor& prepared_keys,
    const OptionalTensor& v,
    const Tensor& memory,
    const OptionalTensor& lengths,
    const OptionalTensor& mask,
    double scale,
    bool need_weights,
    NeedExact need_exact) {
  return forward<Size>(step_inputs(query, keys, prepared_keys, v, memory, lengths, mask, scale), need_weights, need_exact);
}

template <class Size>
std::tuple<Tensor, Tensor> step_attention_backward(
    const OptionalTensor& grad_context,
    const OptionalTensor& grad_weights,
    const Tensor& query,
    const OptionalTensor& keys,
    const OptionalTensor& prepared_keys,
    const OptionalTensor& v,
    const Tensor& memory,
    const OptionalTensor& lengths,
    const OptionalTensor& mask,
    double scale,
    const OptionalTensor& context,
    const OptionalTensor& weights,
    const Tensor& logsumexp) {
  const Inputs inputs = step_inputs(query, keys, prepared_keys, v, memory, lengths, mask, scale);
  const auto sizes = check<Size>(inputs);
  Gradients gradients{wanted_like<Size>(true, query), {}, {}, {}, empty(sizes.of_rows(sizes.S), accumulation_type(query), query)};
  gradients = backward<Size>(inputs, {grad_context, grad_weights, context, weights, logsumexp}, std::move(gradients));
  return {gradients.query, gradients.scores};
}

template <class Size>
std::tuple<Tensor, Tensor> additive_scores_backward(
    const Tensor& grad_scores,
    const Tensor& query,
    const Tensor& keys,
    const OptionalTensor& prepared_keys,
    const Tensor& v,
    const OptionalTensor& lengths,
    const OptionalTensor& mask,
    std::array<bool, 2> wanted) {
  // No values take part: of the rows of memory, none has an element.
  check_keys(keys);
  const Tensor none = keys.narrow(2, 0, 0);
  const Gradients gradients = backward_of_scores<Size>(
      {query, &keys, &v, none, lengths, mask, 1.0, if_given(prepared_keys)},
      grad_scores,
      {{}, wanted_like<Size>(wanted[0], keys), wanted_like<Size>(wanted[1], v), {}, {}});
  return {or_empty<Size>(gradients.keys, keys), or_empty<Size>(gradients.v, v)};
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
  using Dot = Attention<Size, std::make_index_sequence<2>>;
  using KeyedDot = Attention<Size, std::make_index_sequence<3>>;
  using Additive = Attention<Size, std::make_index_sequence<4>>;
  m.impl("dot_attention", Dot::forward);
  m.impl("dot_attention_backward", Dot::backward);
  m.impl("keyed_dot_attention", KeyedDot::forward);
  m.impl("keyed_dot_attention_backward", KeyedDot::backward);
  m.impl("additive_attention", Additive::forward);
  m.impl("additive_attention_backward", Additive::backward);
  m.impl("prepare_keys", prepare_keys<Size>);
  m.impl("step_attention", step_attention<Size>);
  m.impl("step_attention_backward", step_attention_backward<Size>);
  m.impl("additive_scores_backward", additive_scores_backward<Size>);
}

}  // namespace

bool takes_context(Method method, const Tensor& query, const Tensor& memory) {
  // What is no argument of the ops they say; of sizes that torch.compile leaves open nothing is known.
  if ((query.dim() != 3 && query.dim() != 2) || memory.dim() != 3 || has_open_sizes(query) || has_open_sizes(memory)) {
    return true;
  }
  return entries_of(query).takes_context(problem_of_sizes(method, query, memory));
}

// B batch, T queries, S source steps. query [B, T, D], memory [B, S, D]; keyed: query [B, T, D], keys [B, S, D], values [B, S, Dm];
// additive: query [B, T, A], keys [B, S, A], v [A], values [B, S, Dm]; lengths [B] int64, mask [B, S] or [B, T, S] bool. A query
// [B, D] is one decoder step: no result has the T then. weights has no elements if need_weights is false, nor has a gradient that
// is not wanted. need_exact: which of context and weights a backward will take as they were accumulated; of halves, `exact` has
// them, in float32, and otherwise it is empty. Not every backward reads the context: takes_context().
TORCH_LIBRARY(attn_ext, m) {
  m.def(
      "dot_attention(Tensor query, Tensor memory, Tensor? lengths, Tensor? mask, float scale, bool need_weights,"
      " bool[2] need_exact) -> (Tensor context, Tensor weights, Tensor logsumexp, Tensor[] exact)");
  m.def(
      "dot_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor memory, Tensor? lengths,"
      " Tensor? mask, float scale, Tensor? context, Tensor? weights, Tensor logsumexp, bool[2] wanted)"
      " -> (Tensor grad_query, Tensor grad_memory)");
  m.def(
      "keyed_dot_attention(Tensor query, Tensor keys, Tensor values, Tensor? lengths, Tensor? mask, float scale,"
      " bool need_weights, bool[2] need_exact) -> (Tensor context, Tensor weights, Tensor logsumexp, Tensor[] exact)");
  m.def(
      "keyed_dot_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor keys, Tensor values,"
      " Tensor? lengths, Tensor? mask, float scale, Tensor? context, Tensor? weights, Tensor logsumexp, bool[3] wanted)"
      " -> (Tensor grad_query, Tensor grad_keys, Tensor grad_values)");
  m.def(
      "additive_attention(Tensor query, Tensor keys, Tensor v, Tensor values, Tensor? lengths, Tensor? mask, float scale,"
      " bool need_weights, bool[2] need_exact) -> (Tensor context, Tensor weights, Tensor logsumexp, Tensor[] exact)");
  m.def(
      "additive_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor keys, Tensor v,"
      " Tensor values, Tensor? lengths, Tensor? mask, float scale, Tensor? context, Tensor? weights, Tensor logsumexp,"
      " bool[4] wanted) -> (Tensor grad_query, Tensor grad_keys, Tensor grad_v, Tensor grad_values)");

  // Beneath general, without a v, and concat, [A, Dq + Dm] of whose weight projects queries and memory. by_keys: of general,
  // whether the memory is what is projected.
  m.def(
      "projected_attention(Tensor query, Tensor weight, Tensor memory, Tensor? v, Tensor? bias, Tensor? lengths, Tensor? mask,"
      " float scale, bool need_weights, bool by_keys) -> (Tensor context, Tensor weights)");

  // For the steps of a decoder's loop over one AttentionMemory (memory.cpp): of either score, additive with keys and v. A step's
  // backward gives the query's gradient and that of the scores, [B, T, S]; what the memory's tensors get from all steps comes
  // later. prepared_keys is what prepare_keys made of the keys: exp(2 keys) and what goes with it.
  m.def("prepare_keys(Tensor keys) -> Tensor");
  m.def(
      "step_attention(Tensor query, Tensor? keys, Tensor? prepared_keys, Tensor? v, Tensor memory, Tensor? lengths, Tensor? mask,"
      " float scale, bool need_weights, bool[2] need_exact)"
      " -> (Tensor context, Tensor weights, Tensor logsumexp, Tensor[] exact)");
  m.def(
      "step_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor? keys, Tensor? prepared_keys,"
      " Tensor? v, Tensor memory, Tensor? lengths, Tensor? mask, float scale, Tensor? context, Tensor? weights, Tensor logsumexp)"
      " -> (Tensor grad_query, Tensor grad_scores)");
  m.def(
      "additive_scores_backward(Tensor grad_scores, Tensor query, Tensor keys, Tensor? prepared_keys, Tensor v, Tensor? lengths,"
      " Tensor? mask, bool[2] wanted) -> (Tensor grad_keys, Tensor grad_v)");
  m.def(
      "memory_node(Tensor memory, Tensor? weight, Tensor? v, Tensor? bias, Tensor? lengths, Tensor? mask)"
      " -> (Tensor node, Tensor keys, Tensor prepared_keys)");
  m.def(
      "memory_attention(Tensor query, Tensor? query_weight, Tensor? keys, Tensor? prepared_keys, Tensor? v, Tensor memory,"
      " Tensor? lengths, Tensor? mask, float scale, bool need_weights, Tensor? node) -> (Tensor context, Tensor weights)");

  m.def("cpu_capability() -> str", cpu_capability);
  m.def("cpu_multiplies() -> bool", cpu::multiplies);
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

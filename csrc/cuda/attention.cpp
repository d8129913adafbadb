// CUDA's entry points: which kernels make up a call, and the matrix products between them, which are ATen's.
//
// One query a batch element is bound by reading the memory, and has a kernel of its own. With more, of keys k
//
//   forward    e = q k^T;  a = softmax(e);  c = a m
//   backward   da = g m^T;  de = softmax_backward(a, da + gw);  dq = de k;  dk = de^T q;  dm = a^T g, + dk where k = m
//
// where additive scores and their gradients have kernels in the place of the products with q and k. Products of halves are summed
// in float32, scores are not rounded, and a and de are before they meet k, m, g and q: once, as the results are.
#include "../attention.h"

#include "../dispatch.h"
#include "../tensors.h"
#include "splits.h"
#include "stream.h"

#include <ATen/Context.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>

#include <limits>

namespace attn_ext::cuda {
namespace {

// Whether the kernels of one step take it.
bool takes_one_step(const Problem& problem) {
  const bool is_dot = problem.method != Method::Additive;
  return problem.is_one_query() && (!is_dot || problem.memory_size <= most_one_step_columns(width_of(problem.dtype)));
}

// What every call begins with.
class Call {
 public:
  Call(const Inputs& inputs, const char* direction)
      : profiled_(at::RecordScope::FUNCTION),
        device_(inputs.query.device()),
        inputs_(inputs),
        lengths_(inputs.lengths ? inputs.lengths->contiguous() : Tensor()),
        problem_(problem_of(inputs, lengths_)),
        stream_(current_stream(inputs.query.device())) {
    if (profiled_.isActive()) {
      profiled_.before(c10::str("attn_ext::cuda::", name_of(problem_.method), "_attention_", direction));
    }
  }

  const Problem& problem() const {
    return problem_;
  }

  Stream stream() const {
    return stream_;
  }

  bool is_dot() const {
    return problem_.method != Method::Additive;
  }

  bool is_its_own_keys() const {
    return problem_.method == Method::Dot;
  }

  // What dot products' queries meet.
  const Tensor& keys() const {
    return is_its_own_keys() ? inputs_.memory : *inputs_.keys;
  }

  // Kernels are spared the empty.
  bool has_no_scores() const {
    return problem_.batch * problem_.queries * problem_.steps == 0;
  }

  bool is_one_step() const {
    return takes_one_step(problem_);
  }

  bool is_of_halves() const {
    return exact_type() != inputs_.query.scalar_type();
  }

  at::ScalarType exact_type() const {
    return problem_.dtype == Dtype::Double ? at::kDouble : at::kFloat;
  }

  Tensor empty(at::IntArrayRef sizes) const {
    return empty(sizes, inputs_.query.scalar_type());
  }

  Tensor empty_exact(at::IntArrayRef sizes) const {
    return empty(sizes, exact_type());
  }

  Tensor workspace(size_t bytes) const {
    return empty({static_cast<int64_t>(bytes)}, at::kByte);
  }

  Tensor empty_scores() const {
    return empty_exact({problem_.batch, problem_.queries, problem_.steps});
  }

  // q k^T, or v . tanh(q + k), of every query and step.
  void scores(Tensor& to) const;

  // The memory's rows, or the keys', as products with weights of 0 may meet them: 0 where no query attends.
  Tensor attended(const Tensor& rows) const {
    if (!hides_rows()) {
      return rows;
    }
    Problem problem = of_all_queries(rows.size(2));
    problem.memory = view_of(rows);
    Tensor of_these = empty(rows.sizes());
    copy_attended_rows({problem, of_these.mutable_data_ptr()}, stream_);
    return of_these;
  }

  // Gradients of such rows, as products with weights of 0 left them: 0 where no query attends, whatever came in.
  void clear_masked(const Tensor& gradient) const {
    if (hides_rows() && gradient.numel() > 0) {
      clear_masked_rows({of_all_queries(gradient.size(2)), gradient.mutable_data_ptr()}, stream_);
    }
  }

  // `partial_size` elements of a split's result wait for the merge.
  Splits splits(int64_t partial_size, bool backward) {
    const int64_t blocks = (is_dot() ? one_step_dot_blocks : one_step_additive_blocks)(problem_, backward);
    Splits splits = split_steps(problem_, multiprocessors(inputs_.query.device()), blocks, partial_size, backward);
    if (splits.count > 1) {
      partials_ = empty_exact({problem_.batch, splits.count, partial_size});
      splits.partials = partials_.mutable_data_ptr();
    }
    return splits;
  }

 private:
  bool hides_rows() const {
    return problem_.lengths != nullptr || problem_.mask.data != nullptr;
  }

  // With what its mask leaves to any query in the mask's place, and rows of a size.
  Problem of_all_queries(int64_t size) const {
    Problem problem = problem_;
    problem.memory_size = size;
    if (problem.mask_per_query) {
      if (!by_any_.defined()) {
        by_any_ = inputs_.mask->any(1);
      }
      problem.mask = view_of(by_any_);
      problem.mask_per_query = false;
    }
    return problem;
  }

  Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const {
    return at::empty(sizes, inputs_.query.options().dtype(type));
  }

  at::RecordFunction profiled_;
  const BelowAutograd guard_;
  const c10::DeviceGuard device_;
  const Inputs& inputs_;
  Tensor lengths_;
  Problem problem_;
  Stream stream_;
  mutable Tensor by_any_;  // [B, S], of a mask [B, T, S]
  Tensor partials_;
};

// Whether PyTorch has products of such halves with a result of float32: of bfloat16 where the GPU has them, of float16 unless they
// are asked to sum up in their own type.
bool multiplies_into_float(const Tensor& halves) {
  return halves.scalar_type() == at::kBFloat16 ? major_capability(halves.device()) >= 8
                                               : !at::globalContext().allowFP16AccumulationCuBLAS();
}

// result = a b, each [B, ...]. Halves' products may have a result of float32: all their bits.
void multiply(Tensor& result, const Tensor& a, const Tensor& b) {
  const auto type = result.scalar_type();
  if (result.numel() == 0) {
    return;
  }
  if (a.size(2) == 0) {
    result.zero_();
  } else if (type == a.scalar_type()) {
    at::bmm_out(result, a, b);
  } else if (multiplies_into_float(a)) {
    at::bmm_out(result, a, b, type);
  } else {
    multiply(result, a.to(type), b.to(type));
  }
}

void Call::scores(Tensor& to) const {
  if (is_dot()) {
    multiply(to, inputs_.query, keys().mT());
  } else {
    const Tensor its_own = workspace(additive_scores_workspace(problem_));
    additive_scores({problem_, its_own.mutable_data_ptr(), to.mutable_data_ptr()}, stream_);
  }
}

const void* if_given(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

void attend_nothing(Outputs& outputs) {
  outputs.context.zero_();
  if (outputs.exact_context.defined()) {
    outputs.exact_context.zero_();
  }
  outputs.logsumexp.fill_(-std::numeric_limits<double>::infinity());
}

void attend_once(Call& call, Outputs& outputs) {
  const Problem& problem = call.problem();
  OneStep step{};
  step.problem = problem;
  step.splits = call.splits(problem.memory_size + 2, false);
  step.context = data_of(outputs.context);
  step.weights = data_of(outputs.weights);
  step.logsumexp = outputs.logsumexp.mutable_data_ptr();
  step.exact_context = data_of(outputs.exact_context);
  step.exact_weights = data_of(outputs.exact_weights);
  Tensor scores;
  if (step.weights != nullptr && call.is_of_halves() && step.exact_weights == nullptr) {
    scores = call.empty_exact({problem.batch, problem.steps});
  }
  step.scores = scores.defined() ? scores.mutable_data_ptr() : call.is_of_halves() ? step.exact_weights : step.weights;
  (call.is_dot() ? one_step_dot : one_step_additive)(step, call.stream());
}

void attend(const Call& call, const Inputs& inputs, Outputs& outputs) {
  const Problem& problem = call.problem();
  const bool rounds = call.is_of_halves(), has_weights = outputs.weights.numel() > 0;
  Tensor& exact_weights = rounds ? outputs.exact_weights : outputs.weights;
  const bool has_exact_weights = data_of(exact_weights) != nullptr;
  Tensor scores = has_exact_weights ? exact_weights : call.empty_scores();
  call.scores(scores);

  Tensor rounded;
  if (rounds) {
    rounded = has_weights ? outputs.weights : call.empty(scores.sizes());
  }
  softmax(
      {problem,
       scores.const_data_ptr(),
       rounds && !has_exact_weights ? nullptr : scores.mutable_data_ptr(),
       data_of(rounded),
       outputs.logsumexp.mutable_data_ptr()},
      call.stream());

  multiply(outputs.context, rounds ? rounded : scores, call.attended(inputs.memory));
  if (data_of(outputs.exact_context) != nullptr) {
    outputs.exact_context.copy_(outputs.context);  // products of halves have no more
  }
}

void differentiate_nothing(Gradients& gradients) {
  for (Tensor* gradient : {&gradients.query, &gradients.keys, &gradients.v, &gradients.memory, &gradients.scores}) {
    if (gradient->defined()) {
      gradient->zero_();
    }
  }
}

void differentiate_once(Call& call, const BackwardInputs& saved, Gradients& gradients) {
  const Problem& problem = call.problem();
  TORCH_CHECK_VALUE(saved.context.has_value(), "context is missing: a backward of one query reads it");
  const Tensor context = saved.context->contiguous(), logsumexp = saved.logsumexp.contiguous();
  const OptionalTensor weights = contiguous(saved.weights);
  OneStepBackward step{};
  step.problem = problem;
  step.splits = call.splits(problem.key_size, true);
  step.grad_context = view_of(saved.grad_context);
  step.grad_weights = view_of(saved.grad_weights);
  step.context = context.const_data_ptr();
  step.weights = if_given(weights);
  step.logsumexp = logsumexp.const_data_ptr();
  step.grad_scores = data_of(gradients.scores);
  step.grad_query = data_of(gradients.query);
  step.grad_keys = data_of(gradients.keys);
  step.grad_memory = data_of(gradients.memory);
  step.grad_v = data_of(gradients.v);
  Tensor partial_grad_v;
  if (step.grad_v != nullptr) {
    partial_grad_v = call.empty_exact({problem.batch, step.splits.count, problem.key_size});
    step.partial_grad_v = partial_grad_v.mutable_data_ptr();
  }
  (call.is_dot() ? one_step_dot_backward : one_step_additive_backward)(step, call.stream());
}

void differentiate_scores(const Call& call, const Tensor& grad_scores, Gradients& gradients) {
  if (!gradients.query.defined() && !gradients.keys.defined() && !gradients.v.defined()) {
    return;
  }
  AdditiveBackward backward{};
  backward.problem = call.problem();
  backward.grad_scores = grad_scores.const_data_ptr();
  backward.grad_query = data_of(gradients.query);
  backward.grad_keys = data_of(gradients.keys);
  backward.grad_v = data_of(gradients.v);
  const Tensor workspace = call.workspace(additive_backward_workspace(backward));
  backward.workspace = workspace.mutable_data_ptr();
  additive_backward(backward, call.stream());
}

// a and de, as products take them.
struct Coefficients {
  Tensor weights, grad_scores;
  Tensor both;  // of halves: [B, 2, T, S]; of additive scores, whose kernel takes de as it is, the weights alone: [B, 1, T, S]
};

Coefficients coefficients_of(const Call& call, const Inputs& inputs, const BackwardInputs& saved, const Gradients& gradients) {
  const Problem& problem = call.problem();
  const Tensor logsumexp = saved.logsumexp.contiguous();
  Coefficients of;
  of.grad_scores = gradients.scores.defined() ? gradients.scores : call.empty_scores();
  SoftmaxBackward backward{};
  backward.problem = problem;
  backward.grad_weights = view_of(saved.grad_weights);
  if (saved.weights) {
    of.weights = saved.weights->contiguous();
    backward.weights = of.weights.const_data_ptr();
  } else {
    of.weights = call.empty_scores();
    call.scores(of.weights);
    backward.scores = of.weights.const_data_ptr();
    backward.logsumexp = logsumexp.const_data_ptr();
    backward.recomputed = call.is_of_halves() ? nullptr : of.weights.mutable_data_ptr();
  }
  if (saved.grad_context) {
    multiply(of.grad_scores, *saved.grad_context, inputs.memory.mT());
    backward.grad_from_context = of.grad_scores.const_data_ptr();
  }
  const bool takes_halves = call.is_of_halves() && call.is_dot();
  backward.grad_scores = takes_halves && !gradients.scores.defined() ? nullptr : of.grad_scores.mutable_data_ptr();
  if (call.is_of_halves() && (call.is_dot() || gradients.memory.defined())) {
    of.both = call.empty({problem.batch, call.is_dot() ? 2 : 1, problem.queries, problem.steps});
    backward.rounded = of.both.mutable_data_ptr();
  }
  softmax_backward(backward, call.stream());
  return of;
}

void differentiate_memory(
    const Call& call, const Inputs& inputs, const BackwardInputs& saved, const Coefficients& of, Tensor& grad_memory) {
  const bool has_grad = saved.grad_context.has_value();
  if (!has_grad && !call.is_its_own_keys()) {
    grad_memory.zero_();
    return;
  }
  if (call.is_of_halves()) {
    // One product, so that nothing is rounded on the way.
    if (has_grad && call.is_its_own_keys()) {
      multiply(grad_memory, of.both.flatten(1, 2).mT(), at::cat({*saved.grad_context, inputs.query}, 1));
    } else {
      multiply(grad_memory, of.both.select(1, has_grad ? 0 : 1).mT(), has_grad ? *saved.grad_context : inputs.query);
    }
  } else {
    if (has_grad) {
      multiply(grad_memory, of.weights.mT(), *saved.grad_context);
    }
    if (call.is_its_own_keys() && has_grad) {
      at::baddbmm_out(grad_memory, grad_memory, of.grad_scores.mT(), inputs.query);
    } else if (call.is_its_own_keys()) {
      multiply(grad_memory, of.grad_scores.mT(), inputs.query);
    }
  }
  call.clear_masked(grad_memory);
}

void differentiate(const Call& call, const Inputs& inputs, const BackwardInputs& saved, Gradients& gradients) {
  const Coefficients of = coefficients_of(call, inputs, saved, gradients);
  if (call.is_dot()) {
    const Tensor grad_scores = call.is_of_halves() ? of.both.select(1, 1) : of.grad_scores;
    if (gradients.query.defined()) {
      multiply(gradients.query, grad_scores, call.attended(call.keys()));
    }
    if (gradients.keys.defined()) {
      multiply(gradients.keys, grad_scores.mT(), inputs.query);
      call.clear_masked(gradients.keys);
    }
  } else {
    differentiate_scores(call, of.grad_scores, gradients);
  }
  if (gradients.memory.defined()) {
    differentiate_memory(call, inputs, saved, of, gradients.memory);
  }
}

// Of a tensor [B, ...], [B, 1, ...].
Tensor with_queries(const Tensor& tensor) {
  return tensor.defined() ? tensor.unsqueeze(1) : tensor;
}

OptionalTensor with_queries(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->unsqueeze(1)) : std::nullopt;
}

// Whether queries [B, size] go as many [B, 1, size].
bool is_one_of_many(const Inputs& inputs) {
  return inputs.query.dim() == 2 && !takes_one_step(problem_of_sizes(inputs.method(), inputs.query, inputs.memory));
}

// The same of another query.
Inputs with_query(const Inputs& inputs, const Tensor& query) {
  const auto& [_, memory, keys, v, prepared_keys, lengths, mask, scale] = inputs;
  return {query, memory, keys, v, prepared_keys, lengths, mask, scale};
}

void forward(const Inputs& inputs, Outputs& outputs) {
  if (is_one_of_many(inputs)) {
    Outputs of_queries{
        with_queries(outputs.context),
        with_queries(outputs.weights),
        with_queries(outputs.logsumexp),
        with_queries(outputs.exact_context),
        with_queries(outputs.exact_weights)};
    const Tensor query = with_queries(inputs.query);
    forward(with_query(inputs, query), of_queries);
    return;
  }
  Call call(inputs, "forward");
  if (call.has_no_scores()) {
    attend_nothing(outputs);
  } else if (call.is_one_step()) {
    attend_once(call, outputs);
  } else {
    attend(call, inputs, outputs);
  }
}

void backward(const Inputs& inputs, const BackwardInputs& saved, Gradients& gradients) {
  if (is_one_of_many(inputs)) {
    const OptionalTensor grad_context = with_queries(saved.grad_context), grad_weights = with_queries(saved.grad_weights);
    const OptionalTensor weights = with_queries(saved.weights);
    const OptionalTensor context = with_queries(saved.context);
    const Tensor query = with_queries(inputs.query);
    Gradients of_queries{
        with_queries(gradients.query), gradients.memory, gradients.keys, gradients.v, with_queries(gradients.scores)};
    backward(with_query(inputs, query), {grad_context, grad_weights, context, weights, with_queries(saved.logsumexp)}, of_queries);
    return;
  }
  Call call(inputs, "backward");
  if (call.has_no_scores()) {
    differentiate_nothing(gradients);
  } else if (call.is_one_step()) {
    differentiate_once(call, saved, gradients);
  } else {
    differentiate(call, inputs, saved, gradients);
  }
}

void backward_of_scores(const Inputs& inputs, const Tensor& grad_scores, Gradients& gradients) {
  const Call call(inputs, "backward");
  if (call.has_no_scores()) {
    differentiate_nothing(gradients);
  } else {
    differentiate_scores(call, grad_scores.contiguous(), gradients);
  }
}

// The CUDA kernels take the exponentials as they read: this is for whoever calls the op.
void prepare_keys(const Tensor& keys, Tensor& prepared) {
  const BelowAutograd guard;
  const Tensor doubled = keys.to(prepared.scalar_type()).mul(2);
  prepared.fill_(1);
  prepared.narrow(2, 0, keys.size(2)).copy_(doubled.exp());
  if (keys.size(2) > 0) {
    prepared.select(2, prepared_range_at(keys.size(2))).copy_(doubled.abs().amax(2));
  }
}

}  // namespace

const EntryPoints entry_points{takes_one_step, forward, backward, backward_of_scores, prepare_keys};

}  // namespace attn_ext::cuda

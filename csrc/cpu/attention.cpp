// The CPU's entry points: from tensors to the kernels' view of them, and the division of the work among the threads.
#include "../attention.h"

#include "../tensors.h"
#include "capability.h"
#include "huge_pages.h"
#include "plan.h"
#include "precision.h"
#include "run_items.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>

#include <algorithm>

namespace attn_ext::cpu {
namespace {

// Runs every item. If their results are merged, every item keeps its slot until all have run; each then merges an even share
// of the rows.
template <class Call>
void run_all(
    const Call& call,
    size_t slot_size,
    void (*run)(const Call&, int64_t, char*),
    void (*merge)(const Call&, int64_t, char*, size_t),
    bool merges) {
  const int64_t items = call.plan.items(call.problem);
  const Work work{items, items * kItemCost + call.problem.batch * call.problem.steps * work_of_step(call.problem)};
  const auto run_one = [&](int64_t item, char* slot) { run(call, item, slot); };
  run_items(work, slot_size, merges, run_one, [&](char* slots) {
    const int64_t rows = call.problem.is_one_query() ? 1 : std::max(call.plan.chunk, call.plan.split_size);
    const int64_t grain = ceil_div(kGrain, std::max<int64_t>(rows * call.problem.memory_size, 1));
    at::parallel_for(0, merges ? items : 0, grain, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        merge(call, item, slots, slot_size);
      }
    });
  });
}

const Kernels& kernels_for(const Problem& problem, const Plan& plan) {
  const auto kernels = problem.method == Method::Additive ? capability().additive : capability().dot;
  return kernels(problem.product_dtype, problem.is_one_query(), plan.chunk);
}

// Fewer queries' products are not worth rounding floats for, which are operands as they stand.
constexpr int64_t kRoundedQueries = 16;

Problem rounded_as_allowed(Problem problem) {
  if (problem.dtype == Dtype::Float && problem.queries >= kRoundedQueries) {
    problem.product_dtype = product_dtype_of_float32();
  }
  return problem;
}

// What a profiler shows: which op ran, and the compilation of its kernel.
std::string name_of(const Inputs& inputs, const char* direction) {
  return c10::str("attn_ext::cpu::", name_of(inputs.method()), "_attention_", direction, "[", capability().name, "]");
}

Tensor contiguous(const OptionalTensor& tensor) {
  return tensor ? tensor->contiguous() : Tensor();
}

// Whether a backward on so many threads reads the context. With one thread nothing is split: a context that is read even then must
// be given. Without gradients of rows, one query's groups are the smaller.
bool needs_context(const Problem& sizes, int64_t threads) {
  return !backward_plan(sizes, threads, /*has_context=*/true, /*writes_rows=*/false).has_whole_rows(sizes);
}

// `call` lacks the problem, the plan and the outputs.
void run_backward(const Inputs& inputs, Backward& call, bool has_context, Gradients& gradients) {
  const Tensor lengths = contiguous(inputs.lengths);
  call.problem = rounded_as_allowed(problem_of(inputs, lengths));
  const bool writes_rows = gradients.keys.defined() || gradients.memory.defined();
  call.plan = backward_plan(call.problem, at::get_num_threads(), has_context, writes_rows);
  call.grad_scores = data_of(gradients.scores);
  call.grad_query = data_of(gradients.query);
  call.grad_keys = data_of(gradients.keys);
  call.grad_memory = data_of(gradients.memory);
  use_huge_pages(gradients.query);
  use_huge_pages(gradients.keys);
  use_huge_pages(gradients.memory);
  const int64_t items = call.plan.items(call.problem);
  Tensor grad_v = gradients.v;  // [items, A]: a partial sum an item, to be summed in their order; [A] of a single one
  const auto type = gradients.v.defined() && gradients.v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (gradients.v.defined() && (items != 1 || gradients.v.scalar_type() != type)) {
    grad_v = at::empty({items, call.problem.key_size}, gradients.v.options().dtype(type));
  }
  call.grad_v = data_of(grad_v);
  if (items > 0) {
    const Kernels& kernels = kernels_for(call.problem, call.plan);
    const bool merges = call.plan.splits * call.plan.chunks > 1;
    run_all(call, kernels.backward_slot(call), kernels.backward, kernels.merge_backward, merges);
    if (!grad_v.is_same(gradients.v)) {
      void* const out = data_of(gradients.v);
      const int64_t grain = ceil_div(kGrain, items);
      at::parallel_for(0, call.problem.key_size, grain, [&](int64_t begin, int64_t end) { kernels.sum_v(call, out, begin, end); });
    }
  } else if (gradients.v.defined()) {
    gradients.v.zero_();
  }
}

bool needs_context(const Problem& sizes) {
  return needs_context(sizes, at::get_num_threads());
}

void forward(const Inputs& inputs, Outputs& outputs) {
  RECORD_FUNCTION(name_of(inputs, "forward"), c10::ArrayRef<const c10::IValue>{});
  const Tensor lengths = contiguous(inputs.lengths);
  Forward call{};
  call.problem = rounded_as_allowed(problem_of(inputs, lengths));
  call.plan = forward_plan(call.problem, at::get_num_threads());
  call.context = outputs.context.mutable_data_ptr();
  call.weights = data_of(outputs.weights);
  call.logsumexp = outputs.logsumexp.mutable_data_ptr();
  if (outputs.logsumexp.numel() == 0) {
    return;
  }
  const bool rounds = outputs.context.scalar_type() != outputs.logsumexp.scalar_type();
  call.exact_context = rounds ? data_of(outputs.exact_context) : call.context;
  call.exact_weights = rounds ? data_of(outputs.exact_weights) : call.weights;
  call.is_read_back = call.exact_context != nullptr && needs_context(call.problem);
  for (const Tensor* output : {&outputs.context, &outputs.weights, &outputs.exact_context, &outputs.exact_weights}) {
    use_huge_pages(*output);
  }
  const Kernels& kernels = kernels_for(call.problem, call.plan);
  run_all(call, kernels.forward_slot(call), kernels.forward, kernels.merge_forward, call.plan.splits > 1);
}

void backward(const Inputs& inputs, const BackwardInputs& saved, Gradients& gradients) {
  RECORD_FUNCTION(name_of(inputs, "backward"), c10::ArrayRef<const c10::IValue>{});
  const Tensor logsumexp = saved.logsumexp.contiguous();
  Backward call{};
  call.grad_context = view_of(saved.grad_context);
  call.grad_weights = view_of(saved.grad_weights);
  call.context = view_of(saved.context);
  call.weights = view_of(saved.weights);
  call.logsumexp = logsumexp.const_data_ptr();
  const bool has_context = saved.context.has_value();
  const auto sizes = problem_of_sizes(inputs.method(), inputs.query, inputs.memory);
  TORCH_CHECK_VALUE(
      has_context || !needs_context(sizes, 1),
      "context is missing: a backward of T=",
      sizes.queries,
      ", S=",
      sizes.steps,
      " reads it");
  run_backward(inputs, call, has_context, gradients);
}

void backward_of_scores(const Inputs& inputs, const Tensor& grad_scores, Gradients& gradients) {
  RECORD_FUNCTION(name_of(inputs, "backward"), c10::ArrayRef<const c10::IValue>{});
  Backward call{};
  call.given_grad_scores = view_of(grad_scores);
  run_backward(inputs, call, true, gradients);
}

void prepare_keys(const Tensor& keys, Tensor& prepared) {
  const int64_t rows = keys.size(0) * keys.size(1);
  const Preparation call{dtype_of(keys), keys.size(1), keys.size(2), view_of(keys), data_of(prepared)};
  if (rows == 0) {
    return;
  }
  use_huge_pages(prepared);
  const Kernels& kernels = capability().additive(call.dtype, true, 1);
  const int64_t grain = std::max<int64_t>(kGrain / (kTanhCost * std::max<int64_t>(call.key_size, 1)), 1);
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernels.prepare(call, begin, end); });
}

}  // namespace

const EntryPoints entry_points{needs_context, forward, backward, backward_of_scores, prepare_keys};

const char* capability_name() {
  return capability().name;
}

}  // namespace attn_ext::cpu

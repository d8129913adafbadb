// AttentionMemory's autograd: what the steps of a decoder's loop owe their memory is paid once, not at every step.
//
// memory_node makes one node of the graph out of the tensors that the steps share, and every step hangs on it. A step's backward
// takes its query's gradient alone and leaves its small tensors with the node's ledger; autograd runs the node's own backward when
// those of all steps are over, and the ledger becomes, with a weights, g = d context, de = d scores, q the projected queries of all
// steps, x the queries as they came:
//
//   dot       d memory = [a; de]^T [g; q]
//   general   the same, and d weight = dq^T x
//   concat    d keys and d v as of one call with all the queries,
//             d memory = a^T g + d keys Wk, and d weight = [dq^T x, d keys^T memory]
#include "dispatch.h"
#include "projection.h"

#include <ATen/Functions.h>
#include <c10/core/Event.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace attn_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A tensor that a step's backward leaves for later without owning it. No copy: its version is checked. (A gradient that nobody else
// holds autograd makes a leaf's own, and adds the next one to it in place.)
class Lent {
 public:
  explicit Lent(const Tensor& tensor) : tensor_(tensor), version_(version_of(tensor)) {}

  void check_unchanged() const {
    TORCH_CHECK(
        version_ == version_of(tensor_),
        "a query of an AttentionMemory's step, its weights, or its context's gradient was modified by an inplace operation"
        " between the backward of the step and that of the memory");
  }

 private:
  static int64_t version_of(const Tensor& tensor) {
    return !tensor.defined() || tensor.is_inference() ? 0 : tensor._version();
  }

  Tensor tensor_;
  int64_t version_;
};

// What a step's backward leaves behind, each [B, T, ...]; weights and grad_scores in the accumulation type.
struct Step {
  Tensor weights, grad_context;  // undefined if none came in
  Tensor grad_scores;
  Tensor query;              // as it met the memory
  Tensor features;           // as it came,
  Tensor grad_query;         // and the gradient of what its projection gave
  std::array<Lent, 3> lent;  // of these, what others made
  c10::Stream stream;        // of the backward that left this
  variable_list origins;     // under create_graph=True, of what it owes: the query and the gradients that came in, in the graph
};

c10::Stream current_stream(const Tensor& tensor) {
  return c10::impl::getDeviceGuardImpl(tensor.device().type())->getStream(tensor.device());
}

// What autograd does for the gradients that it passes on itself: the current stream waits for the steps' where they are others.
void wait_for(const std::vector<Step>& steps) {
  for (const Step& step : steps) {
    const c10::Stream current = current_stream(step.grad_scores);
    if (step.stream == current) {
      continue;
    }
    c10::Event event(current.device_type());
    event.record(step.stream);
    event.block(current);
    for (const Tensor& tensor : {step.weights, step.grad_context, step.grad_scores, step.query, step.features, step.grad_query}) {
      if (tensor.defined()) {
        tensor.record_stream(current);
      }
    }
  }
}

// The steps of each backward pass under way. A pass owns its entries, by way of a callback that does nothing: they go when it ends,
// whether it came as far as the node, never meant to, or raised.
class Ledger : public torch::CustomClassHolder {
 public:
  void leave(Step step) {
    const std::lock_guard lock(mutex_);
    auto& entries = passes_[torch::autograd::get_current_graph_task_id()];
    auto steps = entries.lock();
    if (steps == nullptr) {
      steps = std::make_shared<std::vector<Step>>();
      entries = steps;
      torch::autograd::Engine::get_default_engine().queue_callback([steps] {});
      std::erase_if(passes_, [](const auto& pass) { return pass.second.expired(); });
    }
    steps->push_back(std::move(step));
  }

  // This pass's.
  std::vector<Step> take() {
    const std::lock_guard lock(mutex_);
    const auto pass = passes_.find(torch::autograd::get_current_graph_task_id());
    const auto steps = pass == passes_.end() ? nullptr : pass->second.lock();
    return steps == nullptr ? std::vector<Step>() : std::exchange(*steps, {});
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int, std::weak_ptr<std::vector<Step>>> passes_;
};

constexpr char kLedger[] = "ledger";

Ledger& ledger_of(AutogradContext& ctx) {
  return *c10::static_intrusive_pointer_cast<Ledger>(ctx.saved_data.at(kLedger).toCapsule());
}

// A gradient that a backward returns under create_graph=True, as the function of `origins` that it is: to differentiate it would
// miss all that is deferred, and raises.
struct Once : torch::autograd::Function<Once> {
  static Tensor forward(AutogradContext*, const Tensor& grad, at::TensorList) {
    return grad.alias();
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "the steps of an AttentionMemory have no second derivative: their gradients are taken once a loop. Call"
        " luong_attention with the encoder outputs themselves, which has one");
  }
};

void refuse_second_derivative(variable_list& grads, const variable_list& origins) {
  variable_list known;
  std::copy_if(origins.begin(), origins.end(), std::back_inserter(known), [](const Tensor& origin) { return origin.defined(); });
  for (Tensor& grad : grads) {
    if (grad.defined()) {
      grad = Once::apply(grad, at::TensorList(known));
    }
  }
}

std::vector<Tensor> each(const std::vector<Step>& steps, Tensor Step::* field) {
  std::vector<Tensor> parts;
  for (const Step& step : steps) {
    parts.push_back(step.*field);
  }
  return parts;
}

// Concat's keys, and what its steps take besides.
struct Keys {
  Tensor keys, prepared;

  static Keys make(
      const Tensor& memory,
      const OptionalTensor& weight,
      const OptionalTensor& v,
      const OptionalTensor& bias,
      const Masking& masking) {
    if (!v) {
      return {};
    }
    const Tensor keys = project_memory(memory, Parts(*weight, memory, true).of_keys, bias, masking);
    return {keys, keys.is_cpu() ? PrepareKeys::call(keys) : Tensor()};  // a GPU's kernels take the exponentials as they read
  }
};

struct MemoryNode : torch::autograd::Function<MemoryNode> {
  // The tensors that have gradients: forward's first arguments. Each is there only if those before it are, so the numbers are those
  // of the edges.
  enum Input { kMemory, kWeight, kV, kBias, kInputs };
  enum Saved { kLengths = kInputs, kMask, kKeys, kPreparedKeys };

  // What the steps hang on and, of concat, the keys.
  static variable_list forward(
      AutogradContext* ctx,
      const Tensor& memory,
      const OptionalTensor& weight,
      const OptionalTensor& v,
      const OptionalTensor& bias,
      const OptionalTensor& lengths,
      const OptionalTensor& mask,
      Keys* made) {
    const BelowAutograd guard;
    *made = Keys::make(memory, weight, v, bias, {lengths, mask});
    const auto& [keys, prepared_keys] = *made;
    ctx->set_materialize_grads(false);
    ctx->saved_data[kLedger] = c10::IValue::make_capsule(c10::make_intrusive<Ledger>());
    ctx->save_for_backward(
        {memory,
         or_undefined(weight),
         or_undefined(v),
         or_undefined(bias),
         or_undefined(lengths),
         or_undefined(mask),
         keys,
         prepared_keys});
    const Tensor node = at::empty({0}, memory.options().dtype(at::kFloat));
    return v ? variable_list{node, keys} : variable_list{node};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list grads(kInputs + 3);  // as many as forward's arguments
    const std::vector<Step> steps = ledger_of(*ctx).take();
    // What the keys got but from the steps.
    Tensor grad_keys = incoming.size() > 1 ? incoming[1] : Tensor();
    if (steps.empty() && !grad_keys.defined()) {
      return grads;
    }
    if (grad_keys.defined()) {
      refuse_batches(incoming);
    }
    for (const Step& step : steps) {
      std::ranges::for_each(step.lent, &Lent::check_unchanged);
    }
    wait_for(steps);
    variable_list saved = ctx->get_saved_variables();
    std::array<bool, kInputs> wanted{};
    for (size_t i = 0; i < kInputs; ++i) {
      wanted[i] = saved[i].defined() && ctx->needs_input_grad(i);
    }
    if (!wants_keys(wanted)) {  // v, which alone has a gradient then, gets none through them
      grad_keys = Tensor();
      if (steps.empty()) {
        return grads;
      }
    }
    if (at::GradMode::is_enabled() && steps.empty()) {
      const variable_list computed = differentiably(saved, wanted, {grad_keys}, [&](const variable_list& inputs) -> variable_list {
        const OptionalTensor lengths = if_defined(saved[kLengths]), mask = if_defined(saved[kMask]);
        const Tensor attended = without_masked_rows(inputs[kMemory], {lengths, mask});
        return {project(attended, Parts(inputs[kWeight], attended, true).of_keys, if_defined(inputs[kBias]))};
      });
      std::copy(computed.begin(), computed.end(), grads.begin());
      return grads;
    }
    differentiate(steps, grad_keys, saved, wanted, grads);
    if (at::GradMode::is_enabled()) {
      saved.insert(saved.end(), incoming.begin(), incoming.end());
      for (const Step& step : steps) {
        saved.insert(saved.end(), step.origins.begin(), step.origins.end());
      }
      refuse_second_derivative(grads, saved);
    }
    return grads;
  }

 private:
  static bool wants_keys(const std::array<bool, kInputs>& wanted) {
    return wanted[kMemory] || wanted[kWeight] || wanted[kBias];
  }

  static void differentiate(
      const std::vector<Step>& steps,
      Tensor grad_keys,
      const variable_list& saved,
      const std::array<bool, kInputs>& wanted,
      variable_list& grads) {
    const at::NoGradGuard no_grad;
    const BelowAutograd guard;
    const Tensor &memory = saved[kMemory], &weight = saved[kWeight];
    const OptionalTensor lengths = if_defined(saved[kLengths]), mask = if_defined(saved[kMask]);
    const Masking masking{lengths, mask};
    const RowSubset attended = rows_to_multiply(memory, masking);
    const bool is_concat = saved[kV].defined();
    if (is_concat && !steps.empty()) {
      Tensor of_steps;
      std::tie(of_steps, grads[kV]) = grad_keys_and_v(steps, saved, wanted);
      grad_keys = grad_keys.defined() ? at::add(of_steps, grad_keys) : of_steps;
    }
    if (wanted[kMemory]) {
      Tensor& sum = grads[kMemory];
      sum = grad_memory(steps, !is_concat, memory, masking, attended);
      if (is_concat) {
        const Tensor of_keys = Parts(weight, memory, is_concat).of_keys;
        sum = sum.defined() ? add_grad_of_input(sum, grad_keys, of_keys, attended)
                            : grad_of_input(grad_keys, of_keys, memory, attended);
      }
    }
    if (wanted[kWeight]) {
      grads[kWeight] = at::empty_symint(weight.sym_sizes(), weight.options());
      const Parts into(grads[kWeight], memory, is_concat);
      if (steps.empty()) {
        into.of_query.zero_();
      } else {
        write_grad_of_weight(into.of_query, each(steps, &Step::grad_query), each(steps, &Step::features));
      }
      if (is_concat) {
        write_grad_of_key_weight(into.of_keys, grad_keys, memory, masking, attended);
      }
    }
    if (wanted[kBias]) {
      grads[kBias] = at::sum(rows_of(grad_keys), 0, false, saved[kBias].scalar_type());
    }
  }

  // In float64, or in float32, as everything that the steps left; then in the memory's type.
  static Tensor grad_memory(
      const std::vector<Step>& steps,
      bool is_its_own_keys,
      const Tensor& memory,
      const Masking& masking,
      const RowSubset& attended) {
    std::vector<Tensor> coefficients, rows;
    for (const Step& step : steps) {
      if (step.grad_context.defined()) {
        coefficients.push_back(step.weights);
        rows.push_back(step.grad_context);
      }
      if (is_its_own_keys) {
        coefficients.push_back(step.grad_scores);
        rows.push_back(step.query);
      }
    }
    if (rows.empty()) {
      return Tensor();
    }
    Tensor sums = cpu::sums_of_products(coefficients, rows, attended);
    if (!sums.defined()) {  // a gradient that is one number everywhere, say, takes no memory till it is joined
      const Tensor of_all = joined(coefficients), all = as(of_all.scalar_type(), joined(rows));
      sums = cpu::sums_of_products(of_all, all, attended);
      if (!sums.defined()) {
        sums = at::bmm(of_all.transpose(1, 2), all);
        const Tensor masked = masked_rows(memory, masking);
        if (masked.defined()) {  // 0 times what is no number is none
          sums.masked_fill_(masked.unsqueeze(2), 0);
        }
      }
    }
    return as(memory.scalar_type(), sums);
  }

  static std::tuple<Tensor, Tensor> grad_keys_and_v(
      const std::vector<Step>& steps, const variable_list& saved, const std::array<bool, kInputs>& wanted) {
    // A mask by query is of a step's queries, not of all steps'; what it hides from each of them may hold anything.
    const bool of_keys = wants_keys(wanted);
    auto [grad_keys, grad_v] = AdditiveScoresBackward::call(
        joined(each(steps, &Step::grad_scores)),
        joined(each(steps, &Step::query)),
        saved[kKeys],
        saved[kV],
        if_defined(saved[kPreparedKeys]),
        if_defined(saved[kLengths]),
        saved[kMask].defined() ? OptionalTensor(by_row(saved[kMask])) : std::nullopt,
        {of_keys, wanted[kV]});
    return {of_keys ? grad_keys : Tensor(), wanted[kV] ? grad_v : Tensor()};
  }
};

// One step's arguments, but for the query.
struct Arguments {
  const OptionalTensor& query_weight;
  const Tensor& memory;
  const OptionalTensor& keys;
  const OptionalTensor& v;
  const OptionalTensor& prepared_keys;
  const OptionalTensor& lengths;
  const OptionalTensor& mask;
  double scale;
  bool need_weights;

  Tensor project(const Tensor& query) const {
    // The product of a sparse one would be dense, which the op takes.
    check_dense("query", query);
    if (!query_weight) {
      return query;
    }
    check_weight_type(*query_weight, query.scalar_type());
    const auto needed = query_weight->sym_size(1);
    TORCH_CHECK_VALUE(
        query.dim() > 0 && query.sym_size(-1) == needed,
        "query has shape ",
        query.sym_sizes(),
        ", needed are ",
        needed,
        " features");
    return attn_ext::project(query, *query_weight);
  }

  // Of a projected query.
  Inputs with(const Tensor& query) const {
    return {query, memory, keys, v, prepared_keys, lengths, mask, scale};
  }
};

// A leaf of the graph, or a view of one.
bool is_of_leaf(const Tensor& tensor) {
  return tensor.requires_grad() && (tensor.is_view() ? tensor._base() : tensor).is_leaf();
}

struct MemoryStep : torch::autograd::Function<MemoryStep> {
  enum Saved {
    kQuery,
    kNode,
    kProjected,  // where there is a query_weight
    kQueryWeight,
    kMemory,
    kKeys,
    kV,
    kPreparedKeys,
    kLengths,
    kMask,
    kContext,  // where the backward op reads it, as it was accumulated,
    kWeights,  // and these
    kLogsumexp,
  };

  // The context, and the weights where they are asked for. These always have a derivative: whatever has one takes part in the
  // scores.
  static variable_list forward(
      AutogradContext* ctx, const Tensor& query, const Tensor& node, const c10::IValue& ledger, const Arguments* arguments) {
    const BelowAutograd guard;
    const Arguments& of = *arguments;
    const Tensor projected = of.project(query);
    const Inputs inputs = of.with(projected);
    const bool with_context = needs_context(inputs);
    const OpResults outputs = attend(inputs, true, {with_context, true});
    const Kept kept(outputs, with_context, true);
    ctx->set_materialize_grads(false);
    ctx->saved_data[kLedger] = ledger;
    ctx->saved_data["scale"] = of.scale;
    ctx->save_for_backward(
        {query,
         node,
         of.query_weight ? projected : Tensor(),
         or_undefined(of.query_weight),
         of.memory,
         or_undefined(of.keys),
         or_undefined(of.v),
         or_undefined(of.prepared_keys),
         or_undefined(of.lengths),
         or_undefined(of.mask),
         kept.context,
         kept.weights,
         kept.logsumexp});
    const auto& [context, weights, _, exact] = outputs;
    return of.need_weights ? variable_list{context, weights} : variable_list{context};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
    variable_list grads(4);  // as many as forward's arguments
    const Tensor grad_context = incoming[0], grad_weights = incoming.size() > 1 ? incoming[1] : Tensor();
    if (!grad_context.defined() && !grad_weights.defined()) {
      return grads;
    }
    const variable_list saved = ctx->get_saved_variables();
    if (saved[kQueryWeight].defined()) {
      refuse_batches(incoming);
    }
    variable_list origins;
    if (at::GradMode::is_enabled()) {
      origins = incoming;
      origins.insert(origins.end(), {saved[kQuery], saved[kNode]});
    }
    step_backward(ctx, saved, grad_context, grad_weights, origins, grads);
    if (at::GradMode::is_enabled()) {
      refuse_second_derivative(grads, origins);
    }
    return grads;
  }

 private:
  static void step_backward(
      AutogradContext* ctx,
      const variable_list& saved,
      const Tensor& grad_context,
      const Tensor& grad_weights,
      const variable_list& origins,
      variable_list& grads) {
    const at::NoGradGuard no_grad;
    const BelowAutograd guard;
    const Tensor &query = saved[kQuery], &query_weight = saved[kQueryWeight], &weights = saved[kWeights];
    const Tensor& projected = query_weight.defined() ? saved[kProjected] : query;
    const Gradients computed = differentiate(
        {projected,
         saved[kMemory],
         if_defined(saved[kKeys]),
         if_defined(saved[kV]),
         if_defined(saved[kPreparedKeys]),
         if_defined(saved[kLengths]),
         if_defined(saved[kMask]),
         ctx->saved_data.at("scale").toDouble()},
        {if_defined(grad_context), if_defined(grad_weights), if_defined(saved[kContext]), weights, saved[kLogsumexp]},
        {true, false, false, false, true});
    if (ctx->needs_input_grad(1)) {
      // One step or several: [B, T, ...].
      const auto steps = [&](const Tensor& t) { return t.defined() && query.dim() == 2 ? t.unsqueeze(1) : t; };
      const bool is_projected = query_weight.defined();
      // A hook of a parameter may bring it up to date as soon as its gradient is there.
      const Tensor kept = is_of_leaf(query) ? query.clone() : query;
      ledger_of(*ctx).leave(
          {steps(weights),
           steps(grad_context),
           steps(computed.scores),
           steps(is_projected ? projected : kept),
           is_projected ? steps(kept) : Tensor(),
           is_projected ? steps(computed.query) : Tensor(),
           {Lent(kept), Lent(weights), Lent(grad_context)},
           current_stream(query),
           origins});
    }
    if (ctx->needs_input_grad(0)) {
      grads[0] = query_weight.defined() ? project(computed.query, query_weight.t()) : computed.query;
    }
  }
};

template <class... Tensors>
void refuse_tangents(const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !have_tangents(tensors...),
      "the steps of an AttentionMemory have no forward-mode derivative. Make it, and call it, within use_backend('reference')");
}

// What every step of a loop is to be given, which carries the gradients of all tensors here; of concat, with a v, the keys, and
// what the steps take besides. Without a weight it is dot, with one alone general.
std::tuple<Tensor, Tensor, Tensor> memory_node(
    const Tensor& memory,
    const OptionalTensor& weight,
    const OptionalTensor& v,
    const OptionalTensor& bias,
    const OptionalTensor& lengths,
    const OptionalTensor& mask) {
  TORCH_CHECK_VALUE(weight || !v, "v came without weight, needed are both of concat");
  if (weight) {
    check_projection(std::nullopt, *weight, memory, v, bias);
  }
  refuse_tangents(memory, weight, v, bias);
  const Tensor none = at::empty({0}, memory.options());
  const auto or_none = [&](const Tensor& tensor) { return tensor.defined() ? tensor : none; };
  Keys made;
  if (!torch::autograd::compute_requires_grad(memory, weight, v, bias)) {
    const BelowAutograd guard;
    made = Keys::make(memory, weight, v, bias, {lengths, mask});
    return {none, or_none(made.keys), or_none(made.prepared)};
  }
  const variable_list outputs = MemoryNode::apply(memory, weight, v, bias, lengths, mask, &made);
  return {outputs[0], v ? outputs[1] : none, or_none(made.prepared)};
}

// A query [B, T, Dq] or [B, Dq] against the memory: its projection, and the op.
std::tuple<Tensor, Tensor> memory_attention(
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
    const OptionalTensor& node) {
  const Arguments arguments{query_weight, memory, keys, v, prepared_keys, lengths, mask, scale, need_weights};
  refuse_tangents(query, query_weight, keys, v, memory);
  const bool has_node = node && node->requires_grad();
  if (!(at::GradMode::is_enabled() && has_node) && !torch::autograd::compute_requires_grad(query, keys, v, memory)) {
    const BelowAutograd guard;
    auto [context, weights, logsumexp, exact] = attend(arguments.with(arguments.project(query)), need_weights, {});
    return {context, weights};
  }
  const auto* made = has_node ? dynamic_cast<torch::autograd::CppNode<MemoryNode>*>(node->grad_fn().get()) : nullptr;
  TORCH_CHECK_VALUE(made != nullptr, "node must be what memory_node returned, of tensors that require a gradient");
  const variable_list outputs = MemoryStep::apply(query, *node, made->ctx_.saved_data.at(kLedger), &arguments);
  return {outputs[0], outputs.size() > 1 ? outputs[1] : at::empty({0}, query.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(attn_ext, CompositeImplicitAutograd, m) {
  m.impl("memory_node", memory_node);
  m.impl("memory_attention", memory_attention);
}

}  // namespace attn_ext

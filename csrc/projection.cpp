#include "projection.h"

#include "cpu/centring.h"

#include <ATen/Functions.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

namespace attn_ext {
namespace {

using torch::autograd::variable_list;

// What PyTorch's products of a type are taken in: on a processor with products of ours, float16 has none of its own.
at::ScalarType product_type(at::ScalarType type, const Tensor& tensor) {
  return type == at::kHalf && tensor.is_cpu() && cpu::has_own_matmul() ? at::kFloat : type;
}

bool is_time_major(const Tensor& tensor) {
  return tensor.dim() == 3 && !tensor.is_contiguous() && tensor.transpose(0, 1).is_contiguous();
}

// Whether PyTorch's product may let a row into the one before it: oneDNN's matrix tiles take pairs of bfloat16 32 at a time, and
// where a row ends within them they read on, and multiply by 0 what may be NaN.
bool reads_behind_rows(const Tensor& input, const Tensor& weight) {
  return input.is_cpu() && weight.scalar_type() == at::kBFloat16 && input.sym_size(-1) % 32 != 0;
}

}  // namespace

Tensor as(at::ScalarType type, const Tensor& tensor) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

Tensor rows_of(const Tensor& tensor) {
  return tensor.dim() == 2 ? tensor : tensor.flatten(0, 1);
}

Tensor joined(at::TensorList tensors) {
  return tensors.size() == 1 ? tensors[0] : at::cat(tensors, 1);
}

Parts::Parts(const Tensor& weight, const Tensor& memory, bool is_concat, bool by_keys) {
  if (is_concat) {
    const auto memory_size = memory.sym_size(2), query_size = weight.sym_size(1) - memory_size;
    of_query = weight.narrow_symint(1, 0, query_size);
    of_keys = weight.narrow_symint(1, query_size, memory_size);
  } else if (by_keys) {
    of_keys = weight.t();
  } else {
    of_query = weight;
  }
}

void check_weight_type(const Tensor& weight, at::ScalarType type) {
  const auto weight_type = weight.scalar_type();
  TORCH_CHECK_TYPE(
      weight_type == type || (weight_type == at::kFloat && at::isReducedFloatingType(type)),
      "weight is ",
      weight_type,
      ", needed is ",
      type);
}

void check_dense(const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name, " must be a dense (strided) tensor, got layout ", tensor.layout());
}

void check_projection(
    const OptionalTensor& query, const Tensor& weight, const Tensor& memory, const OptionalTensor& v, const OptionalTensor& bias) {
  const auto type = query ? query->scalar_type() : memory.scalar_type();
  check_dense("weight", weight);
  check_dense("memory", memory);
  TORCH_CHECK_TYPE(memory.scalar_type() == type, "memory is ", memory.scalar_type(), ", needed is ", type);
  check_weight_type(weight, type);
  TORCH_CHECK_VALUE(memory.dim() == 3, "memory has shape ", memory.sym_sizes(), ", needed is [B, S, size]");
  const auto device = query ? query->device() : memory.device();
  TORCH_CHECK_VALUE(weight.device() == device, "weight is on ", weight.device(), ", needed is ", device);
  TORCH_CHECK_VALUE(!bias || bias->device() == device, "bias is on ", bias->device(), ", needed is ", device);
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight has shape ", weight.sym_sizes(), ", needed are two dimensions");
  TORCH_CHECK_VALUE(v || !bias, "bias came without v, but general has neither");
  const auto memory_size = memory.sym_size(2), columns = weight.sym_size(1);
  if (!v) {
    TORCH_CHECK_VALUE(
        weight.sym_size(0) == memory_size, "weight has shape ", weight.sym_sizes(), ", needed is [", memory_size, ", Dq]");
  }
  if (query) {
    const auto needed = v ? query->sym_size(-1) + memory_size : query->sym_size(-1);
    TORCH_CHECK_VALUE(columns == needed, "weight has shape ", weight.sym_sizes(), ", needed are ", needed, " columns");
  } else if (v) {
    TORCH_CHECK_VALUE(
        columns >= memory_size, "weight has shape ", weight.sym_sizes(), ", needed are ", memory_size, " columns and more");
  }
  if (bias) {
    TORCH_CHECK_VALUE(
        bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0),
        "bias has shape ",
        bias->sym_sizes(),
        ", needed is [",
        weight.sym_size(0),
        "]");
    TORCH_CHECK_TYPE(
        bias->scalar_type() == weight.scalar_type(), "bias is ", bias->scalar_type(), ", needed is ", weight.scalar_type());
  }
}

Tensor centred(const Tensor& memory, const Masking& masking) {
  if (!at::isReducedFloatingType(memory.scalar_type()) || (masking.any() && !masking.fits(memory))) {
    return memory;
  }
  if (cpu::can_centre(memory)) {
    if (const RowSubset attended = attended_rows(memory, masking); attended || !masking.any()) {
      return cpu::centred(memory, attended);
    }
  }
  const Tensor rows = masked_rows(memory, masking);
  const Tensor attended = rows.defined() ? memory.masked_fill(rows.unsqueeze(2), 0) : memory;
  const Tensor wide = attended.to(at::kFloat), sums = wide.sum(1, true), magnitudes = wide.abs().sum(1, true);
  const Tensor has_much = sums.abs().mul(2).ge(magnitudes).logical_and_(magnitudes.isfinite());
  const Tensor average = rows.defined() ? sums.div(rows.logical_not().sum(1, true).unsqueeze(2).clamp_min(1))
                                        : sums.div(at::Scalar(memory.sym_size(1)));
  return at::sub(attended, as(memory.scalar_type(), at::where(has_much, average, 0)));  // halves: nearly the average will do
}

Tensor project(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const RowSubset& some) {
  if (is_time_major(input)) {  // so is the result then, and nothing is copied
    return project(input.transpose(0, 1), weight, bias, some).transpose(0, 1);
  }
  const Tensor rows = rows_of(input), factors = weight.t();
  Tensor projected;
  if (cpu::can_matmul(rows, factors) && (!bias || cpu::is_plain(*bias))) {
    projected = at::empty({rows.size(0), factors.size(1)}, rows.options());
    cpu::matmul(projected, rows, factors, bias, false, some);
  } else {
    const auto type = product_type(weight.scalar_type(), input);
    const Tensor left = as(type, rows), right = as(type, factors);
    projected = as(input.scalar_type(), bias ? at::addmm(as(type, *bias), left, right) : at::mm(left, right));
  }
  return input.dim() == 2 ? projected : projected.view_symint({input.sym_size(0), input.sym_size(1), weight.sym_size(0)});
}

Tensor project_memory(const Tensor& memory, const Tensor& weight, const OptionalTensor& bias, const Masking& masking) {
  if (reads_behind_rows(memory, weight) && masking.any() && masking.fits(memory)) {
    return project(without_masked_rows(memory, masking), weight, bias);
  }
  return project(memory, weight, bias, rows_to_multiply(memory, masking, is_time_major(memory)));
}

void refuse_batches(at::TensorList grads) {
  constexpr c10::DispatchKeySet batched({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
  for (const Tensor& grad : grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !grad.defined() || !grad.key_set().has_any(batched),
        "general and concat take one gradient at a time: several at once (is_grads_batched, vectorize) are the reference's,"
        " within use_backend('reference')");
  }
}

Tensor grad_of_input(const Tensor& grad, const Tensor& weight, const Tensor& input, const RowSubset& some) {
  return as(input.scalar_type(), project(rows_of(grad), weight.t(), {}, some)).view_symint(input.sym_sizes());
}

Tensor add_grad_of_input(const Tensor& sum, const Tensor& grad, const Tensor& weight, const RowSubset& some) {
  const Tensor to = rows_of(sum), rows = rows_of(grad);
  if (cpu::can_matmul(rows, weight)) {
    cpu::matmul(to, rows, weight, std::nullopt, true, some);
    return sum;
  }
  const auto type = sum.scalar_type();
  if (weight.scalar_type() != type || product_type(type, sum) != type) {
    return at::add(sum, grad_of_input(grad, weight, sum, some));
  }
  to.addmm_(rows, weight);
  return sum;
}

bool write_grad_of_weight(const Tensor& result, at::TensorList grads, at::TensorList inputs, const RowSubset& some) {
  if (cpu::sum_of_products(result, grads, inputs, some)) {
    return some.has_value();
  }
  const auto type = product_type(result.scalar_type(), result);
  const auto rows = [&](at::TensorList tensors) { return as(type, rows_of(joined(tensors))); };
  if (type == result.scalar_type()) {
    Tensor out = result;
    at::mm_out(out, rows(grads).t(), rows(inputs));
  } else {
    result.copy_(at::mm(rows(grads).t(), rows(inputs)));
  }
  return false;
}

void write_grad_of_key_weight(
    const Tensor& result, const Tensor& grad_keys, const Tensor& memory, const Masking& masking, const RowSubset& attended) {
  // A look at the result costs less than a copy of the memory, but elsewhere it would wait for a device, or there is nothing to
  // see.
  const bool can_look = cpu::is_plain(memory);
  if (masking.any() && !can_look) {
    write_grad_of_weight(result, grad_keys, without_masked_rows(memory, masking));
    return;
  }
  const bool left_out = write_grad_of_weight(result, grad_keys, memory, attended);
  if (masking.any() && !left_out && !std::isfinite(result.sum().item<double>())) {
    write_grad_of_weight(result, grad_keys, without_masked_rows(memory, masking));
  }
}

variable_list differentiably(
    const variable_list& saved,
    at::ArrayRef<bool> wanted,
    const variable_list& grad_outputs,
    const std::function<variable_list(const variable_list&)>& make) {
  const c10::impl::ExcludeDispatchKeyGuard below_autocast(c10::autocast_dispatch_keyset);  // which had its say before the node
  const size_t n = wanted.size();
  variable_list inputs(n), asked, outputs, arriving, grads(n);
  for (size_t i = 0; i < n; ++i) {
    if (saved[i].defined()) {
      inputs[i] = saved[i].view_as(saved[i]);  // one that was passed twice keeps its gradients apart
      if (wanted[i]) {
        asked.push_back(inputs[i]);
      }
    }
  }
  const variable_list made = make(inputs);
  for (size_t i = 0; i < grad_outputs.size(); ++i) {
    if (grad_outputs[i].defined()) {
      outputs.push_back(made[i]);
      arriving.push_back(grad_outputs[i]);
    }
  }
  const auto computed = torch::autograd::grad(outputs, asked, arriving, std::nullopt, /*create_graph=*/true, /*allow_unused=*/true);
  auto next = computed.begin();
  for (size_t i = 0; i < n; ++i) {
    if (wanted[i]) {
      grads[i] = *next++;
    }
  }
  return grads;
}

}  // namespace attn_ext

// The ops as Python functions of their own: torch.ops takes longer to look at the arguments of a small call than its kernel to run.
// For attn_ext/functional.py and memory.py, where nothing is traced; beneath are the same ops by way of the same dispatcher.
#include "dispatch.h"

#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

namespace attn_ext {
namespace {

using Attended = std::tuple<Tensor, OptionalTensor>;  // the context, and the weights where they are asked for

Attended attended(Tensor context, Tensor weights, bool need_weights) {
  return {std::move(context), need_weights ? OptionalTensor(std::move(weights)) : std::nullopt};
}

template <class Op, class = std::make_index_sequence<Op::kInputs>>
struct Call;

template <class Op, size_t... i>
struct Call<Op, std::index_sequence<i...>> {
  static Attended run(
      Input<i>... inputs, const OptionalTensor& lengths, const OptionalTensor& mask, double scale, bool need_weights) {
    auto [context, weights, logsumexp, exact] = Op::forward(inputs..., lengths, mask, scale, need_weights, {});
    return attended(std::move(context), std::move(weights), need_weights);
  }
};

Attended projected_attention(
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
  static const auto op = find<std::tuple<Tensor, Tensor>(
      const Tensor&,
      const Tensor&,
      const Tensor&,
      const OptionalTensor&,
      const OptionalTensor&,
      const OptionalTensor&,
      const OptionalTensor&,
      double,
      bool,
      bool)>("attn_ext::projected_attention");
  auto [context, weights] = op.call(query, weight, memory, v, bias, lengths, mask, scale, need_weights, by_keys);
  return attended(std::move(context), std::move(weights), need_weights);
}

Attended memory_attention(
    const Tensor& query,
    const OptionalTensor& query_weight,
    const OptionalTensor& keys,
    const OptionalTensor& prepared_keys,
    const OptionalTensor& v,
    const Tensor& memory,
    const OptionalTensor& lengths,
    const OptionalTensor& mask,
    double scale,
    bool need_weights,
    const OptionalTensor& node) {
  static const auto op = find<std::tuple<Tensor, Tensor>(
      const Tensor&,
      const OptionalTensor&,
      const OptionalTensor&,
      const OptionalTensor&,
      const OptionalTensor&,
      const Tensor&,
      const OptionalTensor&,
      const OptionalTensor&,
      double,
      bool,
      const OptionalTensor&)>("attn_ext::memory_attention");
  auto [context, weights] = op.call(query, query_weight, keys, prepared_keys, v, memory, lengths, mask, scale, need_weights, node);
  return attended(std::move(context), std::move(weights), need_weights);
}

}  // namespace

// Other threads of Python run meanwhile; what the ops refuse becomes Python's ValueError and TypeError, as torch.ops would have it.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("dot_attention", torch::wrap_pybind_function_no_gil(Call<DotOp>::run));
  m.def("keyed_dot_attention", torch::wrap_pybind_function_no_gil(Call<KeyedDotOp>::run));
  m.def("additive_attention", torch::wrap_pybind_function_no_gil(Call<AdditiveOp>::run));
  m.def("projected_attention", torch::wrap_pybind_function_no_gil(projected_attention));
  m.def("memory_attention", torch::wrap_pybind_function_no_gil(memory_attention));
}

}  // namespace attn_ext

// The ops as Python functions of their own: torch.ops takes longer to look at the arguments of a small call than its kernel to run.
// For attn_ext/functional.py and memory.py, where nothing is traced; beneath are the same ops by way of the same dispatcher.
#include "../dispatch.h"

#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

namespace attn_ext {
namespace {

using Attended = std::tuple<Tensor, OptionalTensor>;  // the context, and the weights where they are asked for

// Of one query or several, the weights of which have two dimensions or three; what was not asked for has one.
Attended attended(Tensor context, Tensor weights) {
  return {std::move(context), weights.dim() > 1 ? OptionalTensor(std::move(weights)) : std::nullopt};
}

Attended attention(
    const Tensor& query,
    const Tensor& memory,
    const OptionalTensor& keys,
    const OptionalTensor& v,
    const OptionalTensor& lengths,
    const OptionalTensor& mask,
    double scale,
    bool need_weights) {
  auto [context, weights, logsumexp, exact] = attend({query, memory, keys, v, {}, lengths, mask, scale}, need_weights, {});
  return attended(std::move(context), std::move(weights));
}

template <class Named>
struct Call;

template <const char* name, class... Arguments>
struct Call<Op<name, std::tuple<Tensor, Tensor>(Arguments...)>> {
  static Attended run(Arguments... arguments) {
    auto [context, weights] = Op<name, std::tuple<Tensor, Tensor>(Arguments...)>::call(arguments...);
    return attended(std::move(context), std::move(weights));
  }
};

}  // namespace

// Other threads of Python run meanwhile; what the ops refuse becomes Python's ValueError and TypeError, as torch.ops would have it.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("attention", torch::wrap_pybind_function_no_gil(attention));
  m.def("projected_attention", torch::wrap_pybind_function_no_gil(Call<ProjectedAttention>::run));
  m.def("memory_attention", torch::wrap_pybind_function_no_gil(Call<MemoryAttention>::run));
}

}  // namespace attn_ext

// From tensors to the kernels' view of them, for every device's entry points.
#pragma once

#include "attention.h"

namespace attn_ext {

// As a profiler shows them.
inline const char* name_of(Method method) {
  return method == Method::Dot ? "dot" : method == Method::KeyedDot ? "keyed_dot" : "additive";
}

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Dtype::Double;
    case at::kBFloat16:
      return Dtype::BFloat16;
    case at::kHalf:
      return Dtype::Half;
    default:
      return Dtype::Float;
  }
}

// [B, rows, elements], [B, elements], or [elements].
inline View view_of(const Tensor& tensor) {
  if (tensor.dim() == 1) {
    return {tensor.const_data_ptr(), 0, 0, tensor.stride(0)};
  }
  if (tensor.dim() == 2) {
    return {tensor.const_data_ptr(), tensor.stride(0), 0, tensor.stride(1)};
  }
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline View view_of(const OptionalTensor& tensor) {
  return tensor ? view_of(*tensor) : View{};
}

inline void* data_of(const Tensor& output) {
  return output.defined() && output.numel() > 0 ? output.mutable_data_ptr() : nullptr;
}

// A problem without its tensors.
inline Problem problem_of_sizes(Method method, const Tensor& query, const Tensor& memory) {
  Problem problem{};
  problem.dtype = problem.product_dtype = dtype_of(query);
  problem.method = method;
  problem.batch = query.size(0);
  problem.queries = query.dim() == 3 ? query.size(1) : 1;
  problem.steps = memory.size(1);
  problem.key_size = query.size(-1);
  problem.memory_size = memory.size(2);
  return problem;
}

inline Problem problem_of(const Inputs& inputs, const Tensor& lengths) {
  Problem problem = problem_of_sizes(inputs.method(), inputs.query, inputs.memory);
  problem.scale = inputs.scale;
  problem.query = view_of(inputs.query);
  problem.memory = view_of(inputs.memory);
  problem.keys = view_of(inputs.keys);
  problem.v = view_of(inputs.v);
  problem.prepared_keys = view_of(inputs.prepared_keys);
  if (lengths.defined()) {
    problem.lengths = lengths.const_data_ptr<int64_t>();
  }
  if (inputs.mask) {
    problem.mask_per_query = inputs.mask->dim() == 3;
    problem.mask = view_of(*inputs.mask);
  }
  return problem;
}

}  // namespace attn_ext

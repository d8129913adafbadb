// The arguments of the ops, as they pass from ops.cpp to a device's entry points.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace attn_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// One of the ops on its inputs: dot has neither keys nor v.
struct Inputs {
  const Tensor& query;            // [B, T, Dq], additive [B, T, A]; without the T here, there is none in any tensor [B, T, ...]
  const Tensor* keys;             // [B, S, A]
  const Tensor* v;                // [A]
  const Tensor& memory;           // [B, S, Dm]; additive's values
  const OptionalTensor& lengths;  // [B] int64
  const OptionalTensor& mask;     // [B, S] or [B, T, S] bool
  double scale;
};

// Allocated by ops.cpp, contiguous, in the accumulation type; weights has no elements where they are not asked for.
struct Outputs {
  Tensor context;    // [B, T, Dm]
  Tensor weights;    // [B, T, S]
  Tensor logsumexp;  // [B, T]
};

// What the forward left for the backward, and the gradients that came in.
struct Saved {
  const OptionalTensor& grad_context;
  const OptionalTensor& grad_weights;
  const Tensor& context;
  const OptionalTensor& weights;
  const Tensor& logsumexp;
};

// Allocated by ops.cpp, contiguous; undefined where not wanted.
struct Gradients {
  Tensor query;
  Tensor keys;
  Tensor v;
  Tensor memory;
};

namespace cpu {
void forward(const Inputs& inputs, Outputs& outputs);
void backward(const Inputs& inputs, const Saved& saved, Gradients& gradients);
const char* capability_name();
}  // namespace cpu

}  // namespace attn_ext

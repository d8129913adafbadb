// The arguments of the op, as they pass from ops.cpp to a device's entry points.
#pragma once

#include "problem.h"

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace attn_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Of dot products with the memory a query and a memory, of those with keys these as well, of additive scores keys and v.
struct Inputs {
  const Tensor& query;         // [B, T, Dq], additive [B, T, A]; without the T here, there is none in any tensor [B, T, ...]
  const Tensor& memory;        // [B, S, Dm]; with keys, the values
  const OptionalTensor& keys;  // [B, S, Dq], additive [B, S, A]
  const OptionalTensor& v;     // [A]
  const OptionalTensor& prepared_keys;  // [B, S, prepared size], what prepare_keys made of additive's keys
  const OptionalTensor& lengths;        // [B] int64
  const OptionalTensor& mask;           // [B, S] or [B, T, S] bool
  double scale;

  Method method() const {
    return v ? Method::Additive : keys ? Method::KeyedDot : Method::Dot;
  }
};

// Allocated by ops.cpp, contiguous; weights has no elements where they are not asked for.
struct Outputs {
  Tensor context;    // [B, T, Dm] in query's type
  Tensor weights;    // [B, T, S] in query's type
  Tensor logsumexp;  // [B, T] in the accumulation type
  // Of halves, for a backward: the same as they were accumulated, not rounded. Undefined or without elements where not wanted.
  Tensor exact_context;
  Tensor exact_weights;
};

// The gradients that came in, in query's type, and what the forward left for the backward, in the accumulation type.
struct BackwardInputs {
  const OptionalTensor& grad_context;
  const OptionalTensor& grad_weights;
  const OptionalTensor& context;  // where the device needs_context()
  const OptionalTensor& weights;
  const Tensor& logsumexp;
};

// Allocated by ops.cpp, contiguous; undefined where not wanted.
struct Gradients {
  Tensor query;
  Tensor memory;
  Tensor keys;
  Tensor v;
  Tensor scores;  // [B, T, S] in the accumulation type: of q . m, q . k, or v . tanh(q + k)
};

// A device's way in.
struct EntryPoints {
  // Whether a backward of a problem of these sizes, of which nothing else is there yet, reads the context.
  bool (*needs_context)(const Problem& sizes);
  void (*forward)(const Inputs& inputs, Outputs& outputs);
  void (*backward)(const Inputs& inputs, const BackwardInputs& saved, Gradients& gradients);
  // What is left of a backward once the gradients of the scores are known: those of query, keys and v.
  void (*backward_of_scores)(const Inputs& inputs, const Tensor& grad_scores, Gradients& gradients);
  void (*prepare_keys)(const Tensor& keys, Tensor& prepared);
};

namespace cpu {
extern const EntryPoints entry_points;
const char* capability_name();
bool has_own_matmul();  // the projections' float matrices, or leaves them to PyTorch's library
}  // namespace cpu

namespace cuda {
extern const EntryPoints entry_points;
}  // namespace cuda

}  // namespace attn_ext

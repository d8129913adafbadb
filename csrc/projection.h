// The products with a weight around the op, and their gradients. All but differentiably() run beneath autograd, which has nodes of
// its own for what they are part of (projected.cpp, memory.cpp).
#pragma once

#include "masking.h"

#include <torch/csrc/autograd/variable.h>

#include <functional>

namespace attn_ext {

Tensor as(at::ScalarType type, const Tensor& tensor);

// [B, T, D] as [B T, D]: a view where the strides allow.
Tensor rows_of(const Tensor& tensor);

// [B, T, D] of several, one behind the other along T.
Tensor joined(at::TensorList tensors);

// What of a weight, or of its gradient, projects queries, and what the memory: concat's is both, [A, Dq + Dm], general's, [Dm, Dq],
// one of them. Undefined is what there is not.
struct Parts {
  Parts(const Tensor& weight, const Tensor& memory, bool is_concat, bool by_keys = false);

  Tensor of_query, of_keys;
};

// A weight is of its input's type; of halves, it may be in float32.
void check_weight_type(const Tensor& weight, at::ScalarType type);

void check_dense(const char* name, const Tensor& tensor);

// What the products would take, or would say in words of their own. What is made of these tensors, the ops check. Without a query,
// what its weight is for is not known yet.
void check_projection(
    const OptionalTensor& query, const Tensor& weight, const Tensor& memory, const OptionalTensor& v, const OptionalTensor& bias);

// A memory of halves less the average of what can be attended of it, which adds the same to all scores of a query, and so nothing
// to its weights: keys of halves would be rounded as what they have in common is. Features that have little in common stay as they
// are, which no rounding of a difference is.
Tensor centred(const Tensor& memory, const Masking& masking);

// weight x + bias for each x of the input, [..., in] and [out, in]; 0 for those of other rows, where there is something to gain.
// Halves are multiplied in float32 where their weight comes in it, as functional.py has it where PyTorch has nothing better.
Tensor project(const Tensor& input, const Tensor& weight, const OptionalTensor& bias = {}, const RowSubset& some = {});

// Keys, of which those that are masked may be anything.
Tensor project_memory(const Tensor& memory, const Tensor& weight, const OptionalTensor& bias, const Masking& masking);

// Where PyTorch maps over gradients (is_grads_batched, vectorize): a weight's is written in place, which that cannot follow.
void refuse_batches(at::TensorList grads);

// What a projection's input gets: grad [..., out] times weight [out, in], in the shape of `input`; of rows that are masked, 0.
Tensor grad_of_input(const Tensor& grad, const Tensor& weight, const Tensor& input, const RowSubset& some = {});

// As grad_of_input, but added to what the input has already, contiguous; returns the sum.
Tensor add_grad_of_input(const Tensor& sum, const Tensor& grad, const Tensor& weight, const RowSubset& some);

// What a projection's weight gets of these rows of its inputs, written to `result` [out, in]. Returns whether the others were left
// out; if not, they are summed over with all.
bool write_grad_of_weight(const Tensor& result, at::TensorList grads, at::TensorList inputs, const RowSubset& some = {});

// write_grad_of_weight of keys that the memory was projected to. A row that no query may attend has a gradient of 0 and may hold
// anything; NaN and infinity survive the product with it.
void write_grad_of_key_weight(
    const Tensor& result, const Tensor& grad_keys, const Tensor& memory, const Masking& masking, const RowSubset& attended);

// A node's backward under create_graph=True: the gradients of what `make` makes of the node's inputs, which stand first in `saved`,
// where they are wanted; by derivatives that have derivatives.
torch::autograd::variable_list differentiably(
    const torch::autograd::variable_list& saved,
    at::ArrayRef<bool> wanted,
    const torch::autograd::variable_list& grad_outputs,
    const std::function<torch::autograd::variable_list(const torch::autograd::variable_list&)>& make);

}  // namespace attn_ext

// Products of matrices of floats and halves on the CPU, where the kernels here do better than the library behind at::mm: with rows
// left out, and on processors whose vectors or matrix tiles that library leaves unused.
#pragma once

#include "kernels/call.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace attn_ext::cpu {

// Whether a call of PyTorch's with it would go straight to the CPU's kernel: beneath autograd, and nothing traces, batches, counts
// or fakes what happens.
bool is_plain(const at::Tensor& tensor);

// Some of a tensor's rows, those of a batch one behind the other; none named: all.
using RowSubset = std::optional<std::vector<RowRange>>;

// Whether matmul() takes these, or they are PyTorch's: [rows, depth] and [depth, columns].
bool can_matmul(const at::Tensor& a, const at::Tensor& b);

// out = a b, + bias [columns], or, if it adds to out and there is no bias, out + a b. The other rows of out become 0, or stay what
// they are where it adds.
void matmul(
    const at::Tensor& out,
    const at::Tensor& a,
    const at::Tensor& b,
    const std::optional<at::Tensor>& bias,
    bool adds_to_out,
    const RowSubset& rows);

// out = the sum of a^T b over these rows of tensors [rows, size] or [batch, rows, size], as if each list of them were one. False,
// and nothing is written, if it is PyTorch's.
bool sum_of_products(const at::Tensor& out, at::TensorList a, at::TensorList b, const RowSubset& some = {});

// The same for each element of a batch: [batch, rows, columns], of which other rows become 0. Undefined if it is PyTorch's.
at::Tensor sums_of_products(at::TensorList a, at::TensorList b, const RowSubset& rows = {});

}  // namespace attn_ext::cpu

// Products of float matrices on the CPU, where the kernels here do better than the library behind at::mm: with rows left out, and
// on processors whose vectors that library leaves half unused.
#pragma once

#include "kernels/call.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace attn_ext::cpu {

// What a product is added to, and what of it is not there to be taken.
struct Terms {
  std::optional<at::Tensor> bias{};         // [columns]
  bool adds_to_out = false;                 // instead
  const std::vector<Run>* rows = nullptr;   // of all matrices of a batch, one behind the other: the others of out become 0
  const std::vector<Run>* depth = nullptr;  // of what is summed over, where a is stored by columns and b by rows
};

// Whether a call of PyTorch's with it would go straight to the CPU's kernel: beneath autograd, and nothing traces, batches, counts
// or fakes what happens.
bool is_plain(const at::Tensor& tensor);

// Whether matmul() takes these, [rows, depth] and [depth, columns], or a batch of them, and is worth its call.
bool takes(const at::Tensor& a, const at::Tensor& b);

// out = a b, with its terms; by columns without a bias and with all its rows.
void matmul(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const Terms& terms = {});

}  // namespace attn_ext::cpu

// What the rows of a memory of halves have in common, taken off before they are projected to keys.
#pragma once

#include "matmul.h"

namespace attn_ext::cpu {

// Whether centred() takes it.
bool can_centre(const at::Tensor& memory);

// The memory [B, S, Dm] less its average over these of its rows, of features that have much in common, and 0 in the others.
at::Tensor centred(const at::Tensor& memory, const RowSubset& attended);

}  // namespace attn_ext::cpu

// What no query may attend of a memory, by lengths and mask.
#pragma once

#include "attention.h"
#include "cpu/matmul.h"

namespace attn_ext {

using cpu::RowSubset;

struct Masking {
  const OptionalTensor& lengths;
  const OptionalTensor& mask;

  bool any() const {
    return lengths || mask;
  }

  // Whether they are what a memory's ought to be; if not, the ops say so.
  bool fits(const Tensor& memory) const;
};

// Of either form of mask, [B, S]: which rows some query may attend.
Tensor by_row(const Tensor& mask);

// Which rows no query may attend, [B, S]; undefined where nothing says so.
Tensor masked_rows(const Tensor& memory, const Masking& masking);

// The memory with 0 in those.
Tensor without_masked_rows(const Tensor& memory, const Masking& masking);

// The rows of a memory, one batch element behind the other or, `by_time`, one step behind the other, that some query may attend,
// where something is masked and one can look.
RowSubset attended_rows(const Tensor& memory, const Masking& masking, bool by_time = false);

// The same where products leave the others out.
RowSubset rows_to_multiply(const Tensor& memory, const Masking& masking, bool by_time = false);

}  // namespace attn_ext

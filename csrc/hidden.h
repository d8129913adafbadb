// What no query may attend of a memory, by lengths and mask.
#pragma once

#include "attention.h"
#include "cpu/matmul.h"

namespace attn_ext {

using cpu::SomeRows;

struct Hidden {
  const OptionalTensor& lengths;
  const OptionalTensor& mask;

  bool anything() const {
    return lengths || mask;
  }

  // Whether they are what a memory's ought to be; if not, the ops say so.
  bool fit(const Tensor& memory) const;
};

// Of either form of mask, [B, S]: which rows some query may attend.
Tensor by_row(const Tensor& mask);

// Which rows no query may attend, [B, S]; undefined where nothing says so.
Tensor hidden_rows(const Tensor& memory, const Hidden& hidden);

// The memory with 0 in those.
Tensor without_hidden_rows(const Tensor& memory, const Hidden& hidden);

// The rows of a memory, one batch element behind the other or, `by_time`, one step behind the other, that some query may attend,
// where one can look and somebody leaves the others out.
SomeRows seen_rows(const Tensor& memory, const Hidden& hidden, bool by_time = false);

}  // namespace attn_ext

// How exact PyTorch's settings want products of float32 to be.
#pragma once

#include "../problem.h"

#include <ATen/Context.h>

namespace attn_ext::cpu {

// What their operands may be rounded to. Asked for by backend, since the setting of all at once raises as soon as one of them has
// been set by itself.
inline Dtype product_dtype_of_float32() {
  switch (at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL)) {
    case at::Float32Precision::BF16:
      return Dtype::BFloat16;
    case at::Float32Precision::TF32:
      return Dtype::Half;  // of as many bits
    default:
      return Dtype::Float;
  }
}

}  // namespace attn_ext::cpu

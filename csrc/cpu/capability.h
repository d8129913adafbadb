// The kernels' compilations, and which of them this processor runs.
#pragma once

#include "kernels/problem.h"

namespace attn_ext::cpu {

struct Capability {
  const char* name;
  const char* torch_name;
  const Kernels& (*dot)(Dtype);
  const Kernels& (*additive)(Dtype);
};

// PyTorch's own choice, so that ATEN_CPU_CAPABILITY is obeyed. Made once.
const Capability& capability();

}  // namespace attn_ext::cpu

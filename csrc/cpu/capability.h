// The kernels' compilations, and which of them this processor runs.
#pragma once

#include "kernels/call.h"

namespace attn_ext::cpu {

struct Capability {
  const char* name;
  const char* torch_name;
  bool (*runs)();  // where PyTorch's capability is `torch_name`
  const Kernels& (*dot)(Dtype, bool one_query, int64_t chunk);
  const Kernels& (*additive)(Dtype, bool one_query, int64_t chunk);
  void (*centre)(const Centring&, int64_t item, char* slot);
  const MatmulKernels* (*matmul)();  // none where PyTorch's library multiplies at least as fast
};

// PyTorch's own choice, so that ATEN_CPU_CAPABILITY is obeyed, and what the processor has beyond it. Made once.
const Capability& capability();

}  // namespace attn_ext::cpu

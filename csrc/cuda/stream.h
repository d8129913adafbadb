// What the entry points ask PyTorch's CUDA runtime for. In tests the host answers (tests/cuda).
#pragma once

#include "kernels.h"

#include <c10/core/Device.h>

namespace attn_ext::cuda {

Stream current_stream(c10::Device device);

int64_t multiprocessors(c10::Device device);

// The first number of its compute capability.
int64_t major_capability(c10::Device device);

}  // namespace attn_ext::cuda

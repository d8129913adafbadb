// What the CUDA half of this build was compiled for.
#pragma once

#include <string>

namespace attn_ext::cuda {

std::string build();  // "CUDA 13.0 for sm_80, sm_90"

}  // namespace attn_ext::cuda

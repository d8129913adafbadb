// The launch behind a one-step kernel that merges what its splits left; it may begin before that one ends.
#pragma once

#include "kernels.h"

namespace attn_ext::cuda {

// To the outputs, where there are several splits.
void merge_splits(const OneStep& call, Stream stream);

// The same, and grad_v from all blocks' shares.
void merge_splits(const OneStepBackward& call, Stream stream);

}  // namespace attn_ext::cuda

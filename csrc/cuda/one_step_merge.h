// What the launches of one query a batch element end with: one behind theirs, whose kernels let it begin, for what the splits left.
#pragma once

#include "kernels.h"

namespace attn_ext::cuda {

// To the outputs, where there are several splits.
void merge_splits(const OneStep& call, Stream stream);

// The same, and grad_v from all blocks' shares.
void merge_splits(const OneStepBackward& call, Stream stream);

}  // namespace attn_ext::cuda

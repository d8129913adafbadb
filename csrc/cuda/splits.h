// How the steps of one query a batch element are divided among blocks. Free of torch headers.
#pragma once

#include "kernels.h"

namespace attn_ext::cuda {

// The splits that are done soonest, of `processors` multiprocessors that have room for `blocks` of the usual width each. A split
// leaves `partial_size` elements of acc to the merge; where that memory is stays open.
Splits split_steps(const Problem& problem, int64_t processors, int64_t blocks, int64_t partial_size, bool backward);

}  // namespace attn_ext::cuda

// From a dtype known at run time to a kernel's template argument.
#pragma once

#include "../problem.h"
#include "device.cuh"

namespace attn_ext::cuda {

// launch_of(scalar()), scalar being the type as it is stored.
template <class Launch>
void for_dtype(Dtype dtype, const Launch& launch_of) {
  switch (dtype) {
    case Dtype::Double:
      return launch_of(double());
    case Dtype::BFloat16:
      return launch_of(BFloat16());
    case Dtype::Half:
      return launch_of(Half());
    case Dtype::Float:
      return launch_of(float());
  }
}

}  // namespace attn_ext::cuda

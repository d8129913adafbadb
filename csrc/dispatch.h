// The ops by name, from wherever they are called in C++.
#pragma once

#include "attention.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <tuple>
#include <vector>

namespace attn_ext {

using Forwards = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;  // what the forward ops return

template <class Signature>
auto find(const char* op) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(op, "").typed<Signature>();
}

}  // namespace attn_ext

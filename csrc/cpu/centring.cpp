#include "centring.h"

#include "capability.h"
#include "run_items.h"

#include "../tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>

namespace attn_ext::cpu {
namespace {

// An element's, in multiply-adds that take as long.
constexpr int64_t kCentringCost = 8;

}  // namespace

bool can_centre(const Tensor& memory) {
  return is_plain(memory) && at::isReducedFloatingType(memory.scalar_type()) && memory.stride(2) == 1;
}

Tensor centred(const Tensor& memory, const RowSubset& attended) {
  RECORD_FUNCTION(c10::str("attn_ext::cpu::centred[", capability().name, "]"), c10::ArrayRef<const c10::IValue>{});
  const bool keeps_layout = memory.is_non_overlapping_and_dense();
  const Tensor out = keeps_layout ? at::empty_like(memory) : at::empty(memory.sizes(), memory.options());
  if (out.numel() == 0) {
    return out;
  }
  const int64_t batch = memory.size(0), steps = memory.size(1);
  const RowRange all{0, batch * steps};
  Centring call{};
  call.dtype = dtype_of(memory);
  call.steps = steps;
  call.size = memory.size(2);
  call.memory = {memory.const_data_ptr(), memory.stride(0), memory.stride(1), 1};
  call.attended = attended ? RowRanges{attended->data(), static_cast<int64_t>(attended->size())} : RowRanges{&all, 1};
  call.centred = out.mutable_data_ptr();
  call.centred_batch = out.stride(0);
  call.centred_row = out.stride(1);
  const Work work{batch * call.blocks(), kCentringCost * memory.numel()};
  const auto run_one = [&](int64_t item, char* slot) { capability().centre(call, item, slot); };
  run_items(work, kCentringSlot, false, run_one, [](char*) {});
  return out;
}

}  // namespace attn_ext::cpu

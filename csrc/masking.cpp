#include "masking.h"

#include <ATen/Functions.h>

#include <vector>

namespace attn_ext {

bool Masking::fits(const Tensor& memory) const {
  const auto batch = memory.sym_size(0), steps = memory.sym_size(1);
  return (!lengths || (lengths->scalar_type() == at::kLong && lengths->dim() == 1 && lengths->sym_size(0) == batch)) &&
         (!mask || (mask->scalar_type() == at::kBool && (mask->dim() == 2 || mask->dim() == 3) && mask->sym_size(0) == batch &&
                    mask->sym_size(-1) == steps));
}

Tensor by_row(const Tensor& mask) {
  return mask.dim() == 3 ? mask.any(1) : mask;
}

Tensor masked_rows(const Tensor& memory, const Masking& masking) {
  const auto& [lengths, mask] = masking;
  Tensor rows;
  if (mask) {
    rows = by_row(*mask).logical_not();
  }
  if (lengths) {
    const Tensor steps = at::arange(memory.sym_size(1), lengths->options());
    const Tensor behind = steps.ge(lengths->unsqueeze(1));
    rows = rows.defined() ? rows.logical_or_(behind) : behind;
  }
  return rows;
}

Tensor without_masked_rows(const Tensor& memory, const Masking& masking) {
  const Tensor rows = masked_rows(memory, masking);
  return rows.defined() ? memory.masked_fill(rows.unsqueeze(2), 0) : memory;
}

RowSubset attended_rows(const Tensor& memory, const Masking& masking, bool by_time) {
  const auto& [lengths, mask] = masking;
  const auto can_look = [](const OptionalTensor& tensor) { return !tensor || cpu::is_plain(*tensor); };
  if (!masking.any() || !cpu::is_plain(memory) || !can_look(lengths) || !can_look(mask) || !masking.fits(memory)) {
    return std::nullopt;
  }
  const int64_t batch = memory.size(0), steps = memory.size(1);
  const Tensor ends = lengths ? lengths->contiguous() : Tensor();
  const Tensor attended = mask ? by_row(*mask).contiguous() : Tensor();
  const int64_t* end = lengths ? ends.const_data_ptr<int64_t>() : nullptr;
  const bool* may_attend = mask ? attended.const_data_ptr<bool>() : nullptr;
  std::vector<cpu::RowRange> ranges;
  const int64_t outer = by_time ? steps : batch, inner = by_time ? batch : steps;
  for (int64_t i = 0, row = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j, ++row) {
      const int64_t b = by_time ? j : i, s = by_time ? i : j;
      if ((end != nullptr && s >= end[b]) || (may_attend != nullptr && !may_attend[b * steps + s])) {
        continue;
      }
      if (ranges.empty() || ranges.back().end != row) {
        ranges.push_back({row, row});
      }
      ranges.back().end = row + 1;
    }
  }
  return ranges;
}

RowSubset rows_to_multiply(const Tensor& memory, const Masking& masking, bool by_time) {
  return cpu::has_own_matmul() ? attended_rows(memory, masking, by_time) : std::nullopt;
}

}  // namespace attn_ext

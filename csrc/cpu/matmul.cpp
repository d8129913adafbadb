#include "matmul.h"

#include "capability.h"
#include "huge_pages.h"
#include "precision.h"
#include "run_items.h"

#include "../tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <numeric>

namespace attn_ext::cpu {
namespace {

using Addresses = std::vector<const void*>;

// Rows and columns of an item's block of the result: as many as keep it in the second-level cache, and as few as are worth packing.
constexpr int64_t kBlock = 256, kLeastBlock = 64;

// A product deeper than that has to have blocks for all threads.
constexpr int64_t kDeep = 4096;

// Multiply-adds of a few rows that pairs of bfloat16 are not worth waiting for.
constexpr int64_t kFewPairs = int64_t{1} << 22;

// At precision "medium" products are left to PyTorch.
bool may_multiply() {
  return has_own_matmul() && product_dtype_of_float32() != Dtype::BFloat16;
}

Dtype product_dtype_of(Dtype a, Dtype b) {
  return a == Dtype::Float || b == Dtype::Float ? product_dtype_of_float32() : Dtype::Half;
}

bool is_worth_it(int64_t batch, int64_t rows, int64_t depth, int64_t columns) {
  const int64_t blocks = batch * ceil_div(rows, kLeastBlock) * ceil_div(columns, kLeastBlock);
  return blocks > 0 && depth > 0 && (depth <= kDeep || blocks >= at::get_num_threads());
}

bool is_summed_in_float(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  return is_plain(tensor) && (type == at::kFloat || at::isReducedFloatingType(type));
}

// Pairs of bfloat16 have products of their own, which are PyTorch's and take long to begin: of a weight in it, those of a few rows
// are made here.
bool has_faster_product(const Matmul& call) {
  const bool is_small = call.rows <= kFewRows && call.rows * call.depth * call.columns <= kFewPairs;
  return call.b_type == Dtype::BFloat16 && !is_small;
}

bool is_by_rows(const Tensor& matrix) {
  return matrix.stride(-1) == 1 || matrix.size(-1) == 1;
}

bool is_by_columns(const Tensor& matrix) {
  return matrix.stride(-2) == 1 || matrix.size(-2) == 1;
}

View matrix_view(const Tensor& matrix) {
  const bool by_rows = is_by_rows(matrix);
  return {matrix.const_data_ptr(), 0, by_rows ? matrix.stride(0) : 1, by_rows ? 1 : matrix.stride(1)};
}

// Of `size`, as even as can be.
int64_t part_of(int64_t size, int64_t multiple) {
  return round_up(ceil_div(size, ceil_div(size, kBlock)), multiple);
}

Matmul product_of(const Tensor& a, const Tensor& b) {
  Matmul call{};
  call.a_type = dtype_of(a);
  call.b_type = dtype_of(b);
  call.product_dtype = product_dtype_of(call.a_type, call.b_type);
  call.batch = 1;
  call.rows = a.size(0);
  call.depth = a.size(1);
  call.columns = b.size(1);
  call.a = matrix_view(a);
  call.b = matrix_view(b);
  return call;
}

// Of rows of these tensors, those of each batch element one behind the other.
Matmul sum_of(const Addresses& a_rows, const Addresses& b_rows, at::TensorList a, at::TensorList b, int64_t batch) {
  Matmul call{};
  call.a_type = dtype_of(a.front());
  call.b_type = dtype_of(b.front());
  call.product_dtype = product_dtype_of(call.a_type, call.b_type);
  call.batch = batch;
  call.rows = a.front().size(-1);
  call.depth = static_cast<int64_t>(a_rows.size()) / batch;
  call.columns = b.front().size(-1);
  call.a_columns = a_rows.data();
  call.b_rows = b_rows.data();
  return call;
}

// `call` lacks out and the division of the work.
void run(Matmul& call, const Tensor& out, const RowSubset& rows) {
  const MatmulKernels& kernels = *capability().matmul();
  RECORD_FUNCTION(c10::str("attn_ext::cpu::matmul[", kernels.name, "]"), c10::ArrayRef<const c10::IValue>{});
  call.out = out.mutable_data_ptr();
  call.out_type = dtype_of(out);
  call.out_batch = out.dim() == 3 ? out.stride(0) : 0;
  call.out_row = out.stride(-2);
  const RowRange all{0, call.batch * call.rows};
  call.row_ranges = rows ? RowRanges{rows->data(), static_cast<int64_t>(rows->size())} : RowRanges{&all, 1};
  const auto end = call.row_ranges.data + call.row_ranges.count;
  const auto sum = [](int64_t rows, const RowRange& range) { return rows + range.end - range.first; };
  call.mean_range_rows = std::accumulate(call.row_ranges.data, end, int64_t{0}, sum) / std::max<int64_t>(call.row_ranges.count, 1);
  call.height = part_of(call.rows, 1);
  call.width = part_of(call.columns, kLeastBlock);
  while (call.items() < 2 * at::get_num_threads() && std::max(call.height, call.width) > kLeastBlock) {
    if (call.width >= call.height) {
      call.width = round_up(call.width / 2, kLeastBlock);
    } else {  // as even as can be: no thread is to wait for another
      call.height = std::max(ceil_div(call.height, 2), kLeastBlock);
    }
  }
  use_huge_pages(out);
  const Work work{call.items(), call.batch * call.rows * call.depth * call.columns};
  const auto run_one = [&](int64_t item, char* slot) { kernels.run(call, item, slot); };
  run_items(work, kernels.slot(call), false, run_one, [](char*) {});
}

bool are_alike(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.size(-1) == b.size(-1);
}

// The rows of tensors of `batch` elements each, those of an element one behind the other; none where one is not to be taken so.
std::optional<Addresses> rows_by_element(at::TensorList tensors, int64_t batch) {
  struct Part {
    const char* data;
    int64_t element, rows, row;  // and how many bytes elements and rows are apart
  };
  std::vector<Part> parts;  // a loop's steps times its batch are many to ask each time
  int64_t count = 0;
  for (const Tensor& tensor : tensors) {
    if (!are_alike(tensor, tensors.front()) || tensor.size(0) != batch || !is_summed_in_float(tensor) || !is_by_rows(tensor)) {
      return std::nullopt;
    }
    const int64_t width = tensor.element_size();
    const auto* data = static_cast<const char*>(tensor.const_data_ptr());
    parts.push_back({data, tensor.stride(0) * width, tensor.size(1), tensor.stride(1) * width});
    count += tensor.size(1);
  }
  Addresses rows;
  rows.reserve(batch * count);
  for (int64_t b = 0; b < batch; ++b) {
    for (const Part& part : parts) {
      for (int64_t i = 0; i < part.rows; ++i) {
        rows.push_back(part.data + b * part.element + i * part.row);
      }
    }
  }
  return rows;
}

// The same of all elements at once, and only these rows.
std::optional<Addresses> rows_of_all(at::TensorList tensors, const RowSubset& some) {
  Addresses all;
  for (const Tensor& tensor : tensors) {
    if (!are_alike(tensor, tensors.front())) {
      return std::nullopt;
    }
    const auto rows = rows_by_element(tensor.dim() == 3 ? tensor : tensor.unsqueeze(0), tensor.dim() == 3 ? tensor.size(0) : 1);
    if (!rows) {
      return std::nullopt;
    }
    all.insert(all.end(), rows->begin(), rows->end());
  }
  if (!some) {
    return all;
  }
  if (!some->empty() && some->back().end > static_cast<int64_t>(all.size())) {
    return std::nullopt;
  }
  Addresses left;
  for (const RowRange& range : *some) {
    left.insert(left.end(), all.begin() + range.first, all.begin() + range.end);
  }
  return left;
}

}  // namespace

bool has_own_matmul() {
  static const bool has_kernels = capability().matmul() != nullptr;
  return has_kernels;
}

bool is_plain(const Tensor& tensor) {
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet keys = (tensor.key_set() | local.included_) - local.excluded_;
  return keys.remove(c10::DispatchKey::BackendSelect).highestPriorityTypeId() == c10::DispatchKey::CPU;
}

bool can_matmul(const Tensor& a, const Tensor& b) {
  if (!is_summed_in_float(a) || !is_summed_in_float(b) || !may_multiply() || a.size(1) != b.size(0) || !is_by_rows(a) ||
      !(is_by_rows(b) || is_by_columns(b))) {
    return false;
  }
  const Matmul call = product_of(a, b);
  return is_worth_it(1, call.rows, call.depth, call.columns) && !has_faster_product(call);
}

void matmul(
    const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& bias, bool adds_to_out, const RowSubset& rows) {
  Matmul call = product_of(a, b);
  const Tensor added = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  call.bias = bias ? added.const_data_ptr<float>() : nullptr;
  call.adds_to_out = adds_to_out;
  run(call, out, rows);
}

bool sum_of_products(const Tensor& out, at::TensorList a, at::TensorList b, const RowSubset& some) {
  if (!is_summed_in_float(out) || out.scalar_type() == at::kBFloat16 || !may_multiply()) {
    return false;
  }
  if (!is_by_rows(out)) {
    return is_by_columns(out) && sum_of_products(out.t(), b, a, some);
  }
  const auto a_rows = rows_of_all(a, some), b_rows = rows_of_all(b, some);
  if (!a_rows || !b_rows || a_rows->size() != b_rows->size() || a.front().size(-1) != out.size(0) ||
      b.front().size(-1) != out.size(1)) {
    return false;
  }
  if (a_rows->empty()) {
    out.zero_();
    return true;
  }
  Matmul call = sum_of(*a_rows, *b_rows, a, b, 1);
  if (!is_worth_it(1, call.rows, call.depth, call.columns)) {
    return false;
  }
  run(call, out, {});
  return true;
}

Tensor sums_of_products(at::TensorList a, at::TensorList b, const RowSubset& rows) {
  if (!is_summed_in_float(a.front()) || !may_multiply()) {
    return Tensor();
  }
  const int64_t batch = a.front().size(0), size = a.front().size(-1), columns = b.front().size(-1);
  if (!is_worth_it(batch, size, 1, columns)) {
    return Tensor();
  }
  const auto a_rows = rows_by_element(a, batch), b_rows = rows_by_element(b, batch);
  if (!a_rows || !b_rows || a_rows->size() != b_rows->size()) {
    return Tensor();
  }
  const Tensor out = at::empty({batch, size, columns}, b.front().options());
  if (a_rows->empty()) {
    return out.zero_();
  }
  Matmul call = sum_of(*a_rows, *b_rows, a, b, batch);
  run(call, out, rows);
  return out;
}

}  // namespace attn_ext::cpu

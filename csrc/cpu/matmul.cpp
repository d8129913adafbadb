#include "matmul.h"

#include "capability.h"
#include "outputs.h"
#include "run_items.h"

#include "../tensors.h"

#include <ATen/Context.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace attn_ext::cpu {
namespace {

// Rows and columns of an item's block of the result: as many as keep it in the second-level cache, and as few as are worth packing.
constexpr int64_t kBlock = 256, kLeastBlock = 64;

// A product deeper than that has to have blocks for all threads.
constexpr int64_t kDeep = 4096;

bool is_by_rows(const Tensor& matrix) {
  return matrix.stride(-1) == 1 || matrix.size(-1) == 1;
}

bool is_by_columns(const Tensor& matrix) {
  return matrix.stride(-2) == 1 || matrix.size(-2) == 1;
}

View matrix_view(const Tensor& matrix) {
  const bool by_rows = is_by_rows(matrix);
  const int64_t row = by_rows ? matrix.stride(-2) : 1, element = by_rows ? 1 : matrix.stride(-1);
  return {matrix.const_data_ptr(), matrix.dim() == 3 ? matrix.stride(0) : 0, row, element};
}

Runs runs_of(const std::vector<Run>* some, const Run& all) {
  return some == nullptr ? Runs{&all, 1} : Runs{some->data(), static_cast<int64_t>(some->size())};
}

// As even as can be.
int64_t part_of(int64_t size, int64_t most, int64_t multiple) {
  return ceil_div(ceil_div(size, ceil_div(size, most)), multiple) * multiple;
}

}  // namespace

bool is_plain(const Tensor& tensor) {
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet keys = (tensor.key_set() | local.included_) - local.excluded_;
  return keys.remove(c10::DispatchKey::BackendSelect).highestPriorityTypeId() == c10::DispatchKey::CPU;
}

bool multiplies() {
  static const bool has_kernels = capability().matmul() != nullptr;
  return has_kernels;
}

bool takes(const Tensor& a, const Tensor& b) {
  const auto is_stored = [](const Tensor& matrix) {
    return is_plain(matrix) && matrix.scalar_type() == at::kFloat && matrix.numel() > 0 &&
           (is_by_rows(matrix) || is_by_columns(matrix));
  };
  // Who allows rounder products gets PyTorch's.
  const bool allows_less = at::globalContext().float32MatmulPrecision() != at::Float32MatmulPrecision::HIGHEST;
  if (!multiplies() || allows_less || !is_stored(a) || !is_stored(b)) {
    return false;
  }
  const int64_t batch = a.dim() == 3 ? a.size(0) : 1;
  if (a.dim() != b.dim() || a.size(-1) != b.size(-2) || (b.dim() == 3 && b.size(0) != batch)) {
    return false;  // which PyTorch's says in its own words
  }
  const int64_t blocks = batch * ceil_div(a.size(-2), kLeastBlock) * ceil_div(b.size(-1), kLeastBlock);
  return a.size(-1) <= kDeep || blocks >= at::get_num_threads();
}

void matmul(const Tensor& out, const Tensor& a, const Tensor& b, const Terms& terms) {
  if (!is_by_rows(out)) {
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(!terms.bias && terms.rows == nullptr);
    return matmul(out.transpose(-2, -1), b.transpose(-2, -1), a.transpose(-2, -1), terms);
  }
  RECORD_FUNCTION("attn_ext::cpu::matmul[avx512]", c10::ArrayRef<const c10::IValue>{});
  Matmul call{};
  call.batch = a.dim() == 3 ? a.size(0) : 1;
  call.rows = a.size(-2);
  call.depth = a.size(-1);
  call.columns = b.size(-1);
  call.a = matrix_view(a);
  call.b = matrix_view(b);
  call.out = matrix_view(out);
  call.out.data = out.mutable_data_ptr();
  const Tensor bias = terms.bias ? terms.bias->contiguous() : Tensor();
  call.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  call.adds_to_out = terms.adds_to_out;
  const Run all_rows{0, call.batch * call.rows}, all_depth{0, call.depth};
  call.row_runs = runs_of(terms.rows, all_rows);
  call.depth_runs = runs_of(terms.depth, all_depth);
  const int64_t threads = at::get_num_threads();
  call.height = part_of(call.rows, kBlock, 1);
  call.width = part_of(call.columns, kBlock, kLeastBlock);
  while (call.items() < 2 * threads && std::max(call.height, call.width) > kLeastBlock) {
    int64_t& longer = call.width >= call.height ? call.width : call.height;
    longer = ceil_div(longer / 2, kLeastBlock) * kLeastBlock;
  }
  use_huge_pages(out);
  const MatmulKernels& kernels = *capability().matmul();
  const Work work{call.items(), call.batch * call.rows * call.depth * call.columns};
  const auto run = [&](int64_t item, char* slot) { kernels.run(call, item, slot); };
  run_items(work, kernels.slot(call), false, run, [](char*) {});
}

}  // namespace attn_ext::cpu

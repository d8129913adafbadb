// CUDA's entry points in the CPU's place: with this library ahead of attn_ext._C, the ops of CPU tensors run the CUDA kernels, on
// the host (shim.h). Results and workspaces hold NaN until they are written.
#include "../../csrc/attention.h"
#include "../../csrc/cuda/stream.h"
#include "shim.h"

#include <ATen/Context.h>
#include <ATen/ops/bmm.h>
#include <torch/library.h>

#include <limits>
#include <mutex>

namespace attn_ext {
namespace {

// While it lives, at::empty fills what it allocates, and no other thread of PyTorch runs kernels.
class Poisoned {
 public:
  Poisoned()
      : lock_(mutex()),
        deterministic_(at::globalContext().deterministicAlgorithms()),
        warns_(at::globalContext().deterministicAlgorithmsWarnOnly()) {
    at::globalContext().setDeterministicAlgorithms(true, false);
  }

  ~Poisoned() {
    at::globalContext().setDeterministicAlgorithms(deterministic_, warns_);
  }

 private:
  static std::recursive_mutex& mutex() {
    static std::recursive_mutex mutex;
    return mutex;
  }

  std::lock_guard<std::recursive_mutex> lock_;
  bool deterministic_, warns_;
};

// Some problems meet the GPU that has the least shared memory, others one that has more, or the most.
void choose_device(const Inputs& inputs) {
  const int64_t drawn = inputs.query.size(0) + inputs.memory.size(1) + inputs.memory.size(2) / 8 + inputs.query.element_size() / 2;
  constexpr int kilobytes[] = {64, 100, 228};
  shim::shared_memory_of_multiprocessor(kilobytes[drawn % 3] * 1024);
}

void poison(std::initializer_list<Tensor> outputs) {
  for (const Tensor& output : outputs) {
    if (output.defined()) {
      output.fill_(std::numeric_limits<double>::quiet_NaN());
    }
  }
}

void poison(const Gradients& gradients) {
  poison({gradients.query, gradients.keys, gradients.v, gradients.memory, gradients.scores});
}

void forward(const Inputs& inputs, Outputs& outputs) {
  const Poisoned poisoned;
  choose_device(inputs);
  poison({outputs.context, outputs.weights, outputs.logsumexp, outputs.exact_context, outputs.exact_weights});
  cuda::entry_points.forward(inputs, outputs);
}

void backward(const Inputs& inputs, const BackwardInputs& saved, Gradients& gradients) {
  const Poisoned poisoned;
  choose_device(inputs);
  poison(gradients);
  cuda::entry_points.backward(inputs, saved, gradients);
}

void backward_of_scores(const Inputs& inputs, const Tensor& grad_scores, Gradients& gradients) {
  const Poisoned poisoned;
  choose_device(inputs);
  poison(gradients);
  cuda::entry_points.backward_of_scores(inputs, grad_scores, gradients);
}

void prepare_keys(const Tensor& keys, Tensor& prepared) {
  const Poisoned poisoned;
  poison({prepared});
  cuda::entry_points.prepare_keys(keys, prepared);
}

// CUDA alone has these, and refuses them so.
void refuse_own_sums(const Tensor& a) {
  const bool sums_up_in_itself = a.scalar_type() == at::kHalf && at::globalContext().allowFP16AccumulationCuBLAS();
  TORCH_CHECK(!sums_up_in_itself, "not supported with allowFP16AccumulationCuBLAS");
}

Tensor& bmm_out_dtype(const Tensor& a, const Tensor& b, at::ScalarType type, Tensor& out) {
  refuse_own_sums(a);
  return at::bmm_out(out, a.to(type), b.to(type));
}

}  // namespace

const EntryPoints cpu::entry_points{cuda::entry_points.needs_context, forward, backward, backward_of_scores, prepare_keys};

cuda::Stream cuda::current_stream(c10::Device) {
  return nullptr;
}

// Few, so that a test's few blocks are enough to split over.
int64_t cuda::multiprocessors(c10::Device) {
  return 4;
}

int64_t cuda::major_capability(c10::Device) {
  return 9;
}

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("bmm.dtype_out", bmm_out_dtype);
}

}  // namespace attn_ext

// What the launchers offer to attention.cpp: one struct and one function a kernel. Free of torch headers.
//
// acc below is float, or double for Dtype::Double; unmarked tensors are of the problem's dtype. Workspaces and outputs are
// contiguous and hold nothing yet. Kernels never read a row of memory or keys that lengths or a [B, S] mask keep from every query;
// in the gradients such rows, and those that a [B, T, S] mask does, are zeros. A launcher raises std::runtime_error; none waits for
// the device.
#pragma once

#include "../problem.h"

#include <cstddef>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace attn_ext::cuda {

using Stream = CUstream_st*;

// softmax.cu

// weights = softmax(scale scores) over the steps that a query may attend, 0 elsewhere, whatever the scores are there.
struct Softmax {
  Problem problem;
  const void* scores;  // [B, T, S] acc
  void* weights;       // [B, T, S] acc, may be scores; each output may be null: not wanted
  void* rounded;       // [B, T, S], of halves only
  void* logsumexp;     // [B, T] acc
};
void softmax(const Softmax& call, Stream stream);

// da = g . m + gw;  de = scale a (da - sum_s a da), 0 where a query may not attend.
struct SoftmaxBackward {
  Problem problem;
  const void* weights;            // [B, T, S] acc, or null: recomputed
  const void* scores;             // [B, T, S] acc, and
  const void* logsumexp;          // [B, T] acc, from these two
  const void* grad_from_context;  // [B, T, S] acc, g . m; or null
  View grad_weights;              // [B, T, S]; data may be null
  void* recomputed;               // [B, T, S] acc, may be scores; each output may be null: not wanted
  void* grad_scores;              // [B, T, S] acc, may be grad_from_context
  void* rounded;                  // of halves only: the weights, [B, T, S]; of dot products [B, 2, T, S], the scores' gradients too
};
void softmax_backward(const SoftmaxBackward& call, Stream stream);

// masked_rows.cu: of lengths and a [B, S] mask

struct MemoryRows {
  Problem problem;
  void* rows;  // [B, S, memory_size]
};
// The memory's, with zeros for those that no query may attend, so that a product with weights of 0 is 0.
void copy_attended_rows(const MemoryRows& call, Stream stream);
// Zeros into those: a product with weights of 0 left them there only if all else was finite.
void clear_masked_rows(const MemoryRows& call, Stream stream);

// One query a batch element. A block takes `steps` source steps. What the blocks of a batch element leave is merged in their order,
// by a launch behind.
constexpr int64_t kMostSplitSteps = 1024;  // whose additive scores shared memory holds

struct Splits {
  int64_t count;
  int64_t steps;   // of additive attention at most kMostSplitSteps
  int64_t width;   // a block has so many times the usual threads: of dot up to one_step_dot_blocks, of additive 1
  void* partials;  // forward [B, count, memory_size + 2] acc, backward [B, count, key_size] acc; null if count is 1
};

// one_step_dot.cu, one_step_additive.cu

// Blocks that the current device's multiprocessors have room for at a time, by registers and shared memory.
int64_t one_step_dot_blocks(const Problem& problem, bool backward);
int64_t one_step_additive_blocks(const Problem& problem, bool backward);

struct OneStep {
  Problem problem;
  Splits splits;
  void* scores;         // [B, S] acc: scratch, may be exact_weights or (where not of halves) weights; null where none are wanted
  void* context;        // [B, memory_size]
  void* weights;        // [B, S], or null
  void* logsumexp;      // [B] acc
  void* exact_context;  // of halves: [B, memory_size] acc, or null
  void* exact_weights;  // of halves: [B, S] acc, or null
};
constexpr int64_t most_one_step_columns(size_t scalar_size) {
  return scalar_size == 8 ? 512 : 1024;  // whose dot products' rows fit into a warp's registers
}
void one_step_dot(const OneStep& call, Stream stream);
void one_step_additive(const OneStep& call, Stream stream);

struct OneStepBackward {
  Problem problem;
  Splits splits;
  View grad_context;      // [B, memory_size]; data may be null
  View grad_weights;      // [B, S]; data may be null, and is where weights are null
  const void* context;    // [B, memory_size] acc
  const void* weights;    // [B, S] acc, or null: recomputed
  const void* logsumexp;  // [B] acc
  void* grad_scores;      // [B, S] acc; each output may be null: not wanted
  void* grad_query;       // [B, key_size]
  void* grad_keys;        // [B, S, key_size], additive only
  void* grad_v;           // [key_size], additive only, and
  void* partial_grad_v;   // [B, count, key_size] acc, where grad_v is wanted: scratch
  void* grad_memory;      // [B, S, memory_size]
};
void one_step_dot_backward(const OneStepBackward& call, Stream stream);
void one_step_additive_backward(const OneStepBackward& call, Stream stream);

// additive_many.cu: of some queries and some steps

// scores = v . tanh(q + k), not yet scaled. (From one_step_additive's, and from its log-sum-exp, sum(v) is missing but for double:
// it is the same for all steps and cancels in the softmax.) Anything where a query may not attend: of what lies behind lengths,
// some is not written, but of no 16 bytes that begin before.
struct AdditiveScores {
  Problem problem;
  void* workspace;  // additive_scores_workspace bytes
  void* scores;     // [B, T, S] acc
};
size_t additive_scores_workspace(const Problem& problem);
void additive_scores(const AdditiveScores& call, Stream stream);

// From the gradients of v . tanh(q + k), which are 0 where a query may not attend.
struct AdditiveBackward {
  Problem problem;
  const void* grad_scores;  // [B, T, S] acc
  void* workspace;          // additive_backward_workspace bytes
  void* grad_query;         // [B, T, key_size]; each output may be null: not wanted
  void* grad_keys;          // [B, S, key_size]
  void* grad_v;             // [key_size]
};
size_t additive_backward_workspace(const AdditiveBackward& call);  // its workspace is not looked at
void additive_backward(const AdditiveBackward& call, Stream stream);

}  // namespace attn_ext::cuda

// The additive score's launchers. Free of torch headers.
//
// e_ts = scale v . tanh(q_t + k_s) but for scale sum(v), which is the same for every step of a row and cancels in the softmax: all
// scores here, and the log-sum-exps made of them, lack it. prepared_keys are a matter of the CPU's.
#pragma once

#include "problem.h"

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace attn_ext::cuda {

// Many queries. Steps at and past a length are not written, masked ones may hold anything.
struct AdditiveScores {
  Problem problem;
  void* scores;  // [B, T, S] acc, contiguous
};

void additive_scores(const AdditiveScores& call, cudaStream_t stream);

// The gradients of queries, keys and v from those of the scores, which are 0 for pairs that do not attend: a key for which they all
// are passes nothing on, whatever it holds. Outputs are contiguous, of the problem's dtype; null: not wanted.
struct AdditiveBackward {
  Problem problem;
  View grad_scores;  // [B, T, S] acc: of v . tanh(q + k), without the scale
  void* grad_query;
  void* grad_keys;
  void* grad_v;
  void* workspace;  // of additive_backward_workspace's bytes, with any content
};

size_t additive_backward_workspace(const AdditiveBackward& call);
void additive_backward(const AdditiveBackward& call, cudaStream_t stream);

// One query a batch element, T = 1, in one launch. Contiguous outputs; null: not wanted.
struct OneStepAdditiveForward {
  Problem problem;
  void* context;        // [B, Dm] in the problem's dtype
  void* weights;        // [B, S] in the problem's dtype
  void* logsumexp;      // [B] acc
  void* exact_context;  // the same as they were accumulated
  void* exact_weights;
  void* workspace;  // of one_step_additive_workspace's bytes, with any content
  int* counters;    // [B] zeros, and left so
};

size_t one_step_additive_workspace(const OneStepAdditiveForward& call);
void one_step_additive(const OneStepAdditiveForward& call, cudaStream_t stream);

struct OneStepAdditiveBackward {
  Problem problem;
  View grad_context;      // [B, 1, Dm]; data may be null
  View grad_weights;      // [B, 1, S]; data may be null
  View context;           // [B, 1, Dm] acc
  View weights;           // [B, 1, S] acc; data null: recomputed from logsumexp
  const void* logsumexp;  // [B] acc, contiguous
  void* grad_scores;      // [B, S] acc: of v . tanh(q + k)
  void* grad_query;       // these in the problem's dtype
  void* grad_keys;
  void* grad_v;
  void* grad_memory;
  void* workspace;  // of one_step_additive_backward_workspace's bytes, with any content
  int* counters;    // [B] zeros, and left so
};

size_t one_step_additive_backward_workspace(const OneStepAdditiveBackward& call);
void one_step_additive_backward(const OneStepAdditiveBackward& call, cudaStream_t stream);

}  // namespace attn_ext::cuda

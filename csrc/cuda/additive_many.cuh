// Additive scores of many queries, and their gradients (the equations are in additive.cuh). Nothing of size T S A is ever stored.
//
// Forward: a block of 128 threads has a tile of up to 64 queries and 64 steps, and walks the features in chunks of 32. A chunk's
// exponentials are taken on its way into shared memory, feature by feature, 1 for 32 products; a thread holds the sums of up to 8
// queries and 4 steps and shares each reciprocal among two features: 3 multiply-adds and half a special function an element.
//
// Backward: a warp has up to 32 queries and 32 features, a lane one of these. exp(2q) and dq of its queries stay in registers while
// the steps go by, two of which share a reciprocal (of queries it would be one's NaN in the other's gradient): 6.5 multiply-adds
// and half a special function an element. The warps of a block have the same steps and features: what a key gets from them is
// summed in shared memory, what it gets from other blocks by slabs.cuh, in a fixed order.
//
// Where a chunk leaves the range of factored exponentials, its block takes exp(2 (q + k)); double takes tanh.
#pragma once

#include "additive.cuh"
#include "kernels.h"
#include "mask.cuh"
#include "view.cuh"

namespace attn_ext::cuda {

constexpr int kAdditiveThreads = 128;
constexpr int kAdditiveWarps = kAdditiveThreads / kWarp;
constexpr int kFeatures = kWarp;  // of a chunk

// exp(2x), or x where it is to be taken directly.
template <class acc>
__device__ __forceinline__ acc factor_of(acc x, bool direct) {
  return direct ? x : exponential(2 * x);
}

// Threads are 8 x 16, each with `rows` x kColumns pairs.
template <class acc, int rows_>
struct ScoresTile {
  static constexpr int kRows = rows_;
  static constexpr int kColumns = 4;
  static constexpr int kAcross = 16;
  static constexpr int kQueries = kAdditiveThreads / kAcross * kRows;
  static constexpr int kSteps = kAcross * kColumns;
  // Of a feature: the 8 features and 4 rows that a warp stores at once then lie in as many banks.
  static constexpr int kQueryStride = kQueries + 4;
  static constexpr int kStepStride = kSteps + 4;
  static constexpr size_t kShared = kFeatures * (kQueryStride + kStepStride + 1) * sizeof(acc);

  acc* queries;  // [kFeatures][kQueryStride]
  acc* keys;     // [kFeatures][kStepStride]
  acc* v;        // [kFeatures]

  __device__ __forceinline__ explicit ScoresTile(char* shared)
      : queries(reinterpret_cast<acc*>(shared)), keys(queries + kFeatures * kQueryStride), v(keys + kFeatures * kStepStride) {}

  __device__ __forceinline__ void add_factored(acc (&sums)[kRows][kColumns], int row, int column) const {
    for (int a = 0; a < kFeatures; a += 2) {
      acc q0[kRows], q1[kRows], k0[kColumns], k1[kColumns];
      load_shared(q0, queries + a * kQueryStride + row);
      load_shared(q1, queries + (a + 1) * kQueryStride + row);
      load_shared(k0, keys + a * kStepStride + column);
      load_shared(k1, keys + (a + 1) * kStepStride + column);
      const acc v0 = v[a], v1 = v[a + 1];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const acc x0 = q0[i] * k0[j] + 1, x1 = q1[i] * k1[j] + 1;
          sums[i][j] += (v0 * x1 + v1 * x0) * reciprocal_approx(x0 * x1);
        }
      }
    }
  }

  __device__ __forceinline__ void add_direct(acc (&sums)[kRows][kColumns], int row, int column) const {
    for (int a = 0; a < kFeatures; ++a) {
      acc q[kRows], k[kColumns];
      load_shared(q, queries + a * kQueryStride + row);
      load_shared(k, keys + a * kStepStride + column);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          sums[i][j] += v[a] * direct_term(q[i], k[j]);
        }
      }
    }
  }
};

template <class scalar, int rows>
__global__ void __launch_bounds__(kAdditiveThreads, 4) additive_scores_tile(const AdditiveScores call) {
  using acc = accumulated_t<scalar>;
  using Tile = ScoresTile<acc, rows>;
  const Problem& problem = call.problem;
  const int64_t step_tiles = (problem.steps + Tile::kSteps - 1) / Tile::kSteps;
  const int64_t query_tiles = (problem.queries + Tile::kQueries - 1) / Tile::kQueries;
  const int64_t step0 = blockIdx.x % step_tiles * Tile::kSteps;
  const int64_t query0 = blockIdx.x / step_tiles % query_tiles * Tile::kQueries;
  const int64_t b = blockIdx.x / step_tiles / query_tiles;
  const Attendable attended = Attendable::by_any(problem, b);
  if (step0 >= attended.end()) {
    return;  // the whole block
  }
  const Tile tile(shared_memory());

  // What this thread brings of each chunk: one feature of every fourth row.
  const int lane = threadIdx.x % kWarp, feature = threadIdx.x / kWarp * 8 + lane % 8, first = lane / 8;
  uint32_t attends = 0;
  for (int i = 0; i < Tile::kSteps / 4; ++i) {
    attends |= static_cast<uint32_t>(attended(step0 + first + 4 * i)) << i;
  }
  // Returns whether it is beyond the range of factored exponentials.
  const auto bring = [&](int64_t a, bool direct) {
    const bool is_there = a < problem.key_size;
    bool is_wide = false;
    const scalar* query = row_of<scalar>(problem.query, b, query0 + first) + a * problem.query.element;
#pragma unroll 4
    for (int i = 0; i < Tile::kQueries / 4; ++i) {
      const acc q = is_there && query0 + first + 4 * i < problem.queries ? to_acc(*query) : acc(0);
      tile.queries[feature * Tile::kQueryStride + first + 4 * i] = factor_of(q, direct);
      is_wide = is_wide || is_beyond(q, kFactorable);
      query += 4 * problem.query.row;
    }
    const scalar* key = row_of<scalar>(problem.keys, b, step0 + first) + a * problem.keys.element;
#pragma unroll 4
    for (int i = 0; i < Tile::kSteps / 4; ++i) {
      const acc k = is_there && (attends >> i & 1) != 0 ? to_acc(*key) : acc(0);
      tile.keys[feature * Tile::kStepStride + first + 4 * i] = factor_of(k, direct);
      is_wide = is_wide || is_beyond(k, kFactorable);
      key += 4 * problem.keys.row;
    }
    const acc v = is_there ? to_acc(static_cast<const scalar*>(problem.v.data)[a * problem.v.element]) : acc(0);
    if (first == 0) {
      tile.v[feature] = v;
    }
    return is_wide || !(v > -kModerate && v < kModerate);
  };

  const int row = threadIdx.x / Tile::kAcross * rows, column = threadIdx.x % Tile::kAcross * Tile::kColumns;
  acc sums[rows][Tile::kColumns] = {};
  for (int64_t a0 = 0; a0 < problem.key_size; a0 += kFeatures) {
    sync_threads();  // the last chunk has been read
    if constexpr (kFactors<acc>) {
      if (!any_in_block(bring(a0 + feature, false))) {  // the chunk is there
        tile.add_factored(sums, row, column);
        continue;
      }
    }
    bring(a0 + feature, true);
    sync_threads();  // the chunk is there
    tile.add_direct(sums, row, column);
  }

  acc* out = static_cast<acc*>(call.scores) + (b * problem.queries + query0 + row) * problem.steps + step0 + column;
#pragma unroll
  for (int i = 0; i < rows; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      if (query0 + row + i < problem.queries && step0 + column + j < attended.end()) {
        out[i * problem.steps + j] = -2 * sums[i][j];
      }
    }
  }
}

// How the backward divides its work; blocks are numbered batch element, tile of queries, split of the steps, chunk of features.
struct AdditiveBackwardPlan {
  int64_t query_tiles;
  int64_t splits;
  int64_t split_steps;  // whole chunks of steps
  int64_t chunks;       // of features
  // Partial sums, acc; null where a gradient is not wanted, or is one block's.
  void* query_slabs;  // [splits][B, T, A]
  void* key_slabs;    // [query_tiles][B, S, A]
  void* v_slabs;      // [B, query_tiles, splits][A]
};

template <class acc, int rows_>
struct GradientTile {
  static constexpr int kRows = rows_;  // queries of a warp
  static constexpr int kQueries = kAdditiveWarps * kRows;
  static constexpr int kSteps = 16;
  static constexpr int kStride = kQueries + 4;  // of a step: spreads what neighbours in a row of de store over the banks
  static constexpr size_t kShared = (kSteps * kStride + (1 + kAdditiveWarps) * kSteps * kFeatures) * sizeof(acc);

  acc* grad_scores;  // [kSteps][kStride]
  acc* keys;         // [kSteps][kFeatures]
  acc* parts;        // [kAdditiveWarps][kSteps][kFeatures] what the keys get, not yet times 4v

  __device__ __forceinline__ explicit GradientTile(char* shared)
      : grad_scores(reinterpret_cast<acc*>(shared)), keys(grad_scores + kSteps * kStride), parts(keys + kSteps * kFeatures) {}

  // h of a query and two steps.
  template <bool direct>
  static __device__ __forceinline__ void centred_reciprocals(acc& h0, acc& h1, acc query, acc key0, acc key1) {
    if constexpr (direct) {
      h0 = direct_centred(query, key0);
      h1 = direct_centred(query, key1);
    } else {
      const acc x0 = query * key0 + 1, x1 = query * key1 + 1;
      const acc shared = reciprocal_approx(x0 * x1);
      h0 = x1 * shared - acc(0.5);
      h1 = x0 * shared - acc(0.5);
    }
  }

  // This warp's queries by this lane's feature, through all steps of the chunk.
  template <bool direct>
  __device__ __forceinline__ void walk(const acc (&query)[kRows], acc (&grad_query)[kRows], acc& grad_v) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    acc of_chunk = 0;  // a sum of sums is nearer to the truth
#pragma unroll 1       // there is enough to overlap in one round, and no register left for another
    for (int s = 0; s < kSteps; s += 2) {
      const acc key0 = keys[s * kFeatures + lane], key1 = keys[(s + 1) * kFeatures + lane];
      acc grad_key0 = 0, grad_key1 = 0;
#pragma unroll
      for (int i = 0; i < kRows; i += 4) {
        acc grad0[4], grad1[4];
        load_shared(grad0, grad_scores + s * kStride + warp * kRows + i);
        load_shared(grad1, grad_scores + (s + 1) * kStride + warp * kRows + i);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          acc h0, h1;
          centred_reciprocals<direct>(h0, h1, query[i + n], key0, key1);
          const acc y0 = acc(0.25) - h0 * h0, y1 = acc(0.25) - h1 * h1;
          grad_query[i + n] += grad0[n] * y0;
          grad_query[i + n] += grad1[n] * y1;
          grad_key0 += grad0[n] * y0;
          grad_key1 += grad1[n] * y1;
          of_chunk += grad0[n] * h0;
          of_chunk += grad1[n] * h1;
        }
      }
      acc* part = parts + (warp * kSteps + s) * kFeatures + lane;
      part[0] = grad_key0;
      part[kFeatures] = grad_key1;
    }
    grad_v += of_chunk;
  }

  __device__ __forceinline__ acc sum_of_parts(int step, int lane) const {
    acc sum = 0;
#pragma unroll
    for (int warp = 0; warp < kAdditiveWarps; ++warp) {
      sum += parts[(warp * kSteps + step) * kFeatures + lane];
    }
    return sum;
  }
};

// Where a gradient goes: to its place in the output, or as a partial sum to a slab.
template <class scalar>
__device__ __forceinline__ void store_gradient(void* slabs, int64_t slab, void* out, int64_t at, accumulated_t<scalar> x) {
  if (slabs != nullptr) {
    static_cast<accumulated_t<scalar>*>(slabs)[slab + at] = x;
  } else if (out != nullptr) {
    static_cast<scalar*>(out)[at] = from_acc<scalar>(x);
  }
}

template <class scalar, int rows>
__global__ void __launch_bounds__(kAdditiveThreads, 4)
    additive_backward_tile(const AdditiveBackward call, const AdditiveBackwardPlan plan) {
  using acc = accumulated_t<scalar>;
  using Tile = GradientTile<acc, rows>;
  const Problem& problem = call.problem;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t group = blockIdx.x / plan.chunks, split = group % plan.splits;  // group: of v's slabs
  const int64_t query_tile = group / plan.splits % plan.query_tiles, b = group / plan.splits / plan.query_tiles;
  const int64_t a = blockIdx.x % plan.chunks * kFeatures + lane;
  const int64_t tile_query = query_tile * Tile::kQueries, warp_query = tile_query + warp * rows;
  const int64_t size = problem.key_size, first_step = split * plan.split_steps;
  const int64_t end_step = first_step + plan.split_steps < problem.steps ? first_step + plan.split_steps : problem.steps;
  const Attendable attended = Attendable::by_any(problem, b);
  const int64_t attended_end = attended.end() < end_step ? attended.end() : end_step;
  const bool is_there = a < size;
  const auto key_of = [&](int64_t s) {
    const bool take = is_there && s < attended_end && attended(s);
    return take ? to_acc(row_of<scalar>(problem.keys, b, s)[a * problem.keys.element]) : acc(0);
  };
  const Tile tile(shared_memory());

  acc query[rows], grad_query[rows] = {}, grad_v = 0;
  const int64_t last_query = problem.queries - 1, last_feature = size - 1;
#pragma unroll
  for (int i = 0; i < rows; ++i) {
    // Beyond the last one it stands in: what it gets there is not stored, and passes on nothing, its de being 0. Conditions, kept
    // for the stores, would take as many registers as the queries.
    const int64_t t = warp_query + i < last_query ? warp_query + i : last_query;
    query[i] = to_acc(row_of<scalar>(problem.query, b, t)[(is_there ? a : last_feature) * problem.query.element]);
  }
  bool direct = true;
  if constexpr (kFactors<acc>) {
    // A look at all keys, one for the 128 queries here: these need not change from exponentials to themselves on the way.
    bool is_wide = false;
    for (int64_t s = first_step + warp; s < attended_end; s += kAdditiveWarps) {
      is_wide = is_wide || is_beyond(key_of(s), kFactorable);
    }
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      is_wide = is_wide || is_beyond(query[i], kFactorable);
    }
    direct = any_in_block(is_wide);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      query[i] = factor_of(query[i], direct);
    }
  }
  const acc v = is_there ? to_acc(static_cast<const scalar*>(problem.v.data)[a * problem.v.element]) : acc(0);

  const auto store_keys = [&](int64_t step0, const auto& value) {
    for (int s = warp; is_there && s < Tile::kSteps && step0 + s < end_step; s += kAdditiveWarps) {
      const int64_t slab = query_tile * problem.batch * problem.steps * size;
      store_gradient<scalar>(plan.key_slabs, slab, call.grad_keys, (b * problem.steps + step0 + s) * size + a, value(s));
    }
  };
  int64_t step0 = first_step;
  for (; step0 < attended_end; step0 += Tile::kSteps) {
    // Neighbours in a row of de are neighbours in a warp.
    const int step = threadIdx.x % Tile::kSteps;
#pragma unroll 4
    for (int t = threadIdx.x / Tile::kSteps; t < Tile::kQueries; t += kAdditiveThreads / Tile::kSteps) {
      const bool take = step0 + step < end_step && tile_query + t < problem.queries;
      const int64_t at = (b * problem.queries + tile_query + t) * problem.steps + step0 + step;
      tile.grad_scores[step * Tile::kStride + t] = take ? static_cast<const acc*>(call.grad_scores)[at] : acc(0);
    }
    for (int s = warp; s < Tile::kSteps; s += kAdditiveWarps) {
      tile.keys[s * kFeatures + lane] = factor_of(key_of(step0 + s), direct);
    }
    sync_threads();  // the chunk is there, and the last one's parts have been read
    if (direct) {
      tile.template walk<true>(query, grad_query, grad_v);
    } else if constexpr (kFactors<acc>) {
      tile.template walk<false>(query, grad_query, grad_v);
    }
    sync_threads();  // the parts are there, and the chunk has been read
    store_keys(step0, [&](int s) { return 4 * v * tile.sum_of_parts(s, lane); });
  }
  for (; step0 < end_step; step0 += Tile::kSteps) {
    store_keys(step0, [](int) { return acc(0); });
  }

#pragma unroll
  for (int i = 0; i < rows; ++i) {
    if (is_there && warp_query + i < problem.queries) {
      const int64_t at = (b * problem.queries + warp_query + i) * size + a;
      const int64_t slab = split * problem.batch * problem.queries * size;
      store_gradient<scalar>(plan.query_slabs, slab, call.grad_query, at, 4 * v * grad_query[i]);
    }
  }
  if (call.grad_v != nullptr) {
    sync_threads();  // the last chunk's parts have been read
    tile.parts[warp * Tile::kSteps * kFeatures + lane] = grad_v;
    sync_threads();  // every warp's is there
    if (warp == 0 && is_there) {
      store_gradient<scalar>(plan.v_slabs, group * size, call.grad_v, a, -2 * tile.sum_of_parts(0, lane));
    }
  }
}

}  // namespace attn_ext::cuda

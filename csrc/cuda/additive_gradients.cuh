// The gradients of additive scores of many queries (the equations are in additive.cuh). Nothing of size T S A is ever stored: what
// the keys get of several tiles of queries waits in slabs of size S A, of no more tiles than one launch has.
//
// A warp has up to 32 queries and 32 features, a lane one of these. exp(2q) and dq of its queries stay in registers while the steps
// go by, two of which share a reciprocal (of queries it would be one's NaN in the other's gradient): 6.5 multiply-adds and half a
// special function an element. The warps of a block have the same steps and features: what a key gets from them is summed in shared
// memory, what it gets from other blocks by slabs.cuh, in a fixed order.
//
// Where a chunk leaves the range of factored exponentials, its block takes exp(2 (q + k)); double takes tanh.
#pragma once

#include "additive.cuh"
#include "kernels.h"
#include "mask.cuh"
#include "view.cuh"

#include <new>

namespace attn_ext::cuda {

// Two elements share a reciprocal, 1/x0 = x1 / (x0 x1), where queries and keys are no larger than this: x is 2^93 at most, and
// where a product is more than a reciprocal can be taken of, 2^126, both r are less than 2^-32 and may be 0. One for each element
// would keep the special-function unit, 16 results a clock, busy for longer than the instructions take that are left.
constexpr float kFactorable = 16;

// How a launch of the backward divides its work; blocks are numbered batch element, tile of queries, split of the steps, chunk of
// features.
struct AdditiveBackwardPlan {
  int64_t first_tile;  // of the queries
  int64_t query_tiles;
  int64_t splits;
  int64_t split_steps;  // whole chunks of steps
  int64_t chunks;       // of features
  // Partial sums, acc; null where a gradient is not wanted, or is one block's.
  void* query_slabs;  // [splits][B, T, A]
  void* key_slabs;    // [query_tiles][B, S, A]
  void* v_slabs;      // [B, query_tiles, splits][A]
};

// Two chunks of steps: one is walked while the next is on its way.
template <class scalar, int rows_>
struct GradientTile {
  using acc = accumulated_t<scalar>;
  static constexpr int kRows = rows_;  // queries of a warp
  static constexpr int kQueries = kAdditiveWarps * kRows;
  static constexpr int kSteps = 16;
  static constexpr int kAtOnce = 4;  // of them
  static constexpr size_t kPartsSize = kAdditiveWarps * kSteps * kFeatures * sizeof(acc);
  static constexpr size_t kGradsSize = kQueries * kSteps * sizeof(acc);
  static constexpr size_t kKeysSize = kSteps * kFeatures * sizeof(scalar);
  static constexpr size_t kBuffer = kPartsSize + kGradsSize + kKeysSize;
  static constexpr size_t kShared = 2 * kBuffer;

  acc* parts;        // [kAdditiveWarps][kSteps][kFeatures] what the keys get, not yet times 4v
  acc* grad_scores;  // [kQueries][kSteps]
  scalar* keys;      // [kSteps][kFeatures]

  __device__ __forceinline__ GradientTile(char* shared, int buffer)
      : parts(reinterpret_cast<acc*>(shared + buffer * kBuffer)),
        grad_scores(reinterpret_cast<acc*>(shared + buffer * kBuffer + kPartsSize)),
        keys(reinterpret_cast<scalar*>(shared + buffer * kBuffer + kPartsSize + kGradsSize)) {}

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
    for (int s = 0; s < kSteps; s += kAtOnce) {
      acc key[kAtOnce], grad_key[kAtOnce] = {};
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        key[n] = factor_of<scalar>(to_acc(keys[(s + n) * kFeatures + lane]), direct);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        acc grad[kAtOnce];
        load_shared(grad, grad_scores + (warp * kRows + i) * kSteps + s);
#pragma unroll
        for (int n = 0; n < kAtOnce; n += 2) {
          acc h0, h1;
          centred_reciprocals<direct>(h0, h1, query[i], key[n], key[n + 1]);
          if constexpr (direct) {  // a gradient of 0 passes nothing on, whatever the key that a mask hides
            h0 = grad[n] != 0 ? h0 : acc(0);
            h1 = grad[n + 1] != 0 ? h1 : acc(0);
          }
          const acc y0 = acc(0.25) - h0 * h0, y1 = acc(0.25) - h1 * h1;
          grad_query[i] += grad[n] * y0;
          grad_query[i] += grad[n + 1] * y1;
          grad_key[n] += grad[n] * y0;
          grad_key[n + 1] += grad[n + 1] * y1;
          of_chunk += grad[n] * h0;
          of_chunk += grad[n + 1] * h1;
        }
      }
      acc* part = parts + (warp * kSteps + s) * kFeatures + lane;
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        part[n * kFeatures] = grad_key[n];
      }
    }
    grad_v += of_chunk;
  }

  // Over the warps, of a step and features from `a` on.
  template <int count>
  __device__ __forceinline__ void sum_parts(acc (&sums)[count], int step, int a) const {
    load_shared(sums, parts + step * kFeatures + a);
#pragma unroll
    for (int warp = 1; warp < kAdditiveWarps; ++warp) {
      acc its_own[count];
      load_shared(its_own, parts + (warp * kSteps + step) * kFeatures + a);
#pragma unroll
      for (int n = 0; n < count; ++n) {
        sums[n] += its_own[n];
      }
    }
  }
};

// body(i), i < count, each by one thread of the block. Unrolled, it would take the registers of the queries.
template <int count, class Body>
__device__ __forceinline__ void by_threads(const Body& body) {
#pragma unroll 1
  for (int i = 0; i < count; i += kAdditiveThreads) {
    if (count % kAdditiveThreads == 0 || i + static_cast<int>(threadIdx.x) < count) {
      body(i + static_cast<int>(threadIdx.x));
    }
  }
}

// A block's place and its way through the steps. It stands in shared memory, written by one thread: the registers are the queries'.
template <class scalar, int rows>
class GradientBlock {
  using acc = accumulated_t<scalar>;
  using Tile = GradientTile<scalar, rows>;

 public:
  acc of_v[kFeatures];                                 // 4v, filled in when this stands
  int64_t b, query_tile, split, group, first_feature;  // group: of v's slabs
  int first_step, attended_end, end_step;

  __device__ __forceinline__
  GradientBlock(const AdditiveBackward& call, const AdditiveBackwardPlan& plan, bool grads_by_vectors, bool keys_by_vectors)
      : attended_(Attendable::by_any(call.problem, blockIdx.x / plan.chunks / plan.splits / plan.query_tiles)),
        grads_by_vectors_(grads_by_vectors),
        keys_by_vectors_(keys_by_vectors) {
    const Problem& problem = call.problem;
    const int64_t size = problem.key_size, steps = problem.steps;
    group = blockIdx.x / plan.chunks;
    split = group % plan.splits;
    const int64_t tile = group / plan.splits % plan.query_tiles;
    query_tile = plan.first_tile + tile;
    b = group / plan.splits / plan.query_tiles;
    first_feature = blockIdx.x % plan.chunks * kFeatures;
    first_step = static_cast<int>(split * plan.split_steps);
    end_step = static_cast<int>(first_step + plan.split_steps < steps ? first_step + plan.split_steps : steps);
    attended_end = static_cast<int>(attended_.end() < end_step ? attended_.end() : end_step);
    const int64_t queries = problem.queries - query_tile * Tile::kQueries, features = size - first_feature;
    queries_ = queries < Tile::kQueries ? static_cast<int>(queries) : Tile::kQueries;
    features_ = features < kFeatures ? static_cast<int>(features) : kFeatures;
    grads_ = static_cast<const acc*>(call.grad_scores) + (b * problem.queries + query_tile * Tile::kQueries) * steps;
    keys_ = row_of<scalar>(problem.keys, b, 0) + first_feature * problem.keys.element_stride;
    const int64_t out = b * steps * size + first_feature;
    key_slab_ = plan.key_slabs == nullptr ? nullptr : static_cast<acc*>(plan.key_slabs) + tile * problem.batch * steps * size + out;
    grad_keys_ = call.grad_keys == nullptr ? nullptr : static_cast<scalar*>(call.grad_keys) + out;
    constexpr int each = kLanes<acc>;
    stores_by_vectors_ = size % each == 0 && reinterpret_cast<uintptr_t>(key_slab_) % (each * sizeof(acc)) == 0 &&
                         reinterpret_cast<uintptr_t>(grad_keys_) % (each * sizeof(scalar)) == 0;
  }

  __device__ __forceinline__ bool has(int lane) const {
    return lane < features_;
  }

  // The chunk from step0 on, under way.
  __device__ __forceinline__ void start(const Problem& problem, const Tile& tile, int step0) const {
    if (grads_by_vectors_) {
      constexpr int stride = kAdditiveThreads / kPiecesOfGrads;
      const int s = threadIdx.x % kPiecesOfGrads * kLanes<acc>, first = threadIdx.x / kPiecesOfGrads;
      const acc* from = grads_ + first * problem.steps + step0 + s;
      acc* to = tile.grad_scores + first * Tile::kSteps + s;
      const int queries = step0 + s < end_step ? queries_ : 0;
#pragma unroll 1
      for (int t = first; t < Tile::kQueries; t += stride, from += stride * problem.steps, to += stride * Tile::kSteps) {
        copy_async16(to, from, t < queries);
      }
    } else {
      by_threads<Tile::kQueries * Tile::kSteps>([&](int i) {
        const int t = i / Tile::kSteps, s = i % Tile::kSteps;
        tile.grad_scores[i] = t < queries_ && step0 + s < end_step ? grads_[t * problem.steps + step0 + s] : acc(0);
      });
    }
    if (keys_by_vectors_) {
      by_threads<Tile::kSteps * kPiecesOfKeys>([&](int i) {
        const int s = i / kPiecesOfKeys, a = i % kPiecesOfKeys * kLanes<scalar>;
        const bool there = a < features_ && takes(step0 + s);
        copy_async16(tile.keys + s * kFeatures + a, keys_ + (there ? (step0 + s) * problem.keys.row_stride + a : 0), there);
      });
    } else {
      by_threads<Tile::kSteps * kFeatures>([&](int i) {
        const int s = i / kFeatures, a = i % kFeatures;
        const bool there = a < features_ && takes(step0 + s);
        tile.keys[i] = there ? keys_[(step0 + s) * problem.keys.row_stride + a * problem.keys.element_stride] : scalar{};
      });
    }
    commit_copies();
  }

  // Whether a key of the block is beyond the range of factored exponentials, of this thread's share.
  __device__ __forceinline__ bool is_wide(const Problem& problem) const {
    bool wide = false;
    const int a = threadIdx.x % kPiecesOfKeys * kLanes<scalar>;
#pragma unroll 4
    for (int s = first_step + threadIdx.x / kPiecesOfKeys; s < end_step; s += kAdditiveThreads / kPiecesOfKeys) {
      acc key[kLanes<scalar>] = {};
      if (a < features_ && takes(s)) {
        unpack<scalar>(
            key, load_piece(keys_ + s * problem.keys.row_stride, problem.keys.element_stride, a, features_, keys_by_vectors_));
      }
#pragma unroll
      for (int i = 0; i < kLanes<scalar>; ++i) {
        wide = wide || is_beyond(key[i], kFactorable);
      }
    }
    return wide;
  }

  // The gradients of the chunk from step0 on: of a step, from a feature on, value(x, s, a).
  template <class Value>
  __device__ __forceinline__ void store_keys(int64_t size, int step0, const Value& value) const {
    constexpr int each = kLanes<acc>, pieces = kFeatures / each;
    by_threads<Tile::kSteps * pieces>([&](int i) {
      const int s = i / pieces, a = i % pieces * each;
      if (step0 + s >= end_step || a >= features_) {
        return;
      }
      acc x[each];
      value(x, s, a);
      const int64_t at = (step0 + s) * size + a;
      if (key_slab_ != nullptr) {
        store_piece(key_slab_ + at, x, a);
      } else if (grad_keys_ != nullptr) {
        store_piece(grad_keys_ + at, x, a);
      }
    });
  }

 private:
  static constexpr int kPiecesOfGrads = Tile::kSteps / kLanes<acc>;
  static constexpr int kPiecesOfKeys = kFeatures / kLanes<scalar>;

  __device__ __forceinline__ bool takes(int s) const {
    return s < end_step && attended_(s);
  }

  // Of a step's features from `a` on.
  template <class T>
  __device__ __forceinline__ void store_piece(T* to, const acc (&x)[kLanes<acc>], int a) const {
    if (stores_by_vectors_) {
      store_neighbours(to, x);
      return;
    }
#pragma unroll
    for (int n = 0; n < kLanes<acc>; ++n) {
      if (a + n < features_) {
        to[n] = from_acc<T>(x[n]);
      }
    }
  }

  Attendable attended_;
  int queries_, features_;
  const acc* grads_;
  const scalar* keys_;
  acc* key_slab_;
  scalar* grad_keys_;
  bool grads_by_vectors_, keys_by_vectors_, stores_by_vectors_;
};

template <class scalar, int rows>
__global__ void __launch_bounds__(kAdditiveThreads, 4) additive_backward_tile(
    const AdditiveBackward call, const AdditiveBackwardPlan plan, bool grads_by_vectors, bool keys_by_vectors) {
  using acc = accumulated_t<scalar>;
  using Tile = GradientTile<scalar, rows>;
  using Block = GradientBlock<scalar, rows>;
  const Problem& problem = call.problem;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t size = problem.key_size;
  Block& block = *reinterpret_cast<Block*>(shared_memory() + Tile::kShared);
  if (threadIdx.x == 0) {
    ::new (&block) Block(call, plan, grads_by_vectors, keys_by_vectors);
  }
  sync_threads();  // it is there
  if (threadIdx.x < kFeatures) {
    const auto* v = static_cast<const scalar*>(problem.v.data);
    block.of_v[lane] = block.has(lane) ? 4 * to_acc(v[(block.first_feature + lane) * problem.v.element_stride]) : acc(0);
  }
  if (block.first_step < block.attended_end) {
    block.start(problem, Tile(shared_memory(), 0), block.first_step);
  }

  acc query[rows], grad_query[rows] = {}, grad_v = 0;
  {
    const int64_t last = problem.queries - 1, first = block.query_tile * Tile::kQueries + warp * rows;
    const int64_t a = block.first_feature + lane < size ? block.first_feature + lane : size - 1;
    const scalar* from = row_of<scalar>(problem.query, block.b, first < last ? first : last) + a * problem.query.element_stride;
    const int more = last - first < rows ? static_cast<int>(last - first) : rows;
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      // Beyond the last one it stands in: what it gets there is not stored, and passes on nothing, its de being 0.
      query[i] = to_acc(*from);
      from += i < more ? problem.query.row_stride : 0;
    }
  }
  bool direct = true;
  if constexpr (kFactors<acc>) {
    // A look at all keys, one for the 128 queries here: these need not change from exponentials to themselves on the way.
    bool is_wide = block.is_wide(problem);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      is_wide = is_wide || is_beyond(query[i], kFactorable);
    }
    direct = any_in_block(is_wide);
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      query[i] = factor_of<scalar>(query[i], direct);
    }
  }

  const auto store_keys_of = [&](const Tile& tile, int step0) {
    block.store_keys(size, step0, [&](acc(&x)[kLanes<acc>], int s, int a) {
      acc factor[kLanes<acc>];
      load_shared(factor, block.of_v + a);
      tile.sum_parts(x, s, a);
#pragma unroll
      for (int n = 0; n < kLanes<acc>; ++n) {
        x[n] = x[n] != 0 ? x[n] * factor[n] : acc(0);  // of a masked row, whatever v is
      }
    });
  };
  int buffer = 0, step0 = block.first_step;
  for (; step0 < block.attended_end; step0 += Tile::kSteps, buffer = 1 - buffer) {
    const Tile tile(shared_memory(), buffer), other(shared_memory(), 1 - buffer);
    wait_copies<0>();
    sync_threads();  // the chunk is there, and the one before has been walked
    if (step0 + Tile::kSteps < block.attended_end) {
      block.start(problem, other, step0 + Tile::kSteps);
    }
    if (step0 > block.first_step) {
      store_keys_of(other, step0 - Tile::kSteps);
    }
    if (direct) {
      tile.template walk<true>(query, grad_query, grad_v);
    } else if constexpr (kFactors<acc>) {
      tile.template walk<false>(query, grad_query, grad_v);
    }
  }
  const Tile last(shared_memory(), 1 - buffer);
  sync_threads();  // the last chunk's parts are there
  if (step0 > block.first_step) {
    store_keys_of(last, step0 - Tile::kSteps);
  }
  for (; step0 < block.end_step; step0 += Tile::kSteps) {
    block.store_keys(size, step0, [](acc(&x)[kLanes<acc>], int, int) {
#pragma unroll
      for (int n = 0; n < kLanes<acc>; ++n) {
        x[n] = 0;
      }
    });
  }

  const bool has_feature = block.has(lane);
  const int64_t a = block.first_feature + lane, first_query = block.query_tile * Tile::kQueries + warp * rows;
  const auto store_queries = [&]<class T>(T* to) {
    const acc factor = block.of_v[lane];
    const int count = problem.queries - first_query < rows ? static_cast<int>(problem.queries - first_query) : rows;
    to += (block.b * problem.queries + first_query) * size + a;
#pragma unroll
    for (int i = 0; i < rows; ++i, to += size) {
      if (has_feature && i < count) {
        *to = from_acc<T>(factor * grad_query[i]);
      }
    }
  };
  if (plan.query_slabs != nullptr) {
    store_queries(static_cast<acc*>(plan.query_slabs) + block.split * problem.batch * problem.queries * size);
  } else if (call.grad_query != nullptr) {
    store_queries(static_cast<scalar*>(call.grad_query));
  }
  if (call.grad_v != nullptr) {
    sync_threads();  // the last chunk's parts have been read
    last.parts[warp * Tile::kSteps * kFeatures + lane] = grad_v;
    sync_threads();  // every warp's is there
    if (warp == 0 && has_feature) {
      acc sum[1];
      last.sum_parts(sum, 0, lane);
      if (plan.v_slabs != nullptr) {
        static_cast<acc*>(plan.v_slabs)[block.group * size + a] = -2 * sum[0];
      } else {
        static_cast<scalar*>(call.grad_v)[a] = from_acc<scalar>(-2 * sum[0]);
      }
    }
  }
}

}  // namespace attn_ext::cuda

// Additive scores of many queries, and their gradients (the equations are in additive.cuh). Nothing of size T S A is ever stored:
// what the keys get of several tiles of queries waits in slabs of size S A, of no more tiles than one launch has.
//
// Forward: a block of 128 threads has a tile of up to 64 queries and 64 steps, and walks the features in chunks. A chunk's
// exponentials are taken on its way into shared memory, feature by feature, 1 for 32 products; a thread holds the sums of up to 8
// queries and 4 steps and shares each reciprocal among four features, or two of a wide chunk: 3 multiply-adds and a quarter of a
// special function an element.
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

// exp(2x), or x where it is to be taken directly. The approximate one is off by the rounding of its argument, 2^-18 at most: too
// much for float's gradients, and nothing beside a half's own rounding.
template <class scalar>
__device__ __forceinline__ accumulated_t<scalar> factor_of(accumulated_t<scalar> x, bool direct) {
  if (direct) {
    return x;
  }
  if constexpr (sizeof(scalar) == 2) {
    return exp2_approx(kTwoOverLn2 * x);
  } else {
    return exponential(2 * x);
  }
}

// A pair's reciprocal takes 1/v1 in, v1 being the larger of its two v: with v1 no nearer to 0 than kLeastDivisor, which is nothing
// beside the sum's rounding, 1 + E up to 2^58 (queries and keys of 10) leave the denominator below 2^126 wherever 1/x0 is more than
// 2^-28 of v0. Two pairs share one where no denominator comes near to 2^126: v1 within 2^10 of 1, and 1 + E up to 2^26.
constexpr float kFactorableScores = 10;
constexpr float kLeastDivisor = 0x1p-40f;
constexpr float kFactorableByFour = 4.5;
constexpr float kMostDivisorByFour = 0x1p10f;

// How a chunk of features can be summed.
struct Factoring {
  bool by_four = true;
  bool by_two = true;
};

// What a chunk's features bring into all sums. Each pair of features has a place for v0 and one for 1/v1, the larger.
template <class acc, int count>
struct alignas(16) ScoresFeatures {
  acc v[count];
  acc factor[count];                      // of the queries' exponentials, feature by feature
  uint64_t swaps[16 / sizeof(uint64_t)];  // a bit a pair: whether its first feature is the larger

  // A lane a feature. Returns how the chunk can be summed for all it knows.
  __device__ __forceinline__ Factoring fill(acc of_v) {
    const int lane = threadIdx.x % kWarp;
    Factoring factoring;
    if constexpr (kFactors<acc>) {
      const acc size = fabsf(of_v), of_other = shuffle_xor(size, 1);
      const bool divides = lane % 2 == 0 ? size > of_other : !(of_other > size);  // NaN or not, one of the two
      const acc inverse = reciprocal_approx(size < kLeastDivisor ? kLeastDivisor : of_v);
      factoring.by_four = !divides || (size < kMostDivisorByFour && size * kMostDivisorByFour > 1);
      factoring.by_two = size < kModerate;
      uint32_t bits = lane % 2 == 0 && divides ? 1u << lane / 2 : 0;
#pragma unroll
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        bits |= shuffle_xor(bits, lanes);
      }
      if (lane < count) {
        v[(lane & ~1) + divides] = divides ? inverse : of_v;
        factor[lane] = divides ? inverse : acc(1);
      }
      if (lane == 0) {
        swaps[0] = bits;
      }
      if (lane >= count) {
        factoring = {};
      }
    } else if (lane < count) {
      v[lane] = of_v;
    }
    return factoring;
  }
};

// A block's queries and steps, threads being 8 x 16 with kRows x kColumns pairs each, and its two chunks of features: one is summed
// while the next is on its way.
template <class scalar, int rows_, int columns_>
struct ScoresTile {
  using acc = accumulated_t<scalar>;
  static constexpr int kRows = rows_;
  static constexpr int kColumns = columns_;
  static constexpr int kAcross = 16;
  static constexpr int kQueries = kAdditiveThreads / kAcross * kRows;
  static constexpr int kSteps = kAcross * kColumns;
  static constexpr int kStride = kQueries + kSteps + 4;
  // What a thread brings of a chunk: 16 bytes of each of a few rows. Neighbours have 32 rows, and store to all banks.
  static constexpr int kEach = kLanes<scalar>;
  static constexpr int kBrought = kQueries + kSteps > 64 ? 4 : 2;
  static constexpr int kNeighbours = kWarp / kBrought;
  static constexpr int kPieces = 4;
  static constexpr int kChunk = kPieces * kEach;
  static constexpr size_t kBuffer = kChunk * kStride * sizeof(acc);
  static constexpr size_t kBroughtSize = (kBrought + 1) * kAdditiveThreads * sizeof(Vector16);
  static constexpr size_t kShared = 2 * kBuffer + 3 * sizeof(ScoresFeatures<acc, kChunk>) + kBroughtSize;
  static_assert((kQueries + kSteps) / kBrought * kPieces <= kAdditiveThreads);

  acc* rows;     // [kChunk][kStride]: of a feature, all queries' and all steps'
  const acc* v;  // [kChunk]; factored: of a pair of features v0 and 1/v1

  __device__ __forceinline__ ScoresTile(char* shared, int buffer, const ScoresFeatures<acc, kChunk>& features)
      : rows(reinterpret_cast<acc*>(shared + buffer * kBuffer)), v(features.v) {}

  // v0/x0 + v1/x1 = (v0 x1' + x0) / (x0 x1') with x1' = x1/v1, for which q1 and 1 have been divided by v1.
  template <int count>
  __device__ __forceinline__ void add_factored(acc (&sums)[kRows][kColumns], int row, int column) const {
    constexpr int rows_at_once = kRows < 4 ? kRows : 4;
#pragma unroll(4 / count)
    for (int a = 0; a < kChunk; a += count) {
      acc k[count][kColumns], of_v[count];
      load_shared(of_v, v + a);
#pragma unroll
      for (int n = 0; n < count; ++n) {
        load_shared(k[n], rows + (a + n) * kStride + kQueries + column);
      }
#pragma unroll
      for (int i0 = 0; i0 < kRows; i0 += rows_at_once) {
        acc q[count][rows_at_once];
#pragma unroll
        for (int n = 0; n < count; ++n) {
          load_shared(q[n], rows + (a + n) * kStride + row + i0);
        }
#pragma unroll
        for (int i = 0; i < rows_at_once; ++i) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            acc numerator[count / 2], denominator[count / 2];
#pragma unroll
            for (int n = 0; n < count; n += 2) {
              const acc x0 = q[n][i] * k[n][j] + 1, x1 = q[n + 1][i] * k[n + 1][j] + of_v[n + 1];
              numerator[n / 2] = of_v[n] * x1 + x0;
              denominator[n / 2] = x0 * x1;
            }
            if constexpr (count == 4) {
              numerator[0] = numerator[0] * denominator[1] + numerator[1] * denominator[0];
              denominator[0] *= denominator[1];
            }
            sums[i0 + i][j] += numerator[0] * reciprocal_approx(denominator[0]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void add_direct(acc (&sums)[kRows][kColumns], int row, int column) const {
    for (int a = 0; a < kChunk; ++a) {
      acc q[kRows], k[kColumns];
      load_shared(q, rows + a * kStride + row);
      load_shared(k, rows + a * kStride + kQueries + column);
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

// A block's tile.
template <class Tile>
struct TilePlace {
  int64_t b, query0, step0;

  __device__ __forceinline__ TilePlace(const Problem& problem, uint32_t block) {
    const auto step_tiles = static_cast<uint32_t>((problem.steps + Tile::kSteps - 1) / Tile::kSteps);
    const auto query_tiles = static_cast<uint32_t>((problem.queries + Tile::kQueries - 1) / Tile::kQueries);
    step0 = static_cast<int64_t>(block % step_tiles) * Tile::kSteps;
    query0 = static_cast<int64_t>(block / step_tiles % query_tiles) * Tile::kQueries;
    b = block / step_tiles / query_tiles;
  }
};

// A thread's share of a chunk, as it is stored.
template <class Tile, class scalar>
class Brought {
  using acc = accumulated_t<scalar>;

 public:
  __device__ __forceinline__ Brought(const Problem& problem, const TilePlace<Tile>& place, const Attendable& attended)
      : problem_(problem) {
    const int64_t first = is_query() ? place.query0 + at() : place.step0 + at() - Tile::kQueries;
    Source source{row_of<scalar>(view(), place.b, first), 0};
#pragma unroll
    for (int i = 0; i < Tile::kBrought; ++i) {
      const bool takes = is_query() ? first + i < problem.queries : at() < Tile::kQueries + Tile::kSteps && attended(first + i);
      source.takes |= static_cast<uint64_t>(takes) << i;
    }
    *source_of_thread() = source;
  }

  // The chunk from feature `first` on, under way.
  __device__ __forceinline__ void start(int64_t first, bool query_by_vectors, bool keys_by_vectors) const {
    const Source source = *source_of_thread();
    const int64_t a = first + piece();
    const bool by_vectors = is_query() ? query_by_vectors : keys_by_vectors;
#pragma unroll
    for (int i = 0; i < Tile::kBrought; ++i) {
      const bool takes = (source.takes >> i & 1) != 0 && a < problem_.key_size;
      const scalar* row = source.from + i * view().row;
      if (by_vectors) {
        copy_async16(of_row(i), row + a, takes);
      } else {
        store16(of_row(i), takes ? load_piece(row, view().element, a, problem_.key_size, false) : Vector16{});
      }
    }
    commit_copies();
  }

  // The chunk, which has arrived. Returns how this share of it can be summed, if not `direct`.
  __device__ __forceinline__ Factoring
  store(const Tile& tile, const ScoresFeatures<acc, Tile::kChunk>& features, bool direct) const {
    Factoring factoring;
    wait_copies<0>();
    if (at() >= Tile::kQueries + Tile::kSteps) {
      return factoring;
    }
    acc x[Tile::kBrought][Tile::kEach];
#pragma unroll
    for (int i = 0; i < Tile::kBrought; ++i) {
      unpack<scalar>(x[i], load16(of_row(i)));
    }
    acc* to = tile.rows + piece() * Tile::kStride + at();
    if constexpr (kFactors<acc>) {
      if (!direct) {
        acc factor[Tile::kEach], largest = 0;  // a NaN stays in its row either way
        load_shared(factor, features.factor + piece());
        const auto swaps = static_cast<uint32_t>(features.swaps[0]) >> piece() / 2;
#pragma unroll
        for (int n = 0; n < Tile::kEach; ++n) {
          const acc of_queries = is_query() ? factor[n] : acc(1);
          acc of_feature[Tile::kBrought];
#pragma unroll
          for (int i = 0; i < Tile::kBrought; ++i) {
            largest = fmaxf(largest, fabsf(x[i][n]));
            of_feature[i] = exp2_approx(kTwoOverLn2 * x[i][n]) * of_queries;
          }
          const int place = n ^ static_cast<int>(swaps >> n / 2 & 1);
          store_shared(to + place * Tile::kStride, of_feature);
        }
        factoring.by_four = largest < kFactorableByFour;
        factoring.by_two = largest < kFactorableScores;
        return factoring;
      }
    }
#pragma unroll
    for (int n = 0; n < Tile::kEach; ++n) {
      acc of_feature[Tile::kBrought];
#pragma unroll
      for (int i = 0; i < Tile::kBrought; ++i) {
        of_feature[i] = x[i][n];
      }
      store_shared(to + n * Tile::kStride, of_feature);
    }
    return factoring;
  }

 private:
  struct alignas(16) Source {
    const scalar* from;
    uint64_t takes;  // a bit a row
  };
  static_assert(sizeof(Source) == sizeof(Vector16));

  const Problem& problem_;

  __device__ __forceinline__ const View& view() const {
    return is_query() ? problem_.query : problem_.keys;
  }

  // Its rows are the queries' or the steps' behind them.
  static __device__ __forceinline__ int at() {
    constexpr int neighbours = Tile::kNeighbours;
    return (threadIdx.x / (neighbours * Tile::kPieces) * neighbours + threadIdx.x % neighbours) * Tile::kBrought;
  }

  static __device__ __forceinline__ int piece() {
    return threadIdx.x / Tile::kNeighbours % Tile::kPieces * Tile::kEach;
  }

  static __device__ __forceinline__ bool is_query() {
    return at() < Tile::kQueries;
  }

  // Where row i is until it is stored, and what is behind: this thread's own. In registers they would take those of the sums.
  __device__ __forceinline__ Vector16* of_row(int i) const {
    return reinterpret_cast<Vector16*>(shared_memory() + 2 * Tile::kBuffer) + i * kAdditiveThreads + threadIdx.x;
  }

  __device__ __forceinline__ Source* source_of_thread() const {
    return reinterpret_cast<Source*>(of_row(Tile::kBrought));
  }
};

template <class scalar, int rows, int columns>
__global__ void __launch_bounds__(kAdditiveThreads, 4)
    additive_scores_tile(const AdditiveScores call, bool query_by_vectors, bool keys_by_vectors) {
  using acc = accumulated_t<scalar>;
  using Tile = ScoresTile<scalar, rows, columns>;
  using Features = ScoresFeatures<acc, Tile::kChunk>;
  const Problem& problem = call.problem;
  const TilePlace<Tile> place(problem, blockIdx.x);
  const Attendable attended = Attendable::by_any(problem, place.b);
  if (place.step0 >= attended.end()) {
    return;  // the whole block
  }
  const Brought<Tile, scalar> brought(problem, place, attended);
  if (problem.key_size > 0) {
    brought.start(0, query_by_vectors, keys_by_vectors);
  }
  // Three in turn: while some warps are behind with a chunk, others store the next, and the one after that is made ready.
  Features* features = reinterpret_cast<Features*>(shared_memory() + 2 * Tile::kBuffer + Tile::kBroughtSize);
  const auto v_of_lane = [&](int64_t first) {
    const int64_t a = first + threadIdx.x % kWarp;
    const bool is_there = threadIdx.x % kWarp < Tile::kChunk && a < problem.key_size;
    return is_there ? to_acc(static_cast<const scalar*>(problem.v.data)[a * problem.v.element]) : acc(0);
  };
  const bool is_first_warp = threadIdx.x < kWarp;
  Factoring of_features;
  acc next_v = 0;
  if (is_first_warp) {
    of_features = features[0].fill(v_of_lane(0));
    next_v = v_of_lane(Tile::kChunk);
  }
  sync_threads();  // the first features are there

  const int row = threadIdx.x / Tile::kAcross * rows, column = threadIdx.x % Tile::kAcross * columns;
  acc sums[rows][columns] = {};
  int buffer = 0, ready = 0;
  for (int64_t a0 = 0; a0 < problem.key_size; a0 += Tile::kChunk) {
    Features& of_chunk = features[ready];
    ready = ready == 2 ? 0 : ready + 1;
    const Tile tile(shared_memory(), buffer, of_chunk);
    buffer = 1 - buffer;
    Factoring mine = brought.store(tile, of_chunk, !kFactors<acc>);
    if (is_first_warp) {
      mine.by_four = mine.by_four && of_features.by_four;
      mine.by_two = mine.by_two && of_features.by_two;
      of_features = features[ready].fill(next_v);
      next_v = v_of_lane(a0 + 2 * Tile::kChunk);
    }
    // After the barrier the chunk is there, and the chunk before has been read, whose place the next one takes.
    const bool by_four = kFactors<acc> && !any_in_block(!mine.by_four);
    const bool by_two = kFactors<acc> && !by_four && !any_in_block(!mine.by_two);
    if (!by_four && !by_two) {
      if (kFactors<acc>) {
        brought.store(tile, of_chunk, true);
        if (threadIdx.x < Tile::kChunk) {
          of_chunk.v[threadIdx.x] = v_of_lane(a0);
        }
      }
      sync_threads();  // the chunk is there
    }
    if (a0 + Tile::kChunk < problem.key_size) {
      brought.start(a0 + Tile::kChunk, query_by_vectors, keys_by_vectors);
    }
    if constexpr (kFactors<acc>) {
      if (by_four) {
        tile.template add_factored<4>(sums, row, column);
        continue;
      }
      if (by_two) {
        tile.template add_factored<2>(sums, row, column);
        continue;
      }
    }
    tile.add_direct(sums, row, column);
  }

  // Computed anew: the registers are the sums'.
  const TilePlace<Tile> there(problem, forgotten(blockIdx.x));
  const int64_t query0 = there.query0 + row, step0 = there.step0 + column;
  acc* out = static_cast<acc*>(call.scores) + (there.b * problem.queries + query0) * problem.steps + step0;
#pragma unroll
  for (int i = 0; i < rows; ++i) {
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      if (query0 + i < problem.queries && step0 + j < problem.steps) {
        out[i * problem.steps + j] = -2 * sums[i][j];
      }
    }
  }
}

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
    keys_ = row_of<scalar>(problem.keys, b, 0) + first_feature * problem.keys.element;
    const int64_t out = b * steps * size + first_feature;
    key_slab_ = plan.key_slabs == nullptr ? nullptr : static_cast<acc*>(plan.key_slabs) + tile * problem.batch * steps * size + out;
    grad_keys_ = call.grad_keys == nullptr ? nullptr : static_cast<scalar*>(call.grad_keys) + out;
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
        copy_async16(tile.keys + s * kFeatures + a, keys_ + (there ? (step0 + s) * problem.keys.row + a : 0), there);
      });
    } else {
      by_threads<Tile::kSteps * kFeatures>([&](int i) {
        const int s = i / kFeatures, a = i % kFeatures;
        const bool there = a < features_ && takes(step0 + s);
        tile.keys[i] = there ? keys_[(step0 + s) * problem.keys.row + a * problem.keys.element] : scalar{};
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
        unpack<scalar>(key, load_piece(keys_ + s * problem.keys.row, problem.keys.element, a, features_, keys_by_vectors_));
      }
#pragma unroll
      for (int i = 0; i < kLanes<scalar>; ++i) {
        wide = wide || is_beyond(key[i], kFactorable);
      }
    }
    return wide;
  }

  // The gradients of the chunk from step0 on: of each step value(s).
  template <class Value>
  __device__ __forceinline__ void store_keys(int64_t size, int step0, const Value& value) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int end = end_step - step0 < Tile::kSteps ? end_step - step0 : Tile::kSteps;
    if (!has(lane)) {
      return;
    }
    if (key_slab_ != nullptr) {
      acc* to = key_slab_ + (step0 + warp) * size + lane;
      for (int s = warp; s < end; s += kAdditiveWarps, to += kAdditiveWarps * size) {
        *to = value(s);
      }
    } else if (grad_keys_ != nullptr) {
      scalar* to = grad_keys_ + (step0 + warp) * size + lane;
      for (int s = warp; s < end; s += kAdditiveWarps, to += kAdditiveWarps * size) {
        *to = from_acc<scalar>(value(s));
      }
    }
  }

 private:
  static constexpr int kPiecesOfGrads = Tile::kSteps / kLanes<acc>;
  static constexpr int kPiecesOfKeys = kFeatures / kLanes<scalar>;

  __device__ __forceinline__ bool takes(int s) const {
    return s < end_step && attended_(s);
  }

  Attendable attended_;
  int queries_, features_;
  const acc* grads_;
  const scalar* keys_;
  acc* key_slab_;
  scalar* grad_keys_;
  bool grads_by_vectors_, keys_by_vectors_;
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
    block = Block(call, plan, grads_by_vectors, keys_by_vectors);
  }
  sync_threads();  // it is there
  if (block.first_step < block.attended_end) {
    block.start(problem, Tile(shared_memory(), 0), block.first_step);
  }

  acc query[rows], grad_query[rows] = {}, grad_v = 0;
  {
    const scalar* queries = row_of<scalar>(problem.query, block.b, 0);
    const int64_t first = block.query_tile * Tile::kQueries + warp * rows, last_query = problem.queries - 1;
    const int64_t a = block.first_feature + lane < size ? block.first_feature + lane : size - 1;
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      // Beyond the last one it stands in: what it gets there is not stored, and passes on nothing, its de being 0.
      const int64_t t = first + i < last_query ? first + i : last_query;
      query[i] = to_acc(queries[t * problem.query.row + a * problem.query.element]);
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

  const auto v_of_lane = [&]() {
    const auto* v = static_cast<const scalar*>(problem.v.data);
    return block.has(lane) ? to_acc(v[(block.first_feature + lane) * problem.v.element]) : acc(0);
  };
  const auto store_keys_of = [&](const Tile& tile, int step0) {
    const acc factor = 4 * v_of_lane();
    block.store_keys(size, step0, [&](int s) { return factor * tile.sum_of_parts(s, lane); });
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
    block.store_keys(size, step0, [](int) { return acc(0); });
  }

  const bool has_feature = block.has(lane);
  const int64_t a = block.first_feature + lane, first_query = block.query_tile * Tile::kQueries + warp * rows;
  const acc factor = 4 * v_of_lane();
#pragma unroll
  for (int i = 0; i < rows; ++i) {
    if (has_feature && first_query + i < problem.queries) {
      const int64_t at = (block.b * problem.queries + first_query + i) * size + a;
      const int64_t slab = block.split * problem.batch * problem.queries * size;
      store_gradient<scalar>(plan.query_slabs, slab, call.grad_query, at, factor * grad_query[i]);
    }
  }
  if (call.grad_v != nullptr) {
    sync_threads();  // the last chunk's parts have been read
    last.parts[warp * Tile::kSteps * kFeatures + lane] = grad_v;
    sync_threads();  // every warp's is there
    if (warp == 0 && has_feature) {
      store_gradient<scalar>(plan.v_slabs, block.group * size, call.grad_v, a, -2 * last.sum_of_parts(0, lane));
    }
  }
}

}  // namespace attn_ext::cuda

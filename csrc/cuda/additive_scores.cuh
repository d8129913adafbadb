// Additive scores of many queries (the equations are in additive.cuh). Nothing of size T S A is ever stored.
//
// A first launch takes the exponentials, once for each query's and each key's feature, and lays them out as the second reads them:
// feature by feature, in chunks. There a block of 128 threads has a tile of up to 64 queries and 64 steps and walks the chunks, one
// being summed while the next is on its way to shared memory. A thread holds the sums of up to 8 queries and 4 steps and shares
// each reciprocal among four features, or two of a wide chunk: 3 multiply-adds and a quarter of a special function an element.
//
// Where a chunk leaves the range of factored exponentials, a tile takes exp(2 (q + k)), from the queries and keys themselves;
// double takes tanh.
#pragma once

#include "additive.cuh"
#include "kernels.h"
#include "mask.cuh"
#include "view.cuh"

namespace attn_ext::cuda {

// Numerators that share a reciprocal take the other's factor on: v must leave them room.
constexpr float kModerate = 1e6f;

// A pair's reciprocal takes 1/v1 in, v1 being the larger of its two v: with v1 no nearer to 0 than kLeastDivisor, which is nothing
// beside the sum's rounding, 1 + E up to 2^58 (queries and keys of 10) leave the denominator below 2^126 wherever 1/x0 is more than
// 2^-28 of v0. Two pairs share one where no denominator comes near to 2^126: v1 within 2^10 of 1, and 1 + E up to 2^26.
constexpr float kFactorableScores = 10;
constexpr float kLeastDivisor = 0x1p-40f;
constexpr float kFactorableByFour = 4.5;
constexpr float kMostDivisorByFour = 0x1p10f;

// The v of pairs that the last chunk lacks, this and its opposite: they add up to 0, and may share a reciprocal with another pair.
constexpr float kNoFeature = 0x1p-9f;

// How a chunk of features can be summed; of several rows, the last in this order.
enum Factoring : uint16_t { kByFour, kByTwo, kDirect };

// What is kept of a chunk's v: kFeatures numbers, half of what v sums up to, and what makes it whole vectors.
constexpr int kChunkOfV = kFeatures + 4;

// A chunk of so many rows, of queries or of keys, has its factors together: [kFeatures][kFactorRows].
constexpr int kFactorRows = kWarp;
constexpr int kFactorTile = kFeatures * kFactorRows;

// Of one side, in the workspace.
struct RowsFactors {
  int64_t blocks;        // of kFactorRows
  float* factors;        // [B, blocks, chunks, kFeatures, kFactorRows]
  Factoring* factoring;  // [B, blocks, chunks]
};

// The first launch's results.
struct ScoresFactors {
  int64_t chunks;
  RowsFactors queries;  // exp(2q), of a pair's larger v over it
  RowsFactors keys;     // exp(2k)
  float* v;             // [chunks, kChunkOfV]: of each pair v0 and 1/v1, the queries and keys in this order too
  Factoring* of_v;      // [chunks]
};

// What a chunk's features bring into all sums, a lane a feature.
struct ChunkOfV {
  float value;       // v0, or 1/v1
  float inverse;     // the pair's 1/v1
  uint32_t divides;  // a bit a feature: whether it is the larger of its pair
  Factoring factoring;

  __device__ __forceinline__ explicit ChunkOfV(float v) {
    const int lane = threadIdx.x % kWarp;
    const float size = fabsf(v), of_other = shuffle_xor(size, 1);
    const bool is_v1 = lane % 2 == 0 ? size > of_other : !(of_other > size);  // NaN or not, one of the two
    value = is_v1 ? reciprocal_approx(size < kLeastDivisor ? kLeastDivisor : v) : v;
    const float others = shuffle_xor(value, 1);
    inverse = is_v1 ? value : others;
    divides = ballot(is_v1);
    const bool by_four = !is_v1 || (size < kMostDivisorByFour && size * kMostDivisorByFour > 1), by_two = size < kModerate;
    factoring = ballot(!by_two) != 0 ? kDirect : ballot(!by_four) != 0 ? kByTwo : kByFour;
  }

  // Whether the pair that begins with this feature is swapped, so that the larger comes last.
  __device__ __forceinline__ bool is_swapped(int feature) const {
    return (divides >> feature & 1) != 0;
  }
};

// A warp has a chunk of kFactorRows rows, of queries or of keys, a lane a row; blocks are numbered batch element, block of rows,
// chunks for each warp one.
template <class scalar>
__global__ void __launch_bounds__(kAdditiveThreads)
    take_factors(const AdditiveScores call, const ScoresFactors factors, bool query_by_vectors, bool keys_by_vectors) {
  const Problem& problem = call.problem;
  const auto groups = static_cast<uint32_t>((factors.chunks + kAdditiveWarps - 1) / kAdditiveWarps);
  const auto blocks = static_cast<uint32_t>(factors.queries.blocks + factors.keys.blocks);
  const int64_t chunk = blockIdx.x % groups * kAdditiveWarps + threadIdx.x / kWarp;
  if (chunk >= factors.chunks) {
    return;  // a whole warp
  }
  const int64_t at = blockIdx.x / groups % blocks, b = blockIdx.x / groups / blocks;
  const bool is_query = at < factors.queries.blocks;
  const RowsFactors side = is_query ? factors.queries : factors.keys;
  const int64_t block = is_query ? at : at - factors.queries.blocks, place = (b * side.blocks + block) * factors.chunks + chunk;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = block * kFactorRows + lane, first_feature = chunk * kFeatures;
  const View view = is_query ? problem.query : problem.keys;
  const bool takes = is_query ? row < problem.queries : Attendable::by_any(problem, b)(row);
  const scalar* from = row_of<scalar>(view, b, takes ? row : 0);
  constexpr int each = kLanes<scalar>, pieces = kFeatures / each;
  Vector16 piece[pieces];
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
    const bool by_vectors = is_query ? query_by_vectors : keys_by_vectors;
    piece[p] = takes ? load_piece(from, view.element_stride, first_feature + p * each, problem.key_size, by_vectors) : Vector16{};
  }
  const int64_t a = first_feature + lane;
  float its_own = lane % 2 == 0 ? kNoFeature : a == problem.key_size ? 0 : -kNoFeature;
  if (a < problem.key_size) {
    its_own = to_acc(static_cast<const scalar*>(problem.v.data)[a * problem.v.element_stride]);
  }
  const ChunkOfV v(its_own);

  float* to = side.factors + place * kFactorTile + lane;
  float largest = 0;  // a NaN stays in its row whatever is done
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
    float x[each];
    unpack<scalar>(x, piece[p]);
#pragma unroll
    for (int n = 0; n < each; n += 2) {
      const int feature = p * each + n;
      const bool swaps = v.is_swapped(feature);
      const float inverse = shuffle(v.inverse, feature);
      largest = fmaxf(largest, fmaxf(fabsf(x[n]), fabsf(x[n + 1])));
      to[feature * kFactorRows] = factor_of<scalar>(swaps ? x[n + 1] : x[n], false);
      to[(feature + 1) * kFactorRows] = factor_of<scalar>(swaps ? x[n] : x[n + 1], false) * (is_query ? inverse : 1.0f);
    }
  }
  const bool by_two = ballot(!(largest < kFactorableByFour)) != 0, direct = ballot(!(largest < kFactorableScores)) != 0;
  if (lane == 0) {
    side.factoring[place] = direct ? kDirect : by_two ? kByTwo : kByFour;
  }
  if (b == 0 && at == 0) {
    float* of_chunk = factors.v + chunk * kChunkOfV;
    of_chunk[v.is_swapped(lane & ~1) ? lane ^ 1 : lane] = v.value;
    float half = its_own / 2;
#pragma unroll
    for (int apart = 1; apart < kWarp; apart *= 2) {
      half += shuffle_xor(half, apart);  // neighbours first: features that are none add up to 0
    }
    if (lane < kChunkOfV - kFeatures) {
      of_chunk[kFeatures + lane] = half;  // the first is read, all are copied
    }
    if (lane == 0) {
      factors.of_v[chunk] = v.factoring;
    }
  }
}

// A block's queries and steps, threads being 8 x 16 with kRows x kColumns pairs each, and a chunk of features in shared memory.
template <class acc_, int rows_, int columns_>
struct ScoresTile {
  using acc = acc_;
  static constexpr int kRows = rows_;
  static constexpr int kColumns = columns_;
  static constexpr int kAcross = 16;
  static constexpr int kQueries = kAdditiveThreads / kAcross * kRows;
  static constexpr int kSteps = kAcross * kColumns;
  static constexpr int kStride = kQueries + kSteps + 4;  // so that a feature's row as it is does not come to few banks
  static constexpr size_t kBuffer = (kFeatures * kStride + kChunkOfV) * sizeof(acc);
  // Two, one on its way and where it comes from; what is taken directly alone is loaded where it is summed.
  static constexpr size_t kShared = kFactors<acc> ? 2 * kBuffer + 2 * kAdditiveThreads * sizeof(Vector16) : kBuffer;

  acc* rows;  // [kFeatures][kStride]: of a feature, all queries' and all steps'
  acc* v;     // [kFeatures]; factored: of a pair of features v0 and 1/v1; behind them, half of all v

  __device__ __forceinline__ ScoresTile(char* shared, int buffer)
      : rows(reinterpret_cast<acc*>(shared + buffer * kBuffer)), v(rows + kFeatures * kStride) {}

  // v0/x0 + v1/x1 = (v0 x1' + x0) / (x0 x1') with x1' = x1/v1, for which q1 and 1 have been divided by v1.
  template <int count>
  __device__ __forceinline__ void add_factored(acc (&sums)[kRows][kColumns], int row, int column) const {
    constexpr int rows_at_once = kRows < 4 ? kRows : 4;
#pragma unroll(4 / count)
    for (int a = 0; a < kFeatures; a += count) {
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

  // Of the chunk that was added: r is about a half, and v of one sign would let the sums grow, whose rounding then exceeds that of
  // what the steps differ by.
  __device__ __forceinline__ void centre(acc (&sums)[kRows][kColumns]) const {
    const acc half = v[kFeatures];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        sums[i][j] -= half;
      }
    }
  }

  __device__ __forceinline__ void add_direct(acc (&sums)[kRows][kColumns], int row, int column) const {
    for (int a = 0; a < kFeatures; ++a) {
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

// A block's tile; blocks are numbered batch element, tile of queries, tile of steps.
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

// Factors on their way to a tile: of either side a thread has the same 4 rows of every kApart-th feature. Where they come from
// stands in shared memory: the registers are the sums'.
template <class Tile, int count>
class FactorsUnderWay {
 public:
  static constexpr size_t kShared = kAdditiveThreads * sizeof(Vector16);

  // Of a side, from a row of batch element b on.
  __device__ __forceinline__ FactorsUnderWay(char* shared, const RowsFactors& side, int64_t chunks, int64_t b, int64_t first_row)
      : source_(reinterpret_cast<Source*>(shared) + threadIdx.x) {
    const int64_t row = first_row + at(), block = row / kFactorRows;
    const float* from =
        side.factors + (b * side.blocks + block) * chunks * kFactorTile + feature() * kFactorRows + row % kFactorRows;
    const bool there = block < side.blocks;
    *source_ = {there ? from : side.factors, there ? kFactorTile : 0};
  }

  // The next chunk's, to the rows of `to` that begin with its first.
  __device__ __forceinline__ void start(float* to) const {
    const Source source = *source_;
    to += feature() * Tile::kStride + at();
#pragma unroll
    for (int n = 0; n < kFeatures; n += kApart) {
      copy_async16(to + n * Tile::kStride, source.from + n * kFactorRows, source.advance != 0);
    }
    source_->from = source.from + source.advance;
  }

 private:
  static constexpr int kPieces = count / 4;
  static constexpr int kApart = kAdditiveThreads / kPieces;
  static_assert(kFeatures % kApart == 0);

  struct alignas(16) Source {
    const float* from;
    int64_t advance;  // to the next chunk; 0 where there are no such rows
  };
  static_assert(sizeof(Source) == sizeof(Vector16));

  Source* source_;

  static __device__ __forceinline__ int at() {
    return threadIdx.x % kPieces * 4;
  }

  static __device__ __forceinline__ int feature() {
    return threadIdx.x / kPieces;
  }
};

// How a tile's chunks can be summed, a warp's lanes of them at a time: a bit a chunk.
template <class Tile>
struct TileFactorings {
  uint32_t by_four, by_two;

  __device__ __forceinline__ TileFactorings(const ScoresFactors& factors, const TilePlace<Tile>& place, int64_t first_chunk) {
    const int64_t chunk = first_chunk + threadIdx.x % kWarp;
    Factoring all = kByFour;
    const auto meet = [&](const RowsFactors& side, int64_t row0, int rows) {
      for (int64_t block = row0 / kFactorRows; block < side.blocks && block * kFactorRows < row0 + rows; ++block) {
        const Factoring its_own = side.factoring[(place.b * side.blocks + block) * factors.chunks + chunk];
        all = its_own > all ? its_own : all;
      }
    };
    if (chunk < factors.chunks) {
      all = factors.of_v[chunk];
      meet(factors.queries, place.query0, Tile::kQueries);
      meet(factors.keys, place.step0, Tile::kSteps);
    }
    by_four = ballot(all == kByFour);
    by_two = ballot(all == kByTwo);
  }
};

// A chunk as it is.
template <class scalar, class Tile>
__device__ __forceinline__ void load_directly(
    const Tile& tile, const Problem& problem, const TilePlace<Tile>& place, const Attendable& attended, int64_t first_feature) {
  for (int i = threadIdx.x; i < kFeatures * (Tile::kQueries + Tile::kSteps); i += kAdditiveThreads) {
    const int a = i % kFeatures, row = i / kFeatures;
    const bool is_query = row < Tile::kQueries;
    const int64_t at = is_query ? place.query0 + row : place.step0 + row - Tile::kQueries;
    const bool takes = first_feature + a < problem.key_size && (is_query ? at < problem.queries : attended(at));
    const View& view = is_query ? problem.query : problem.keys;
    tile.rows[a * Tile::kStride + row] =
        takes ? to_acc(row_of<scalar>(view, place.b, at)[(first_feature + a) * view.element_stride]) : typename Tile::acc(0);
  }
  if (threadIdx.x < kFeatures) {
    const int64_t a = first_feature + threadIdx.x;
    const auto* v = static_cast<const scalar*>(problem.v.data);
    tile.v[threadIdx.x] = a < problem.key_size ? to_acc(v[a * problem.v.element_stride]) : typename Tile::acc(0);
  }
}

// Of a query, the first `there` of consecutive steps' sums; by vectors all of a vector's are there or none.
template <class acc, int columns>
__device__ __forceinline__ void store_scores(acc* to, const acc (&sums)[columns], int64_t there, bool by_vectors) {
  constexpr int lanes = kLanes<acc>;
  if constexpr (columns % lanes == 0) {
    if (by_vectors) {
#pragma unroll
      for (int j = 0; j < columns; j += lanes) {
        acc part[lanes];
#pragma unroll
        for (int n = 0; n < lanes; ++n) {
          part[n] = -2 * sums[j + n];
        }
        if (j < there) {
          store16(to + j, pack<acc>(part));
        }
      }
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < columns; ++j) {
    if (j < there) {
      to[j] = -2 * sums[j];
    }
  }
}

template <class scalar, int rows, int columns>
__global__ void __launch_bounds__(kAdditiveThreads, 4)
    additive_scores_tile(const AdditiveScores call, const ScoresFactors factors, bool out_by_vectors) {
  using acc = accumulated_t<scalar>;
  using Tile = ScoresTile<acc, rows, columns>;
  const Problem& problem = call.problem;
  const TilePlace<Tile> place(problem, blockIdx.x);
  const Attendable attended = Attendable::by_any(problem, place.b);
  if (place.step0 >= attended.end()) {
    return;  // the whole block
  }
  const int row = threadIdx.x / Tile::kAcross * rows, column = threadIdx.x % Tile::kAcross * columns;
  acc sums[rows][columns] = {};
  if constexpr (kFactors<acc>) {
    using Queries = FactorsUnderWay<Tile, Tile::kQueries>;
    char* sources = shared_memory() + 2 * Tile::kBuffer;
    const Queries queries(sources, factors.queries, factors.chunks, place.b, place.query0);
    const FactorsUnderWay<Tile, Tile::kSteps> keys(sources + Queries::kShared, factors.keys, factors.chunks, place.b, place.step0);
    const auto start = [&](const Tile& to, int64_t chunk) {
      queries.start(to.rows);
      keys.start(to.rows + Tile::kQueries);
      if (threadIdx.x < kChunkOfV / 4) {
        copy_async16(to.v + 4 * threadIdx.x, factors.v + chunk * kChunkOfV + 4 * threadIdx.x);
      }
      commit_copies();
    };
    if (factors.chunks > 0) {
      start(Tile(shared_memory(), 0), 0);
    }
    TileFactorings<Tile> factorings(factors, place, 0);
    for (int64_t chunk = 0; chunk < factors.chunks; ++chunk) {
      const int bit = static_cast<int>(chunk % kWarp), buffer = static_cast<int>(chunk % 2);
      if (chunk > 0 && bit == 0) {
        factorings = TileFactorings<Tile>(factors, place, chunk);
      }
      const Tile tile(shared_memory(), buffer);
      wait_copies<0>();
      sync_threads();  // the chunk is there, and the one before has been summed, whose place the next one takes
      if (chunk + 1 < factors.chunks) {
        start(Tile(shared_memory(), 1 - buffer), chunk + 1);
      }
      if (factorings.by_four >> bit & 1) {
        tile.template add_factored<4>(sums, row, column);
      } else if (factorings.by_two >> bit & 1) {
        tile.template add_factored<2>(sums, row, column);
      } else {
        load_directly<scalar>(tile, problem, place, attended, chunk * kFeatures);
        sync_threads();  // the chunk as it is
        tile.add_direct(sums, row, column);
      }
      tile.centre(sums);
    }
  } else {
    const Tile tile(shared_memory(), 0);
    for (int64_t a = 0; a < problem.key_size; a += kFeatures) {
      load_directly<scalar>(tile, problem, place, attended, a);
      sync_threads();  // the chunk is there
      tile.add_direct(sums, row, column);
      sync_threads();  // it has been summed
    }
  }

  // Computed anew: the registers are the sums'.
  const TilePlace<Tile> there(problem, forgotten(blockIdx.x));
  const int64_t query0 = there.query0 + row, step0 = there.step0 + column;
  acc* out = static_cast<acc*>(call.scores) + (there.b * problem.queries + query0) * problem.steps + step0;
#pragma unroll
  for (int i = 0; i < rows; ++i, out += problem.steps) {
    if (query0 + i < problem.queries) {
      store_scores(out, sums[i], problem.steps - step0, out_by_vectors);
    }
  }
}

}  // namespace attn_ext::cuda

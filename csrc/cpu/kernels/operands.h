// What the products of attention take and where their results go.
#pragma once

#include "amx.h"
#include "cache.h"
#include "elements.h"
#include "rows.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// Coefficients as they stand, or transposed: c(i, k) = data[i * row_stride + k * column_stride].
template <class element>
struct Coefficients {
  const element* data;
  int64_t row_stride;
  int64_t column_stride;
};

// Where rows go: to_i = factor_i (plus_i + what is computed), without a plus where it is null, with
// factor_i = factors[i * factor_stride].
template <class acc>
struct Result {
  acc* to;
  int64_t stride;
  const acc* plus;
  int64_t plus_stride;
  const acc* factors;
  int64_t factor_stride;
  bool streams = false;  // past the caches

  static constexpr acc kOne = 1;

  Result(acc* out, int64_t stride, bool add = false) : Result(out, stride, add ? out : nullptr, stride, &kOne, 0) {}

  Result(acc* out, int64_t stride, const acc* plus, int64_t plus_stride, const acc* factors, int64_t factor_stride)
      : to(out), stride(stride), plus(plus), plus_stride(plus_stride), factors(factors), factor_stride(factor_stride) {}

  // What is to be added to, of `height` rows, in its place, times its factor.
  void begin(int64_t height, int64_t width) const {
    for (int64_t i = 0; plus != nullptr && i < height; ++i) {
      const acc factor = factors[i * factor_stride];
      if (plus != to || factor != 1) {
        for_vectors<acc>(width, [&](int64_t j, auto count) {
          const auto row = Vec<acc>::loadu(plus + i * plus_stride + j, count);
          (row * Vec<acc>(factor)).store(to + i * stride + j, static_cast<int>(count));
        });
      }
    }
  }

  // The same past the caches, if rows are whole lines and added to nothing.
  Result streamed() const {
    Result past = *this;
    const bool has_whole_lines = reinterpret_cast<uintptr_t>(to) % kLine == 0 && stride * sizeof(acc) % kLine == 0;
    past.streams = kStreams && plus == nullptr && has_whole_lines;
    return past;
  }

  // From row i and column n on.
  Result at(int64_t i, int64_t n) const {
    const acc* const from = plus == nullptr ? nullptr : plus + i * plus_stride + n;
    Result part{to + i * stride + n, stride, from, plus_stride, factors + i * factor_stride, factor_stride};
    part.streams = streams;
    return part;
  }
};

// Accumulators of a register tile of multiply. AVX-512 and ARM's 64-bit processors have 32 registers: 24 accumulators, 3 or 4
// vectors of b and a coefficient; x86-64's others have 16: 12, 2 and 1. Two multiply-adds a cycle with a latency of four need eight
// at least, ARM's four twice as many. Elsewhere a vector of PyTorch's takes two registers.
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int kAccumulators = 24, kWidest = 4;
#elif defined(CPU_CAPABILITY_AVX2) || defined(ATTN_EXT_SSE2)
constexpr int kAccumulators = 12, kWidest = 2;
#else
constexpr int kAccumulators = 4, kWidest = 2;
#endif

// Whether registers hold what several chains of operations have between them.
constexpr bool kHasManyRegisters = kAccumulators == 24;

// A block of b, transposed or as it is, that is used at once by all rows of a result: up to kPanelDepth rows of kPanelWidth, as
// wide as the register tile. Rows of which it took a part would be apart, and crowd some sets of the first-level cache.
constexpr int64_t kPanelWidth = kWidest * Vec<float>::size();
constexpr int64_t kPanelDepth = 256;

static_assert(kTile <= kPanelDepth && 2 * kChunk <= kPanelDepth, "the products of a tile and of a chunk take their depth at once");

// Rows that are worth transposing a panel for, if they are not few; no shallower product is worth packing one.
constexpr int64_t kPanelRows = 16;

// As many queries' products in bfloat16 are of pairs.
#if defined(__AMX_BF16__)
constexpr int64_t kPairedRows = kPanelRows;
#else
constexpr int64_t kPairedRows = 8;
#endif

// Pairs that the left operand of a product takes, of a tile's or a chunk's rows.
template <class element>
constexpr int64_t kLeftSize = 0;

#if defined(__AVX512BF16__)
template <>
constexpr int64_t kLeftSize<Pair> = kTile * padded<Pair>(kPanelDepth / 2);
#endif
#if defined(__AMX_BF16__)
template <>
constexpr int64_t kLeftSize<float> = AmxBuffer<3>::size(kTile / kAmxRows, kPanelDepth);
#endif

// What an item's products share: scratch, and what comes next.
template <class element>
struct Workspace {
  bool few;                  // queries: nothing is transposed for them, and nothing but pairs is packed
  element* panel;            // kPanelWidth x kPanelDepth; of few queries only pairs have one
  Pair* left;                // coefficients as pairs: of tiles, or where they are pairs anyhow
  int parts;                 // bfloat16 that a float is the sum of in matrix tiles
  bool by_amx;               // all of more than a few queries, matrix tiles
  PrefetchQueue prefetches;  // what the next item or tile begins with

  // For products of up to `queries` queries.
  Workspace(Arena& arena, Dtype product_dtype, int64_t queries, bool worth_amx)
      : few(queries < kPanelRows),
        panel(kIsPaired<element> || !few ? arena.take<element>(kPanelWidth * kPanelDepth) : nullptr),
        left(kIsPaired<element> || worth_amx ? arena.take<Pair>(kLeftSize<element>) : nullptr),
        parts(parts_of(product_dtype)),
        by_amx(!few && worth_amx) {}

  // Whether rows of halves may be right operands as they stand.
  bool takes_halves() const {
    return !by_amx;
  }

  // Forgets what was planned; whether anything is to be, for products with a tile of so many steps. Few queries have time for it
  // only where they wait for what they read, and a register tile of few steps has none.
  bool may_prefetch(bool far, int64_t steps) {
    prefetches.clear();
    return PrefetchQueue::kMostOfStep > 0 && steps >= kPanelRows && (!few || far);
  }
};

// A panel and the addresses of its rows.
template <class element>
struct PanelRows {
  element* data;
  const element* address[kPanelDepth];

  PanelRows(element* panel, int64_t depth) : data(panel) {
    for (int64_t k = 0; k < depth; ++k) {
      address[k] = panel + k * kPanelWidth;
    }
  }
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

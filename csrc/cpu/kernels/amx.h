// The processor's matrix tiles (AMX): 16 rows of 16 pairs of bfloat16 by 16 pairs of 16 columns an instruction, 16 times the
// multiply-adds of AVX-512's in float32. A float is a sum of bfloat16, and a product of two the sum of those of their parts.
#pragma once

#include "cache.h"
#include "elements.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// Rows of a tile, and the numbers of 32 bits in one.
constexpr int64_t kAmxRows = 16;

// `count` filled up to whole tiles.
constexpr int64_t whole_amx_tiles(int64_t count) {
  return round_up(count, kAmxRows);
}

// Whether products of `element` go by them.
template <class element>
#if defined(__AMX_BF16__)
constexpr bool kHasAmx = kIsPaired<element> || std::is_same_v<element, float>;
#else
constexpr bool kHasAmx = false;
#endif

// How many bfloat16 a float is the sum of in products of that dtype: eight bits each. Three are all that it has, two all of a
// float16 and more.
constexpr int parts_of(Dtype product_dtype) {
  return product_dtype == Dtype::Float ? 3 : 2;
}

// Numbers of the index that is summed over whose parts a panel holds: those of 32 columns stay in the first-level cache while rows
// pass by.
template <int parts>
constexpr int64_t kPartsDepth = parts == 2 ? 256 : 128;

// Either operand of a product in tiles: groups of 16 rows of the left one, or columns of the right one. A group has its tiles, of
// 16 pairs along the index that is summed over, and a tile its parts; where it is in place it has one part.
struct AmxOperand {
  const Pair* data;
  int64_t group;  // stride, in pairs
  int64_t tile;
  int64_t line;  // of a part's 16, the parts are one behind the other

  // Rows that stand in a tensor.
  static AmxOperand in_place(const Pair* rows, int64_t stride) {
    return {rows, kAmxRows * stride, kAmxRows, stride};
  }

  bool is_in_place() const {
    return tile == kAmxRows;
  }

  // From row i on; of what is not in place, a multiple of 16.
  AmxOperand from(int64_t i) const {
    return {data + i / kAmxRows * group + i % kAmxRows * line, group, tile, line};
  }
};

// Tiles in scratch, one behind the other, so that their lines share no set of the cache: [groups][tiles][parts][16][16].
template <int parts>
struct AmxBuffer {
  static constexpr int64_t kPart = kAmxRows * kAmxRows;
  static constexpr int64_t kTile = parts * kPart;

  Pair* data = nullptr;
  int64_t group = 0;

  AmxBuffer() = default;

  // With room for so many numbers along the index that is summed over.
  AmxBuffer(void* scratch, int64_t depth) : data(static_cast<Pair*>(scratch)), group(size(1, depth)) {}

  // So many pairs it takes.
  static constexpr int64_t size(int64_t groups, int64_t depth) {
    return groups * ceil_div(depth, 2 * kAmxRows) * kTile;
  }

  // Line r of a group's tile, the first of its parts.
  Pair* line(int64_t g, int64_t tile, int64_t r) const {
    return data + g * group + tile * kTile + r * kAmxRows;
  }

  // From tile k on.
  AmxOperand from(int64_t k) const {
    return {data + k * kTile, group, kTile, kAmxRows};
  }
};

#if defined(__AMX_BF16__)
// What ldtilecfg reads.
struct alignas(64) AmxConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
#endif

// While it lives, this thread's tiles are whole ones, if they are wanted and there are any. Left so, they would slow down others.
class AmxScope {
 public:
  explicit AmxScope(bool wanted) : in_use_(wanted) {
#if defined(__AMX_BF16__)
    static constexpr AmxConfiguration kWhole{};
    if (in_use_) {
      _tile_loadconfig(&kWhole);
    }
#endif
  }

  ~AmxScope() {
#if defined(__AMX_BF16__)
    if (in_use_) {
      _tile_release();
    }
#endif
  }

  AmxScope(const AmxScope&) = delete;
  AmxScope& operator=(const AmxScope&) = delete;

 private:
  bool in_use_;
};

#if defined(__AMX_BF16__)
// sums (+)= a b for `rows` groups of a and `columns` of b, so many tiles of each. Of operands in parts all products of two whose
// places add up to less than `parts`: the others are beyond the last bit. Four products share their operands' loads, each of which
// takes half as long as a product. What is wanted next is prefetched a line every other product: more would fill the buffers that
// the loads need. `every` so many products, evenly, a step packs some of what is multiplied next.
template <int parts, int rows, int columns, class Packer>
inline void multiply_amx_tiles(
    float* sums,
    int64_t stride,
    bool add,
    const AmxOperand& a,
    const AmxOperand& b,
    int64_t tiles,
    PrefetchQueue& prefetches,
    Packer& packer,
    int64_t every) {
  const int64_t a_line = a.line * sizeof(Pair), b_line = kAmxRows * sizeof(Pair), bytes = stride * sizeof(float);
  float* const below = sums + kAmxRows * stride;
  asm volatile("" ::: "memory");  // the compiler does not know that these instructions read
  if (add) {
    _tile_loadd(0, sums, bytes);
    if constexpr (columns == 2) {
      _tile_loadd(1, sums + kAmxRows, bytes);
    }
    if constexpr (rows == 2) {
      _tile_loadd(2, below, bytes);
    }
    if constexpr (rows == 2 && columns == 2) {
      _tile_loadd(3, below + kAmxRows, bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  int64_t wait = every;
  constexpr int asked = rows * parts * (parts + 1) / 2;
  for (int64_t k = 0; k < tiles; ++k) {
    const Pair* const left = a.data + k * a.tile;
    const Pair* const right = b.data + k * b.tile;
    // Those behind the last one do no harm; if there is none, what is here anyhow.
    const PrefetchQueue::Lines* const lines = prefetches.take(asked);
    const char* next = lines != nullptr ? lines->first : reinterpret_cast<const char*>(left);
    const int64_t line_step = lines != nullptr ? kLine : 0;
    const auto step = [&]() __attribute__((always_inline)) {
      if (--wait == 0) {
        wait = every;
        if (packer.steps_left() > 0) {
          packer.step();
        }
      }
    };
    const auto prefetch_one = [&]() __attribute__((always_inline)) {
      prefetch(next);
      next += line_step;
    };
#pragma GCC unroll 3
    for (int q = 0; q < parts; ++q) {
      const Pair* const from = right + q * AmxBuffer<parts>::kPart;
      _tile_loadd(6, from, b_line);
      if constexpr (columns == 2) {
        _tile_loadd(7, from + b.group, b_line);
      }
#pragma GCC unroll 3
      for (int p = 0; p < parts - q; ++p) {
        const Pair* const row = left + p * AmxBuffer<parts>::kPart;
        _tile_loadd(4, row, a_line);
        _tile_dpbf16ps(0, 4, 6);
        prefetch_one();
        step();
        if constexpr (columns == 2) {
          _tile_dpbf16ps(1, 4, 7);
          step();
        }
        if constexpr (rows == 2) {
          _tile_loadd(5, row + a.group, a_line);
          _tile_dpbf16ps(2, 5, 6);
          prefetch_one();
          step();
        }
        if constexpr (rows == 2 && columns == 2) {
          _tile_dpbf16ps(3, 5, 7);
          step();
        }
      }
    }
  }
  _tile_stored(0, sums, bytes);
  if constexpr (columns == 2) {
    _tile_stored(1, sums + kAmxRows, bytes);
  }
  if constexpr (rows == 2) {
    _tile_stored(2, below, bytes);
  }
  if constexpr (rows == 2 && columns == 2) {
    _tile_stored(3, below + kAmxRows, bytes);
  }
}

#endif

}  // namespace attn_ext::cpu::CPU_CAPABILITY

// Prefetching by software, and non-temporal stores.
#pragma once

#include "call.h"
#include "vec.h"

#include <bit>

namespace attn_ext::cpu::CPU_CAPABILITY {

constexpr int64_t kLine = 64;  // bytes

// A line of what comes next, into the second-level cache: the first has its hands full. Calls of what does nothing but prefetch
// would be dropped as without effect, were they not inlined at once.
[[gnu::always_inline]] inline void prefetch(const void* line) {
  __builtin_prefetch(line, 0, 2);
}

// Rows that come next, in the order of their use. Products prefetch their lines one by one, each beside a dozen cycles of
// multiply-adds: what other work has left far away is near when its turn comes. Few queries wait for what they read: theirs are
// spread over all of their products, so that some line is always on its way.
class PrefetchQueue {
 public:
  // A step of AVX-512's register tiles reads four lines, others' one. Without registers to spare none is prefetched beside it:
  // gcc's loops took up to 1.19 times the instructions.
#if defined(CPU_CAPABILITY_AVX512)
  static constexpr int64_t kMostOfStep = 2;
#elif defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__) || defined(ATTN_EXT_SSE2)
  static constexpr int64_t kMostOfStep = 1;
#else
  static constexpr int64_t kMostOfStep = 0;
#endif

  // Lines one behind the other: one at each of so many steps, or two.
  struct Lines {
    const char* first;
    int64_t steps;
    int64_t bytes;  // of a step
  };

  void clear() {
    next_ = count_ = 0;
    bytes_ = 0;
    pace_ = kPace;
  }

  // What was added is to last for so many steps, rather than for as many as it has lines.
  void spread(int64_t steps) {
    const int64_t even = ceil_div(kPace * bytes_ / kLine, std::max<int64_t>(steps, 1));
    pace_ = std::min(std::max<int64_t>(even, 1), kMostOfStep * kPace);
  }

  // `rows` rows of a batch element, from row `first` on, of `size` elements each.
  void add(Dtype dtype, const View& view, int64_t b, int64_t first, int64_t rows, int64_t size) {
    add(dtype, view, b, first, rows, 0, size);
  }

  // The same from an element of each row on.
  void add(Dtype dtype, const View& view, int64_t b, int64_t first, int64_t rows, int64_t element, int64_t size) {
    const int64_t row = size * width_of(dtype);
    if (view.data == nullptr || rows <= 0 || row <= 0 || (view.element_stride != 1 && size > 1) ||
        bytes_ + rows * row > kMostBytes) {
      return;
    }
    bytes_ += rows * row;
    const bool dense = view.row_stride == size;
    blocks_[count_++] = {
        static_cast<const char*>(view.data) +
            (b * view.batch_stride + first * view.row_stride + element * view.element_stride) * width_of(dtype),
        ceil_div(dense ? rows * row : row, kLine),
        0,
        dense ? 1 : rows,
        view.row_stride * width_of(dtype)};
  }

  // The next ones, for at most so many steps, until others are taken; null if there is none.
  const Lines* take(int64_t steps) {
    return kMostOfStep == 0 || next_ == count_ ? nullptr : take_some(steps);
  }

 private:
  [[gnu::noinline]] const Lines* take_some(int64_t steps) {
    Block& block = blocks_[next_];
    const int64_t most = std::min(ceil_div(steps * pace_, kPace), block.lines - block.taken);
    const int64_t two = pace_ > kPace && most > 1;
    taken_ = {block.row + block.taken * kLine, std::min(most >> two, steps), kLine << two};
    block.taken += taken_.steps << two;
    if (block.taken == block.lines) {
      block.row += block.stride;
      block.taken = 0;
      next_ += --block.rows == 0;
    }
    return &taken_;
  }

  static constexpr int64_t kPace = 8;  // of a line a step

  static constexpr int kMostBlocks = 5;  // a backward's: two of queries, their weights, keys and memory

  // More would drive from the second-level cache what is at work. Processors with matrix tiles have 2 MiB of it.
#if defined(__AMX_BF16__)
  static constexpr int64_t kMostBytes = 1 << 20;
#else
  static constexpr int64_t kMostBytes = 3 << 17;
#endif

  struct Block {
    const char* row;
    int64_t lines;  // of a row
    int64_t taken;
    int64_t rows;
    int64_t stride;  // bytes
  };

  Block blocks_[kMostBlocks];
  int next_ = 0;
  int count_ = 0;
  int64_t bytes_ = 0;
  int64_t pace_ = kPace;
  Lines taken_{};
};

// A step's lines; returns the next one's. Where there may be two, a single one is prefetched twice, which is cheaper than a branch.
[[gnu::always_inline]] inline const char* prefetch_lines(const char* line, int64_t bytes) {
  prefetch(line);
  if constexpr (PrefetchQueue::kMostOfStep == 1) {
    return line + kLine;
  }
  line += bytes;
  prefetch(line - kLine);
  return line;
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(ATTN_EXT_SSE2)
constexpr bool kStreams = true;
#else
constexpr bool kStreams = false;
#endif

// A non-temporal store, past every cache, where kStreams; `to` is aligned to a vector.
template <class V>
inline void stream(void* to, const V& x) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_stream_si512(static_cast<__m512i*>(to), std::bit_cast<__m512i>(x));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm256_stream_si256(static_cast<__m256i*>(to), std::bit_cast<__m256i>(x));
#elif defined(ATTN_EXT_SSE2)
  _mm_stream_si128(static_cast<__m128i*>(to), std::bit_cast<__m128i>(x));
#else
  x.store(to);
#endif
}

// Until others may read what was streamed.
inline void finish_streaming() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(ATTN_EXT_SSE2)
  _mm_sfence();
#endif
}

// store_row() past every cache, but for the lines that the row shares with others.
template <class acc>
inline void stream_row(Dtype dtype, void* data, int64_t first, const acc* from, int64_t size) {
  with_type<acc>(dtype, [&](auto example) {
    using scalar = decltype(example);
    constexpr int64_t lanes = Vec<acc>::size(), line = kLine / sizeof(scalar);
    scalar* const to = static_cast<scalar*>(data) + first;
    int64_t i = std::min<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLine / sizeof(scalar), size);
    store_row(dtype, data, first, from, i);
    for (; i + line <= size; i += line) {
      if constexpr (std::is_same_v<scalar, acc>) {
        for (int64_t j = 0; j < line; j += lanes) {
          stream(to + i + j, Vec<acc>::loadu(from + i + j));
        }
      } else {
        for (int64_t j = 0; j < line; j += 2 * lanes) {
          stream(to + i + j, rounded<scalar>(Vec<acc>::loadu(from + i + j), Vec<acc>::loadu(from + i + j + lanes)));
        }
      }
    }
    store_row(dtype, data, first + i, from + i, size - i);
  });
}

// store_row(), past every cache where that is asked for and the row is whole lines: those that two rows share would cost more than
// the others save.
template <class acc>
inline void write_row(bool streams, Dtype dtype, void* data, int64_t first, const acc* from, int64_t size) {
  const auto begin = reinterpret_cast<uintptr_t>(data) + first * width_of(dtype);
  const bool has_whole_lines = begin % kLine == 0 && size * width_of(dtype) % kLine == 0;
  if (streams && has_whole_lines) {
    stream_row(dtype, data, first, from, size);
  } else {
    store_row(dtype, data, first, from, size);
  }
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

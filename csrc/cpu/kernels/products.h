// The two matrix products of attention, over rows given by address so that a mask's gaps and any stride cost nothing.
//
//   dot_products   out[i][j] = factor a_i . b_j           scores, and the gradient of the weights
//   multiply       out_i (+)= sum_k c(i, k) b_k           contexts, and the gradients of rows
//
// multiply broadcasts its coefficients, so that no sum crosses a vector, and nears the multiply-add peak as its products get
// deeper and find their rows of b next to each other: for many rows of the result, blocks of floats are copied so. Dot products of
// many rows go its way too, over b transposed block by block; those of few rows, whose transposition would not pay, sum along
// vectors. Both take numbers, rows of b in halves, or, in half as many elements, pairs of bfloat16 along the index they sum over
// (elements.h): a row of memory is pairs of features as it stands, which is what dot products want; multiply has its rows zipped
// two by two. The processor's matrix tiles, where it has them, take the register tile's place for pairs, and for floats where that
// is worth it (amx_products.h). docs/performance.md says what was measured.
#pragma once

#include "amx_products.h"
#include "operands.h"
#include "processor.h"
#include "transpose.h"
#include "vec.h"

#include <array>
#include <utility>

namespace attn_ext::cpu::CPU_CAPABILITY {

// The height of a register tile, by the vectors of b abreast; more than eight rows gain nothing.
constexpr int tallest(int width) {
  return std::min(kAccumulators / width, 8);
}

// The widest whose last vector may be partial: without masks that one is alone.
constexpr int kWidestPartial = kHasMasks ? kWidest : 1;

// The register tile of sums along vectors: as many accumulators, their vectors of b and one of a.
constexpr int kColumns = kWidest;
constexpr int kRows = tallest(kColumns);

// The depth of a transposed block: at most 32 KiB, so that it stays in the first-level cache.
constexpr int64_t kTransposedDepth = std::min<int64_t>(kPanelDepth, (1 << 15) / (kPanelWidth * sizeof(float)));

// How many rows of b ahead of its reading a panel is prefetched.
constexpr int64_t kPrefetchRows = 16;

// Rows of a result that are worth packing a panel for. Intel's second-level cache is the slower one to read rows from that crowd
// the first.
#if defined(__AMX_BF16__)
constexpr int64_t kPackedRows = 32;
#else
constexpr int64_t kPackedRows = kMany;
#endif

// f(std::integral_constant<int, n>, first) over blocks of at most `block` that cover 0 .. count.
template <int block, class F>
void for_blocks(int64_t count, const F& f) {
  int64_t first = 0;
  for (; first + block <= count; first += block) {
    f(std::integral_constant<int, block>(), first);
  }
  if constexpr (block > 1) {
    if (first < count) {
      for_blocks<block / 2>(count - first, [&](auto size, int64_t offset) { f(size, first + offset); });
    }
  }
}

// The same, but as even as blocks of at most `block` can be: a last one of a single row would wait for its own results.
template <int block, class F>
void for_even_blocks(int64_t count, const F& f) {
  const int64_t blocks = ceil_div(count, block);
  const int64_t least = blocks > 0 ? quotient(count, blocks) : 0, larger = count - blocks * least;
  for (int64_t i = 0, first = 0; i < blocks; ++i) {
    const int64_t rows = least + (i < larger);
    [&]<int... n>(std::integer_sequence<int, n...>) {
      (void)((rows == n + 1 && (f(std::integral_constant<int, n + 1>(), first), true)) || ...);
    }(std::make_integer_sequence<int, block>());
    first += rows;
  }
}

// What coefficients of rows of b are: floats for halves, else b's own elements.
template <class element>
using Coefficient = std::conditional_t<kIsHalf<element>, float, element>;

// out_i = sum_k c(i, k) b_k of `size` elements, and what the result makes of it.
template <class element, class acc>
struct Product {
  Result<acc> out;
  Coefficients<Coefficient<element>> c;
  const element* const* b;
  int64_t depth;
  int64_t size;
  PrefetchQueue* prefetches = nullptr;
  const PanelRows<element>* panel = nullptr;  // the first rows pass by b itself, the others by what those leave there

  const PrefetchQueue::Lines* lines() const {
    return prefetches == nullptr ? nullptr : prefetches->take(depth);
  }
};

#if defined(CPU_CAPABILITY_AVX512)
#define ATTN_EXT_REGISTER_TILE [[gnu::noinline]]
#define ATTN_EXT_RELOAD(address) asm("" : "+r"(address))
#else
#define ATTN_EXT_REGISTER_TILE [[gnu::always_inline]] inline
#define ATTN_EXT_RELOAD(address)
#endif

// A product's register tile: `rows` from i0 on by `width` vectors from n on, over all k. Of a partial one's last vector not all
// elements exist. The result's lines, each of another page, come while the sums are taken: what was there is added last. They need
// not come if they are written past the caches. A tile that `packs` leaves a panel of what it reads of b for those that follow, and
// prefetches it: the others' rows of b are near. Those prefetch what is wanted next.
//
// A tile is to begin while the one before it is still being added up. With AVX-512 it is a function of its own, of few arguments,
// and what the end needs is loaded again there (ATTN_EXT_RELOAD hides an address from the compiler). Otherwise gcc keeps those
// addresses in vector registers, or loads as a vector what was just stored as scalars, and both wait for the sums.
template <int rows, int width, bool partial, bool packs, class element, class acc>
ATTN_EXT_REGISTER_TILE void multiply_tile(
    const Product<element, acc>& product, int64_t i0, int64_t n, [[maybe_unused]] const PrefetchQueue::Lines* lines) {
  static_assert(!partial || width <= kWidestPartial);
  constexpr bool tall = 2 * rows > tallest(width);
  using F = ElementTraits<element>;
  using C = ElementTraits<Coefficient<element>>;
  constexpr int lanes = Vec<acc>::size();
  const auto is_partial = [](int w) { return partial && w == width - 1; };
  const int64_t depth = product.depth, count = product.size - n - (width - 1) * lanes;  // of the last vector
  Vec<acc> sums[rows][width];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int w = 0; w < width; ++w) {
      sums[i][w] = Vec<acc>(0);
    }
  }
  if (!kStreams || !product.out.streams) {
    const acc* row = product.out.to + i0 * product.out.stride + n;
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i, row += product.out.stride) {
      ATTN_EXT_RELOAD(row);
#pragma GCC unroll 8
      for (int w = 0; w < width; ++w) {
        __builtin_prefetch(row + w * lanes, 1);
      }
    }
  }
  const element* const* const b = packs || product.panel == nullptr ? product.b : product.panel->address;
  [[maybe_unused]] element* const panel = packs ? product.panel->data : nullptr;
  const auto c = product.c;
  const auto* const coefficients = c.data + i0 * c.row_stride;
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    const element* from = b[k] + n;
    if constexpr (tall) {
      asm("" : "+r"(from));  // one register for all vectors: the compiler would keep the place of each
    }
    [[maybe_unused]] const element* later = packs ? b[std::min(k + kPrefetchRows, depth - 1)] + n : nullptr;
    typename F::Vector right[width];
#pragma GCC unroll 8
    for (int w = 0; w < width; ++w) {
      right[w] = is_partial(w) ? F::load(from + w * lanes, count) : F::load(from + w * lanes);
      if constexpr (packs) {
        __builtin_prefetch(later + w * lanes);
        right[w].store(panel + k * kPanelWidth + n + w * lanes);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const auto coefficient = C::broadcast(coefficients[i * c.row_stride + k * c.column_stride]);
#pragma GCC unroll 8
      for (int w = 0; w < width; ++w) {
        sums[i][w] = C::multiply_add(coefficient, right[w], sums[i][w]);
      }
    }
  };
  int64_t k = 0;
  if (!packs && lines != nullptr) [[unlikely]] {
    const auto [first, steps, bytes] = *lines;
    for (const char* line = first; k < steps; ++k) {
      line = prefetch_lines(line, bytes);
      step(k);
    }
  }
  for (; k < depth; ++k) {
    step(k);
  }
  const Product<element, acc>* again = &product;
  ATTN_EXT_RELOAD(again);
  const Result<acc>& out = again->out;
  acc* to = out.to + i0 * out.stride + n;
  const acc* factors = out.factors + i0 * out.factor_stride;
  if constexpr (kStreams && !partial) {
    if (out.streams) {
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i, to += out.stride, factors += out.factor_stride) {
        ATTN_EXT_RELOAD(to);
        ATTN_EXT_RELOAD(factors);
        const Vec<acc> factor(*factors);
#pragma GCC unroll 8
        for (int w = 0; w < width; ++w) {
          stream(to + w * lanes, sums[i][w] * factor);
        }
      }
      return;
    }
  }
  if (out.plus == nullptr) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i, to += out.stride, factors += out.factor_stride) {
      ATTN_EXT_RELOAD(to);
      ATTN_EXT_RELOAD(factors);
      const Vec<acc> factor(*factors);
#pragma GCC unroll 8
      for (int w = 0; w < width; ++w) {
        (sums[i][w] * factor).store(to + w * lanes, is_partial(w) ? static_cast<int>(count) : lanes);
      }
    }
    return;
  }
  const acc* plus = out.plus + i0 * out.plus_stride + n;
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i, to += out.stride, plus += out.plus_stride, factors += out.factor_stride) {
    ATTN_EXT_RELOAD(to);
    ATTN_EXT_RELOAD(plus);
    ATTN_EXT_RELOAD(factors);
    const Vec<acc> factor(*factors);
#pragma GCC unroll 8
    for (int w = 0; w < width; ++w) {
      const auto there = is_partial(w) ? Vec<acc>::loadu(plus + w * lanes, count) : Vec<acc>::loadu(plus + w * lanes);
      ((sums[i][w] + there) * factor).store(to + w * lanes, is_partial(w) ? static_cast<int>(count) : lanes);
    }
  }
}

// Rows first .. end of a product with b as it stands: a block of b, all k by a few vectors, stays in the first-level cache, a deep
// one in the second, while the rows pass.
template <class element, class acc>
void multiply_rows(const Product<element, acc>& product, int64_t first, int64_t end) {
  constexpr int lanes = Vec<acc>::size();
  const int64_t size = product.size;
  int64_t n = 0;
  const auto columns = [&](auto width, auto partial) {
    for_even_blocks<tallest(width.value)>(end - first, [&](auto rows, int64_t i) {
      if constexpr (std::is_same_v<element, acc>) {
        if (product.panel != nullptr && first + i == 0) {
          return multiply_tile<rows.value, width.value, partial.value, true>(product, 0, n, nullptr);
        }
      }
      multiply_tile<rows.value, width.value, partial.value, false>(product, first + i, n, product.lines());
    });
    n += width.value * lanes;
  };
  // One row gets its accumulators from vectors abreast alone.
  for (; end - first == 1 && n + 8 * lanes <= size; n += 8 * lanes) {
    multiply_tile<1, 8, false, false>(product, first, n, product.lines());
  }
  const auto abreast = [&](auto width) {
    if constexpr (width.value <= kWidestPartial) {
      if (n + width.value * lanes > size) {
        return columns(width, std::true_type());
      }
    }
    columns(width, std::false_type());
  };
  while (n < size) {
    // The last ones as 3 and 2 rather than 4 and 1.
    const int64_t rest = size - n, vectors = kWidestPartial > 1 || rest < lanes ? ceil_div(rest, lanes) : rest / lanes;
    if (kWidest == 4 && vectors >= 4 && vectors != 5) {
      abreast(std::integral_constant<int, kWidest>());
    } else if (kWidest == 4 && vectors >= 3) {
      abreast(std::integral_constant<int, kWidest - 1>());
    } else if (vectors >= 2) {
      abreast(std::integral_constant<int, 2>());
    } else {
      abreast(std::integral_constant<int, 1>());
    }
  }
}

// All `height` of them. A few rows of b stay in the first-level cache whole: then the result is written row by row. Narrow ones are
// anyhow.
template <class element, class acc>
void multiply_blocks(const Product<element, acc>& product, int64_t height) {
  constexpr int64_t few = 8, block = tallest(kWidest);
  const bool by_rows = product.depth <= few && height > block && product.size > kWidest * Vec<acc>::size();
  const int64_t rows = by_rows ? block : height;
  for (int64_t i = 0; i < height; i += rows) {
    multiply_rows(product, i, std::min(i + rows, height));
  }
}

// For `height` rows of the result, sum_k c(i, k) b_k of `size` numbers. With a workspace many rows have b packed.
template <class acc>
void multiply(
    Result<acc> out,
    int64_t height,
    Coefficients<acc> c,
    const acc* const* b,
    int64_t depth,
    int64_t size,
    Workspace<acc>* work = nullptr) {
  if constexpr (kHasAmx<acc>) {
    if (work != nullptr && work->by_amx) {
      return multiply_by_amx(out, height, c, b, depth, size, *work);
    }
  }
  PrefetchQueue* const prefetches = work == nullptr ? nullptr : &work->prefetches;
  // Rows a multiple of 1 KiB apart, as a tensor's often are, share a few sets of the caches, and each has a page of its own.
  if (work == nullptr || work->panel == nullptr || height < kPackedRows || depth < kPanelRows || size <= kPanelWidth) {
    return multiply_blocks<acc, acc>({out, c, b, depth, size, prefetches}, height);
  }
  const PanelRows<acc> rows(work->panel, depth);
  const acc* from[kPanelDepth];
  for (int64_t n = 0; n < size; n += kPanelWidth) {
    const int64_t width = std::min(kPanelWidth, size - n);
    for (int64_t k = 0; k < depth; ++k) {
      from[k] = b[k] + n;
    }
    multiply_blocks<acc, acc>({out.at(0, n), c, from, depth, width, prefetches, &rows}, height);
  }
}

// The same of halves, converted each time they are read: a panel of floats took longer.
template <class half, class acc>
  requires kIsHalf<half>
void multiply(
    Result<acc> out, int64_t height, Coefficients<acc> c, const half* const* b, int64_t depth, int64_t size, Workspace<acc>* work) {
  multiply_blocks<half, acc>({out, c, b, depth, size, &work->prefetches}, height);
}

// f of the rows' addresses, of their type.
template <class F>
void with_addresses(const StoredRows& rows, const F& f) {
  const auto of = [&](auto example) { f(reinterpret_cast<const decltype(example)* const*>(rows.addresses)); };
  if constexpr (kConvertsInRegisters) {
    with_type<float>(rows.dtype, of);
  } else {
    of(float());
  }
}

inline void multiply(
    Result<float> out,
    int64_t height,
    Coefficients<float> c,
    const StoredRows& b,
    int64_t depth,
    int64_t size,
    Workspace<float>* work) {
  with_addresses(b, [&](auto* const* rows) { multiply(out, height, c, rows, depth, size, work); });
}

#if defined(__AVX512BF16__)
// The coefficients, rounded, and the rows of b as pairs along k.
template <class acc>
void multiply(
    Result<acc> out,
    int64_t height,
    Coefficients<acc> c,
    const Pair* const* b,
    int64_t depth,
    int64_t size,
    Workspace<Pair>* work) {
#if defined(__AMX_BF16__)
  multiply_by_amx(out, height, c, b, depth, size, *work);
#else
  const int64_t pairs = ElementTraits<Pair>::elements(depth);
  Pair* const panel = work->panel;
  Pair* const coefficients = work->left;
  const int64_t stride = padded<Pair>(c.column_stride == 1 ? pairs : height);
  if (c.column_stride == 1) {
    for (int64_t i = 0; i < height; ++i) {
      pair_row(coefficients + i * stride, c.data + i * c.row_stride, depth);
    }
  } else {
    for (int64_t k = 0; k < depth; k += 2) {
      const acc* column = c.data + k * c.column_stride;
      pair_rows(coefficients + k / 2 * stride, column, k + 1 < depth ? column + c.column_stride : nullptr, height);
    }
  }
  const Coefficients<Pair> paired{coefficients, c.column_stride == 1 ? stride : 1, c.column_stride == 1 ? 1 : stride};
  const PanelRows<Pair> rows(panel, pairs);
  for (int64_t n = 0; n < size; n += kPanelWidth) {
    const int64_t width = std::min(kPanelWidth, size - n);
    for (int64_t k = 0; k < depth; k += 2) {
      zip_rows(panel + k / 2 * kPanelWidth, b[k], k + 1 < depth ? b[k + 1] : nullptr, n, width);
    }
    multiply_blocks<Pair, acc>({out.at(0, n), paired, rows.address, pairs, width, &work->prefetches}, height);
  }
#endif
}
#endif

// out[i][j] = factor * (the sum of sums[i][j]); out's rows are `stride` apart.
template <int rows, int columns, class acc>
inline void store_sums(acc* out, int64_t stride, const Vec<acc> (&sums)[rows][columns], acc factor) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<acc, float> && columns == 4) {
    int i = 0;
#pragma GCC unroll 2
    for (; i + 4 <= rows; i += 4) {
      store_sixteen_sums(out + i * stride, stride, sums + i, factor);
    }
#pragma GCC unroll 4
    for (; i < rows; ++i) {
      store_four_sums(out + i * stride, sums[i], factor);
    }
    return;
  }
#endif
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    if constexpr (columns == 4) {
      acc four[4];
      sum_four<acc>(four, sums[i]);
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) {
        out[i * stride + j] = factor * four[j];
      }
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) {
        out[i * stride + j] = factor * sum(sums[i][j]);
      }
    }
  }
}

// The addresses of a register tile's rows, in registers where there are as many: ARM's processors have 31.
template <int rows, class element>
inline auto addresses(const element* const* from) {
#if defined(__aarch64__)
  std::array<const element*, rows> kept;
  std::copy_n(from, rows, kept.begin());
  return kept;
#else
  return from;
#endif
}

// out[i][j] = factor * sum_d a[i][d] b[j][d], summed along vectors: for a few rows.
template <class left_element, class right_element, class acc>
void sum_products(
    acc* out,
    int64_t stride,
    const left_element* const* a,
    int64_t a_count,
    const right_element* const* b,
    int64_t b_count,
    int64_t size,
    acc factor,
    PrefetchQueue* prefetches = nullptr) {
  using F = ElementTraits<left_element>;
  for_even_blocks<kRows>(a_count, [&](auto rows, int64_t i0) {
    for_blocks<kColumns>(b_count, [&](auto columns, int64_t j0) {
      const auto of_a = addresses<rows.value>(a + i0);
      const auto of_b = addresses<columns.value>(b + j0);
      Vec<acc> sums[rows.value][columns.value];
      for (int i = 0; i < rows.value; ++i) {
        for (int j = 0; j < columns.value; ++j) {
          sums[i][j] = Vec<acc>(0);
        }
      }
      const auto step = [&](int64_t d, auto count) {
        typename F::Vector right[columns.value];
#pragma GCC unroll 8
        for (int j = 0; j < columns.value; ++j) {
          right[j] = ElementTraits<right_element>::load(of_b[j] + d, count);
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows.value; ++i) {
          const auto left = F::load(of_a[i] + d, count);
#pragma GCC unroll 8
          for (int j = 0; j < columns.value; ++j) {
            sums[i][j] = F::multiply_add(left, right[j], sums[i][j]);
          }
        }
      };
      constexpr std::integral_constant<int64_t, Vec<acc>::size()> full;
      int64_t d = 0;
      if (const PrefetchQueue::Lines* lines = prefetches == nullptr ? nullptr : prefetches->take(size / full); lines != nullptr) {
        const auto [first, steps, bytes] = *lines;
        for (const char* line = first; d < steps * full; d += full) {
          line = prefetch_lines(line, bytes);
          step(d, full);
        }
      }
      for (; d + full <= size; d += full) {
        step(d, full);
      }
      if (d < size) {
        step(d, size - d);
      }
      store_sums<rows.value, columns.value>(out + i0 * stride + j0, stride, sums, factor);
    });
  });
}

// Whether dot products are summed along vectors rather than taken over b transposed: where the transposition is not worth it for so
// many rows of a. Beside wide datapaths it weighs twice as much, and a lone vector of columns keeps the ports for loads more than
// those for products.
template <class element>
bool are_summed(int64_t a_count, int64_t b_count, int64_t size) {
  if constexpr (!std::is_same_v<element, float>) {
    return false;
  } else {
    constexpr int64_t lanes = Vec<float>::size();
    const bool is_lone_vector = b_count <= lanes + lanes / 2 && size >= 4 * lanes;
    return are_few(a_count, size) || (is_zen_5() && (a_count <= size / 4 - 8 || is_lone_vector));
  }
}

// out[i][j] = factor a_i . b_j of rows of `size` elements; out's rows are `stride` apart.
template <class element, class right_element, class acc>
void dot_products(
    acc* out,
    int64_t stride,
    const element* const* a,
    int64_t a_count,
    const right_element* const* b,
    int64_t b_count,
    int64_t size,
    acc factor,
    Workspace<element>& work) {
  if constexpr (kHasAmx<element> && !kIsHalf<right_element>) {
    if (work.by_amx && a_count >= kPanelRows && size > 0) {
      return dot_products_by_amx(out, stride, a, a_count, b, b_count, size, factor, work);
    }
  }
  int64_t j0 = 0;
  if constexpr (kTransposes<element>) {
    if (a_count >= kPanelRows && size > 0 && !are_summed<element>(a_count, b_count, size)) {
      // What is left of whole vectors is cheaper by sums, unless it is most of one.
      constexpr int64_t lanes = Vec<acc>::size();
      const int64_t rest = b_count % lanes;
      const int64_t paneled = rest > lanes / 2 ? b_count : b_count - rest;
      const PanelRows<element> columns(work.panel, std::min(kTransposedDepth, size));
      for (; j0 < paneled; j0 += kPanelWidth) {
        const int64_t width = std::min(kPanelWidth, paneled - j0);
        for (int64_t d = 0; d < size; d += kTransposedDepth) {
          const int64_t depth = std::min(kTransposedDepth, size - d);
          // a's rows are evenly spaced: they are queries or their gradients.
          const Coefficients<element> rows{a[0] + d, a_count > 1 ? a[1] - a[0] : 0, 1};
          const Result<acc> block{
              out + j0, stride, d > 0 ? out + j0 : nullptr, stride, d + depth == size ? &factor : &Result<acc>::kOne, 0};
          transpose(work.panel, kPanelWidth, b + j0, width, d, depth);
          multiply_blocks<element, acc>(
              {block, rows, columns.address, depth, whole_vectors<acc>(width), &work.prefetches}, a_count);
        }
      }
      j0 = std::min(j0, paneled);
    }
  }
  if (j0 < b_count) {
    sum_products(out + j0, stride, a, a_count, b + j0, b_count - j0, size, factor, &work.prefetches);
  }
}

inline void dot_products(
    float* out,
    int64_t stride,
    const float* const* a,
    int64_t a_count,
    const StoredRows& b,
    int64_t b_count,
    int64_t size,
    float factor,
    Workspace<float>& work) {
  with_addresses(b, [&](auto* const* rows) { dot_products(out, stride, a, a_count, rows, b_count, size, factor, work); });
}

// row += factor * other
template <class acc>
void add_row(acc* row, acc factor, const acc* other, int64_t size) {
  multiply<acc>({row, 0, true}, 1, {&factor, 0, 0}, &other, 1, size);
}

// A row of a gradient, the sum of its shares in their order: each is `distance` bytes behind the one before.
template <class acc>
void merge_row(Dtype dtype, void* out, int64_t index, acc* row, int64_t shares, size_t distance, int64_t size) {
  const char* other = reinterpret_cast<const char*>(row);
  for (int64_t k = 1; k < shares; ++k) {
    other += distance;
    add_row(row, acc(1), reinterpret_cast<const acc*>(other), size);
  }
  store_row(dtype, out, index * size, row, size);
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

// What is asked for ahead, and what goes past the caches.
#pragma once

#include "vec.h"

#include <bit>

namespace attn_ext::cpu::CPU_CAPABILITY {

// A line of what comes next, into the second-level cache: the first has its hands full. Calls of what does nothing but fetch would
// be dropped as without effect, were they not inlined at once.
[[gnu::always_inline]] inline void fetch(const void* line) {
  __builtin_prefetch(line, 0, 2);
}

// Past every cache; `to` is aligned to a vector.
template <class V>
inline void stream(void* to, const V& x) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_stream_si512(static_cast<__m512i*>(to), std::bit_cast<__m512i>(x));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm256_stream_si256(static_cast<__m256i*>(to), std::bit_cast<__m256i>(x));
#else
  x.store(to);
#endif
}

// Until others may read what was streamed.
inline void finish_streaming() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// A row past every cache, but for the lines that it shares with other rows; as much is fetched from `next` on.
template <class acc>
inline void stream_row(acc* to, const acc* from, int64_t size, const char* next) {
  constexpr int64_t lanes = Vec<acc>::size(), line = 64 / sizeof(acc);
  int64_t i = std::min<int64_t>(-reinterpret_cast<uintptr_t>(to) % 64 / sizeof(acc), size);
  fetch(next);
  std::copy_n(from, i, to);
  for (; i + line <= size; i += line) {
    fetch(next + i * sizeof(acc));
    for (int64_t j = 0; j < line; j += lanes) {
      stream(to + i + j, Vec<acc>::loadu(from + i + j));
    }
  }
  std::copy_n(from + i, size - i, to + i);
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

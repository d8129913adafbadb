// What this machine can do at most, as loops without an op around them. Free of torch headers; plain C for ctypes, which knows the
// signatures from limits.py. Compiled for one instruction set, the one that the fused kernels run with.
//
// Every function takes `threads` and shares its work among that many threads of OpenMP, PyTorch's own pool: a second pool would
// spin beside it. What is measured, and how fast the variants came out on a Skylake-SP core at 2.4 GHz:
//   multiply-add        2 an instruction cycle, all of them
//   additive forward    10.0 G elements/s of 11.0 that the two ports allow (7 operations a vector: vrcp14ps takes 3); in 256-bit
//                       vectors 8.2, with an integer's estimate and two Newton steps 8.7, with a division 4.3
//   additive backward   6.7 of 7.7 (10 operations a vector); 4.9, 5.9 and 4.2
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// a * b + c on these is one instruction where the machine has one (-ffp-contract=fast).
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

inline Vec load(const float* p) {
  return *reinterpret_cast<const Vec*>(p);
}

inline void store(float* p, Vec x) {
  *reinterpret_cast<Vec*>(p) = x;
}

inline Vec all(float x) {
  return x - Vec{};
}

// Past every cache: a plain store would read the line first.
inline void stream(float* p, Vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)x);
#else
  store(p, x);
#endif
}

inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec estimate = (Vec)_mm512_rcp14_ps((__m512)x);
  return estimate * (2.f - x * estimate);
#elif defined(__AVX2__)
  const Vec estimate = (Vec)_mm256_rcp_ps((__m256)x);
  return estimate * (2.f - x * estimate);
#else
  return 1.f / x;
#endif
}

// Keeps `x` from being optimised away, or from being known.
inline void opaque(Vec& x) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(x));
#else
  asm volatile("" : "+w"(x));
#endif
}

// Registers for a tile: 32 with AVX-512 and on aarch64, else 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 4, kColumns = 4, kGradRows = 8;
#else
constexpr int kRows = 2, kColumns = 4, kGradRows = 4;
#endif

constexpr int kQueries = 16, kSteps = 16, kFeatures = 256;  // forward: 34 KB of q and k, of which a tile reads 9
constexpr int kGradQueries = 32, kGradSteps = 32;           // backward, a vector of features at a time: 12 KB

constexpr int kStride = kFeatures + 16;  // rows an odd number of cache lines apart share no cache set

struct alignas(64) Forward {
  float q[kQueries][kStride], k[kSteps][kStride], v[kFeatures];
  float sums[kQueries][kSteps][kLanes];
};

struct alignas(64) Backward {
  float q[kGradQueries][kLanes], k[kGradSteps][kLanes], de[kGradSteps][kGradQueries];
  float dq[kGradQueries][kLanes], dk[kGradSteps][kLanes], dv[kLanes];
};

template <class T>
void fill(T& all_of_it, float value) {
  float* p = reinterpret_cast<float*>(&all_of_it);
  for (size_t i = 0; i < sizeof(T) / sizeof(float); ++i) {
    p[i] = value;
  }
}

// sums[t][s] += v / (1 + q k), a tile of sums in registers while the features go by.
void additive_forward(Forward& f) {
  for (int t0 = 0; t0 < kQueries; t0 += kRows) {
    for (int s0 = 0; s0 < kSteps; s0 += kColumns) {
      Vec sums[kRows][kColumns] = {};
      for (int a = 0; a < kFeatures; a += kLanes) {
        const Vec v = load(f.v + a);
        Vec k[kColumns];
#pragma GCC unroll 8
        for (int j = 0; j < kColumns; ++j) {
          k[j] = load(f.k[s0 + j] + a);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Vec q = load(f.q[t0 + i] + a);
#pragma GCC unroll 8
          for (int j = 0; j < kColumns; ++j) {
            sums[i][j] += v * reciprocal(q * k[j] + 1.f);
          }
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kColumns; ++j) {
          store(f.sums[t0 + i][s0 + j], sums[i][j]);
        }
      }
    }
  }
}

// y = r - r r;  dq_t += de y, dk_s += de y, dv += de r: dq and dv in registers while the steps go by.
void additive_backward(Backward& b) {
  Vec dv[2] = {load(b.dv), Vec{}};  // two: one would be a chain of additions as long as the loop
  for (int t0 = 0; t0 < kGradQueries; t0 += kGradRows) {
    Vec q[kGradRows], dq[kGradRows];
#pragma GCC unroll 8
    for (int i = 0; i < kGradRows; ++i) {
      q[i] = load(b.q[t0 + i]);
      dq[i] = load(b.dq[t0 + i]);
    }
    for (int s = 0; s < kGradSteps; ++s) {
      const Vec k = load(b.k[s]);
      Vec dk[2] = {load(b.dk[s]), Vec{}};
#pragma GCC unroll 8
      for (int i = 0; i < kGradRows; ++i) {
        const Vec de = all(b.de[s][t0 + i]);
        const Vec r = reciprocal(q[i] * k + 1.f);
        const Vec y = r - r * r;
        dq[i] += de * y;
        dk[i % 2] += de * y;
        dv[i % 2] += de * r;
      }
      store(b.dk[s], dk[0] + dk[1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kGradRows; ++i) {
      store(b.dq[t0 + i], dq[i]);
    }
  }
  store(b.dv, dv[0] + dv[1]);
}

// Where a loop's data may lie: on some processors which of it the first-level cache keeps depends on the addresses, which differ
// from one run of the program to the next.
constexpr int kPlaces = 4;

constexpr int64_t kPage = 4096 / sizeof(float);

// The sum of `streams` pages at a time, asking for the pages `ahead` of them: the prefetcher in hardware stops at a page's end.
template <int streams>
Vec sum_of(const float* x, int64_t count, int64_t ahead) {
  Vec sums[8] = {};
  for (int64_t first = 0; first + streams * kPage <= count; first += streams * kPage) {
    for (int64_t i = 0; i < kPage; i += 2 * kLanes) {
#pragma GCC unroll 4
      for (int page = 0; page < streams; ++page) {
        const float* p = x + first + page * kPage + i;
        if (ahead > 0) {
          __builtin_prefetch(p + ahead);
        }
        sums[2 * page] += load(p);
        sums[2 * page + 1] += load(p + kLanes);
      }
    }
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace

extern "C" {

int limits_lanes() {
  return kLanes;
}

// `rounds` multiply-adds on each of 12 independent vectors, which hide a latency of 6 at two an instruction cycle. Nothing is
// loaded.
void limits_multiply_add(int64_t rounds, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Vec x[12], half = all(0.5f), one = all(1);
    opaque(half);
    opaque(one);
    for (Vec& each : x) {
      each = one;
      opaque(each);
    }
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
      for (int j = 0; j < 12; ++j) {
        x[j] = x[j] * half + one;
      }
    }
    for (Vec& each : x) {
      opaque(each);
    }
  }
}

int64_t limits_additive_forward_elements() {
  return int64_t(kQueries) * kSteps * kFeatures;
}

int limits_places() {
  return kPlaces;
}

void limits_additive_forward(int64_t rounds, int place, int threads) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local Forward places[kPlaces];
    Forward& f = places[place];
    fill(f, 0.5f);
    for (int64_t i = 0; i < rounds; ++i) {
      additive_forward(f);
      asm volatile("" : : "r"(&f) : "memory");
    }
  }
}

int64_t limits_additive_backward_elements() {
  return int64_t(kGradQueries) * kGradSteps * kLanes;
}

void limits_additive_backward(int64_t rounds, int place, int threads) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local Backward places[kPlaces];
    Backward& b = places[place];
    fill(b, 0.5f);
    for (int64_t i = 0; i < rounds; ++i) {
      additive_backward(b);
      asm volatile("" : : "r"(&b) : "memory");
    }
  }
}

// Reads `count` floats, up to a few pages, `repeats` times.
void limits_read(const float* x, int64_t count, int64_t repeats, int streams, int64_t ahead, int threads) {
  const int64_t share = count / threads / (4 * kPage) * (4 * kPage);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    const float* mine = x + thread * share;
    for (int64_t i = 0; i < repeats; ++i) {
      asm volatile("" : "+r"(mine) : : "memory");  // each time from memory, for all that the compiler knows
      Vec sum = streams == 4   ? sum_of<4>(mine, share, ahead)
                : streams == 2 ? sum_of<2>(mine, share, ahead)
                               : sum_of<1>(mine, share, ahead);
      opaque(sum);
    }
  }
}

// Reads and writes `count` floats, up to a few pages, `repeats` times; `to` is aligned to 64 bytes.
void limits_copy(float* to, const float* from, int64_t count, int64_t repeats, int streaming, int64_t ahead, int threads) {
  const int64_t share = count / threads / (4 * kPage) * (4 * kPage);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    const float* source = from + thread * share;
    float* destination = to + thread * share;
    for (int64_t repeat = 0; repeat < repeats; ++repeat) {
      for (int64_t i = 0; i < share; i += 16) {
        if (ahead > 0) {
          __builtin_prefetch(source + i + ahead);
        }
#pragma GCC unroll 4
        for (int64_t j = i; j < i + 16; j += kLanes) {
          const Vec x = load(source + j);
          if (streaming) {
            stream(destination + j, x);
          } else {
            store(destination + j, x);
          }
        }
      }
    }
#if defined(__x86_64__)
    _mm_sfence();
#endif
  }
}
}

// What the programs that check the CPU kernels have in common: random problems, one after the other.
#pragma once

#include "../../csrc/cpu/kernels/call.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <random>
#include <vector>

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace attn_ext::cpu {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  int64_t upto(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(engine_);
  }

  bool chance(double probability) {
    return std::uniform_real_distribution<>()(engine_) < probability;
  }

  // Numbers of a normal distribution.
  auto normals(double size) {
    return [this, size] { return size * std::normal_distribution<>()(engine_); };
  }

  template <class T>
  T of(std::initializer_list<T> choices) {
    return choices.begin()[upto(0, static_cast<int64_t>(choices.size()) - 1)];
  }

 private:
  std::mt19937_64 engine_;
};

// Some of `count` rows, in ranges.
inline std::vector<RowRange> random_ranges(Random& random, int64_t count) {
  const double density = random.of({0.0, 0.3, 0.9, 1.0, 1.0, 1.0});
  std::vector<RowRange> ranges;
  for (int64_t row = 0; row < count; ++row) {
    if (random.chance(density)) {
      if (!ranges.empty() && ranges.back().end == row) {
        ranges.back().end = row + 1;
      } else {
        ranges.push_back({row, row + 1});
      }
    }
  }
  return ranges;
}

inline bool is_in(const std::vector<RowRange>& ranges, int64_t row) {
  return std::any_of(ranges.begin(), ranges.end(), [&](const RowRange& range) { return range.first <= row && row < range.end; });
}

// The program's main function, called with SEED COUNT: check(seed) of so many seeds, which prints what failed and how.
inline int check_problems(int count, char** arguments, bool (*check)(uint64_t)) {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s SEED COUNT\n", arguments[0]);
    return 2;
  }
#if defined(__AMX_BF16__)
  // Matrix tiles are the system's to allow: ARCH_REQ_XCOMP_PERM of their data.
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) {
    std::fprintf(stderr, "the system does not allow matrix tiles\n");
    return 2;
  }
#endif
  const long first = std::atol(arguments[1]), problems = std::atol(arguments[2]);
  int failed = 0;
  for (long seed = first; seed < first + problems; ++seed) {
    if (!check(seed)) {
      std::printf("that was seed %ld\n", seed);
      ++failed;
    }
  }
  std::printf("%ld problems, %d failed\n", problems, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace attn_ext::cpu

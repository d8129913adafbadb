// Centring alone, as check.cpp checks attention: random sizes, layouts, ranges and numbers that are none, against plain loops in
// double. Built by tests/test_kernels.py with sanitizers, and for other processors under an emulator.
//
//   check_centring SEED COUNT    prints what failed and how; exit status 1 if anything did
#include "op.h"
#include "problems.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

namespace attn_ext::cpu {

namespace CPU_CAPABILITY {
void centre_item(const Centring&, int64_t item, char* slot);
}

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();

bool check(uint64_t seed) {
  Random random(seed);
  const Dtype dtype = random.of({Dtype::BFloat16, Dtype::Half});
  const int64_t B = random.upto(1, 4), S = random.upto(1, 40);
  const int64_t D = random.of({random.upto(1, 40), random.upto(1, 300), 64 * random.upto(1, 10)});
  const auto padding = [&] { return random.of<int64_t>({0, 0, random.upto(1, 20)}); };
  Array memory(dtype, B, S, D, padding()), centred(dtype, B, S, D, padding());
  const std::vector<RowRange> ranges = random_ranges(random, B * S);
  const auto is_attended = [&](int64_t b, int64_t s) { return is_in(ranges, b * S + s); };
  for (int64_t i = 0; i < D; ++i) {
    const double common = random.of({0.0, 1.0, 30.0}) * random.normals(1)();
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t s = 0; s < S; ++s) {
        const double odd = random.of({kInfinity, -kInfinity, kNaN});
        const bool is_odd = !is_attended(b, s) || random.chance(0.002);
        memory.set(b, s, i, is_odd ? odd : common + random.normals(1)());
      }
    }
  }

  Centring call{};
  call.dtype = dtype;
  call.steps = S;
  call.size = D;
  call.memory = memory.view();
  call.attended = {ranges.data(), static_cast<int64_t>(ranges.size())};
  call.centred = centred.data();
  call.centred_batch = centred.view().batch_stride;
  call.centred_row = centred.view().row_stride;
  const Scratch slot(kCentringSlot);
  for (int64_t item = B * call.blocks(); item-- > 0;) {
    CPU_CAPABILITY::centre_item(call, item, slot.bytes);
  }

  const double unit = dtype == Dtype::BFloat16 ? 0x1p-8 : 0x1p-11;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = 0; i < D; ++i) {
      double sum = 0, magnitude = 0, count = 0;
      for (int64_t s = 0; s < S; ++s) {
        if (is_attended(b, s)) {
          sum += memory.at(b, s, i);
          magnitude += std::abs(memory.at(b, s, i));
          ++count;
        }
      }
      const double average = 2 * std::abs(sum) >= magnitude && magnitude < kInfinity && count > 0 ? sum / count : 0;
      for (int64_t s = 0; s < S; ++s) {
        const double x = memory.at(b, s, i), expected = is_attended(b, s) ? x - average : 0, actual = centred.at(b, s, i);
        const bool is_same = std::isnan(expected) ? std::isnan(actual)
                             : std::isinf(expected)
                                 ? actual == expected
                                 : std::abs(actual - expected) <= unit * (std::abs(average) + std::abs(expected));
        if (!is_same) {
          std::printf(
              "[%lld, %lld, %lld]: element (%lld, %lld, %lld), %.9g, became %.9g, not %.9g\n",
              (long long)B,
              (long long)S,
              (long long)D,
              (long long)b,
              (long long)s,
              (long long)i,
              x,
              actual,
              expected);
          return false;
        }
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace attn_ext::cpu

int main(int count, char** arguments) {
  return attn_ext::cpu::check_problems(count, arguments, attn_ext::cpu::check);
}

// A memory of halves less its average over the source steps.
#include "vec.h"

#include <limits>

namespace attn_ext::cpu::CPU_CAPABILITY {
namespace {

// f(row, is_attended) for the rows of one batch element.
template <class F>
void for_rows(const Centring& call, int64_t b, const F& f) {
  const int64_t first = b * call.steps;
  const RowRange* const end = call.attended.data + call.attended.count;
  const RowRange* range = std::partition_point(call.attended.data, end, [&](const RowRange& r) { return r.end <= first; });
  for (int64_t s = 0; s < call.steps; ++s) {
    range += range != end && range->end <= first + s;
    f(s, range != end && range->first <= first + s);
  }
}

// average[i] = the average of `count` numbers, rounded as they are, so that what is near it differs by a half exactly; 0 where
// they have little in common, or are not all finite.
template <class half>
void make_average(float* average, const float* sums, const float* magnitudes, int64_t count, int64_t size) {
  constexpr int64_t lanes = Vec<float>::size();
  const Vec<float> zero(0), infinity(std::numeric_limits<float>::infinity()), share(1.f / static_cast<float>(count));
  for (int64_t i = 0; i < size; i += 2 * lanes) {
    Vec<float> x[2];
    for (int64_t j = 0; j < 2; ++j) {
      const auto sum = Vec<float>::loadu(sums + i + j * lanes), magnitude = Vec<float>::loadu(magnitudes + i + j * lanes);
      const Vec<float> has_much = (sum.abs() + sum.abs() >= magnitude) & (magnitude < infinity);
      x[j] = Vec<float>::blendv(zero, sum * share, has_much);
    }
    half as_rounded[2 * lanes];
    rounded<half>(x[0], x[1]).store(as_rounded);
    load_row(average + i, as_rounded, 1, 2 * lanes);
  }
}

template <class half>
void centre(const Centring& call, int64_t b, int64_t first, int64_t size, float* average, float* sums, float* magnitudes) {
  constexpr int64_t lanes = Vec<float>::size();
  const auto* const from = static_cast<const half*>(call.memory.data) + b * call.memory.batch_stride + first;
  auto* const to = static_cast<half*>(call.centred) + b * call.centred_batch + first;
  int64_t count = 0;
  std::fill_n(sums, round_up(size, 2 * lanes), 0.f);
  std::fill_n(magnitudes, round_up(size, 2 * lanes), 0.f);
  for_rows(call, b, [&](int64_t s, bool is_attended) {
    if (!is_attended) {
      return;
    }
    ++count;
    for_twos<float>(size, [&](int64_t i, auto some) {
      Vec<float> x[2];
      load_two(x, from + s * call.memory.row_stride + i, some);
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t at = i + j * lanes;
        (Vec<float>::loadu(sums + at) + x[j]).store(sums + at);
        (Vec<float>::loadu(magnitudes + at) + x[j].abs()).store(magnitudes + at);
      }
    });
  });
  make_average<half>(average, sums, magnitudes, std::max<int64_t>(count, 1), size);
  for_rows(call, b, [&](int64_t s, bool is_attended) {
    if (!is_attended) {
      zero_row(call.dtype, to, s * call.centred_row, size);
      return;
    }
    for_twos<float>(size, [&](int64_t i, auto some) {
      Vec<float> x[2];
      load_two(x, from + s * call.memory.row_stride + i, some);
      const Vec<float> low = x[0] - Vec<float>::loadu(average + i), high = x[1] - Vec<float>::loadu(average + i + lanes);
      rounded<half>(low, high).store(to + s * call.centred_row + i, static_cast<int>(some));
    });
  });
}

}  // namespace

void centre_item(const Centring& call, int64_t item, char* slot) {
  const int64_t b = item / call.blocks(), first = item % call.blocks() * kCentredFeatures;
  const int64_t size = std::min(kCentredFeatures, call.size - first);
  auto* const rows = reinterpret_cast<float*>(slot);
  with_type<float>(call.dtype, [&](auto example) {
    if constexpr (!std::is_same_v<decltype(example), float>) {
      centre<decltype(example)>(call, b, first, size, rows, rows + kCentredFeatures, rows + 2 * kCentredFeatures);
    }
  });
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

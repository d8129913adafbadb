// The time that splits take, estimated. What it is made of was fitted to calls of 39 shapes, forward and backward, each in up to 33
// ways, on an H200 (docs/performance_gpu.md); what is chosen takes 1.3 % more than the soonest of them in the mean, 12 % at most.
#include "splits.h"

#include <algorithm>
#include <limits>

namespace attn_ext::cuda {
namespace {

// Times are in bytes that a multiprocessor reads or writes meanwhile.
struct Times {
  int64_t byte;     // of a row, in quarters: to the block alone, whose warps wait for their rows, round after round
  int64_t merge;    // another launch, and
  int64_t split;    // a split that the merge's threads go through, one after the other, and
  int64_t partial;  // a byte of the splits' results
};
constexpr Times kForward{6, 40 << 10, 1536, 12};
constexpr Times kBackward{7, 48 << 10, 256, 8};  // whose merge shares the splits among threads
constexpr int64_t kStep = 640;      // a step to the block, beyond its bytes; half of a short row's, for they come together
constexpr int64_t kByElements = 3;  // so many times the block's time, of rows that do not lie on 16 bytes
constexpr int64_t kWave = 1 << 20;  // blocks for which there is no room at first

// The warps' time and the memory's: of so much of the shorter nothing is hidden, for the rows are asked for all at once, of the
// rest all but an eighth.
constexpr int64_t together(int64_t by_warps, int64_t by_memory) {
  constexpr int64_t at_once = 64 << 10;
  const int64_t shorter = std::min(by_warps, by_memory), rest = std::max<int64_t>(shorter - at_once, 0);
  return std::max(by_warps, by_memory) + shorter - rest + rest / 8;
}

// Steps of a split are a multiple of it where they are more: short of that a block's warps do not all have the same to do.
constexpr int64_t kSplitSteps = 8;

// Bytes of the rows that a block of the usual width has at hand: wider ones are of no use for fewer.
constexpr int64_t kRound = 8 << 10;

// How fast a block of so many times the usual warps is by itself: 2 is the usual.
constexpr int64_t speed_of(int64_t width) {
  return width == 1 ? 2 : width == 2 ? 3 : 4;
}

}  // namespace

Splits split_steps(const Problem& problem, int64_t processors, int64_t blocks, int64_t partial_size, bool backward) {
  const bool is_dot = problem.method != Method::Additive;
  const Times& times = backward ? kBackward : kForward;
  const int64_t memory = problem.memory_size * width_of(problem.dtype),
                keys = is_dot ? 0 : problem.key_size * width_of(problem.dtype);
  const int64_t row = std::max<int64_t>(memory + keys, 1), moved = backward ? 2 * row : row;
  const int64_t step = (moved * times.byte / 4 + std::min(kStep, moved / 2)) * ((memory | keys) % 16 == 0 ? 1 : kByElements);
  // Additive gradients leave v's too.
  const int64_t partial = partial_size * (problem.dtype == Dtype::Double ? 8 : 4) * (backward && !is_dot ? 2 : 1);
  const int64_t most_steps = is_dot ? problem.steps : kMostSplitSteps;
  int64_t least = std::numeric_limits<int64_t>::max();
  Splits soonest{};
  const auto consider = [&](int64_t wanted, int64_t width) {
    int64_t steps = ceil_div(problem.steps, std::max<int64_t>(wanted, 1));
    steps = steps < kSplitSteps ? steps : round_up(steps, kSplitSteps);
    steps = std::clamp<int64_t>(steps, 1, most_steps);
    const int64_t count = std::max<int64_t>(ceil_div(problem.steps, steps), 1), all = problem.batch * count;
    const int64_t waves = ceil_div(all, processors * (blocks / width));
    const int64_t by_warps = waves * steps * step * speed_of(1) / speed_of(width);
    const int64_t by_memory = ceil_div(all, processors) * steps * moved;
    const int64_t merge = count == 1 ? 0 : times.merge + count * times.split + all * partial / processors * times.partial;
    const int64_t time = together(by_warps, by_memory) + (waves - 1) * kWave + merge;
    if (time < least) {
      least = time;
      soonest.steps = steps;
      soonest.count = count;
      soonest.width = width;
    }
  };
  consider(1, 1);
  if (is_dot && problem.batch <= processors) {
    const int64_t rounds = ceil_div(problem.steps * row, kRound);
    const int64_t widest = std::min({blocks, rounds, int64_t{backward && rounds > 6 ? 4 : 2}});
    for (int64_t width = 2; width <= widest; width *= 2) {
      consider(1, width);
    }
  }
  // A quarter, a half and all of the multiprocessors, and then each of them with another block.
  for (int64_t quarters = 1; quarters <= 4 * blocks; quarters += quarters < 4 ? quarters : 4) {
    consider(quarters * processors / 4 / problem.batch, 1);
  }
  return soonest;
}

}  // namespace attn_ext::cuda

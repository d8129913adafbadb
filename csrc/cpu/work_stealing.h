// A call's items among its workers. Free of torch headers.
//
// Each worker begins with a range of its own, the same in every call of that size: from one step of a decoder to the next, its
// part of the memory may still be in its cache. Who has done all of it takes over from the ends of the others': the lengths of the
// sources differ, often in order, and a core may be slow, or late to wake. An item's results are the same whoever runs it.
#pragma once

#include "../problem.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

namespace attn_ext::cpu {

class WorkStealing {
 public:
  // Bytes of storage.
  static size_t size_of(int64_t workers) {
    return static_cast<size_t>(workers) * sizeof(Range);
  }

  // Items are taken `grain` at a time, or more, if their number asks for it. `storage` is aligned to cache lines.
  WorkStealing(void* storage, int64_t items, int64_t grain, int64_t workers)
      : ranges_(static_cast<Range*>(storage)), items_(items), grain_(std::max(grain, items >> 31)), workers_(workers) {
    const int64_t units = ceil_div(items, grain_);
    for (int64_t w = 0; w < workers; ++w) {
      new (&ranges_[w]) Range{both(units * w / workers, units * (w + 1) / workers)};
    }
  }

  // Calls run(item) for each item that falls to `worker`, of whom each calls this once.
  template <class RunItem>
  void work(int64_t worker, const RunItem& run) {
    for (int64_t i = 0; i < workers_; ++i) {
      const bool is_own = i == 0;
      Range& range = ranges_[(worker + i) % workers_];
      for (int64_t unit; (unit = take(range, is_own)) >= 0;) {
        const int64_t end = std::min((unit + 1) * grain_, items_);
        for (int64_t item = unit * grain_; item < end; ++item) {
          run(item);
        }
      }
    }
  }

 private:
  // Grains that nobody has begun, counted in 32 bits, in a cache line of their own.
  struct alignas(64) Range {
    std::atomic<uint64_t> rest;  // the first, and the one behind the last
  };

  static uint64_t both(uint64_t first, uint64_t end) {
    return first | end << 32;
  }

  // The first unit or the last; -1 if there is none. What the items read and write is ordered by the region that they run in.
  static int64_t take(Range& range, bool from_front) {
    uint64_t rest = range.rest.load(std::memory_order_relaxed);
    while (true) {
      const uint64_t first = rest & 0xffffffff, end = rest >> 32;
      if (first == end) {
        return -1;
      }
      const uint64_t left = from_front ? both(first + 1, end) : both(first, end - 1);
      if (range.rest.compare_exchange_weak(rest, left, std::memory_order_relaxed)) {
        return static_cast<int64_t>(from_front ? first : end - 1);
      }
    }
  }

  Range* ranges_;
  int64_t items_;
  int64_t grain_;
  int64_t workers_;
};

}  // namespace attn_ext::cpu

// A call's items on PyTorch's threads, each in a slot of scratch.
#pragma once

#include "plan.h"
#include "work_stealing.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>

namespace attn_ext::cpu {

// Items of less than kGrain are taken several at a time, an eighth of it.
constexpr int64_t kPartsOfGrain = 8;

struct Work {
  int64_t items;
  int64_t multiply_adds;  // of all of them
};

// run(item, slot) for every item, then `then(slots)`. A slot is a worker's, or an item's own if it is to be kept for `then`.
template <class RunItem, class Then>
void run_items(const Work& work, size_t slot_size, bool keeps_slots, const RunItem& run, const Then& then) {
  const auto [items, multiply_adds] = work;
  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(multiply_adds / items, 1), 1);
  const int64_t workers = at::in_parallel_region() ? 1 : std::min<int64_t>(ceil_div(items, grain), at::get_num_threads());
  const size_t slots_size = (keeps_slots ? items : workers) * slot_size;
  const size_t size = slots_size + WorkStealing::size_of(workers);
  // A small call's scratch is on the stack, so that it does not wait for the allocator.
  alignas(64) char small[1 << 14];
  const at::DataPtr large = size > sizeof(small) ? c10::GetCPUAllocator()->allocate(size) : at::DataPtr();
  char* slots = large ? static_cast<char*>(large.get()) : small;
  WorkStealing shares(slots + slots_size, items, ceil_div(grain, kPartsOfGrain), workers);
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      shares.work(worker, [&](int64_t item) { run(item, slots + (keeps_slots ? item : worker) * slot_size); });
    }
  });
  then(slots);
}

}  // namespace attn_ext::cpu

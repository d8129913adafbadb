// Kernels that are right, and wrong in one way when they are told so: what the shim has to find, and what it has to let pass.
//   planted list                  names the kernels
//   planted KERNEL right|wrong    prints what is wrong, or "right", for each of some orders of blocks and threads
//   planted behind PTX            the same of a launch behind another, of kernels compiled to that PTX
//   planted room KB               blocks of 32 KB and a little for which a multiprocessor of so much shared memory has room
//   planted order SEED            prints the order in which threads came by
//   planted exchange              prints what each thread got from the others
//   planted approximations        writes floats with exp2_approx and reciprocal_approx of them
//   planted conversions           writes every Half, every BFloat16, and some floats rounded to both
#include "device.cuh"
#include "launch.h"

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace attn_ext::cuda {

constexpr int kThreads = 64;

__device__ __forceinline__ int* shared_ints() {
  return reinterpret_cast<int*>(shared_memory());
}

// out[i] = i + 1, by the right neighbour's hand.
__global__ void barrier_before_read(int* out, bool wrong) {
  const int i = threadIdx.x;
  shared_ints()[i] = i;
  if (!wrong) {
    sync_threads();
  }
  out[i] = shared_ints()[(i + 1) % kThreads];
}

__global__ void barrier_before_write(int* out, bool wrong) {
  const int i = threadIdx.x;
  shared_ints()[i] = i;
  sync_threads();
  out[i] = shared_ints()[(i + 1) % kThreads];
  if (!wrong) {
    sync_threads();
  }
  shared_ints()[i] = 0;
}

__global__ void one_writer(int* out, bool wrong) {
  if (threadIdx.x == 0 || (wrong && threadIdx.x == 40)) {
    shared_ints()[0] = 7;
  }
  sync_threads();
  out[threadIdx.x] = shared_ints()[0];
}

__global__ void warp_barrier(int* out, bool wrong) {
  const int i = threadIdx.x;
  shared_ints()[i] = i;
  if (!wrong) {
    sync_warp();
  }
  out[i] = shared_ints()[i ^ 1];
}

__global__ void warp_barrier_is_not_the_blocks(int* out, bool wrong) {
  const int i = threadIdx.x;
  shared_ints()[i] = i;
  if (wrong) {
    sync_warp();
  } else {
    sync_threads();
  }
  out[i] = shared_ints()[i ^ 32];
}

__global__ void shuffle_orders_nothing(int* out, bool wrong) {
  const int i = threadIdx.x;
  shared_ints()[i] = i;
  const int sum = warp_sum(i);
  if (!wrong) {
    sync_warp();
  }
  out[i] = shared_ints()[i ^ 1] + sum;
}

__global__ void whole_warp_shuffles(int* out, bool wrong) {
  const int i = threadIdx.x;
  out[i] = wrong && i % 2 != 0 ? i : shuffle_xor(i, 2);
}

__global__ void one_shuffle_for_all(int* out, bool wrong) {
  const int i = threadIdx.x;
  if (wrong && i % 2 != 0) {
    out[i] = shuffle(i, 3);
  } else {
    out[i] = shuffle(i, 2);
  }
}

__global__ void shuffle_among_lanes(int* out, bool wrong) {
  const int i = threadIdx.x;
  out[i] = shuffle(i, wrong ? kWarp : i % kWarp);
}

__global__ void whole_warps(int* out, bool) {
  out[threadIdx.x] = warp_max(static_cast<int>(threadIdx.x));
}

__global__ void no_more_shared_memory_than_there_is(int* out, bool) {
  out[threadIdx.x] = 0;
}

__global__ void no_more_threads_than_there_are(int* out, bool) {
  out[threadIdx.x] = 0;
}

__global__ void every_thread_at_the_barrier(int* out, bool wrong) {
  if (!wrong || threadIdx.x != 5) {
    sync_threads();
  }
  out[threadIdx.x] = 0;
}

__global__ void one_barrier_for_all(int* out, bool wrong) {
  if (wrong && threadIdx.x == 5) {
    out[0] = any_in_block(true);
  } else {
    sync_threads();
  }
}

__global__ void nobody_leaves_before_the_barrier(int* out, bool wrong) {
  if (wrong && threadIdx.x >= 50) {
    return;
  }
  sync_threads();
  out[threadIdx.x] = 0;
}

__global__ void inside_shared_memory(int* out, bool wrong) {
  const int i = threadIdx.x;
  shared_ints()[i + (wrong ? 1 : 0)] = i;
  out[i] = i;
}

__global__ void not_before_shared_memory(int* out, bool wrong) {
  const int i = threadIdx.x;
  shared_ints()[i] = i;
  out[i] = shared_ints()[wrong ? -1 - i : i];
}

__global__ void inside_an_allocation(int* out, bool wrong) {
  out[threadIdx.x + (wrong ? 1 : 0)] = 1;
}

__global__ void written_before_read(int* out, bool wrong) {
  const int i = threadIdx.x;
  if (!wrong || i != 9) {
    shared_ints()[i] = i;
  }
  sync_threads();
  out[i] = shared_ints()[i];
}

// Each block's shared memory is its own: what an earlier one left is not to be relied on.
__global__ void written_by_this_block(int* out, bool wrong) {
  if (!wrong || blockIdx.x == 0) {
    shared_ints()[threadIdx.x] = 3;
  }
  out[blockIdx.x * kThreads + threadIdx.x] = shared_ints()[threadIdx.x];
}

__device__ __forceinline__ void copy_mine(const int* from) {
  copy_async16(shared_memory() + 16 * threadIdx.x, from + 4 * threadIdx.x);
}

__global__ void copy_is_waited_for(int* out, const int* in, bool wrong) {
  copy_mine(in);
  commit_copies();
  if (!wrong) {
    wait_copies<0>();
  }
  out[threadIdx.x] = shared_ints()[4 * threadIdx.x];
}

__global__ void copy_is_committed(int* out, const int* in, bool wrong) {
  copy_mine(in);
  if (!wrong) {
    commit_copies();
  }
  wait_copies<0>();
  out[threadIdx.x] = shared_ints()[4 * threadIdx.x];
}

// The older of two groups is there when one may be pending.
__global__ void copies_in_flight(int* out, const int* in, bool wrong) {
  copy_mine(in);
  commit_copies();
  copy_async16(shared_memory() + 16 * (kThreads + threadIdx.x), in, false);
  commit_copies();
  wait_copies<1>();
  out[threadIdx.x] = shared_ints()[4 * threadIdx.x];
  if (!wrong) {
    wait_copies<0>();
  }
  out[threadIdx.x] += shared_ints()[4 * (kThreads + threadIdx.x)];
}

__global__ void no_copy_outlives_the_kernel(int*, const int* in, bool wrong) {
  copy_mine(in);
  commit_copies();
  if (!wrong) {
    wait_copies<0>();
  }
}

__global__ void barrier_after_copies(int* out, const int* in, bool wrong) {
  copy_mine(in);
  commit_copies();
  wait_copies<0>();
  if (!wrong) {
    sync_threads();
  }
  out[threadIdx.x] = shared_ints()[(4 * threadIdx.x + 4) % (4 * kThreads)];
}

__global__ void barrier_before_copies(int* out, const int* in, bool wrong) {
  const int i = threadIdx.x;
  Vector16 x{};
  store16(shared_memory() + 16 * i, x);
  sync_threads();
  out[i] = shared_ints()[(4 * i + 4) % (4 * kThreads)];
  if (!wrong) {
    sync_threads();
  }
  copy_mine(in);
  commit_copies();
  wait_copies<0>();
}

__global__ void aligned_vectors(int* out, const int* in, bool wrong) {
  store16(out + 4 * threadIdx.x, load16(in + 4 * threadIdx.x + (wrong ? 1 : 0)));
}

__global__ void aligned_elements(int* out, const int* in, bool wrong) {
  out[threadIdx.x] = *reinterpret_cast<const int*>(reinterpret_cast<const char*>(in + threadIdx.x) + (wrong ? 2 : 0));
}

__global__ void streaming_is_for_global_memory(int* out, const int* in, bool wrong) {
  store16(shared_memory() + 16 * threadIdx.x, Vector16{});
  const void* from = wrong ? static_cast<const void*>(shared_memory() + 16 * threadIdx.x) : in + 4 * threadIdx.x;
  store16_streaming(out + 4 * threadIdx.x, load16_streaming(from));
}

__global__ void no_null_pointer(int* out, const int* in, bool wrong) {
  out[threadIdx.x] = (wrong ? nullptr : in)[threadIdx.x];
}

// Two blocks.
__global__ void blocks_write_apart(int* out, bool wrong) {
  out[threadIdx.x + (wrong ? 0 : blockIdx.x * kThreads)] = 1;
}

__global__ void threads_write_apart(int* out, bool wrong) {
  out[threadIdx.x / (wrong ? 2 : 1)] = 1;
}

// Behind another launch.
__global__ void last_launch_is_waited_for(int* out, bool wrong) {
  if (!wrong || threadIdx.x != 7) {
    wait_for_last_launch();
  }
  out[threadIdx.x] += 1;
}

// What threads get from each other: a row of results each.
__global__ void exchange(int* out, bool) {
  const int i = threadIdx.x;
  const int results[] = {
      shuffle_xor(i, 5),
      shuffle(i, 7),
      warp_sum(i),
      warp_max(-i),
      static_cast<int>(warp_sum(0.5) + warp_sum(0.25f)),
      any_in_block(i == 40),
      any_in_block(i == kThreads),
  };
  for (int j = 0; j < 7; ++j) {
    out[7 * i + j] = results[j];
  }
}

// Unseen by the shim: on a GPU it would be a race.
[[gnu::no_sanitize_thread, gnu::noinline]] int next_number(int* counter) {
  return (*counter)++;
}

__global__ void draw(int* out, int* counter) {
  out[blockIdx.x * kThreads + threadIdx.x] = next_number(counter);
}

}  // namespace attn_ext::cuda

namespace {

using namespace attn_ext::cuda;

// Memory at its exact size, so that one element past it is nobody's.
struct Buffer {
  explicit Buffer(int size, int value = 0) : values(new int[size]) {
    for (int i = 0; i < size; ++i) {
      values[i] = value;
    }
  }
  ~Buffer() {
    delete[] values;
  }
  int* values;
};

using Case = std::function<void(bool wrong)>;

Case plain(void (*kernel)(int*, bool), int blocks = 1, int shared_ints = kThreads) {
  return [=](bool wrong) {
    Buffer out(blocks * kThreads);
    launch(kernel, blocks, kThreads, shared_ints * sizeof(int), nullptr, out.values, wrong);
  };
}

Case reading(void (*kernel)(int*, const int*, bool), int shared_vectors = kThreads) {
  return [=](bool wrong) {
    Buffer out(4 * kThreads);
    const Buffer in(4 * kThreads + 4, 1);
    launch(kernel, 1, kThreads, shared_vectors * 16, nullptr, out.values, in.values, wrong);
  };
}

void behind(bool wrong) {
  Buffer out(kThreads);
  launch(whole_warps, 1, kThreads, 0, nullptr, out.values, false);
  launch_behind<last_launch_is_waited_for>(1, kThreads, 0, nullptr, out.values, wrong);
}

#define ATTN_EXT_CASE(kind, kernel, ...) {#kernel, kind(kernel __VA_OPT__(, ) __VA_ARGS__)}

const std::map<std::string, Case> kCases{
    ATTN_EXT_CASE(plain, barrier_before_read),
    ATTN_EXT_CASE(plain, barrier_before_write),
    ATTN_EXT_CASE(plain, one_writer),
    ATTN_EXT_CASE(plain, warp_barrier),
    ATTN_EXT_CASE(plain, warp_barrier_is_not_the_blocks),
    ATTN_EXT_CASE(plain, shuffle_orders_nothing),
    ATTN_EXT_CASE(plain, whole_warp_shuffles),
    ATTN_EXT_CASE(plain, one_shuffle_for_all),
    ATTN_EXT_CASE(plain, shuffle_among_lanes),
    ATTN_EXT_CASE(plain, every_thread_at_the_barrier),
    ATTN_EXT_CASE(plain, one_barrier_for_all),
    ATTN_EXT_CASE(plain, nobody_leaves_before_the_barrier),
    ATTN_EXT_CASE(plain, inside_shared_memory),
    ATTN_EXT_CASE(plain, not_before_shared_memory),
    ATTN_EXT_CASE(plain, inside_an_allocation),
    ATTN_EXT_CASE(plain, written_before_read),
    ATTN_EXT_CASE(plain, written_by_this_block, 2),
    ATTN_EXT_CASE(plain, blocks_write_apart, 2),
    ATTN_EXT_CASE(plain, threads_write_apart),
    ATTN_EXT_CASE(reading, copy_is_waited_for),
    ATTN_EXT_CASE(reading, copy_is_committed),
    ATTN_EXT_CASE(reading, copies_in_flight, 2 * kThreads),
    ATTN_EXT_CASE(reading, no_copy_outlives_the_kernel),
    ATTN_EXT_CASE(reading, barrier_after_copies),
    ATTN_EXT_CASE(reading, barrier_before_copies),
    ATTN_EXT_CASE(reading, aligned_vectors),
    ATTN_EXT_CASE(reading, aligned_elements),
    ATTN_EXT_CASE(reading, streaming_is_for_global_memory),
    ATTN_EXT_CASE(reading, no_null_pointer),
    {"last_launch_is_waited_for", behind},
    {"whole_warps",
     [](bool wrong) {
       Buffer out(kThreads);
       launch(whole_warps, 1, wrong ? 48 : kThreads, 0, nullptr, out.values, wrong);
     }},
    {"no_more_shared_memory_than_there_is",
     [](bool wrong) {
       Buffer out(kThreads);
       launch(no_more_shared_memory_than_there_is, 1, kThreads, 227 * 1024 + (wrong ? 16 : 0), nullptr, out.values, wrong);
     }},
    {"no_more_threads_than_there_are",
     [](bool wrong) {
       Buffer out(2048);
       launch(no_more_threads_than_there_are, 1, wrong ? 1056 : 1024, 0, nullptr, out.values, wrong);
     }},
};

#undef ATTN_EXT_CASE

void run(const Case& one, bool wrong) {
  for (int seed = 1; seed <= 5; ++seed) {
    attn_ext::shim::seed(seed);
    try {
      one(wrong);
      std::puts("right");
    } catch (const std::exception& error) {
      std::puts(error.what());
    }
  }
}

void print_order(uint64_t seed) {
  attn_ext::shim::seed(seed);
  const Buffer out(3 * kThreads);
  const Buffer counter(1);
  launch(draw, 3, kThreads, 0, nullptr, out.values, counter.values);
  for (int i = 0; i < 3 * kThreads; ++i) {
    std::printf("%d ", out.values[i]);
  }
}

void print_exchange() {
  const Buffer out(7 * kThreads);
  launch(exchange, 1, kThreads, 0, nullptr, out.values, false);
  for (int i = 0; i < 7 * kThreads; ++i) {
    std::printf("%d ", out.values[i]);
  }
}

template <class T>
void write(T x) {
  std::fwrite(&x, sizeof(x), 1, stdout);
}

void write_approximations() {
  for (uint32_t i = 0; i < 1 << 18; ++i) {
    const auto x = std::bit_cast<float>(i * 16381u);
    write(x);
    write(exp2_approx(x));
    write(reciprocal_approx(x));
  }
}

void write_conversions() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    write(to_acc(Half{static_cast<uint16_t>(bits)}));
  }
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    write(to_acc(BFloat16{static_cast<uint16_t>(bits)}));
  }
  for (uint32_t i = 0; i < 1 << 20; ++i) {
    const auto x = std::bit_cast<float>(i * 4093u);
    write(x);
    write(from_acc<Half>(x));
    write(from_acc<BFloat16>(x));
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  if (what == "list") {
    for (const auto& [name, one] : kCases) {
      std::puts(name.c_str());
    }
  } else if (what == "conversions") {
    write_conversions();
  } else if (what == "approximations") {
    write_approximations();
  } else if (what == "exchange") {
    print_exchange();
  } else if (what == "behind") {
    attn_ext::shim::compiled_to(std::atoi(arguments[2]));
    run(behind, false);
  } else if (what == "room") {
    attn_ext::shim::shared_memory_of_multiprocessor(std::atoi(arguments[2]) * 1024);
    std::printf("%d", static_cast<int>(blocks_by_shared_memory(32 * 1024 + 32)));
  } else if (what == "order") {
    print_order(std::atoi(arguments[2]));
  } else {
    run(kCases.at(what), std::strcmp(arguments[2], "wrong") == 0);
  }
}

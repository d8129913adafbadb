// Runs the kernels' own source on the CPU: what csrc/cuda takes from <cuda_runtime.h>, and the host's versions of what
// csrc/cuda/device.cuh takes from the machine.
//
// A block's threads are fibers, run one at a time in random order from barrier to barrier; so are a launch's blocks, one after the
// other. A launch throws std::runtime_error that names the kernel where
//   - not every thread of the block comes to the same barrier, or not every lane of the warp to the same shuffle,
//   - shared memory is read that this block has not written, or touched outside the size that was asked for,
//   - two threads touch the same memory, one of them writing, and no barrier stands between them,
//   - a copy_async16 is touched before its wait_copies,
//   - global memory is touched by a thread that may run beside the last launch and has not waited for it,
//   - an address is not aligned as the GPU needs it, null, or (where ASan's runtime is loaded) nobody's.
// Accesses through plain pointers are seen when the kernels are compiled with -fsanitize=thread: shim.cpp answers to its hooks, in
// the place of ThreadSanitizer's runtime, which must not be linked. Without that flag, NaNs in shared memory have to speak.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x;
  unsigned y;
  unsigned z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerMultiprocessor, cudaDevAttrMaxSharedMemoryPerBlockOptin };

struct cudaFuncAttributes {
  int binaryVersion;
  int ptxVersion;
};

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int programmaticStreamSerializationAllowed;
  } val;
};

// A launch is over before the next one begins; one that its attribute allows to begin earlier has to wait as if it did.
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaFuncGetName(const char** name, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);

namespace attn_ext::shim {

// Where threads wait for each other: the whole block, or the warp.
enum class Meeting { Barrier, AnyInBlock, SyncWarp, ShuffleXor, Shuffle };

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, void (*thread)(const void*), const void* arguments);
uint64_t meet(Meeting meeting, uint64_t mine, int argument, const std::source_location& where);
void wait_copies(int pending);
void wait_for_last_launch();

template <class T>
T shuffle(Meeting meeting, T mine, int argument, const std::source_location& where) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4 && sizeof(T) <= 8, "the GPU shuffles words of 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &mine, sizeof(T));
  bits = meet(meeting, bits, argument, where);
  std::memcpy(&mine, &bits, sizeof(T));
  return mine;
}

// The order of blocks and threads; the same seed is the same order.
void seed(uint64_t value);

// Kernels are as if compiled to this PTX, for a device of 9.0: before 90 they do not wait for the last launch.
void compiled_to(int ptx_version);

// What a multiprocessor is said to have of shared memory; the most there is on a GPU, unless it is told.
void shared_memory_of_multiprocessor(int bytes);

}  // namespace attn_ext::shim

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const auto call = [&] { kernel(arguments...); };
  const auto thread = [](const void* it) { (*static_cast<decltype(&call)>(it))(); };
  return attn_ext::shim::run(*config, reinterpret_cast<const void*>(kernel), thread, &call);
}

namespace attn_ext::cuda {

using Where = std::source_location;

struct Half;
struct Vector16;

char* shared_memory();

inline void sync_threads(const Where& where = Where::current()) {
  shim::meet(shim::Meeting::Barrier, 0, 0, where);
}

inline bool any_in_block(bool mine, const Where& where = Where::current()) {
  return shim::meet(shim::Meeting::AnyInBlock, mine, 0, where) != 0;
}

inline void sync_warp(const Where& where = Where::current()) {
  shim::meet(shim::Meeting::SyncWarp, 0, 0, where);
}

template <class T>
T shuffle_xor(T x, int lanes, const Where& where = Where::current()) {
  return shim::shuffle(shim::Meeting::ShuffleXor, x, lanes, where);
}

template <class T>
T shuffle(T x, int lane, const Where& where = Where::current()) {
  return shim::shuffle(shim::Meeting::Shuffle, x, lane, where);
}

inline uint32_t ballot(bool mine, const Where& where = Where::current()) {
  uint32_t bits = static_cast<uint32_t>(mine) << ::threadIdx.x % 32;
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    bits |= shuffle_xor(bits, lanes, where);
  }
  return bits;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// As exact as the GPU's: off by one unit in the last place here and there, and without subnormals.
inline float product(float a, float b) {
  return a * b;
}

inline double product(double a, double b) {
  return a * b;
}

inline uint32_t forgotten(uint32_t x) {
  return x;
}

float exp2_approx(float x);
float reciprocal_approx(float x);

float to_acc(Half x);
Half rounded_to_half(float x);

Vector16 load16(const void* from);
Vector16 load16_streaming(const void* from);
void store16(void* to, const Vector16& x);
void store8(void* to, uint32_t first, uint32_t second);
void store16_streaming(void* to, const Vector16& x);

// The copy is made by wait_copies, no sooner.
void copy_async16(void* to, const void* from, bool there = true);
void commit_copies();

template <int pending>
void wait_copies() {
  shim::wait_copies(pending);
}

inline void wait_for_last_launch() {
  shim::wait_for_last_launch();
}

inline void let_next_launch_begin() {}

}  // namespace attn_ext::cuda

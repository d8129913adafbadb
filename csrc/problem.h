// What the kernels of every device are told of a call: sizes, addresses and strides. Free of torch headers.
#pragma once

#include <cstdint>

namespace attn_ext {

enum class Dtype { Float, Double, BFloat16, Half };

// Bytes of an element.
constexpr int64_t width_of(Dtype dtype) {
  return dtype == Dtype::Double ? 8 : dtype == Dtype::Float ? 4 : 2;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The next multiple of b.
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// What a query's score with a source step is: q . m, q . k, or v . tanh(q + k).
enum class Method { Dot, KeyedDot, Additive };

// A tensor as [batch, row, element]: strides in elements, 0 along what it has not or repeats.
struct View {
  const void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t element_stride = 0;
};

// A prepared key is exp(2k), filled up with ones to whole blocks of features, and a line that begins with the largest |2k|.
constexpr int64_t kPreparedBlock = 64;
constexpr int64_t kPreparedLine = 16;

template <class Size>
constexpr Size prepared_size(const Size& key_size) {
  return (key_size + (kPreparedBlock - 1)) / kPreparedBlock * kPreparedBlock + kPreparedLine;
}

// Where in it that largest |2k| stands.
constexpr int64_t prepared_range_at(int64_t key_size) {
  return prepared_size(key_size) - kPreparedLine;
}

struct Problem {
  Dtype dtype;
  Dtype product_dtype;  // what a matrix product's may be rounded to: dtype or, of float32, what PyTorch's settings allow
  Method method;
  int64_t batch;        // B
  int64_t queries;      // T
  int64_t steps;        // S
  int64_t key_size;     // Dq of dot products, A of additive
  int64_t memory_size;  // Dm
  double scale;
  View query;                        // [B, T, key_size]
  View keys;                         // [B, S, key_size]; not of dot, whose memory is its own keys
  View prepared_keys;                // [B, S, prepared_size(key_size)] acc, additive only; data may be null
  View v;                            // [key_size] (along element), additive only
  View memory;                       // [B, S, memory_size]
  const int64_t* lengths = nullptr;  // [B]
  View mask;                         // [B, S] (row stride 0) or [B, T, S] bool
  bool mask_per_query = false;

  // One query a batch element is bound by reading the memory, and has kernels of its own, but for keyed dot products.
  bool is_one_query() const {
    return queries == 1 && method != Method::KeyedDot;
  }
};

}  // namespace attn_ext

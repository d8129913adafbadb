// What programs that run the CPU kernels without PyTorch around them give them: tensors, scratch, and an op on its inputs.
#pragma once

#include "../../csrc/cpu/kernels/call.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

namespace attn_ext::cpu {

namespace CPU_CAPABILITY {
const Kernels& dot_kernels(Dtype, bool, int64_t);
const Kernels& additive_kernels(Dtype, bool, int64_t);
}  // namespace CPU_CAPABILITY

// What an output holds before it is written: none may keep it.
constexpr unsigned char kUnwritten = 0xff;

// A tensor [batches, rows, size] of any dtype, its bytes exactly as many as its strides reach: a sanitizer sees a step further.
class Array {
 public:
  Array(Dtype dtype, int64_t batches, int64_t rows, int64_t size, int64_t row_padding = 0, int64_t element = 1)
      : dtype_(dtype), rows_(rows), size_(size), row_(size * element + row_padding), element_(element), batches_(batches) {
    const int64_t count = batches * rows * size == 0 ? 0 : (batches * rows - 1) * row_ + (size - 1) * element_ + 1;
    void* bytes = nullptr;  // aligned as PyTorch aligns
    if (posix_memalign(&bytes, 64, std::max<size_t>(count * width(), 1)) != 0) {
      std::abort();
    }
    bytes_.reset(static_cast<char*>(bytes));
    std::fill_n(reinterpret_cast<unsigned char*>(bytes_.get()), count * width(), kUnwritten);
  }

  View view() const {
    return {bytes_.get(), rows_ * row_, row_, element_};
  }

  void* data() const {
    return bytes_.get();
  }

  double at(int64_t b, int64_t row, int64_t i) const {
    const int64_t at = index(b, row, i);
    return with_type([&](auto* data) { return static_cast<double>(data[at]); });
  }

  void set(int64_t b, int64_t row, int64_t i, double value) {
    const int64_t at = index(b, row, i);
    with_type([&](auto* data) {
      using scalar = std::remove_pointer_t<decltype(data)>;
      if constexpr (std::is_same_v<scalar, double>) {
        data[at] = value;
      } else {
        data[at] = static_cast<scalar>(static_cast<float>(value));
      }
      return 0.0;
    });
  }

  // With what next() returns, as the dtype holds it.
  template <class F>
  void fill(const F& next) {
    for_each([&](int64_t b, int64_t row, int64_t i) { set(b, row, i, next()); });
  }

  // What a result is compared with: consecutive, in double.
  std::vector<double> values() const {
    std::vector<double> all;
    for_each([&](int64_t b, int64_t row, int64_t i) { all.push_back(at(b, row, i)); });
    return all;
  }

  template <class F>
  void for_each(const F& f) const {
    for (int64_t b = 0; b < batches_; ++b) {
      for (int64_t row = 0; row < rows_; ++row) {
        for (int64_t i = 0; i < size_; ++i) {
          f(b, row, i);
        }
      }
    }
  }

 private:
  struct Free {
    void operator()(char* bytes) const {
      std::free(bytes);
    }
  };

  int64_t width() const {
    return width_of(dtype_);
  }

  int64_t index(int64_t b, int64_t row, int64_t i) const {
    return (b * rows_ + row) * row_ + i * element_;
  }

  template <class F>
  double with_type(const F& f) const {
    switch (dtype_) {
      case Dtype::Double:
        return f(reinterpret_cast<double*>(bytes_.get()));
      case Dtype::Float:
        return f(reinterpret_cast<float*>(bytes_.get()));
      case Dtype::BFloat16:
        return f(reinterpret_cast<c10::BFloat16*>(bytes_.get()));
      default:
        return f(reinterpret_cast<c10::Half*>(bytes_.get()));
    }
  }

  Dtype dtype_;
  int64_t rows_, size_, row_, element_, batches_;
  std::unique_ptr<char, Free> bytes_;
};

// Scratch between pages of nothing is the sanitizers' to guard; each slot begins as garbage.
struct Scratch {
  explicit Scratch(size_t size) : bytes(static_cast<char*>(std::aligned_alloc(64, std::max<size_t>((size + 63) / 64 * 64, 64)))) {
    std::fill_n(bytes, size, static_cast<char>(kUnwritten));
  }
  ~Scratch() {
    std::free(bytes);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* bytes;
};

// Sizes, masks and inputs of one op. Of dot products the memory is its own keys, or not.
struct Op {
  Method method;
  Dtype dtype, product_dtype, exact_type;
  int64_t B, T, S, D, Dm;
  double scale;
  std::vector<int64_t> lengths{};
  std::vector<char> mask{};  // [B, S] or [B, T, S]
  bool mask_per_query;
  Array query, keys, memory, v;

  bool is_additive() const {
    return method == Method::Additive;
  }

  bool has_keys() const {
    return method != Method::Dot;
  }

  bool attended(int64_t b, int64_t t, int64_t s) const {
    const bool within = lengths.empty() || s < lengths[b];
    return within && (mask.empty() || mask[mask_per_query ? (b * T + t) * S + s : b * S + s]);
  }

  Problem problem() const {
    Problem p{};
    p.dtype = dtype;
    p.product_dtype = product_dtype;
    p.method = method;
    p.batch = B, p.queries = T, p.steps = S, p.key_size = D, p.memory_size = Dm;
    p.scale = scale;
    p.query = query.view();
    p.memory = memory.view();
    if (has_keys()) {
      p.keys = keys.view();
    }
    if (is_additive()) {
      p.v = v.view();
    }
    p.lengths = lengths.empty() ? nullptr : lengths.data();
    if (!mask.empty()) {
      p.mask = {mask.data(), mask_per_query ? T * S : S, mask_per_query ? S : 0, 1};
      p.mask_per_query = mask_per_query;
    }
    return p;
  }

  const Kernels& kernels(const Plan& plan) const {
    return (is_additive() ? CPU_CAPABILITY::additive_kernels : CPU_CAPABILITY::dot_kernels)(
        product_dtype, problem().is_one_query(), plan.chunk);
  }

  // Whether the inputs of products are rounded, too.
  bool rounds_inputs() const {
    return product_dtype != dtype;
  }

  std::string text() const {
    constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16"};
    char line[200];
    std::snprintf(
        line,
        sizeof(line),
        "%s (B=%d, T=%d, S=%d, D=%d, Dm=%d) %s%s%s%s%s",
        is_additive() ? "additive"
        : has_keys()  ? "keyed dot"
                      : "dot",
        static_cast<int>(B),
        static_cast<int>(T),
        static_cast<int>(S),
        static_cast<int>(D),
        static_cast<int>(Dm),
        names[static_cast<int>(dtype)],
        rounds_inputs() ? ", factors of " : "",
        rounds_inputs() ? names[static_cast<int>(product_dtype)] : "",
        lengths.empty() ? "" : ", lengths",
        mask.empty()     ? ""
        : mask_per_query ? ", mask by query"
                         : ", mask by row");
    return line;
  }
};

}  // namespace attn_ext::cpu

// The gradient of a memory's or of keys' rows, of one query.
#pragma once

#include "row_group.h"
#include "twos.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// The rows of a [B, S, size] gradient, each written once and in their order, with zeros for the steps that nobody attends: where
// they belong, or by way of scratch if they are of another type or streamed.
template <class acc>
class GradientRows {
 public:
  // `at_once` rows may be under way.
  GradientRows(Arena& arena, void* out, const Problem& problem, const Plan& plan, int64_t size, int64_t at_once)
      : out_(static_cast<char*>(out)),
        dtype_(problem.dtype),
        steps_(problem.steps),
        size_(size),
        streams_(plan.streams && reinterpret_cast<uintptr_t>(out) % kLine == 0 && size % (2 * Vec<acc>::size()) == 0),
        in_place_(dtype_ == kAccumulated<acc> && !streams_),
        stride_(padded<acc>(size)),
        scratch_(out == nullptr || in_place_ ? nullptr : arena.take<acc>(at_once * stride_)) {}

  bool wanted() const {
    return out_ != nullptr;
  }

  // Past the caches.
  bool streams() const {
    return wanted() && streams_;
  }

  void begin(const Item& item) {
    first_row_ = item.batch * steps_;
    written_ = item.first_step;
  }

  // The tile's rows: a_r g + de_r q, of the coefficients a and, kGroupRows behind them, de. g or q may be null.
  void combine(const Tile& tile, const acc* coefficients, const acc* g, const acc* q) {
    with_bool(streams_, [&](auto streams) { combine_terms<streams.value, false>(tile, coefficients, g, q, nullptr); });
  }

  // The same of rows that are streamed, while the memory's next ones are prefetched.
  void combine_and_prefetch(const Tile& tile, const acc* coefficients, const acc* g, const acc* q, const RowGroup<acc>& memory) {
    combine_terms<true, true>(tile, coefficients, g, q, &memory);
  }

  // Where a step's row belongs, for it to be written now.
  void* place(int64_t step) {
    zero(step);
    written_ = step + 1;
    return at(step);
  }

  // Room for a step's row, which write() then brings where it belongs; `i` numbers those that are under way.
  acc* row(int64_t step, int64_t i = 0) {
    void* const belongs = place(step);
    return in_place_ ? static_cast<acc*>(belongs) : scratch_ + i * stride_;
  }

  void write(int64_t step, const acc* row) const {
    if (in_place_) {
      return;
    }
    with_type<acc>(dtype_, [&](auto example) {
      auto* to = static_cast<decltype(example)*>(at(step));
      const auto copy = [&](auto streams) {
        for_twos<acc>(size_, [&](int64_t d, auto count) {
          Vec<acc> x[2];
          load_two(x, row + d, count);
          store_two<streams.value>(to + d, x, count);
        });
      };
      with_bool(streams_, copy);
    });
  }

  void end(const Item& item) {
    zero(item.end_step);
    if (streams_) {
      finish_streaming();
    }
  }

 private:
  template <bool streams, bool prefetches>
  void combine_terms(const Tile& tile, const acc* coefficients, const acc* g, const acc* q, const RowGroup<acc>* memory) {
    const acc* const rows[] = {g, q};
    const auto take = [&](auto terms, const acc* const* from, const acc* factors) {
      with_type<acc>(dtype_, [&](auto example) {
        for_blocks<4>(tile.count, [&](auto count, int64_t first) {
          const char* next[count.value] = {};
          for (int r = 0; prefetches && r < count.value; ++r) {
            next[r] = memory->next(first + r);
          }
          combine_block<terms.value, count.value, streams, prefetches, decltype(example)>(
              tile.steps + first, from, factors + first, next);
        });
      });
    };
    if (g != nullptr && q != nullptr) {
      take(std::integral_constant<int, 2>(), rows, coefficients);
    } else if (g != nullptr) {
      take(std::integral_constant<int, 1>(), rows, coefficients);
    } else if (q != nullptr) {
      take(std::integral_constant<int, 1>(), rows + 1, coefficients + kGroupRows);
    }
  }

  // Not inlined: the loop needs registers that whoever calls would have in use.
  template <int terms, int count, bool streams, bool prefetches, class scalar>
  [[gnu::noinline]] void combine_block(
      const int64_t* steps, const acc* const* rows, const acc* coefficients, const char* const* next) {
    scalar* to[count];
    Vec<acc> factors[terms][count];
#pragma GCC unroll 4
    for (int r = 0; r < count; ++r) {
      to[r] = static_cast<scalar*>(place(steps[r]));
#pragma GCC unroll 2
      for (int k = 0; k < terms; ++k) {
        factors[k][r] = Vec<acc>(coefficients[k * kGroupRows + r]);
      }
    }
    for_twos<acc>(size_, [&](int64_t d, auto filled) {
      Vec<acc> x[terms][2];
#pragma GCC unroll 2
      for (int k = 0; k < terms; ++k) {
        load_two(x[k], rows[k] + d, filled);
      }
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r) {
        Vec<acc> result[2] = {factors[0][r] * x[0][0], factors[0][r] * x[0][1]};
        if constexpr (terms == 2) {
          result[0] = fmadd(factors[1][r], x[1][0], result[0]);
          result[1] = fmadd(factors[1][r], x[1][1], result[1]);
        }
        store_two<streams>(to[r] + d, result, filled);
        for (size_t at = 0; prefetches && at < 2 * sizeof(scalar) * Vec<acc>::size(); at += kLine) {
          prefetch(next[r] + d * sizeof(scalar) + at);
        }
      }
    });
  }

  void* at(int64_t step) const {
    return out_ + (first_row_ + step) * size_ * width_of(dtype_);
  }

  void zero(int64_t end) const {
    if (wanted() && written_ < end) {
      zero_row(dtype_, out_, (first_row_ + written_) * size_, (end - written_) * size_);
    }
  }

  char* out_;
  Dtype dtype_;
  int64_t steps_;
  int64_t size_;
  bool streams_;
  bool in_place_;
  int64_t stride_;
  acc* scratch_;
  int64_t first_row_ = 0;
  int64_t written_ = 0;  // up to here
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

// A few rows of memory, a group, and what one query wants of them while they are near (one_query.h).
#pragma once

#include "cache.h"
#include "products.h"
#include "rows.h"
#include "twos.h"

namespace attn_ext::cpu::CPU_CAPABILITY {

// How far ahead of what is read lines are prefetched.
constexpr int64_t kPrefetchBytes = 1 << 14;

// Rows below which four are read at once, which saves their sums' ends; of others, one stream of lines is faster than four, whose
// places in the caches may be the same. From half as long ones on something else may go on beside their products.
constexpr int64_t kLongRow = 1 << 10;

// What is worked on after a group: of the same batch element or, behind its last, of the next one.
struct Upcoming {
  int64_t batch;
  Tile tile;
};

// Work put off on one row, two vectors of features at a time: it is added to a sum and, where it `streams`, its gradient is written
// past the caches.
template <class acc, class scalar, bool streams>
struct DeferredRow {
  const scalar* row;
  acc* sum;
  Vec<acc> factor;
  scalar* gradient = nullptr;
  const acc *g = nullptr, *q = nullptr;
  Vec<acc> weight{0};

  template <class Count>
  [[gnu::always_inline]] void operator()(int64_t d, Count count) const {
    Vec<acc> sums[2], x[2];
    load_two(sums, sum + d, count);
    load_two_any_order(x, row + d, count);
    sums[0] = fmadd(factor, x[0], sums[0]);
    sums[1] = fmadd(factor, x[1], sums[1]);
    store_two<false>(sum + d, sums, count);
    if constexpr (streams) {
      Vec<acc> of_g[2], of_q[2];
      load_two(of_g, g + d, count);
      load_two(of_q, q + d, count);
      x[0] = fmadd(factor, of_q[0], weight * of_g[0]);
      x[1] = fmadd(factor, of_q[1], weight * of_g[1]);
      store_two<true>(gradient + d, x, count);
    }
  }
};

// Work put off on a group's rows, to be done beside the next group's dot products: sum += sum_r factors[r] row_r and, where there
// is a place for them, gradients weights[r] g + factors[r] q. The sum is kept in scratch for a few groups, there in the order of
// load_two_any_order().
template <class acc>
class DeferredRows {
 public:
  DeferredRows(Arena& arena, Dtype dtype, int64_t size, bool is_used)
      : dtype_(dtype), size_(size), part_(is_used ? arena.take<acc>(padded<acc>(size)) : nullptr) {}

  void begin(acc* sum, const void* const* rows, const acc* factors, int64_t count) {
    if (in_part_ == 0) {
      std::fill_n(part_, size_, acc(0));
    }
    in_part_ += count;
    sum_ = sum;
    done_ = 0;
    count_ = count;
    streams_ = false;
    std::copy_n(rows, count, rows_);
    std::copy_n(factors, count, factors_);
  }

  // place(r) is where row r's gradient belongs.
  template <class Place>
  void add_gradients(const acc* weights, const acc* g, const acc* q, const Place& place) {
    streams_ = true;
    g_ = g;
    q_ = q;
    std::copy_n(weights, count_, weights_);
    for (int64_t r = 0; r < count_; ++r) {
      gradients_[r] = place(r);
    }
  }

  bool streams() const {
    return streams_;
  }

  int64_t pending() const {
    return count_ - done_;
  }

  // The next row's, for the caller to do.
  template <class scalar, bool streams>
  DeferredRow<acc, scalar, streams> take() {
    const int64_t r = done_++;
    DeferredRow<acc, scalar, streams> taken{static_cast<const scalar*>(rows_[r]), part_, Vec<acc>(factors_[r])};
    if constexpr (streams) {
      taken.gradient = static_cast<scalar*>(gradients_[r]);
      taken.g = g_;
      taken.q = q_;
      taken.weight = Vec<acc>(weights_[r]);
    }
    return taken;
  }

  // Into the sum, once no row is pending.
  void flush_partial_sum(int64_t least = 1) {
    if (in_part_ < least) {
      return;
    }
    in_part_ = 0;
    with_type<acc>(dtype_, [&](auto example) {
      using scalar = decltype(example);
      for_twos<acc>(size_, [&](int64_t d, auto count) {
        Vec<acc> part[2], sums[2];
        load_two(part, part_ + d, count);
        if constexpr (kDeinterleaves<scalar> && kAreWhole<decltype(count)>) {
          interleave(part);
        }
        load_two(sums, sum_ + d, count);
        sums[0] = sums[0] + part[0];
        sums[1] = sums[1] + part[1];
        store_two<false>(sum_ + d, sums, count);
      });
    });
  }

 private:
  Dtype dtype_;
  int64_t size_;
  acc* part_;
  int64_t in_part_ = 0;  // rows
  acc* sum_ = nullptr;
  int64_t done_ = 0;
  int64_t count_ = 0;
  bool streams_ = false;
  const acc* g_ = nullptr;
  const acc* q_ = nullptr;
  const void* rows_[kGroupRows];
  void* gradients_[kGroupRows];
  acc factors_[kGroupRows];
  acc weights_[kGroupRows];
};

// A group's rows of a tensor: where they stand and as they are, or copied where their elements stand apart.
template <class acc>
class RowGroup {
 public:
  RowGroup(Arena& arena, Dtype dtype, const View& view, const Plan& plan, int64_t size)
      : source_(dtype),
        prefetches_(plan.prefetches),
        view_(view),
        size_(size),
        line_(kLine / width_of(dtype)),
        in_place_(view.element_stride == 1 || size <= 1),
        is_long_(size * width_of(dtype) >= kLongRow),
        overlaps_(plan.overlaps && prefetches_ && in_place_ && 2 * size * width_of(dtype) >= kLongRow),
        defers_gradients_(overlaps_ && is_long_ && source_ == kAccumulated<acc>),
        prefetch_rows_(
            plan.streams && !defers_gradients_
                ? plan.group
                : std::clamp<int64_t>(kPrefetchBytes / std::max<int64_t>(size * width_of(dtype), 1), 1, plan.group)),
        dtype_(in_place_ ? source_ : kAccumulated<acc>),
        stride_(padded<acc>(size)),
        copies_(in_place_ ? nullptr : arena.take<acc>(plan.group * stride_)),
        deferred_(arena, dtype_, size, overlaps_),
        pairs_(in_place_ && source_ == Dtype::BFloat16 ? arena.take<c10::BFloat16>(whole_vectors<c10::BFloat16>(size)) : nullptr) {}

  // Those of a tile; `next` follows.
  void load(int64_t b, const Tile& tile, const Upcoming& next) {
    count_ = tile.count;
    const auto address = [&](int64_t batch, int64_t step) {
      return static_cast<const char*>(view_.data) + (batch * view_.batch_stride + step * view_.row_stride) * width_of(source_);
    };
    for (int64_t r = 0; r < count_; ++r) {
      rows_[r] = address(b, tile.steps[r]);
    }
    if (prefetches_) {
      const int64_t here = std::max<int64_t>(count_ - prefetch_rows_, 0);
      std::copy_n(rows_ + count_ - here, here, next_);
      for (int64_t r = here; r < count_; ++r) {
        next_[r] = r - here < next.tile.count ? address(next.batch, next.tile.steps[r - here]) : rows_[r];
      }
    }
    for (int64_t r = 0; !in_place_ && r < count_; ++r) {
      rows_[r] = copies_ + r * stride_;
      load_row(copies_ + r * stride_, source_, view_, b, tile.steps[r], size_);
    }
  }

  int64_t count() const {
    return count_;
  }

  const void* address(int64_t r) const {
    return rows_[r];
  }

  // Of the rows as they are read.
  Dtype dtype() const {
    return dtype_;
  }

  // Where rows are as they are accumulated.
  const acc* row(int64_t r) const {
    return static_cast<const acc*>(rows_[r]);
  }

  // Whoever reads rows by address has later ones prefetched: the line of feature d of the one that is due at row r.
  bool prefetches() const {
    return prefetches_;
  }

  [[gnu::always_inline]] void prefetch_next(int64_t r, int64_t d) const {
    prefetch(next(r) + d * width_of(source_));
  }

  // For whoever reads one vector of features after the other, of which a line may have several; of `scalar` where that is known.
  template <class scalar = char>
  [[gnu::always_inline]] void prefetch_next_line(int64_t r, int64_t d) const {
    constexpr bool is_line = Vec<acc>::size() * sizeof(scalar) >= kLine;
    if (is_line || (d & (line_ - 1)) == 0) {
      prefetch_next(r, d);
    }
  }

  // From feature d on.
  void prefetch_rest_of_next(int64_t r, int64_t d) const {
    for (const int64_t line = kLine / width_of(source_); d < size_; d += line) {
      prefetch_next(r, d);
    }
  }

  // Of what comes kPrefetchBytes after row r; a whole group after it where it is prefetched beside gradients that are streamed.
  const char* next(int64_t r) const {
    return static_cast<const char*>(next_[r]);
  }

  // Whether work on a group's rows, of a large memory, is put off until the next ones' dot products; and with it their gradients,
  // where those are streamed: of halves and of short rows they are sooner taken at once, four of them.
  bool overlaps() const {
    return overlaps_;
  }

  bool defers_gradients() const {
    return defers_gradients_;
  }

  // sum += sum_r factors[r] row_r, complete after finish_deferred().
  DeferredRows<acc>& defer_sum(acc* sum, const acc* factors) {
    run_deferred_rows();
    deferred_.begin(sum, rows_, factors, count_);
    return deferred_;
  }

  // For whoever reads other rows meanwhile: one of those that are pending, if there is one.
  void run_deferred_row() {
    if (deferred_.pending() > 0) {
      run_one_deferred();
    }
  }

  // All that was put off.
  void finish_deferred() {
    run_deferred_rows();
    deferred_.flush_partial_sum();
  }

  // out[r] = factor x . row_r, of an x that is of the rows' dtype. `prefetches`: here, where the rows are read first.
  void dot_products(acc* out, const acc* x, acc factor, bool prefetches = true) {
    with_type<acc>(dtype_, [&](auto example) {
      using scalar = decltype(example);
      const auto* const left = as_operand<scalar>(x);
      if (deferred_.pending() > 0) {
        deferred_.streams() ? dot_products_beside<scalar, true>(out, left, factor)
                            : dot_products_beside<scalar, false>(out, left, factor);
        run_deferred_rows();
        deferred_.flush_partial_sum(kGroupRows);
        return;
      }
      with_bool(prefetches && prefetches_, [&](auto prefetching) {
        const bool one_by_one = prefetching.value && is_long_;
        if constexpr (kHasManyRegisters && !kMultipliesPairs<scalar>) {
          if (size_ <= Vec<acc>::size()) {
            return dot_products_of_short_rows<1, prefetching.value, scalar>(out, left, factor);
          }
          if (size_ <= 2 * Vec<acc>::size()) {
            return dot_products_of_short_rows<2, prefetching.value, scalar>(out, left, factor);
          }
        }
        for_blocks<4>(count_, [&](auto rows, int64_t first) {
          Vec<acc> totals[1][rows.value];
          if (one_by_one) {
            for (int r = 0; r < rows.value; ++r) {
              accumulate_dot_products<1, prefetching.value, scalar>(totals[0] + r, left, first + r);
            }
          } else {
            accumulate_dot_products<rows.value, prefetching.value, scalar>(totals[0], left, first);
          }
          store_sums<1, rows.value>(out + first, 0, totals, factor);
        });
      });
    });
  }

  // to += sum_r factors[r] row_r
  void add_to(acc* to, const acc* factors) const {
    sum_to(to, factors, 1, true);
  }

  // to = factor sum_r factors[r] row_r, or to += where it `adds`. A few vectors of the sums stay in registers while the rows pass.
  void sum_to(acc* to, const acc* factors, acc factor, bool adds) const {
    constexpr std::integral_constant<int64_t, 2 * Vec<acc>::size()> both;
    with_type<acc>(dtype_, [&](auto example) {
      using scalar = decltype(example);
      if constexpr (kAccumulators >= 8) {
        if (size_ <= both) {
          return sum_short_rows_to<scalar>(to, factors, factor, adds);
        }
      }
      const auto add = [&](int64_t d, auto width, auto count) {
        Vec<acc> sums[width.value][2], right[2];
#pragma GCC unroll 4
        for (int w = 0; w < width.value; ++w) {
          sums[w][0] = sums[w][1] = Vec<acc>(0);
        }
        for (int64_t r = 0; r < count_; ++r) {
          const Vec<acc> of_row(factors[r]);
#pragma GCC unroll 4
          for (int w = 0; w < width.value; ++w) {
            load_two_any_order(right, static_cast<const scalar*>(rows_[r]) + d + w * both, count);
            sums[w][0] = fmadd(of_row, right[0], sums[w][0]);
            sums[w][1] = fmadd(of_row, right[1], sums[w][1]);
          }
        }
#pragma GCC unroll 4
        for (int w = 0; w < width.value; ++w) {
          if constexpr (kDeinterleaves<scalar> && kAreWhole<decltype(count)>) {
            interleave(sums[w]);
          }
          right[0] = right[1] = Vec<acc>(0);
          if (adds) {
            load_two(right, to + d + w * both, count);
          }
          sums[w][0] = fmadd(sums[w][0], Vec<acc>(factor), right[0]);
          sums[w][1] = fmadd(sums[w][1], Vec<acc>(factor), right[1]);
          store_two<false>(to + d + w * both, sums[w], count);
        }
      };
      const int64_t whole = size_ / both;
      for_blocks<4>(whole, [&](auto width, int64_t first) { add(first * both, width, both); });
      if (whole * both < size_) {
        add(whole * both, std::integral_constant<int, 1>(), size_ - whole * both);
      }
    });
  }

 private:
  // Not inlined: the loops of whoever calls have no registers to spare.
  [[gnu::noinline]] void run_one_deferred() {
    with_type<acc>(dtype_, [&](auto example) { for_twos<acc>(size_, deferred_.template take<decltype(example), false>()); });
    if (deferred_.pending() == 0) {
      deferred_.flush_partial_sum(kGroupRows);
    }
  }

  // x as it meets the rows.
  template <class scalar>
  auto as_operand(const acc* x) const {
    if constexpr (kMultipliesPairs<scalar>) {
      store_row(Dtype::BFloat16, pairs_, 0, x, size_);
      return static_cast<const scalar*>(pairs_);
    } else {
      return x;
    }
  }

  // out[r] = factor x . row_r, each beside one of the rows that are pending, as far as there are some.
  template <class scalar, bool streams, class Operand>
  void dot_products_beside(acc* out, const Operand* x, acc factor) {
    for_blocks<4>(count_, [&](auto rows, int64_t first) {
      Vec<acc> totals[1][rows.value];
      for (int r = 0; r < rows.value; ++r) {
        if (deferred_.pending() > 0) {
          accumulate_dot_products<1, true, scalar>(totals[0] + r, x, first + r, deferred_.template take<scalar, streams>());
        } else {
          accumulate_dot_products<1, true, scalar>(totals[0] + r, x, first + r);
        }
      }
      store_sums<1, rows.value>(out + first, 0, totals, factor);
    });
  }

  // Of rows of up to two vectors. Each row would wait for the sum of those before: there are four, which take turns.
  template <class scalar>
  void sum_short_rows_to(acc* to, const acc* factors, acc factor, bool adds) const {
    Vec<acc> sums[4][2], right[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      sums[i][0] = sums[i][1] = Vec<acc>(0);
    }
    const auto add = [&](int64_t r, Vec<acc>* sum) __attribute__((always_inline)) {
      const Vec<acc> of_row(factors[r]);
      load_two(right, static_cast<const scalar*>(rows_[r]), size_);
      sum[0] = fmadd(of_row, right[0], sum[0]);
      sum[1] = fmadd(of_row, right[1], sum[1]);
    };
    int64_t r = 0;
    for (; r + 4 <= count_; r += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        add(r + i, sums[i]);
      }
    }
    for (; r < count_; ++r) {
      add(r, sums[0]);
    }
    right[0] = right[1] = Vec<acc>(0);
    if (adds) {
      load_two(right, to, size_);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vec<acc> sum = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
      sums[0][i] = fmadd(sum, Vec<acc>(factor), right[i]);
    }
    store_two<false>(to, sums[0], size_);
  }

  // Of rows of up to `vectors` vectors, of which a loop over features, and the end of a sum, would be the most: sixteen at a time.
  template <int vectors, bool prefetches, class scalar>
  void dot_products_of_short_rows(acc* out, const acc* x, acc factor) const {
    Vec<acc> left[2];
    load_two(left, x, size_);
    const auto products = [&](int64_t r) __attribute__((always_inline)) {
      const scalar* const row = static_cast<const scalar*>(rows_[r]);
      if constexpr (prefetches) {
        prefetch(next(r));
        if constexpr (vectors * Vec<acc>::size() * sizeof(scalar) > kLine) {
          prefetch(next(r) + kLine);
        }
      }
      if constexpr (vectors == 1) {
        return left[0] * load_one<acc>(row, size_);
      } else {
        Vec<acc> right[2];
        load_two(right, row, size_);
        // Rounded as delta is (dot_product_by_twos): of two products gcc would make one with the sum.
        return fmadd(left[0], right[0], Vec<acc>(0)) + fmadd(left[1], right[1], Vec<acc>(0));
      }
    };
    int64_t first = 0;
    for (; first + 16 <= count_; first += 16) {
      Vec<acc> totals[4][4];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        totals[r / 4][r % 4] = products(first + r);
      }
      store_sums<4, 4>(out + first, 4, totals, factor);
    }
    sum_each(out + first, count_ - first, [&](int64_t r) __attribute__((always_inline)) { return products(first + r); });
    for (; first < count_; ++first) {
      out[first] *= factor;
    }
  }

  void run_deferred_rows() {
    with_type<acc>(dtype_, [&](auto example) {
      with_bool(deferred_.streams(), [&](auto streams) {
        while (deferred_.pending() > 0) {
          for_twos<acc>(size_, deferred_.template take<decltype(example), streams.value>());
        }
      });
    });
  }

  struct Nothing {
    template <class Count>
    void operator()(int64_t, Count) const {}
  };

  // Vectors that add up to x . row_r each, of `rows` rows from `first` on, with what is done beside them.
  template <int rows, bool prefetches, class scalar, class Operand, class Beside = Nothing>
  [[gnu::always_inline]] void accumulate_dot_products(
      Vec<acc>* totals, const Operand* x, int64_t first, const Beside& beside = {}) const {
    const scalar* row[rows];
    const char* later[rows];
    Vec<acc> sums[rows][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      row[r] = static_cast<const scalar*>(rows_[first + r]);
      later[r] = prefetches ? next(first + r) : nullptr;
      sums[r][0] = sums[r][1] = Vec<acc>(0);
    }
    for_twos<acc>(size_, [&](int64_t d, auto count) __attribute__((always_inline)) {
      const auto prefetch_one = [&](int r) __attribute__((always_inline)) {
        for (size_t at = 0; prefetches && at < 2 * sizeof(scalar) * Vec<acc>::size(); at += kLine) {
          prefetch(later[r] + d * sizeof(scalar) + at);
        }
      };
      if constexpr (kMultipliesPairs<scalar>) {
        const auto left = load_pairs(x + d, count);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          prefetch_one(r);
          sums[r][0] = ElementTraits<Paired<scalar>>::multiply_add(left, load_pairs(row[r] + d, count), sums[r][0]);
          std::swap(sums[r][0], sums[r][1]);  // two chains
        }
      } else {
        Vec<acc> left[2], right[2];
        load_two(left, x + d, count);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          prefetch_one(r);
          load_two(right, row[r] + d, count);
          sums[r][0] = fmadd(left[0], right[0], sums[r][0]);
          sums[r][1] = fmadd(left[1], right[1], sums[r][1]);
        }
      }
      beside(d, count);
    });
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      totals[r] = sums[r][0] + sums[r][1];
    }
  }

  Dtype source_;
  bool prefetches_;
  View view_;
  int64_t size_;
  int64_t line_;  // elements
  bool in_place_;
  bool is_long_;
  bool overlaps_;
  bool defers_gradients_;
  int64_t prefetch_rows_;  // rows
  Dtype dtype_;            // of the rows as they are read
  int64_t stride_;
  acc* copies_;
  DeferredRows<acc> deferred_;
  int64_t count_ = 0;
  const void* rows_[kGroupRows];
  const void* next_[kGroupRows];
  c10::BFloat16* pairs_;
};

}  // namespace attn_ext::cpu::CPU_CAPABILITY

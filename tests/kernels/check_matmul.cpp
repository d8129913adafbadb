// The products of projections alone, as check.cpp checks attention: random sizes, layouts, types and rows left out, against plain
// loops in double. Built by tests/test_kernels.py with sanitizers, where AVX-512 has these kernels.
//
//   check_matmul SEED COUNT    prints what failed and how; exit status 1 if anything did
#include "op.h"
#include "problems.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <vector>

namespace attn_ext::cpu {

namespace CPU_CAPABILITY {
const MatmulKernels& matmul_kernels();
}

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// How a call's factors lie: a by rows and b by rows or by columns, or both as the rows that a sum of products is over.
enum class Layout { Rows, Columns, Sum };

std::vector<const void*> addresses(const Array& rows, Dtype dtype, int64_t batches, int64_t count) {
  const View view = rows.view();
  std::vector<const void*> all;
  for (int64_t i = 0; i < batches * count; ++i) {
    all.push_back(static_cast<const char*>(view.data) + i * view.row_stride * width_of(dtype));
  }
  return all;
}

// As exact as a product of floats is in matrix tiles, or by vectors; an output of halves is rounded besides.
double unit_of(Dtype product_dtype, Dtype out) {
#if defined(__AMX_BF16__)
  const double unit = product_dtype == Dtype::Float ? 0x1p-20 : 0x1p-14;
#else
  const double unit = (void(product_dtype), 0x1p-20);
#endif
  return out == Dtype::BFloat16 ? unit + 0x1p-8 : out == Dtype::Half ? unit + 0x1p-11 : unit;
}

bool check(uint64_t seed) {
  Random random(seed);
  const auto type = [&] { return random.of({Dtype::Float, Dtype::Float, Dtype::BFloat16, Dtype::Half}); };
  const Layout layout = random.of({Layout::Rows, Layout::Columns, Layout::Sum});
  const bool is_sum = layout == Layout::Sum;
  const int64_t batch = is_sum ? random.upto(1, 3) : 1;
  const int64_t rows = random.of({random.upto(1, 40), random.upto(1, 300)});
  const int64_t depth = random.of({random.upto(1, 40), random.upto(1, 600)});
  const int64_t columns = random.of({random.upto(1, 40), random.upto(1, 300)});
  Matmul call{};
  call.a_type = type();
  call.b_type = type();
  call.out_type = type();
  const bool has_floats = call.a_type == Dtype::Float || call.b_type == Dtype::Float;
  call.product_dtype = has_floats ? Dtype::Float : Dtype::Half;
  call.batch = batch;
  call.rows = rows;
  call.depth = depth;
  call.columns = columns;

  const auto padding = [&] { return random.of<int64_t>({0, 0, random.upto(1, 20)}); };
  Array a(call.a_type, batch, is_sum ? depth : rows, is_sum ? rows : depth, padding());
  Array b(call.b_type, batch, layout == Layout::Columns ? columns : depth, layout == Layout::Columns ? depth : columns, padding());
  Array out(call.out_type, batch, rows, columns, padding());
  a.fill(random.normals(1));
  b.fill(random.normals(1));
  const std::vector<RowRange> ranges = random_ranges(random, batch * rows);
  const auto is_wanted = [&](int64_t row) { return is_in(ranges, row); };
  std::vector<const void*> a_columns, b_rows;
  if (is_sum) {
    call.a_columns = (a_columns = addresses(a, call.a_type, batch, depth)).data();
    call.b_rows = (b_rows = addresses(b, call.b_type, batch, depth)).data();
  } else {
    const View of_b = b.view();
    call.a = a.view();
    call.b = layout == Layout::Columns ? View{of_b.data, 0, 1, of_b.row_stride} : of_b;
    // What nobody asks for is allowed to be anything.
    a.for_each([&](int64_t, int64_t row, int64_t k) {
      if (!is_wanted(row)) {
        a.set(0, row, k, kNaN);
      }
    });
  }

  std::vector<float> bias(columns);
  call.adds_to_out = random.chance(0.3);
  if (call.adds_to_out) {
    out.fill(random.normals(1));
  } else if (random.chance(0.5)) {
    std::generate(bias.begin(), bias.end(), random.normals(1));
    call.bias = bias.data();
  }
  const std::vector<double> before = out.values();
  call.out = out.data();
  call.out_batch = out.view().batch_stride;
  call.out_row = out.view().row_stride;
  call.row_ranges = {ranges.data(), static_cast<int64_t>(ranges.size())};
  const auto count = [](int64_t sum, const RowRange& range) { return sum + range.end - range.first; };
  call.mean_range_rows = std::accumulate(ranges.begin(), ranges.end(), int64_t{0}, count) / std::max<int64_t>(ranges.size(), 1);
  call.height = std::min<int64_t>(random.of({rows, random.upto(1, rows)}), 256);
  call.width = 64 * random.upto(1, 4);

  const MatmulKernels& kernels = CPU_CAPABILITY::matmul_kernels();
  const Scratch slot(kernels.slot(call));
  for (int64_t item = call.items(); item-- > 0;) {
    kernels.run(call, item, slot.bytes);
  }

  const std::vector<double> after = out.values();
  for (int64_t i = 0; i < batch * rows; ++i) {
    for (int64_t n = 0; n < columns; ++n) {
      const int64_t element = i / rows, row = i % rows;
      double expected = call.adds_to_out ? before[i * columns + n] : is_wanted(i) ? bias[n] : 0;
      double magnitude = std::abs(expected);
      for (int64_t k = 0; is_wanted(i) && k < depth; ++k) {
        const double left = is_sum ? a.at(element, k, row) : a.at(element, row, k);
        const double product = left * (layout == Layout::Columns ? b.at(element, n, k) : b.at(element, k, n));
        expected += product;
        magnitude += std::abs(product);
      }
      const double actual = after[i * columns + n];
      if (!(std::abs(actual - expected) <= unit_of(call.product_dtype, call.out_type) * magnitude)) {
        std::printf(
            "[%lld, %lld, %lld] %s: element (%lld, %lld) is %.9g, not %.9g, of magnitude %.3g\n",
            (long long)rows,
            (long long)depth,
            (long long)columns,
            is_sum                      ? "a sum over rows"
            : layout == Layout::Columns ? "b by columns"
                                        : "b by rows",
            (long long)i,
            (long long)n,
            actual,
            expected,
            magnitude);
        return false;
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace attn_ext::cpu

int main(int count, char** arguments) {
  return attn_ext::cpu::check_problems(count, arguments, attn_ext::cpu::check);
}

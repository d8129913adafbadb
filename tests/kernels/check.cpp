// The CPU kernels alone, without PyTorch around them: random problems, divisions of the work and layouts against plain loops in
// double. Built by tests/test_kernels.py for each instruction set, with sanitizers, and for other processors under an emulator.
//
//   check SEED COUNT    prints what failed and how; exit status 1 if anything did
#include "../../csrc/cpu/kernels/products.h"
#include "../../csrc/cpu/plan.h"
#include "../../csrc/cpu/work_stealing.h"
#include "op.h"
#include "problems.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <limits>
#include <thread>
#include <vector>

namespace attn_ext::cpu {
namespace {

using Doubles = std::vector<double>;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

Op random_op(Random& random) {
  const Method method = random.of({Method::Additive, Method::Additive, Method::Dot, Method::KeyedDot});
  const Dtype dtype = random.of({Dtype::Float, Dtype::Float, Dtype::Double, Dtype::BFloat16, Dtype::Half});
  const Dtype product_dtype = dtype == Dtype::Float ? random.of({dtype, dtype, Dtype::Half, Dtype::BFloat16}) : dtype;
  const int64_t B = random.upto(1, 3);
  const int64_t T = random.chance(0.5) ? 1 : random.chance(0.7) ? random.upto(2, 40) : random.upto(41, 300);
  const int64_t S = random.chance(0.2) ? random.upto(0, 3) : random.chance(0.7) ? random.upto(4, 90) : random.upto(91, 600);
  const int64_t D = random.chance(0.35) ? 32 * random.upto(1, 6) : random.chance(0.8) ? random.upto(1, 70) : random.upto(71, 300);
  const int64_t Dm = method == Method::Dot ? D : random.chance(0.5) ? 32 * random.upto(1, 6) : random.upto(1, 70);
  const auto array = [&](int64_t rows, int64_t size) {
    return Array(dtype, B, rows, size, random.upto(0, 3), random.of({1, 1, 2}));
  };
  Op op{
      .method = method,
      .dtype = dtype,
      .product_dtype = product_dtype,
      .exact_type = dtype == Dtype::Double ? Dtype::Double : Dtype::Float,
      .B = B,
      .T = T,
      .S = S,
      .D = D,
      .Dm = Dm,
      .scale = random.of({1.0, 0.3}),
      .mask_per_query = random.chance(0.5),
      .query = array(T, D),
      .keys = array(S, D),
      .memory = array(S, Dm),
      .v = Array(dtype, 1, 1, D)};
  // With the largest, the guard leaves the factored exponentials.
  const double size = random.of({0.02, 1.0, 1.0, 10.0, 60.0});
  op.query.fill(random.normals(op.is_additive() ? size : 1 / std::sqrt(static_cast<double>(D))));
  op.keys.fill(random.normals(op.is_additive() ? size : 1));
  op.memory.fill(random.normals(1));
  op.v.fill(random.normals(1 / std::sqrt(static_cast<double>(D))));
  if (random.chance(0.4)) {
    for (int64_t b = 0; b < B; ++b) {
      op.lengths.push_back(random.upto(0, S));
    }
  }
  if (random.chance(0.4)) {
    const double density = random.of({0.1, 0.7, 0.97});
    for (int64_t i = 0; i < (op.mask_per_query ? B * T * S : B * S); ++i) {
      op.mask.push_back(random.chance(density));
    }
  }
  // What nobody attends is never looked at.
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t s = 0; s < S; ++s) {
      bool by_some = false;
      for (int64_t t = 0; t < T; ++t) {
        by_some |= op.attended(b, t, s);
      }
      for (int64_t i = 0; !by_some && i < Dm; ++i) {
        op.memory.set(b, s, i, kNaN);
      }
      for (int64_t i = 0; !by_some && i < D; ++i) {
        op.keys.set(b, s, i, kNaN);
      }
    }
  }
  return op;
}

// The op in double.
struct Truth {
  Doubles context, weights, logsumexp, scores, grad_query, grad_keys, grad_v, grad_memory, grad_scores;
  // Of the sums that make up the gradients through scores, the largest possible: where they cancel, its rounding remains.
  double grad_size = 0;

  Truth(const Op& c, const Array& g, const Array& gw)
      : context(c.B * c.T * c.Dm),
        weights(c.B * c.T * c.S),
        logsumexp(c.B * c.T, -std::numeric_limits<double>::infinity()),
        scores(c.B * c.T * c.S),
        grad_query(c.B * c.T * c.D),
        grad_keys(c.B * c.S * c.D),
        grad_v(c.D),
        grad_memory(c.B * c.S * c.Dm),
        grad_scores(c.B * c.T * c.S) {
    for (int64_t b = 0; b < c.B; ++b) {
      for (int64_t t = 0; t < c.T; ++t) {
        row(c, g, gw, b, t);
      }
    }
  }

 private:
  void row(const Op& c, const Array& g, const Array& gw, int64_t b, int64_t t) {
    const int64_t at = b * c.T + t;
    double* a = weights.data() + at * c.S;
    double* e = scores.data() + at * c.S;
    double row_max = -std::numeric_limits<double>::infinity(), sum = 0, delta = 0;
    const auto each = [&](const auto& f) {
      for (int64_t s = 0; s < c.S; ++s) {
        if (c.attended(b, t, s)) {
          f(s);
        }
      }
    };
    each([&](int64_t s) {
      for (int64_t i = 0; i < c.D; ++i) {
        const double q = c.query.at(b, t, i);
        e[s] += c.is_additive() ? c.v.at(0, 0, i) * std::tanh(q + c.keys.at(b, s, i)) : q * keys(c).at(b, s, i);
      }
      e[s] *= c.scale;
      row_max = std::max(row_max, e[s]);
    });
    each([&](int64_t s) { sum += a[s] = std::exp(e[s] - row_max); });
    if (sum == 0) {
      return;
    }
    logsumexp[at] = row_max + std::log(sum);
    Doubles da(c.S);
    each([&](int64_t s) {
      a[s] /= sum;
      da[s] = gw.at(b, t, s);
      for (int64_t i = 0; i < c.Dm; ++i) {
        context[at * c.Dm + i] += a[s] * c.memory.at(b, s, i);
        da[s] += g.at(b, t, i) * c.memory.at(b, s, i);
      }
      delta += a[s] * da[s];
    });
    each([&](int64_t s) {
      const double de = grad_scores[at * c.S + s] = c.scale * a[s] * (da[s] - delta);
      grad_size = std::max(grad_size, c.scale * a[s] * (std::abs(da[s]) + std::abs(delta)));
      for (int64_t i = 0; i < c.Dm; ++i) {
        grad_memory[(b * c.S + s) * c.Dm + i] += a[s] * g.at(b, t, i);
      }
      for (int64_t i = 0; i < c.D; ++i) {
        const double q = c.query.at(b, t, i);
        if (c.is_additive()) {
          const double tanh = std::tanh(q + c.keys.at(b, s, i)), inner = de * c.v.at(0, 0, i) * (1 - tanh * tanh);
          grad_query[at * c.D + i] += inner;
          grad_keys[(b * c.S + s) * c.D + i] += inner;
          grad_v[i] += de * tanh;
        } else {
          grad_query[at * c.D + i] += de * keys(c).at(b, s, i);
          (c.has_keys() ? grad_keys : grad_memory)[(b * c.S + s) * c.D + i] += de * q;
        }
      }
    });
  }

  static const Array& keys(const Op& c) {
    return c.has_keys() ? c.keys : c.memory;
  }
};

Plan random_plan(const Problem& p, Random& random, int64_t most_queries) {
  Plan plan{};
  plan.tile = 32 * random.upto(1, (p.method == Method::Additive ? kShortTile : kTile) / 32);
  plan.group = 4 * random.of({random.upto(1, 4), random.upto(1, kGroupRows / 4)});
  plan.chunk = std::clamp<int64_t>(random.of({most_queries, random.upto(1, 24)}), 1, std::min(most_queries, p.queries));
  plan.chunks = std::max<int64_t>(ceil_div(p.queries, plan.chunk), 1);
  const int64_t tiles = std::max<int64_t>(ceil_div(p.steps, plan.tile), 1);
  plan.split_tiles = random.of({tiles, random.upto(1, tiles)});
  plan.split_size = plan.split_tiles * plan.tile - random.of({int64_t{0}, random.upto(0, plan.tile - 1)});
  plan.splits = std::max<int64_t>(ceil_div(p.steps, plan.split_size), 1);
  plan.prefetches = random.chance(0.5);
  plan.overlaps = random.chance(0.5);
  plan.streams = random.chance(0.5);
  plan.streams_queries = random.chance(0.5);
  return plan;
}

// Items in any order, as threads would take them.
template <class Call>
void run_items(
    const Call& call,
    Random& random,
    size_t (*slot_size)(const Call&),
    void (*run)(const Call&, int64_t, char*),
    void (*merge)(const Call&, int64_t, char*, size_t),
    int64_t merges) {
  const int64_t items = call.plan.items(call.problem);
  const size_t size = slot_size(call);
  Scratch scratch(size * (merges == 0 ? 1 : items));
  std::vector<int64_t> order(items);
  for (int64_t i = 0; i < items; ++i) {
    order[i] = i;
    std::swap(order[i], order[random.upto(0, i)]);
  }
  for (const int64_t item : order) {
    run(call, item, scratch.bytes + (merges == 0 ? 0 : item * size));
  }
  for (int64_t i = 0; i < merges; ++i) {
    merge(call, i, scratch.bytes, size);
  }
}

// However few the items, or whatever is left of them in the last round, the division chosen never makes threads wait longer than
// none at all would, nor any other into as few parts.
bool check_parts(Random& random) {
  const int64_t items = random.upto(1, 200), threads = random.upto(1, 130), most = random.upto(0, 140);
  const auto wait = [&](int64_t parts) {
    return ceil_div(items * parts, threads) * static_cast<double>(threads) / (items * parts);
  };
  const int64_t parts = divisions_of(items, threads, most, kWait);
  bool ok = parts >= 1 && parts <= std::max<int64_t>(most, 1);
  for (int64_t fewer = 1; fewer < parts; ++fewer) {
    ok = ok && wait(parts) <= wait(fewer);
  }
  if (!ok) {
    std::printf(
        "%lld items for %lld threads were divided into %lld parts\n", (long long)items, (long long)threads, (long long)parts);
  }
  return ok;
}

// The products of floats, by matrix tiles where there are any, of which the kernels' own choice would leave out what does not fill
// them. What is in scratch beforehand is not to matter.
bool check_products(Random& random) {
  using namespace CPU_CAPABILITY;
  const Dtype dtype = random.of({Dtype::Float, Dtype::Half});
  Arena count(nullptr);
  Workspace<float> counted(count, dtype, kChunk, kHasAmx<float>);
  std::vector<float> scratch(count.used() / sizeof(float) + 16, static_cast<float>(kNaN));
  char* const base = reinterpret_cast<char*>(scratch.data());
  Arena arena(base + -reinterpret_cast<uintptr_t>(base) % 64);
  Workspace<float> work(arena, dtype, kChunk, kHasAmx<float>);
  work.prefetches.clear();
  const AmxScope amx_scope(kHasAmx<float>);
  const auto numbers = [&](int64_t size) {
    std::vector<float> some(size);
    std::generate(some.begin(), some.end(), random.normals(1));
    return some;
  };
  const auto rows_of = [](const std::vector<float>& all, int64_t rows, int64_t stride) {
    std::vector<const float*> addresses(rows);
    for (int64_t i = 0; i < rows; ++i) {
      addresses[i] = all.data() + i * stride;
    }
    return addresses;
  };
  // Relative to the sums of magnitudes.
  const double tolerance = kHasAmx<float> && dtype == Dtype::Half ? 0x1p-14 : 0x1p-21;
  bool ok = true;
  const auto compare = [&](const char* what, float actual, double expected, double magnitude) {
    if (ok && !(std::abs(actual - expected) <= tolerance * magnitude)) {
      std::printf("%s: %.9g instead of %.9g, of magnitude %g\n", what, actual, expected, magnitude);
      ok = false;
    }
  };
  {
    const int64_t height = random.upto(1, kTile), depth = random.upto(0, 2 * kChunk), width = random.upto(1, 200);
    const bool by_columns = random.chance(0.5), in_place = random.chance(0.5), adds = random.chance(0.5);
    const int64_t stride = width + random.of({0, 5, 16}), row = (by_columns ? height : depth) + random.of({0, 3});
    const auto c = numbers((by_columns ? depth : height) * row), b = numbers(depth * width), plus = numbers(height * stride);
    const auto factors = numbers(height);
    auto out = in_place ? plus : numbers(height * stride);
    const auto rows = rows_of(b, depth, width);
    const Coefficients<float> coefficients{c.data(), by_columns ? 1 : row, by_columns ? row : 1};
    const Result<float> result(
        out.data(), stride, adds ? (in_place ? out.data() : plus.data()) : nullptr, stride, factors.data(), 1);
#if defined(__AMX_BF16__)
    multiply_by_amx(result, height, coefficients, rows.data(), depth, width, work);
#else
    multiply(result, height, coefficients, rows.data(), depth, width, &work);
#endif
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t n = 0; n < width; ++n) {
        double sum = adds ? plus[i * stride + n] : 0, magnitude = std::abs(sum);
        for (int64_t k = 0; k < depth; ++k) {
          const double product =
              static_cast<double>(c[i * coefficients.row_stride + k * coefficients.column_stride]) * b[k * width + n];
          sum += product;
          magnitude += std::abs(product);
        }
        compare("multiply", out[i * stride + n], factors[i] * sum, std::abs(factors[i]) * magnitude);
      }
    }
  }
  {
    const int64_t a_count = random.upto(1, kChunk), b_count = random.upto(1, kTile), size = random.upto(1, 300);
    const auto a = numbers(a_count * size), b = numbers(b_count * size);
    const auto a_rows = rows_of(a, a_count, size), b_rows = rows_of(b, b_count, size);
    std::vector<float> out(a_count * kTile);
    const float factor = random.of({1.0, 0.3});
#if defined(__AMX_BF16__)
    dot_products_by_amx(out.data(), kTile, a_rows.data(), a_count, b_rows.data(), b_count, size, factor, work);
#else
    dot_products(out.data(), kTile, a_rows.data(), a_count, b_rows.data(), b_count, size, factor, work);
#endif
    for (int64_t i = 0; i < a_count; ++i) {
      for (int64_t j = 0; j < b_count; ++j) {
        double sum = 0, magnitude = 0;
        for (int64_t d = 0; d < size; ++d) {
          const double product = static_cast<double>(a[i * size + d]) * b[j * size + d];
          sum += product;
          magnitude += std::abs(product);
        }
        compare("dot_products", out[i * kTile + j], factor * sum, std::abs(factor) * magnitude);
      }
    }
  }
  return ok;
}

// What is asked for ahead are the lines of the rows that were named, all of them and no others.
bool check_prefetches(Random& random) {
  using CPU_CAPABILITY::PrefetchQueue, CPU_CAPABILITY::kLine;
  PrefetchQueue prefetches;
  std::vector<char> data(1 << 19), wanted(data.size()), asked(data.size() + kLine);
  prefetches.clear();
  int64_t begin = 0;
  for (int64_t blocks = random.upto(0, 4); blocks > 0; --blocks) {
    const Dtype dtype = random.of({Dtype::Float, Dtype::Double, Dtype::BFloat16, Dtype::Half});
    const int64_t rows = random.upto(0, 30), size = random.upto(0, 300), first = random.upto(0, 3);
    const View view{data.data() + begin, 0, size + random.of({0, 0, 7, 100}), random.of({1, 1, 1, 2})};
    const int64_t width = width_of(dtype);
    prefetches.add(dtype, view, 0, first, rows, size);
    for (int64_t r = 0; (view.element_stride == 1 || size == 1) && r < rows; ++r) {
      std::fill_n(wanted.begin() + begin + (first + r) * view.row_stride * width, size * width, 1);
    }
    begin += (first + rows) * view.row_stride * width + 64;
  }
  if (random.upto(0, 1) == 1) {
    prefetches.spread(random.upto(0, 2 * ceil_div(begin, kLine)));
  }
  const char* const end = data.data() + data.size();
  for (const PrefetchQueue::Lines* lines; (lines = prefetches.take(random.upto(1, 40))) != nullptr;) {
    for (const char* line = lines->first; line < lines->first + lines->bytes * lines->steps; line += kLine) {
      if (line < data.data() || line >= end || !wanted[line - data.data()]) {
        std::printf("a line of no row that comes next was asked for\n");
        return false;
      }
      std::fill_n(asked.begin() + (line - data.data()), kLine, 1);
    }
  }
  for (int64_t i = 0; i < begin; ++i) {
    if (wanted[i] && !asked[i]) {
      std::printf("a row that comes next was not asked for\n");
      return false;
    }
  }
  return true;
}

// Each item falls to one worker, once, whoever is slow.
bool check_work_stealing(Random& random) {
  const int64_t items = random.of({random.upto(0, 5), random.upto(6, 3000)}), workers = random.upto(1, 4),
                grain = random.upto(1, 5);
  std::vector<char> storage(WorkStealing::size_of(workers) + 64);
  void* aligned = storage.data() + (64 - reinterpret_cast<uintptr_t>(storage.data()) % 64);
  WorkStealing shares(aligned, items, grain, workers);
  std::vector<int> runs(items);  // not atomic: no two workers may meet there
  std::atomic<int64_t> ready{0};
  std::vector<std::thread> threads;
  for (int64_t worker = 0; worker < workers; ++worker) {
    const int64_t turns = random.of({0, 0, 1, 50});
    threads.emplace_back([&, worker, turns] {
      for (++ready; ready < workers;) {
        std::this_thread::yield();
      }
      shares.work(worker, [&](int64_t item) {
        ++runs[item];
        for (volatile int64_t i = 0; i < turns; i = i + 1) {
        }
      });
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  const bool ok = std::all_of(runs.begin(), runs.end(), [](int count) { return count == 1; });
  if (!ok) {
    std::printf("%lld items, %lld at a time, were not run once each\n", (long long)items, (long long)grain);
  }
  return ok;
}

// As exact as the products with the weights are: pairs of bfloat16 are multiplied with rounded ones.
Dtype products_type(const Op& c) {
#if defined(__AVX512BF16__)
  return c.product_dtype == Dtype::BFloat16 && c.T >= CPU_CAPABILITY::kPairedRows ? c.product_dtype : c.exact_type;
#else
  return c.exact_type;
#endif
}

class Checker {
 public:
  explicit Checker(const Op& c) : case_(c) {}

  // Relative to the largest value there is, or to `size` where that is larger.
  void compare(const char* name, const Doubles& actual, const Doubles& expected, Dtype dtype, double slack = 1, double size = 0) {
    double largest = size;
    for (const double x : expected) {
      largest = std::isfinite(x) ? std::max(largest, std::abs(x)) : largest;
    }
    double unit = unit_of(dtype);
    if (case_.rounds_inputs()) {
      unit = std::max(unit, 2 * unit_of(case_.product_dtype == Dtype::BFloat16 ? products_type(case_) : case_.product_dtype));
    }
    for (size_t i = 0; i < expected.size(); ++i) {
      const bool same = actual[i] == expected[i];  // infinities
      if (!same && !(std::abs(actual[i] - expected[i]) <= slack * unit * largest)) {
        std::printf(
            "%s: %s[%zu] is %.9g, not %.9g; the largest is %.3g\n", case_.text().c_str(), name, i, actual[i], expected[i], largest);
        ok = false;
        return;
      }
    }
  }

  bool ok = true;

 private:
  static double unit_of(Dtype dtype) {
    return dtype == Dtype::Double ? 1e-11 : dtype == Dtype::Float ? 2e-5 : dtype == Dtype::Half ? 1e-3 : 8e-3;
  }

  const Op& case_;
};

bool check(uint64_t seed) {
  Random random(seed);
  const Op c = random_op(random);
  const bool rounds = c.dtype != c.exact_type, need_weights = random.chance(0.7);
  Array g(c.dtype, c.B, c.T, c.Dm, random.upto(0, 2)), gw(c.dtype, c.B, c.T, c.S);
  g.fill(random.normals(1));
  gw.fill(random.normals(need_weights && random.chance(0.5) ? 1 : 0));
  const Truth truth(c, g, gw);
  Checker checker(c);

  Array context(c.dtype, c.B, c.T, c.Dm), weights(c.dtype, c.B, c.T, c.S), logsumexp(c.exact_type, 1, c.B, c.T);
  Array exact_context(c.exact_type, c.B, c.T, c.Dm), exact_weights(c.exact_type, c.B, c.T, c.S);
  Forward f{};
  f.problem = c.problem();
  f.plan = random.chance(0.3) ? forward_plan(f.problem, random.upto(1, 40)) : random_plan(f.problem, random, kChunk);
  const bool writes_rows = random.chance(0.5);
  const Plan plan_of_backward = random.chance(0.3) ? backward_plan(f.problem, random.upto(1, 40), random.chance(0.5), writes_rows)
                                                   : random_plan(f.problem, random, std::max<int64_t>(c.T, 1));
  const bool keeps_context = !plan_of_backward.has_whole_rows(f.problem) || random.chance(0.5);
  f.context = context.data();
  f.weights = need_weights && c.S > 0 ? weights.data() : nullptr;
  f.logsumexp = logsumexp.data();
  f.exact_context = !rounds ? f.context : keeps_context ? exact_context.data() : nullptr;
  f.exact_weights = f.weights == nullptr ? nullptr : rounds ? exact_weights.data() : f.weights;
  f.is_read_back = keeps_context;

  const int64_t prepared = prepared_size(c.D);
  Array prepared_keys(c.exact_type, c.B, c.S, prepared);
  if (c.is_additive() && random.chance(0.3)) {
    const Preparation preparation{c.dtype, c.S, c.D, c.keys.view(), prepared_keys.data()};
    c.kernels(f.plan).prepare(preparation, 0, c.B * c.S);
    f.problem.prepared_keys = prepared_keys.view();
  }
  const int64_t merges = f.plan.splits > 1 ? f.plan.items(f.problem) : 0;
  const Kernels& forward = c.kernels(f.plan);
  run_items(f, random, forward.forward_slot, forward.forward, forward.merge_forward, merges);
  const double score_slack = c.is_additive() ? 4 : 1;
  checker.compare("context", context.values(), truth.context, c.dtype, score_slack);
  if (f.weights != nullptr) {
    checker.compare("weights", weights.values(), truth.weights, c.dtype, score_slack);
  }
  checker.compare("logsumexp", logsumexp.values(), truth.logsumexp, c.exact_type, 4, 1);
  if (rounds && keeps_context) {
    checker.compare("exact context", exact_context.values(), truth.context, products_type(c), score_slack);
  }

  Array grad_query(c.dtype, c.B, c.T, c.D), grad_keys(c.dtype, c.B, c.S, c.D), grad_memory(c.dtype, c.B, c.S, c.Dm);
  Array grad_scores(c.exact_type, c.B, c.T, c.S);
  Backward b{};
  b.problem = f.problem;
  b.plan = plan_of_backward;
  const bool recompute = f.weights == nullptr;
  b.grad_context = g.view();
  b.grad_weights = recompute ? View{} : gw.view();
  b.context = !keeps_context ? View{} : rounds ? exact_context.view() : context.view();
  b.weights = recompute ? View{} : rounds ? exact_weights.view() : weights.view();
  b.logsumexp = logsumexp.data();
  b.grad_query = random.chance(0.8) ? grad_query.data() : nullptr;
  b.grad_scores = random.chance(0.5) && c.S > 0 ? grad_scores.data() : nullptr;
  b.grad_memory = random.chance(0.8) && c.S > 0 ? grad_memory.data() : nullptr;
  const bool of_keys = c.has_keys() && random.chance(0.7), of_v = c.is_additive() && of_keys;
  Array grad_v(c.exact_type, 1, b.plan.items(b.problem), c.D);
  if (of_keys) {
    b.grad_keys = c.S > 0 ? grad_keys.data() : nullptr;
  }
  if (of_v) {
    b.grad_v = grad_v.data();
  }
  const int64_t items = b.plan.items(b.problem);
  const Kernels& backward = c.kernels(b.plan);
  run_items(
      b, random, backward.backward_slot, backward.backward, backward.merge_backward, b.plan.splits * b.plan.chunks > 1 ? items : 0);
  const double slack = 8;
  if (b.grad_query != nullptr) {
    checker.compare("grad query", grad_query.values(), truth.grad_query, c.dtype, slack, truth.grad_size);
  }
  if (b.grad_scores != nullptr) {
    checker.compare("grad scores", grad_scores.values(), truth.grad_scores, products_type(c), slack, truth.grad_size);
  }
  if (b.grad_memory != nullptr) {
    checker.compare("grad memory", grad_memory.values(), truth.grad_memory, c.dtype, slack, truth.grad_size);
  }
  if (b.grad_keys != nullptr) {
    checker.compare("grad keys", grad_keys.values(), truth.grad_keys, c.dtype, slack, truth.grad_size);
  }
  if (of_v) {
    Doubles total(c.D);
    for (int64_t item = 0; item < items; ++item) {
      for (int64_t a = 0; a < c.D; ++a) {
        total[a] += grad_v.at(0, item, a);
      }
    }
    const double size = truth.grad_size * std::sqrt(1.0 + c.B * c.T);
    checker.compare("grad v", total, truth.grad_v, products_type(c), slack, size);
    Array sum(c.dtype, 1, 1, c.D);
    const int64_t middle = random.upto(0, c.D);
    backward.sum_v(b, sum.data(), 0, middle);
    backward.sum_v(b, sum.data(), middle, c.D);
    checker.compare("sum of grad v", sum.values(), total, c.dtype, slack, size);
  }

  // The gradients of keys and of v alone, from those of the scores, where no values take part.
  if (of_v && b.grad_scores != nullptr) {
    Array keys_again(c.dtype, c.B, c.S, c.D), v_again(c.exact_type, 1, items, c.D);
    Backward s{};
    s.problem = b.problem;
    s.problem.memory_size = 0;
    s.problem.scale = 1;
    s.plan = b.plan;
    s.given_grad_scores = grad_scores.view();
    s.grad_keys = keys_again.data();
    s.grad_v = v_again.data();
    const int64_t again = s.plan.splits * s.plan.chunks > 1 ? items : 0;
    run_items(s, random, backward.backward_slot, backward.backward, backward.merge_backward, again);
    checker.compare("grad keys of scores", keys_again.values(), truth.grad_keys, c.dtype, slack, truth.grad_size);
  }
  return check_parts(random) && check_work_stealing(random) && check_prefetches(random) && check_products(random) && checker.ok;
}

}  // namespace
}  // namespace attn_ext::cpu

int main(int count, char** arguments) {
  return attn_ext::cpu::check_problems(count, arguments, attn_ext::cpu::check);
}

// A few calls of the CPU kernels as the ops make them on one thread, for an emulator to count their instructions: see
// tests/test_instructions.py.
//
//   count    prints the compiler, then a line for each call of counted(), in order
#include "op.h"

#include "../../csrc/cpu/plan.h"

#include <cmath>
#include <functional>
#include <random>

// What is counted, and nothing else: the emulators are given its name, and one that does not see it return that of the next.
extern "C" [[gnu::noinline]] void counted(const std::function<void()>& run) {
  run();
}

extern "C" [[gnu::noinline]] void was_counted() {
  asm("");
}

#if defined(CPU_CAPABILITY_AVX2)
// PyTorch's library, which has these for its vectors, would take the emulator longer to load than everything here to run.
using Doubles = double __attribute__((vector_size(32)));
using Floats = float __attribute__((vector_size(32)));

template <class Vector>
Vector of_each(double (*function)(double), Vector x) {
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) {
    x[i] = function(x[i]);
  }
  return x;
}

extern "C" Doubles Sleef_expd4_u10(Doubles x) {
  return of_each(std::exp, x);
}

extern "C" Doubles Sleef_logd4_u10(Doubles x) {
  return of_each(std::log, x);
}

extern "C" Floats Sleef_logf8_u10(Floats x) {
  return of_each(std::log, x);
}
#endif

namespace attn_ext::cpu {
namespace {

struct Sizes {
  int64_t B, T, S, D;
};

// The same numbers with every standard library, whose distributions are not: within 1, or within `size`.
class Numbers {
 public:
  auto within(double size) {
    return [this, size] { return size * (std::ldexp(static_cast<double>(engine_() >> 11), -52) - 1); };
  }

 private:
  std::mt19937_64 engine_;
};

// With memory as wide as keys, and both gradients of a training step.
struct Calls {
  Calls(Method method, Sizes sizes, Dtype dtype = Dtype::Float)
      : op{.method = method,
           .dtype = dtype,
           .product_dtype = dtype,
           .exact_type = dtype == Dtype::Double ? Dtype::Double : Dtype::Float,
           .B = sizes.B,
           .T = sizes.T,
           .S = sizes.S,
           .D = sizes.D,
           .Dm = sizes.D,
           .scale = 1,
           .mask_per_query = false,
           .query = {dtype, sizes.B, sizes.T, sizes.D},
           .keys = {dtype, sizes.B, sizes.S, sizes.D},
           .memory = {dtype, sizes.B, sizes.S, sizes.D},
           .v = {dtype, 1, 1, sizes.D}} {
    for (Array* array : {&op.query, &op.keys, &op.memory, &op.v}) {
      array->fill(numbers.within(1));
    }
  }

  // Every third step is left out: rows are no longer one after the other.
  Calls masked() && {
    for (int64_t i = 0; i < op.B * op.S; ++i) {
      op.mask.push_back(i % 3 != 0);
    }
    return std::move(*this);
  }

  Calls prepared() && {
    is_prepared = true;
    return std::move(*this);
  }

  void run() {
    const auto [B, T, S, D] = Sizes{op.B, op.T, op.S, op.D};
    const bool rounds = op.dtype != op.exact_type;
    const Array context(op.dtype, B, T, D), weights(op.dtype, B, T, S), logsumexp(op.exact_type, 1, B, T);
    const Array exact_context(op.exact_type, B, T, D), exact_weights(op.exact_type, B, T, S);
    const Array prepared_keys(op.exact_type, B, S, prepared_size(D));
    Forward f{};
    f.problem = op.problem();
    f.plan = forward_plan(f.problem, 1);
    f.context = context.data();
    f.weights = weights.data();
    f.logsumexp = logsumexp.data();
    f.exact_context = rounds ? exact_context.data() : context.data();
    f.exact_weights = rounds ? exact_weights.data() : weights.data();
    const Kernels& forward = op.kernels(f.plan);
    if (is_prepared) {
      const Preparation preparation{op.dtype, S, D, op.keys.view(), prepared_keys.data()};
      count("keys", [&] { forward.prepare(preparation, 0, B * S); });
      f.problem.prepared_keys = prepared_keys.view();
    }
    items("forward", f, forward.forward_slot(f), forward.forward);

    Array grad_context(op.dtype, B, T, D);
    grad_context.fill(numbers.within(1));
    const Array grad_query(op.dtype, B, T, D), grad_keys(op.dtype, B, S, D), grad_memory(op.dtype, B, S, D);
    Backward b{};
    b.problem = f.problem;
    b.plan = backward_plan(b.problem, 1, true, true);
    const Array grad_v(op.exact_type, 1, b.plan.items(b.problem), D);
    b.grad_context = grad_context.view();
    b.context = rounds ? exact_context.view() : context.view();
    b.weights = rounds ? exact_weights.view() : weights.view();
    b.logsumexp = logsumexp.data();
    b.grad_query = grad_query.data();
    b.grad_memory = grad_memory.data();
    if (op.is_additive()) {
      b.grad_keys = grad_keys.data();
      b.grad_v = grad_v.data();
    }
    const Kernels& backward = op.kernels(b.plan);
    items("backward", b, backward.backward_slot(b), backward.backward);
  }

 private:
  // On one thread nothing is split, and nothing merged.
  template <class Call>
  void items(const char* direction, const Call& call, size_t slot_size, void (*run)(const Call&, int64_t, char*)) {
    const Scratch slot(slot_size);
    count(direction, [&] {
      for (int64_t item = 0; item < call.plan.items(call.problem); ++item) {
        run(call, item, slot.bytes);
      }
    });
  }

  void count(const char* what, const std::function<void()>& run) {
    counted(run);
    was_counted();
    std::printf("%s%s, %s\n", op.text().c_str(), is_prepared ? ", keys prepared" : "", what);
  }

  Numbers numbers;
  Op op;
  bool is_prepared = false;
};

void run_all() {
  constexpr auto dot = Method::Dot, additive = Method::Additive;
  // Two tiles, and enough rows, wider than a panel, that panels are packed.
  Calls(dot, {1, 64, 300, 128}).run();
  Calls(dot, {1, 64, 100, 64}, Dtype::Double).run();
  Calls(dot, {1, 64, 100, 64}, Dtype::BFloat16).run();
  Calls(dot, {1, 3, 100, 64}).run();
  Calls(dot, {1, 1, 100, 128}).run();
  Calls(dot, {1, 1, 100, 128}).masked().run();
  Calls(additive, {1, 32, 50, 64}).run();
  Calls(additive, {1, 3, 50, 64}).run();
  Calls(additive, {1, 1, 50, 64}).run();
  Calls(additive, {1, 1, 50, 64}).prepared().run();
}

}  // namespace
}  // namespace attn_ext::cpu

int main() {
#if defined(__clang__)
  std::printf("clang %d\n", __clang_major__);
#else
  std::printf("gcc %d\n", __GNUC__);
#endif
  attn_ext::cpu::run_all();
}

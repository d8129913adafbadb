// How csrc/cuda/splits.cpp divides the steps of one query: for each line "additive backward dtype B S A Dm processors blocks" on
// stdin, the splits' "count steps width".
#include "splits.h"

#include <cstdio>

int main() {
  using namespace attn_ext;
  int additive, backward, dtype;
  long B, S, A, Dm, processors, blocks;
  while (std::scanf("%d %d %d %ld %ld %ld %ld %ld %ld", &additive, &backward, &dtype, &B, &S, &A, &Dm, &processors, &blocks) == 9) {
    Problem problem{};
    problem.dtype = static_cast<Dtype>(dtype);
    problem.method = additive ? Method::Additive : Method::Dot;
    problem.batch = B;
    problem.queries = 1;
    problem.steps = S;
    problem.key_size = A;
    problem.memory_size = Dm;
    const auto splits = cuda::split_steps(problem, processors, blocks, backward ? A : Dm + 2, backward);
    std::printf("%ld %ld %ld\n", static_cast<long>(splits.count), static_cast<long>(splits.steps), static_cast<long>(splits.width));
  }
}

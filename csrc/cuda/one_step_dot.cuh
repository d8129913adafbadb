// One query a batch element against its memory, which is read once.
//
//   forward    e_s = scale q . m_s, p_s = exp(e_s - max), the running maximum;  c = sum_s p_s m_s / sum_s p_s
//   backward   delta = g . c + sum_s a_s gw_s;  de_s = scale a_s (g . m_s + gw_s - delta);  dq = sum_s de_s m_s;
//              dm_s = a_s g + de_s q
//
// sum_s de_s is 0 but for how delta is rounded; what is left of it, times the context, is taken off dq, where what the rows have in
// common would multiply it.
//
// A team of lanes, up to a warp, takes `rows` rows of memory at a time, of which each lane has its columns, and has those columns
// of all sums in its registers. The team's next rows are under way to shared memory meanwhile, so loads never pause, and no barrier
// stands before the teams' results are merged. What all rows meet, q and g, is kept as it is stored: of halves that is half the
// registers, and so a multiprocessor has room for kDotBlocks blocks. Bound by memory.
#pragma once

#include "one_step.cuh"

#include <algorithm>

namespace attn_ext::cuda {

// Blocks that a multiprocessor is to have registers for: long rows of double need fewer of them.
template <class scalar, int pieces>
constexpr int kDotBlocks = sizeof(scalar) == 8 && pieces > 4 ? 3 : kStepBlocks;

// A row of memory, a lane's columns of it, and how it is read.
template <class scalar, int pieces, bool any_width>
struct Columns : LanesOfRow<scalar, pieces, any_width> {
  using Lanes = LanesOfRow<scalar, pieces, any_width>;
  using Lanes::column;
  using Lanes::kEach;
  using typename Lanes::acc;

  int size;
  bool by_vectors;        // the memory and its gradient
  bool query_by_vectors;  // what has one row a batch element: the query, and a backward's context and its gradient

  // Of a row of any strides, and zeros beyond it or where it is not `there`.
  __device__ __forceinline__ Vector16 gather(const scalar* row, int64_t element, int piece, bool there) const {
    return load_piece(row, element, column(piece), there ? size : 0, false);
  }

  // A row as it is stored, and zeros beyond it or without one.
  __device__ __forceinline__ void load(Vector16 (&to)[pieces], const scalar* row, int64_t element) const {
    if (query_by_vectors) {
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        to[p] = row != nullptr && column(p) < size ? load16(row + column(p)) : Vector16{};
      }
    } else {
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        to[p] = gather(row, element, p, row != nullptr);
      }
    }
  }

  static __device__ __forceinline__ void clear(acc (&x)[pieces][kEach]) {
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        x[p][i] = 0;
      }
    }
  }

  // sum_d g_d c_d of the team, as g . m_s is summed of a row m_s under way.
  __device__ __forceinline__ acc dot(const Vector16 (&grad)[pieces], const acc* context) const {
    acc sum[1] = {};
    const auto add = [&](const Vector16& of_grad, const acc(&c)[kEach]) {
      acc g[kEach];
      unpack<scalar>(g, of_grad);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        sum[0] = fused(g[i], c[i], sum[0]);
      }
    };
    acc c[kEach];
    if (query_by_vectors) {
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
#pragma unroll
        for (int i = 0; i < kEach; i += kLanes<acc>) {
          acc part[kLanes<acc>];
          unpack<acc>(part, column(p) < size ? load16(context + column(p) + i) : Vector16{});
#pragma unroll
          for (int n = 0; n < kLanes<acc>; ++n) {
            c[i + n] = part[n];
          }
        }
        add(grad[p], c);
      }
    } else {
#pragma unroll 1  // so many single loads take too many registers
      for (int p = 0; p < pieces; ++p) {
        Vector16 of_grad = grad[0];
#pragma unroll
        for (int n = 1; n < pieces; ++n) {
          of_grad = n == p ? grad[n] : of_grad;
        }
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          c[i] = column(p) + i < size ? context[column(p) + i] : acc(0);
        }
        add(of_grad, c);
      }
    }
    this->sum_in_team(sum);
    return sum[0];
  }
};

// The `count` first steps of a split, of which those before `end` may be attended: each team's next rows of memory are under way.
template <class scalar, int pieces, int rows, int depth, bool any_width>
class MemoryUnderWay {
 public:
  using acc = accumulated_t<scalar>;
  using Cols = Columns<scalar, pieces, any_width>;
  using Rows = RowsUnderWay<rows * pieces, depth>;
  static_assert(rows * depth <= 32, "who attends stands in a word");

  __device__ __forceinline__
  MemoryUnderWay(const Problem& problem, const Place& place, const Cols& columns, int end, int count, void* shared)
      : problem_(problem),
        columns_(columns),
        under_way_(shared),
        step_(columns.team()),
        count_(count),
        end_(end),
        mask_(static_cast<const bool*>(problem.mask.data)),
        next_(row_of<scalar>(problem.memory, place.b, place.begin + step_)) {
    if (mask_ != nullptr) {
      mask_ += place.b * problem.mask.batch_stride + place.begin * problem.mask.element_stride;
    }
    if (columns.by_vectors) {
      next_ += columns.lane() * Cols::kEach;
    }
#pragma unroll 1
    for (int n = 0; n < depth; ++n) {
      request();
    }
    step_ -= depth * rows * teams();
  }

  // Whether there are rows at hand, of any team.
  __device__ __forceinline__ bool has_rows() const {
    return step_ - columns_.team() < count_;
  }

  __device__ __forceinline__ void wait() const {
    under_way_.wait();
  }

  // From the split's first.
  __device__ __forceinline__ int step(int row) const {
    return step_ + row * teams();
  }

  __device__ __forceinline__ bool attends(int row) const {
    return attended_ >> ((depth - 1) * rows + row) & 1;
  }

  // Zeros of one that does not attend.
  __device__ __forceinline__ void unpack_piece(acc (&to)[Cols::kEach], int row, int piece) const {
    unpack<scalar>(to, under_way_.piece(row * pieces + piece));
  }

  // x into a piece of `to`, a row of the memory's gradient, which finish_row completes. Without vectors that is done in a loop by
  // way of the row at hand, in whose place x stands for a while: unrolled it would take the registers of all the row's addresses.
  __device__ __forceinline__ void store_piece(scalar* to, int row, int piece, const Vector16& x) {
    if (!columns_.by_vectors) {
      under_way_.store(row * pieces + piece, x);
    } else if (columns_.column(piece) < columns_.size) {
      store16_streaming(to + columns_.column(piece), x);
    }
  }

  __device__ __forceinline__ void finish_row(scalar* to, int row) const {
    if (!columns_.by_vectors) {
#pragma unroll 1
      for (int p = 0; p < pieces; ++p) {
        acc x[Cols::kEach];
        unpack_piece(x, row, p);
#pragma unroll
        for (int i = 0; i < Cols::kEach; ++i) {
          if (columns_.column(p) + i < columns_.size) {
            to[columns_.column(p) + i] = from_acc<scalar>(x[i]);
          }
        }
      }
    }
  }

  // Those at hand have been read.
  __device__ __forceinline__ void advance() {
    step_ += depth * rows * teams();
    request();
    step_ -= depth * rows * teams();
  }

  __device__ __forceinline__ void finish() const {
    under_way_.finish();
  }

 private:
  // The rows from step_ on, which is then the one behind them.
  __device__ __forceinline__ void request() {
    attended_ <<= rows;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const bool attends = step(r) < end_ && (mask_ == nullptr || mask_[int64_t{step(r)} * problem_.mask.element_stride]);
      attended_ |= static_cast<uint32_t>(attends) << r;
    }
    if (columns_.by_vectors) {
#pragma unroll
      for (int r = 0; r < rows; ++r) {
#pragma unroll
        for (int p = 0; p < pieces; ++p) {
          const scalar* from = next_ + r * stride() + p * kWarp * Cols::kEach;
          under_way_.copy(r * pieces + p, from, attended_ >> r & 1 && columns_.column(p) < columns_.size);
        }
      }
    } else {
      constexpr int at_once = pieces > 2 ? 1 : 2;  // of what there are registers for
#pragma unroll at_once
      for (int n = 0; n < rows * pieces; ++n) {
        const int r = n / pieces;
        const scalar* from = next_ + r * stride();
        under_way_.store(n, columns_.gather(from, problem_.memory.element_stride, n % pieces, attended_ >> r & 1));
      }
    }
    under_way_.next();
    step_ += rows * teams();
    next_ += rows * stride();
  }

  // A team's rows are so many steps apart, and elements.
  __device__ __forceinline__ int teams() const {
    return columns_.teams();
  }

  __device__ __forceinline__ int64_t stride() const {
    return teams() * problem_.memory.row_stride;
  }

  const Problem& problem_;
  const Cols& columns_;
  Rows under_way_;
  int step_;  // of the team's first row at hand, from the split's first
  int count_, end_;
  const bool* mask_;
  const scalar* next_;     // row that will be requested
  uint32_t attended_ = 0;  // a bit a row under way
};

// In shared memory two numbers a warp stand before the rows under way, where in the end the warps' sums stand.
constexpr int kOfWarp = 2;

// Whether the columns of so long a row leave registers short. A backward's query then stands in shared memory, [pieces][kWarp],
// behind all.
template <class scalar, int pieces>
constexpr bool kIsLongRow = pieces * kLanes<scalar> * sizeof(accumulated_t<scalar>) >= 128;

template <class scalar, int pieces, int rows, int depth>
constexpr int kStepShared = std::max<int>(  // of a warp
    RowsUnderWay<rows * pieces, depth>::kBytes,
    kWarp * pieces * kLanes<scalar> * sizeof(accumulated_t<scalar>));

// The bounds below are not the block's size: they leave registers for kDotBlocks of kStepBlock threads on a multiprocessor.
template <class scalar, int pieces, int rows, int depth>
__global__ void __launch_bounds__(kStepBlock* kDotBlocks<scalar, pieces>, 1)
    attend_one_step(const OneStep call, const Columns<scalar, pieces, true> columns, accumulated_t<scalar> scale) {
  using acc = accumulated_t<scalar>;
  constexpr int each = kLanes<scalar>;
  const Problem& problem = call.problem;
  let_next_launch_begin();
  const Place place(problem, call.splits);
  const Attendable may_attend(problem, place.b, 0);
  acc* of_warps = reinterpret_cast<acc*>(shared_memory());
  acc* sums = of_warps + kOfWarp * columns.warps();
  const int count = steps_to_attend(place, may_attend);
  MemoryUnderWay<scalar, pieces, rows, depth, true> memory(problem, place, columns, count, count, sums);
  Vector16 query[pieces];
  columns.load(query, row_of<scalar>(problem.query, place.b, 0), problem.query.element_stride);
  acc* scores = call.scores == nullptr ? nullptr : static_cast<acc*>(call.scores) + place.b * problem.steps + place.begin;
  acc context[pieces][each];
  Columns<scalar, pieces, true>::clear(context);
  Softmaxed<acc> mine;
  for (; memory.has_rows(); memory.advance()) {
    memory.wait();
    acc score[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      acc parts[2] = {};
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        acc q[each], x[each];
        unpack<scalar>(q, query[p]);
        memory.unpack_piece(x, r, p);
#pragma unroll
        for (int i = 0; i < each; ++i) {
          parts[i % 2] = fused(q[i], x[i], parts[i % 2]);
        }
      }
      score[r] = parts[0] + parts[1];
    }
    columns.sum_in_team(score);
    acc largest = mine.largest;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      score[r] = memory.attends(r) ? product(scale, score[r]) : -kInfinity<acc>;
      largest = score[r] > largest ? score[r] : largest;
      if (scores != nullptr && memory.attends(r) && columns.lane() == 0) {
        scores[memory.step(r)] = score[r];
      }
    }
    if (largest > mine.largest) {  // seldom, after the first rows
      const acc factor = exponential(mine.largest - largest);
      mine.largest = largest;
      mine.total *= factor;
      Columns<scalar, pieces, true>::multiply(context, factor);
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const acc weight = exponential(score[r] - mine.shift());
      mine.total += weight;
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        acc x[each];
        memory.unpack_piece(x, r, p);
#pragma unroll
        for (int i = 0; i < each; ++i) {
          context[p][i] += weight * x[i];
        }
      }
    }
  }
  memory.finish();

  // Of long rows computed anew: in the loop registers are short.
  const Place there(problem, call.splits, kIsLongRow<scalar, pieces> ? forgotten(blockIdx.x) : blockIdx.x);
  finish_split(call, there, columns, columns.width(), mine, context, sums, of_warps);
}

template <class scalar, int pieces, int rows, int depth, bool any_width>
__global__ void __launch_bounds__(kStepBlock* kDotBlocks<scalar, pieces>, 1) differentiate_one_step(
    const OneStepBackward call, const Columns<scalar, pieces, any_width> columns, accumulated_t<scalar> scale) {
  using acc = accumulated_t<scalar>;
  constexpr int each = kLanes<scalar>;
  const Problem& problem = call.problem;
  let_next_launch_begin();
  const Place place(problem, call.splits);
  const Attendable may_attend(problem, place.b, 0);
  acc* of_warps = reinterpret_cast<acc*>(shared_memory());
  acc* sums = of_warps + kOfWarp * columns.warps();
  const int count = static_cast<int>(place.end - place.begin);
  const int64_t first = place.b * problem.steps + place.begin;
  MemoryUnderWay<scalar, pieces, rows, depth, any_width> memory(
      problem, place, columns, steps_to_attend(place, may_attend), count, sums);
  const acc delta_weights = delta_of_weights<scalar>(call, place, may_attend, of_warps, columns.warps());
  // Both are asked for before either is waited for.
  Vector16 query[pieces], grad[pieces];
  columns.load(query, row_of<scalar>(problem.query, place.b, 0), problem.query.element_stride);
  const bool has_grad = call.grad_context.data != nullptr;
  columns.load(grad, has_grad ? row_of<scalar>(call.grad_context, place.b, 0) : nullptr, call.grad_context.element_stride);
  constexpr bool shares_query = kIsLongRow<scalar, pieces>;
  char* behind = reinterpret_cast<char*>(sums) + columns.warps() * kStepShared<scalar, pieces, rows, depth>;
  Vector16* shared_query = reinterpret_cast<Vector16*>(behind) + threadIdx.x % kWarp;
  if (shares_query && threadIdx.x < kWarp) {  // every warp's lanes have the same columns
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      store16(shared_query + p * kWarp, query[p]);
    }
  }
  const acc delta = has_grad ? columns.dot(grad, static_cast<const acc*>(call.context) + place.b * columns.size) : acc(0);
  acc* of_block = of_warps + columns.warps();  // for registers are short: the log-sum-exp, and delta in its two parts
  if (threadIdx.x == 0) {
    of_block[0] = call.weights == nullptr ? shift_of(static_cast<const acc*>(call.logsumexp)[place.b]) : acc(0);
    of_block[1] = delta_weights;
    of_block[2] = delta;
  }
  sync_threads();  // all of this is there
  const auto unpack_query = [&](acc(&to)[each], int p) {
    unpack<scalar>(to, shares_query ? load16(shared_query + p * kWarp) : query[p]);
  };
  const scalar* grad_weights = call.grad_weights.data == nullptr
                                   ? nullptr
                                   : row_of<scalar>(call.grad_weights, place.b, 0) + place.begin * call.grad_weights.element_stride;
  acc grad_query[pieces][each], excess = 0;
  Columns<scalar, pieces, any_width>::clear(grad_query);
  for (; memory.has_rows(); memory.advance()) {
    memory.wait();
    acc products[3 * rows] = {};  // q . m in two parts, as the forward has it, and g . m
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      acc q[each], g[each];
      unpack_query(q, p);
      unpack<scalar>(g, grad[p]);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        acc x[each];
        memory.unpack_piece(x, r, p);
#pragma unroll
        for (int i = 0; i < each; ++i) {
          products[i % 2 * rows + r] = fused(q[i], x[i], products[i % 2 * rows + r]);
          products[2 * rows + r] = fused(g[i], x[i], products[2 * rows + r]);
        }
      }
    }
    acc sums_of_rows[2 * rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      sums_of_rows[r] = products[r] + products[rows + r];
      sums_of_rows[rows + r] = products[2 * rows + r];
    }
    columns.sum_in_team(sums_of_rows);
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int s = memory.step(r);
      acc weight = 0, grad_score = 0;
      if (memory.attends(r)) {
        weight = call.weights != nullptr ? static_cast<const acc*>(call.weights)[first + s]
                                         : exponential(product(scale, sums_of_rows[r]) - of_block[0]);  // the forward's score
        grad_score = sums_of_rows[rows + r] - of_block[2];
        if (grad_weights != nullptr) {
          grad_score += to_acc(grad_weights[s * call.grad_weights.element_stride]) - of_block[1];
        }
        grad_score = scale * (weight * grad_score);
        excess += grad_score;
      }
      const bool is_there = s < count;
      scalar* grad_row =
          is_there && call.grad_memory != nullptr ? static_cast<scalar*>(call.grad_memory) + (first + s) * columns.size : nullptr;
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        acc q[each], g[each], x[each];
        unpack_query(q, p);
        unpack<scalar>(g, grad[p]);
        memory.unpack_piece(x, r, p);
#pragma unroll
        for (int i = 0; i < each; ++i) {
          grad_query[p][i] += grad_score * x[i];
          x[i] = weight * g[i] + grad_score * q[i];
        }
        if (grad_row != nullptr) {
          // Whatever is not finite in q or g is no row's that does not attend.
          memory.store_piece(grad_row, r, p, memory.attends(r) ? pack<scalar>(x) : Vector16{});
        }
      }
      if (grad_row != nullptr) {
        memory.finish_row(grad_row, r);
      }
      if (is_there && call.grad_scores != nullptr && columns.lane() == 0) {
        static_cast<acc*>(call.grad_scores)[first + s] = grad_score;
      }
    }
  }
  memory.finish();
  if (call.grad_query == nullptr) {
    return;
  }

  excess = block_sum(columns.lane() == 0 ? excess : acc(0), of_warps, columns.warps());  // and every warp's rows have been read
  columns.share(sums, grad_query, 1, columns.width());
  sync_threads();  // every warp's sums are there
  const int64_t splits = call.splits.count, size = columns.size;
  scalar* to = static_cast<scalar*>(call.grad_query) + place.b * size;
  acc* partials = static_cast<acc*>(call.splits.partials) + (place.b * splits + place.split) * size;
  const acc* context = has_grad ? static_cast<const acc*>(call.context) + place.b * size : nullptr;
  for (int d = threadIdx.x; d < columns.size; d += columns.warps() * kWarp) {
    acc sum = shared_column(sums, columns.width(), d, columns.warps());
    sum -= context == nullptr ? acc(0) : excess * context[d];
    if (splits == 1) {
      to[d] = from_acc<scalar>(sum);
    } else {
      partials[d] = sum;
    }
  }
}

}  // namespace attn_ext::cuda

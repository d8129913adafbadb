// One query a batch element against its memory, which is read once.
//
//   forward    e_s = scale q . m_s, p_s = exp(e_s - max), the running maximum;  c = sum_s p_s m_s / sum_s p_s
//   backward   delta = g . c + sum_s a_s gw_s;  de_s = scale a_s (g . m_s + gw_s - delta);  dq = sum_s de_s m_s;
//              dm_s = a_s g + de_s q
//
// A team of lanes, up to a warp, has a row of memory in its registers from the score to the context, a few rows at a time, and its
// columns of all sums. So there is no barrier before the teams' results are merged. Bound by memory.
#pragma once

#include "one_step.cuh"

namespace attn_ext::cuda {

constexpr int kMostPieces = 8;

// The columns of a lane: `pieces` times 16 bytes, the lanes' pieces taking turns along the row. `rows` are in flight at once.
template <class scalar, int pieces, int rows>
struct Columns {
  using acc = accumulated_t<scalar>;
  static constexpr int kEach = kLanes<scalar>;

  int lanes;  // of a team: a power of two
  int64_t size;
  bool by_vectors;  // the memory and its gradient

  __device__ __forceinline__ int lane() const {
    return threadIdx.x % lanes;
  }

  __device__ __forceinline__ int64_t column(int piece) const {
    return (piece * lanes + lane()) * kEach;
  }

  // body(piece, i, column) for what there is of the row.
  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (column(p) + i < size) {
          body(p, i, column(p) + i);
        }
      }
    }
  }

  // A row in the accumulation type, and zeros beyond it or without one.
  template <class T>
  __device__ __forceinline__ void load(acc (&to)[pieces][kEach], const T* row, int64_t element) const {
    clear(to);
    if (row != nullptr) {
      for_each([&](int p, int i, int64_t d) { to[p][i] = to_acc(row[d * element]); });
    }
  }

  // A row of memory as it is stored.
  __device__ __forceinline__ void load(Vector16 (&to)[pieces], const scalar* row, int64_t element) const {
    if (by_vectors) {
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        to[p] = column(p) < size ? load16_streaming(row + column(p)) : Vector16{};
      }
    } else {
      acc x[pieces][kEach];
      load(x, row, element);
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        to[p] = pack<scalar>(x[p]);
      }
    }
  }

  __device__ __forceinline__ void store(scalar* row, const acc (&from)[pieces][kEach]) const {
    if (by_vectors) {
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        if (column(p) < size) {
          store16_streaming(row + column(p), pack<scalar>(from[p]));
        }
      }
    } else {
      for_each([&](int p, int i, int64_t d) { row[d] = from_acc<scalar>(from[p][i]); });
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

  // This lane's share of a product of two rows.
  static __device__ __forceinline__ acc dot(const acc (&a)[pieces][kEach], const Vector16 (&b)[pieces]) {
    acc sum = 0;
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      acc x[kEach];
      unpack<scalar>(x, b[p]);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        sum += a[p][i] * x[i];
      }
    }
    return sum;
  }

  static __device__ __forceinline__ void add(acc (&to)[pieces][kEach], acc factor, const Vector16 (&row)[pieces]) {
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      acc x[kEach];
      unpack<scalar>(x, row[p]);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        to[p][i] += factor * x[i];
      }
    }
  }

  static __device__ __forceinline__ void multiply(acc (&x)[pieces][kEach], acc factor) {
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        x[p][i] *= factor;
      }
    }
  }

  // Sums over the team, in each of its lanes.
  __device__ __forceinline__ void sum_in_team(acc (&x)[rows]) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        x[r] += shuffle_xor(x[r], distance);
      }
    }
  }

  // Sums over the teams of a warp, in each of them.
  __device__ __forceinline__ acc sum_of_teams(acc x) const {
    for (int distance = lanes; distance < kWarp; distance *= 2) {
      x += shuffle_xor(x, distance);
    }
    return x;
  }

  __device__ __forceinline__ void sum_of_teams(acc (&x)[pieces][kEach]) const {
    if (lanes < kWarp) {
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          x[p][i] = sum_of_teams(x[p][i]);
        }
      }
    }
  }
};

template <class scalar, int pieces, int rows>
__global__ void __launch_bounds__(kStepBlock, 1) attend_one_step(const OneStep call, const Columns<scalar, pieces, rows> columns) {
  using acc = accumulated_t<scalar>;
  using Cols = Columns<scalar, pieces, rows>;
  const Problem& problem = call.problem;
  const Place place(problem, call.splits);
  const Attendable may_attend(problem, place.b, 0);
  const int64_t size = columns.size, end = place.end < may_attend.end() ? place.end : may_attend.end();
  const int teams = kStepBlock / columns.lanes, team = threadIdx.x / columns.lanes;
  const acc scale = static_cast<acc>(problem.scale);
  acc* scores = call.scores == nullptr ? nullptr : static_cast<acc*>(call.scores) + place.b * problem.steps;
  acc query[pieces][Cols::kEach], context[pieces][Cols::kEach];
  columns.load(query, row_of<scalar>(problem.query, place.b, 0), problem.query.element);
  columns.clear(context);
  Softmaxed<acc> mine;
  for (int64_t s0 = place.begin; s0 < end; s0 += teams * rows) {
    Vector16 row[rows][pieces];
    bool attends[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int64_t s = s0 + r * teams + team;
      attends[r] = s < end && may_attend(s);
      if (attends[r]) {
        columns.load(row[r], row_of<scalar>(problem.memory, place.b, s), problem.memory.element);
      } else {
#pragma unroll
        for (int p = 0; p < pieces; ++p) {
          row[r][p] = Vector16{};
        }
      }
    }
    acc score[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      score[r] = Cols::dot(query, row[r]);
    }
    columns.sum_in_team(score);
    const acc before = mine.largest;
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      score[r] = attends[r] ? scale * score[r] : -kInfinity<acc>;
      mine.largest = score[r] > mine.largest ? score[r] : mine.largest;
      if (scores != nullptr && attends[r] && columns.lane() == 0) {
        scores[s0 + r * teams + team] = score[r];
      }
    }
    const acc shift = mine.shift(), factor = exponential(before - shift);
    mine.total *= factor;
    Cols::multiply(context, factor);
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const acc p = exponential(score[r] - shift);
      mine.total += p;
      Cols::add(context, p, row[r]);
    }
  }

  // The warps' results stand in shared memory as the splits' do in global memory.
  acc* partials = reinterpret_cast<acc*>(shared_memory());  // [warps][size + 2]
  acc* factors = partials + kStepWarps * (size + 2);        // [warps], or of all splits
  Softmaxed<acc> warp{warp_max(mine.largest), 0};
  const acc factor = exponential(mine.largest - warp.shift());
  Cols::multiply(context, factor);
  columns.sum_of_teams(context);
  warp.total = columns.sum_of_teams(mine.total * factor);
  if (threadIdx.x % kWarp < columns.lanes) {
    acc* to = partials + threadIdx.x / kWarp * (size + 2);
    columns.for_each([&](int p, int i, int64_t d) { to[d] = context[p][i]; });
    if (columns.lane() == 0) {
      to[size] = warp.largest;
      to[size + 1] = warp.total;
    }
  }
  sync_threads();  // every warp's result and scores are there
  Softmaxed<acc> all = merge_softmaxes(partials, kStepWarps, size, factors);
  if (call.splits.count == 1) {
    finish_step<scalar>(call, place, partials, kStepWarps, factors, all);
    return;
  }
  const int64_t count = call.splits.count;
  acc* of_splits = static_cast<acc*>(call.splits.partials) + place.b * count * (size + 2);  // [count][size + 2]
  acc* to = of_splits + place.split * (size + 2);
  for (int64_t d = threadIdx.x; d < size; d += kStepBlock) {
    to[d] = merged_column(partials, kStepWarps, size + 2, factors, d);
  }
  if (threadIdx.x == 0) {
    to[size] = all.largest;
    to[size + 1] = all.total;
  }
  if (place.is_last(call.splits)) {
    all = merge_softmaxes(of_splits, count, size, factors);
    finish_step<scalar>(call, place, of_splits, count, factors, all);
  }
}

// g . c + sum_s a_s gw_s, of a whole batch element.
template <class scalar, int pieces, int rows>
__device__ __forceinline__ accumulated_t<scalar> delta_of(
    const OneStepBackward& call,
    const Place& place,
    const Columns<scalar, pieces, rows>& columns,
    const accumulated_t<scalar> (&grad)[pieces][kLanes<scalar>]) {
  using acc = accumulated_t<scalar>;
  const Problem& problem = call.problem;
  acc sum = 0;
  if (threadIdx.x < columns.lanes) {
    const acc* context = static_cast<const acc*>(call.context) + place.b * columns.size;
    columns.for_each([&](int p, int i, int64_t d) { sum += grad[p][i] * context[d]; });
  }
  if (call.grad_weights.data != nullptr) {
    const Attendable may_attend(problem, place.b, 0);
    const acc* weights = static_cast<const acc*>(call.weights) + place.b * problem.steps;
    const scalar* grad_weights = row_of<scalar>(call.grad_weights, place.b, 0);
    for (int64_t s = threadIdx.x; s < problem.steps; s += kStepBlock) {
      sum += may_attend(s) ? weights[s] * to_acc(grad_weights[s * call.grad_weights.element]) : acc(0);
    }
  }
  acc* of_warps = reinterpret_cast<acc*>(shared_memory());
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) {
    of_warps[threadIdx.x / kWarp] = sum;
  }
  sync_threads();  // every warp's is there
  sum = 0;
#pragma unroll
  for (int w = 0; w < kStepWarps; ++w) {
    sum += of_warps[w];
  }
  sync_threads();  // they have been read
  return sum;
}

template <class scalar, int pieces, int rows>
__global__ void __launch_bounds__(kStepBlock, 1)
    differentiate_one_step(const OneStepBackward call, const Columns<scalar, pieces, rows> columns) {
  using acc = accumulated_t<scalar>;
  using Cols = Columns<scalar, pieces, rows>;
  const Problem& problem = call.problem;
  const Place place(problem, call.splits);
  const Attendable may_attend(problem, place.b, 0);
  const int64_t size = columns.size, first = place.b * problem.steps;
  const int teams = kStepBlock / columns.lanes, team = threadIdx.x / columns.lanes;
  const acc scale = static_cast<acc>(problem.scale);
  const acc* weights = call.weights == nullptr ? nullptr : static_cast<const acc*>(call.weights) + first;
  const acc logsumexp = weights == nullptr ? static_cast<const acc*>(call.logsumexp)[place.b] : acc(0);
  const scalar* grad_weights = call.grad_weights.data == nullptr ? nullptr : row_of<scalar>(call.grad_weights, place.b, 0);
  acc query[pieces][Cols::kEach], grad[pieces][Cols::kEach], grad_query[pieces][Cols::kEach];
  columns.load(query, row_of<scalar>(problem.query, place.b, 0), problem.query.element);
  const bool has_grad = call.grad_context.data != nullptr;
  columns.load(grad, has_grad ? row_of<scalar>(call.grad_context, place.b, 0) : nullptr, call.grad_context.element);
  columns.clear(grad_query);
  const acc delta = delta_of(call, place, columns, grad);
  for (int64_t s0 = place.begin; s0 < place.end; s0 += teams * rows) {
    Vector16 row[rows][pieces];
    bool attends[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int64_t s = s0 + r * teams + team;
      attends[r] = s < place.end && may_attend(s);
      if (attends[r]) {
        columns.load(row[r], row_of<scalar>(problem.memory, place.b, s), problem.memory.element);
      } else {
#pragma unroll
        for (int p = 0; p < pieces; ++p) {
          row[r][p] = Vector16{};
        }
      }
    }
    acc weight[rows], grad_score[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      weight[r] = weights == nullptr ? Cols::dot(query, row[r]) : acc(0);
      grad_score[r] = Cols::dot(grad, row[r]);
    }
    if (weights == nullptr) {
      columns.sum_in_team(weight);
    }
    columns.sum_in_team(grad_score);
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const int64_t s = s0 + r * teams + team;
      if (attends[r]) {
        weight[r] = weights != nullptr ? weights[s] : exponential(scale * weight[r] - logsumexp);
        grad_score[r] += grad_weights != nullptr ? to_acc(grad_weights[s * call.grad_weights.element]) : acc(0);
        grad_score[r] = scale * (weight[r] * (grad_score[r] - delta));
        Cols::add(grad_query, grad_score[r], row[r]);
      } else {
        weight[r] = grad_score[r] = 0;
      }
      if (s < place.end && call.grad_memory != nullptr) {
        acc grad_row[pieces][Cols::kEach];
#pragma unroll
        for (int p = 0; p < pieces; ++p) {
#pragma unroll
          for (int i = 0; i < Cols::kEach; ++i) {
            grad_row[p][i] = attends[r] ? weight[r] * grad[p][i] + grad_score[r] * query[p][i] : acc(0);
          }
        }
        columns.store(static_cast<scalar*>(call.grad_memory) + (first + s) * size, grad_row);
      }
      if (s < place.end && call.grad_scores != nullptr && columns.lane() == 0) {
        static_cast<acc*>(call.grad_scores)[first + s] = grad_score[r];
      }
    }
  }
  if (call.grad_query == nullptr) {
    return;
  }

  acc* partials = reinterpret_cast<acc*>(shared_memory());  // [warps][size]
  columns.sum_of_teams(grad_query);
  if (threadIdx.x % kWarp < columns.lanes) {
    acc* to = partials + threadIdx.x / kWarp * size;
    columns.for_each([&](int p, int i, int64_t d) { to[d] = grad_query[p][i]; });
  }
  sync_threads();  // every warp's is there
  const int64_t count = call.splits.count;
  acc* of_splits = static_cast<acc*>(call.splits.partials) + place.b * count * size;  // [count][size]
  scalar* to = static_cast<scalar*>(call.grad_query) + place.b * size;
  for (int64_t d = threadIdx.x; d < size; d += kStepBlock) {
    const acc sum = merged_column<acc>(partials, kStepWarps, size, nullptr, d);
    if (count == 1) {
      to[d] = from_acc<scalar>(sum);
    } else {
      of_splits[place.split * size + d] = sum;
    }
  }
  if (count > 1 && place.is_last(call.splits)) {
    for (int64_t d = threadIdx.x; d < size; d += kStepBlock) {
      to[d] = from_acc<scalar>(merged_column<acc>(of_splits, count, size, nullptr, d));
    }
  }
}

}  // namespace attn_ext::cuda

// One query a batch element with additive scores (the equations are in additive.cuh), of any rows: those longer than a warp's
// registers hold, or not to be read 16 bytes at a time, come here; one_step_additive_streamed.cuh has the others. Keys and memory
// are each read once, and the keys once more by a backward that was left no weights.
//
//   forward    e_s = scale v . tanh(q + k_s), p_s = exp(e_s - max);  c = sum_s p_s m_s / sum_s p_s
//   backward   delta = g . c + sum_s a_s gw_s;  de_s = scale a_s (g . m_s + gw_s - delta);  dm_s = a_s g, and dq, dk, dv from de
//
// A block has a split of the steps, whose scores are in shared memory. Where a row becomes a number (a score, g . m_s), it is a
// warp's, several at once; where rows are summed (the context, dq, dv) a thread has 16 bytes of a column and walks the rows,
// several threads abreast where a row is short. Bound by memory: for one query there are as many exponentials either way, two
// special functions an element, taken directly.
#pragma once

#include "additive.cuh"
#include "kernels.h"
#include "mask.cuh"
#include "one_step.cuh"
#include "view.cuh"

#include <type_traits>

namespace attn_ext::cuda {

constexpr int kStepPanel = 1024;  // elements of the row that all rows meet, in shared memory at a time
constexpr int kStepRows = 4;      // in flight

template <class acc>
struct AdditiveStepShared {
  acc* panel;   // [kStepPanel]
  acc* scores;  // [steps of a split]; backward: its weights
  acc* grads;   // [steps of a split], backward only: da, then de

  __device__ __forceinline__ explicit AdditiveStepShared(const Splits& splits)
      : panel(reinterpret_cast<acc*>(shared_memory())), scores(panel + kStepPanel), grads(scores + splits.steps) {}

  static size_t size(const Splits& splits, bool has_grads) {
    return (kStepPanel + (has_grads ? 2 : 1) * splits.steps) * sizeof(acc);
  }
};

// Rows of a tensor, 16 bytes at a time.
template <class scalar>
struct StepRows {
  using acc = accumulated_t<scalar>;
  static constexpr int kEach = kLanes<scalar>;

  const scalar* first;  // of the split
  int64_t row;
  int64_t element;
  int64_t size;
  bool by_vectors;

  __device__ __forceinline__ StepRows(const View& view, const Place& place, int64_t size, bool by_vectors)
      : first(row_of<scalar>(view, place.b, place.begin)),
        row(view.row_stride),
        element(view.element_stride),
        size(size),
        by_vectors(by_vectors) {}

  // Elements from `at` < size on, and zeros behind them.
  __device__ __forceinline__ Vector16 load(int s, int64_t at) const {
    const scalar* from = first + s * row;
    return by_vectors ? load16_streaming(from + at) : load_piece(from, element, at, size, false);
  }
};

// Into an output's row.
template <class scalar>
__device__ __forceinline__ void store_piece(
    scalar* row, int64_t at, int64_t size, const accumulated_t<scalar> (&x)[kLanes<scalar>]) {
  if (size % kLanes<scalar> == 0) {
    store16_streaming(row + at, pack<scalar>(x));
    return;
  }
#pragma unroll
  for (int i = 0; i < kLanes<scalar>; ++i) {
    if (at + i < size) {
      row[at + i] = from_acc<scalar>(x[i]);
    }
  }
}

// body(at, count) for kStepPanel / rows elements at a time of one or two rows [size], which then stand in `panel`, one behind the
// other, with zeros up to whole pieces. A row that is null is zeros.
template <class scalar, int rows, class Body>
__device__ __forceinline__ void for_panels(
    accumulated_t<scalar>* panel,
    const scalar* const (&row)[rows],
    const int64_t (&element)[rows],
    int64_t size,
    const Body& body) {
  constexpr int most = kStepPanel / rows;
  for (int64_t at = 0; at < size; at += most) {
    const int count = static_cast<int>(size - at < most ? size - at : most);
    sync_threads();  // the last panel, or whatever was there, has been read
    for (int i = threadIdx.x; i < (count + kLanes<scalar> - 1) / kLanes<scalar> * kLanes<scalar>; i += kStepBlock) {
#pragma unroll
      for (int n = 0; n < rows; ++n) {
        panel[n * most + i] = row[n] != nullptr && i < count ? to_acc(row[n][(at + i) * element[n]]) : accumulated_t<scalar>(0);
      }
    }
    sync_threads();  // the panel is there
    body(at, count);
  }
}

// body(s, wanted) for a warp's kStepRows steps at a time: wanted[r] says whether wants(s + r).
template <class Wants, class Body>
__device__ __forceinline__ void for_rows_of_warp(int count, const Wants& wants, const Body& body) {
  for (int s = threadIdx.x / kWarp * kStepRows; s < count; s += kStepWarps * kStepRows) {
    bool wanted[kStepRows];
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
      wanted[r] = s + r < count && wants(s + r);
    }
    body(s, wanted);
  }
}

// scores[s] = scale v . tanh(q + k_s), -inf where the query may not attend. Of the split; complete after a barrier.
template <class scalar>
__device__ __forceinline__ void additive_scores_of(
    const Problem& problem,
    const Place& place,
    const Attendable& may_attend,
    bool by_vectors,
    const AdditiveStepShared<accumulated_t<scalar>>& shared) {
  using acc = accumulated_t<scalar>;
  using Rows = StepRows<scalar>;
  constexpr int each = Rows::kEach;
  const Rows keys(problem.keys, place, problem.key_size, by_vectors);
  const int count = static_cast<int>(place.end - place.begin), lane = threadIdx.x % kWarp;
  for (int s = threadIdx.x; s < count; s += kStepBlock) {
    shared.scores[s] = may_attend(place.begin + s) ? acc(0) : -kInfinity<acc>;
  }
  const scalar* const rows[2] = {row_of<scalar>(problem.query, place.b, 0), static_cast<const scalar*>(problem.v.data)};
  const int64_t elements[2] = {problem.query.element_stride, problem.v.element_stride};
  for_panels<scalar, 2>(shared.panel, rows, elements, problem.key_size, [&](int64_t first, int size) {
    const auto attends = [&](int s) { return shared.scores[s] != -kInfinity<acc>; };
    for_rows_of_warp(count, attends, [&](int s, const bool (&wanted)[kStepRows]) {
      acc sums[kStepRows] = {};
      for (int at = lane * each; at < size; at += kWarp * each) {
        Vector16 piece[kStepRows];
#pragma unroll
        for (int r = 0; r < kStepRows; ++r) {
          piece[r] = wanted[r] ? keys.load(s + r, first + at) : Vector16{};
        }
        acc q[each], v[each];
        load_shared(q, shared.panel + at);
        load_shared(v, shared.panel + kStepPanel / 2 + at);
#pragma unroll
        for (int r = 0; r < kStepRows; ++r) {
          acc k[each];
          unpack<scalar>(k, piece[r]);
#pragma unroll
          for (int i = 0; i < each; ++i) {
            sums[r] = fused(v[i], direct_term(q[i], k[i]), sums[r]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) {
        sums[r] = warp_sum(sums[r]);
      }
      sync_warp();  // every lane knows who attends
      if (lane == 0) {
#pragma unroll
        for (int r = 0; r < kStepRows; ++r) {
          if (wanted[r]) {
            shared.scores[s + r] += -2 * static_cast<acc>(problem.scale) * sums[r];
          }
        }
      }
    });
  });
}

// A thread's 16 bytes of the columns, and which rows it walks: group, group + groups, ... They are taken in rounds where there are
// more pieces than threads.
struct StepColumns {
  int64_t pieces;
  int width;  // pieces abreast
  int groups;
  int group;
  int place;

  __device__ __forceinline__ StepColumns(int64_t size, int each)
      : pieces((size + each - 1) / each),
        width(static_cast<int>(pieces < kStepBlock ? pieces : kStepBlock)),
        groups(width > 0 ? kStepBlock / width : 0),
        group(width > 0 ? threadIdx.x / width : 0),
        place(width > 0 ? threadIdx.x % width : 0) {}

  __device__ __forceinline__ bool has(int64_t round) const {
    return group < groups && round + place < pieces;
  }

  // The first row it walks; `count` where it has no column.
  __device__ __forceinline__ int first(int64_t round, int count) const {
    return has(round) ? group : count;
  }

  __device__ __forceinline__ int64_t at(int64_t round, int each) const {
    return (round + place) * each;
  }

  // store(at, sum over the groups of x at column `at` of `size`), in their order, by way of shared memory [kStepBlock * each].
  template <class acc, int each, class Store>
  __device__ __forceinline__ void sum(acc* parts, const acc (&x)[each], int64_t round, int64_t size, const Store& store) const {
    sync_threads();  // what stood there has been read
    if (has(round)) {
#pragma unroll
      for (int i = 0; i < each; ++i) {
        parts[(group * width + place) * each + i] = x[i];
      }
    }
    sync_threads();  // every group's is there
    for (int i = threadIdx.x; i < width * each && round * each + i < size; i += kStepBlock) {
      acc all = 0;
      for (int n = 0; n < groups; ++n) {
        all += parts[n * width * each + i];
      }
      store(round * each + i, all);
    }
  }
};

template <class scalar>
__global__ void __launch_bounds__(kStepBlock, kStepBlocks)
    attend_one_step_additive(const OneStep call, bool keys_by_vectors, bool memory_by_vectors) {
  using acc = accumulated_t<scalar>;
  using Rows = StepRows<scalar>;
  const Problem& problem = call.problem;
  let_next_launch_begin();
  const Place place(problem, call.splits);
  const Attendable may_attend(problem, place.b, 0);
  const AdditiveStepShared<acc> shared(call.splits);
  const int count = static_cast<int>(place.end - place.begin);
  const int64_t size = problem.memory_size;
  additive_scores_of<scalar>(problem, place, may_attend, keys_by_vectors, shared);
  sync_threads();  // the scores are there

  Softmaxed<acc> mine;
  for (int s = threadIdx.x; s < count; s += kStepBlock) {
    mine.largest = shared.scores[s] > mine.largest ? shared.scores[s] : mine.largest;
  }
  mine.largest = block_max(mine.largest, shared.panel);
  acc* scores = part_of<acc>(call.scores, place.b * problem.steps + place.begin);
  for (int s = threadIdx.x; s < count; s += kStepBlock) {
    if (scores != nullptr) {
      scores[s] = shared.scores[s];
    }
    shared.scores[s] = exponential(shared.scores[s] - mine.shift());
    mine.total += shared.scores[s];
  }
  mine.total = block_sum(mine.total, shared.panel);

  const int64_t splits = call.splits.count;
  acc* partials = part_of<acc>(call.splits.partials, place.b * splits * (size + 2));  // [splits][size + 2]
  const Rows memory(problem.memory, place, size, memory_by_vectors);
  const StepColumns columns(size, Rows::kEach);
  for (int64_t round = 0; round < columns.pieces; round += columns.width) {
    acc context[Rows::kEach] = {};
    for (int s = columns.first(round, count); s < count; s += kStepRows * columns.groups) {
      acc weight[kStepRows];
      Vector16 piece[kStepRows];
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) {
        const int step = s + r * columns.groups;
        weight[r] = step < count ? shared.scores[step] : acc(0);
        piece[r] = weight[r] != 0 ? memory.load(step, columns.at(round, Rows::kEach)) : Vector16{};
      }
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) {
        acc row[Rows::kEach];
        unpack<scalar>(row, piece[r]);
#pragma unroll
        for (int i = 0; i < Rows::kEach; ++i) {
          context[i] += weight[r] * row[i];
        }
      }
    }
    columns.sum(shared.panel, context, round, size, [&](int64_t d, acc sum) {
      if (splits == 1) {
        store_context<scalar>(call, place.b, d, sum * mine.inverse());
      } else {
        partials[place.split * (size + 2) + d] = sum;
      }
    });
  }
  if (splits == 1) {
    finish_weights<scalar>(call, place.b, mine, threadIdx.x, kStepBlock);
  } else if (threadIdx.x == 0) {
    acc* behind = partials + place.split * (size + 2) + size;
    behind[0] = mine.largest;
    behind[1] = mine.total;
  }
}

// shared.scores = a, shared.grads = de, of the split; complete after a barrier. On the way, dm.
template <class scalar>
__device__ __forceinline__ void grad_scores_of(
    const OneStepBackward& call,
    const Place& place,
    bool keys_by_vectors,
    bool memory_by_vectors,
    const AdditiveStepShared<accumulated_t<scalar>>& shared) {
  using acc = accumulated_t<scalar>;
  using Rows = StepRows<scalar>;
  constexpr int each = Rows::kEach;
  const Problem& problem = call.problem;
  const Attendable may_attend(problem, place.b, 0);
  const int count = static_cast<int>(place.end - place.begin), lane = threadIdx.x % kWarp;
  const int64_t first_step = place.b * problem.steps + place.begin, size = problem.memory_size;
  const acc* weights = call.weights == nullptr ? nullptr : static_cast<const acc*>(call.weights) + first_step;
  if (weights == nullptr) {
    additive_scores_of<scalar>(problem, place, may_attend, keys_by_vectors, shared);
    sync_threads();  // the scores are there
  }
  const acc logsumexp = weights == nullptr ? shift_of(static_cast<const acc*>(call.logsumexp)[place.b]) : acc(0);
  for (int s = threadIdx.x; s < count; s += kStepBlock) {
    const bool attends = may_attend(place.begin + s);
    shared.scores[s] = !attends ? acc(0) : weights != nullptr ? weights[s] : exponential(shared.scores[s] - logsumexp);
    shared.grads[s] = 0;
  }
  const acc delta_weights = delta_of_weights<scalar>(call, place, may_attend, shared.panel);

  const Rows memory(problem.memory, place, size, memory_by_vectors);
  const bool has_grad = call.grad_context.data != nullptr;
  const scalar* const grad_context[1] = {has_grad ? row_of<scalar>(call.grad_context, place.b, 0) : nullptr};
  const int64_t elements[1] = {call.grad_context.element_stride};
  scalar* grad_memory = part_of<scalar>(call.grad_memory, first_step * size);
  const acc* context = static_cast<const acc*>(call.context) + place.b * size;
  acc delta = 0;  // g . c
  for_panels<scalar, 1>(shared.panel, grad_context, elements, size, [&](int64_t first, int panel_size) {
    // As g . m_s is summed: where a step has all the weight, c is m_s, and their difference 0 to the last bit.
    acc of_panel = 0;
    for (int at = lane * each; has_grad && at < panel_size; at += kWarp * each) {
      acc grad[each];
      load_shared(grad, shared.panel + at);
#pragma unroll
      for (int i = 0; i < each; ++i) {
        of_panel = fused(grad[i], first + at + i < size ? context[first + at + i] : acc(0), of_panel);
      }
    }
    delta += warp_sum(of_panel);
    // A weight of 0 passes nothing on, whatever came in.
    const auto passes = [&](int s) { return has_grad && shared.scores[s] != 0; };
    for_rows_of_warp(count, passes, [&](int s, const bool (&wanted)[kStepRows]) {
      acc sums[kStepRows] = {};
      for (int at = lane * each; at < panel_size; at += kWarp * each) {
        Vector16 piece[kStepRows];
#pragma unroll
        for (int r = 0; r < kStepRows; ++r) {
          piece[r] = wanted[r] ? memory.load(s + r, first + at) : Vector16{};
        }
        acc grad[each];
        load_shared(grad, shared.panel + at);
#pragma unroll
        for (int r = 0; r < kStepRows; ++r) {
          acc row[each];
          unpack<scalar>(row, piece[r]);
#pragma unroll
          for (int i = 0; i < each; ++i) {
            sums[r] = fused(grad[i], row[i], sums[r]);
            row[i] = wanted[r] ? shared.scores[s + r] * grad[i] : acc(0);
          }
          if (grad_memory != nullptr && s + r < count) {
            store_piece(grad_memory + (s + r) * size, first + at, size, row);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kStepRows; ++r) {
        sums[r] = warp_sum(sums[r]);
        if (lane == 0 && wanted[r]) {
          shared.grads[s + r] += sums[r];
        }
      }
    });
  });
  sync_threads();  // g . m is there
  const scalar* grad_weights = call.grad_weights.data == nullptr ? nullptr : row_of<scalar>(call.grad_weights, place.b, 0);
  acc* grad_scores = part_of<acc>(call.grad_scores, first_step);
  for (int s = threadIdx.x; s < count; s += kStepBlock) {
    const acc weight = shared.scores[s];
    acc grad = 0;
    if (weight != 0) {
      grad = grad_weights != nullptr ? to_acc(grad_weights[(place.begin + s) * call.grad_weights.element_stride]) : acc(0);
      grad = static_cast<acc>(problem.scale) * (weight * ((shared.grads[s] - delta) + (grad - delta_weights)));
    }
    shared.grads[s] = grad;
    if (grad_scores != nullptr) {
      grad_scores[s] = grad;
    }
  }
}

template <class scalar>
__global__ void __launch_bounds__(kStepBlock, kStepBlocks)
    differentiate_one_step_additive(const OneStepBackward call, bool keys_by_vectors, bool memory_by_vectors) {
  using acc = accumulated_t<scalar>;
  using Rows = StepRows<scalar>;
  constexpr int each = Rows::kEach, rows = kStepRows / 2;
  const Problem& problem = call.problem;
  let_next_launch_begin();
  const Place place(problem, call.splits);
  const AdditiveStepShared<acc> shared(call.splits);
  const int count = static_cast<int>(place.end - place.begin);
  const int64_t size = problem.key_size, splits = call.splits.count;
  grad_scores_of<scalar>(call, place, keys_by_vectors, memory_by_vectors, shared);
  sync_threads();  // de is there

  const Rows keys(problem.keys, place, size, keys_by_vectors);
  scalar* grad_keys = part_of<scalar>(call.grad_keys, (place.b * problem.steps + place.begin) * size);
  scalar* grad_query = part_of<scalar>(call.grad_query, place.b * size);
  acc* grad_v = part_of<acc>(call.partial_grad_v, (place.b * splits + place.split) * size);
  acc* partials = part_of<acc>(call.splits.partials, place.b * splits * size);  // [splits][size]
  const StepColumns columns(size, each);
  for (int64_t round = 0; round < columns.pieces; round += columns.width) {
    const int64_t at = columns.at(round, each);
    acc query[each], v[each], to_query[each] = {}, to_v[each] = {};
    unpack<scalar>(query, load_piece(row_of<scalar>(problem.query, place.b, 0), problem.query.element_stride, at, size, false));
    unpack<scalar>(v, load_piece(static_cast<const scalar*>(problem.v.data), problem.v.element_stride, at, size, false));
    for (int s = columns.first(round, count); s < count; s += rows * columns.groups) {
      acc grad[rows];
      Vector16 piece[rows];
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const int step = s + r * columns.groups;
        grad[r] = step < count ? shared.grads[step] : acc(0);
        piece[r] = grad[r] != 0 ? keys.load(step, at) : Vector16{};
      }
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const int step = s + r * columns.groups;
        acc row[each];
        unpack<scalar>(row, piece[r]);
#pragma unroll
        for (int i = 0; i < each; ++i) {
          const acc h = direct_centred(query[i], row[i]);
          const acc y = grad[r] != 0 ? grad[r] * (acc(0.25) - h * h) : acc(0);
          to_query[i] += y;
          to_v[i] += grad[r] != 0 ? grad[r] * h : acc(0);
          row[i] = y != 0 ? 4 * v[i] * y : acc(0);  // of a masked row, whatever v is
        }
        if (grad_keys != nullptr && step < count) {
          store_piece(grad_keys + step * size, at, size, row);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < each; ++i) {
      to_query[i] *= 4 * v[i];
      to_v[i] *= -2;
    }
    columns.sum(shared.panel, to_query, round, size, [&](int64_t a, acc sum) {
      if (partials != nullptr) {
        partials[place.split * size + a] = sum;
      } else if (grad_query != nullptr) {
        grad_query[a] = from_acc<scalar>(sum);
      }
    });
    if (grad_v != nullptr) {
      columns.sum(shared.panel, to_v, round, size, [&](int64_t a, acc sum) { grad_v[a] = sum; });
    }
  }
}

}  // namespace attn_ext::cuda

// One query a batch element with additive scores, of rows that a warp holds in its registers and that can be read 16 bytes at a
// time (the equations are in one_step_additive.cuh, whose kernels take the others).
//
// A team of lanes, up to a warp, has a step: its key and its row of memory, from the score to the context, or to all its
// gradients, which are taken from the tanh that the score left in registers. So each row is read once and written once, and there
// is no barrier before the teams' results are merged. A lane always has the same columns. It copies them itself, some steps ahead,
// into a FIFO of its own in shared memory, while it computes: bound by memory, if with two special functions an element beside.
#pragma once

#include "one_step_additive.cuh"

namespace attn_ext::cuda {

// Pieces of 16 bytes that a thread has under way of keys, and as many of memory: 32 KB a block.
constexpr int kAheadPieces = 8;

// A step's two rows, and a lane's columns of either.
template <class scalar_, int pieces>
struct StreamedTeams : LanesOfRow<scalar_, pieces> {
  using scalar = scalar_;
  using Lanes = LanesOfRow<scalar, pieces>;
  using Lanes::kEach;
  using Lanes::lanes;
  using Lanes::piece;
  using Lanes::teams;
  using typename Lanes::acc;
  static constexpr int kPieces = pieces;
  static constexpr int kWords = pieces * kEach * sizeof(acc) / 4;  // registers of a row
  static constexpr int kRows = kWords < 16 ? 2 : 1;                // of a team at once: of a short one there is little to overlap
  static constexpr int kStages = kAheadPieces / (pieces * kRows);
  // Blocks that a multiprocessor is to have registers for: rows of more bytes need fewer of them.
  static constexpr int kForwardBlocks = pieces > 4 ? 3 : kWords > 16 ? 4 : 5;
  static constexpr int kBackwardBlocks = pieces > 4 ? 2 : kWords > 16 || sizeof(scalar) > 2 ? 3 : 4;
  static_assert(kStages * kRows * pieces == kAheadPieces && kRows * kStages <= 32);

  int key_size;
  int memory_size;
  bool query_by_vectors;
  bool v_by_vectors;
  bool grad_by_vectors;  // the context's, backward only

  // Steps that the block takes at once.
  __device__ __forceinline__ int stride() const {
    return teams() * kRows;
  }

  // Whether any lane has this piece of a row: the others' are zeros.
  __device__ __forceinline__ bool has(int p, int size) const {
    return p == 0 || p * lanes() * kEach < size;
  }

  // A row that all rows meet, into shared memory [pieces * lanes] as it is stored, zeros behind it; all zeros where it is null.
  __device__ __forceinline__ void bring(Vector16* to, const scalar* row, int64_t element, int size, bool by_vectors) const {
    for (int i = threadIdx.x; i < pieces * lanes(); i += kStepBlock) {
      if (by_vectors) {
        copy_async16(to + i, row + i * kEach, row != nullptr && i * kEach < size);
      } else {
        store16(to + i, load_piece(row, element, i * kEach, row == nullptr ? 0 : size, false));
      }
    }
  }

  __device__ __forceinline__ void load(acc (&to)[kEach], const Vector16* row, int p) const {
    unpack<scalar>(to, load16(row + piece(p)));
  }
};

// The rows of a block's steps as they come: kStages of them are under way, each kRows a team. Where a query may not attend, zeros.
// A stage is a group of keys and a group of memory; what a thread asked for, no other one reads.
template <class Teams>
struct StepStream {
  using scalar = typename Teams::scalar;
  static constexpr int kStage = Teams::kRows * Teams::kPieces * kStepBlock;  // Vector16, of keys or of memory
  static constexpr size_t kShared = 2 * Teams::kStages * kStage * sizeof(Vector16);
  static constexpr int kPending = 2 * Teams::kStages - 1;  // groups behind the one that is due

  const Teams& teams;
  const Problem& problem;
  const Attendable& may_attend;
  const Place& place;
  int count;    // of the split's steps, those behind which nothing is attended
  int due = 0;  // this team's first step of the stage that is due, from the split's first
  int stage = 0;
  const scalar* keys;      // of this team's first step to ask for, from the lane's first column on
  const scalar* memories;  // likewise
  uint32_t attended = 0;   // [kStages][kRows]

  __device__ __forceinline__
  StepStream(const Teams& teams, const Problem& problem, const Attendable& may_attend, const Place& place, int count)
      : teams(teams),
        problem(problem),
        may_attend(may_attend),
        place(place),
        count(count),
        due(teams.team()),
        keys(row_of<scalar>(problem.keys, place.b, place.begin + teams.team()) + teams.column(0)),
        memories(row_of<scalar>(problem.memory, place.b, place.begin + teams.team()) + teams.column(0)) {
#pragma unroll 1
    for (int n = 0; n < Teams::kStages; ++n) {
      ask_for_keys(0);
      ask_for_memory();
    }
    due = teams.team();
  }

  // The r-th step of the stage that is due.
  __device__ __forceinline__ int step(int r) const {
    return due + r * teams.teams();
  }

  __device__ __forceinline__ bool attends(int r) const {
    return (attended >> (stage * Teams::kRows + r) & 1) != 0;
  }

  __device__ __forceinline__ Vector16 key(int r, int p) const {
    return load16(slot(0, r, p));
  }

  __device__ __forceinline__ Vector16 memory(int r, int p) const {
    return load16(slot(1, r, p));
  }

  // In the place of what was due and has been read, `ahead` steps behind it; memory's turns to the next stage.
  __device__ __forceinline__ void ask_for_keys(int ahead) {
#pragma unroll
    for (int r = 0; r < Teams::kRows; ++r) {
      const int s = step(r) + ahead;
      const uint32_t bit = 1u << (stage * Teams::kRows + r);
      attended = s < count && may_attend(place.begin + s) ? attended | bit : attended & ~bit;
    }
    ask_for(0, keys, problem.keys.row_stride, teams.key_size);
  }

  __device__ __forceinline__ void ask_for_memory() {
    ask_for(1, memories, problem.memory.row_stride, teams.memory_size);
    due += teams.stride();
    stage = stage + 1 == Teams::kStages ? 0 : stage + 1;
  }

 private:
  __device__ __forceinline__ Vector16* slot(int which, int r, int p) const {
    Vector16* fifo = reinterpret_cast<Vector16*>(shared_memory());
    return fifo + (2 * stage + which) * kStage + (r * Teams::kPieces + p) * kStepBlock + threadIdx.x;
  }

  __device__ __forceinline__ void ask_for(int which, const scalar*& from, int64_t row, int size) const {
#pragma unroll
    for (int r = 0; r < Teams::kRows; ++r) {
#pragma unroll
      for (int p = 0; p < Teams::kPieces; ++p) {
        if (teams.has(p, size)) {
          copy_async16(slot(which, r, p), from + p * kWarp * Teams::kEach, attends(r) && teams.column(p) < size);
        }
      }
      from += teams.teams() * row;
    }
    commit_copies();
  }
};

// What the key's features add to the scores, times -2 scale, of the stage that is due; keep(r, p, i, term) is told each by itself.
template <class Teams, class Keep>
__device__ __forceinline__ void streamed_scores(
    typename Teams::acc (&sums)[Teams::kRows],
    const Teams& teams,
    const StepStream<Teams>& stream,
    const Vector16* query,
    const Vector16* v,
    const Keep& keep) {
  using acc = typename Teams::acc;
#pragma unroll
  for (int p = 0; p < Teams::kPieces; ++p) {
    if (teams.has(p, teams.key_size)) {
      acc of_query[Teams::kEach], of_v[Teams::kEach];
      teams.load(of_query, query, p);
      teams.load(of_v, v, p);
#pragma unroll
      for (int r = 0; r < Teams::kRows; ++r) {
        acc key[Teams::kEach];
        unpack<typename Teams::scalar>(key, stream.key(r, p));
#pragma unroll
        for (int i = 0; i < Teams::kEach; ++i) {
          const acc term = direct_term(of_query[i], key[i]);
          sums[r] = fused(of_v[i], term, sums[r]);
          keep(r, p, i, term);
        }
      }
    }
  }
}

template <class scalar, int pieces>
__global__ void __launch_bounds__(kStepBlock, (StreamedTeams<scalar, pieces>::kForwardBlocks))
    attend_one_step_additive_streamed(const OneStep call, const StreamedTeams<scalar, pieces> teams) {
  using acc = accumulated_t<scalar>;
  using Teams = StreamedTeams<scalar, pieces>;
  using Stream = StepStream<Teams>;
  constexpr int rows = Teams::kRows, each = Teams::kEach;
  const Problem& problem = call.problem;
  let_next_launch_begin();
  const Place place(problem, call.splits);
  const Attendable may_attend(problem, place.b, 0);
  const int size = teams.memory_size, steps = steps_to_attend(place, may_attend);
  const int ahead = Teams::kStages * teams.stride();
  acc* scores = part_of<acc>(call.scores, place.b * problem.steps + place.begin);
  Vector16* query = reinterpret_cast<Vector16*>(shared_memory() + Stream::kShared);  // [pieces * lanes]
  Vector16* v = query + pieces * teams.lanes();                                      // [pieces * lanes]
  teams.bring(
      query, row_of<scalar>(problem.query, place.b, 0), problem.query.element_stride, teams.key_size, teams.query_by_vectors);
  teams.bring(v, static_cast<const scalar*>(problem.v.data), problem.v.element_stride, teams.key_size, teams.v_by_vectors);
  commit_copies();
  Stream stream(teams, problem, may_attend, place, steps);
  wait_copies<Stream::kPending + 1>();
  sync_threads();  // query and v are there

  acc context[pieces][each] = {};
  Softmaxed<acc> mine;
  for (int s0 = 0; s0 < steps; s0 += teams.stride()) {
    acc score[rows] = {};
    const acc before = mine.largest;
    wait_copies<Stream::kPending>();
    streamed_scores(score, teams, stream, query, v, [](int, int, int, acc) {});
    teams.sum_in_team(score);
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      score[r] = stream.attends(r) ? product(-2 * static_cast<acc>(problem.scale), score[r]) : -kInfinity<acc>;
      mine.largest = score[r] > mine.largest ? score[r] : mine.largest;
      if (scores != nullptr && stream.attends(r) && teams.lane() == 0) {
        scores[stream.step(r)] = score[r];
      }
    }
    stream.ask_for_keys(ahead);
    const acc shift = mine.shift();
    if (before != mine.largest) {
      const acc factor = exponential(before - shift);
      mine.total *= factor;
      Teams::multiply(context, factor);
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      score[r] = exponential(score[r] - shift);
      mine.total += score[r];
    }
    wait_copies<Stream::kPending>();
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      if (teams.has(p, size)) {
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          acc row[each];
          unpack<scalar>(row, stream.memory(r, p));
#pragma unroll
          for (int i = 0; i < each; ++i) {
            context[p][i] += score[r] * row[i];
          }
        }
      }
    }
    stream.ask_for_memory();
  }

  wait_copies<0>();                                                    // the last ones are zeros: nobody has waited for them
  acc* sums = reinterpret_cast<acc*>(shared_memory());                 // [warps][size], in the streams' place
  acc* of_warps = reinterpret_cast<acc*>(v + pieces * teams.lanes());  // [2][warps]
  finish_split(call, place, teams, size, mine, context, sums, of_warps);
}

// 2h = -tanh from what a feature adds to a score.
__device__ __forceinline__ float doubled_centred(float term) {
  return fused(2, term, -1);
}

__device__ __forceinline__ double doubled_centred(double term) {
  return 2 * term;
}

// dm = a g of a step, to its row from the lane's first column on.
template <class scalar, int pieces>
__device__ __forceinline__ void store_memory_gradient(
    const StreamedTeams<scalar, pieces>& teams, scalar* to, accumulated_t<scalar> weight, const Vector16* grad) {
  constexpr int each = kLanes<scalar>;
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
    if (teams.has(p, teams.memory_size)) {
      accumulated_t<scalar> g[each];
      teams.load(g, grad, p);
#pragma unroll
      for (int i = 0; i < each; ++i) {
        g[i] *= weight;
      }
      const Vector16 out = pack<scalar>(g);
      if (teams.column(p) < teams.memory_size) {
        store16_streaming(to + p * kWarp * each, out);
      }
    }
  }
}

// A step's dk, to its row where that is wanted, and its share of dq, not yet times v, and of -dv; from de and 2h.
template <class scalar, int pieces>
__device__ __forceinline__ void add_key_gradient(
    const StreamedTeams<scalar, pieces>& teams,
    scalar* to,
    bool is_wanted,
    accumulated_t<scalar> grad_score,
    const accumulated_t<scalar> (&doubled)[pieces][kLanes<scalar>],
    const Vector16* v,
    accumulated_t<scalar> (&to_query)[pieces][kLanes<scalar>],
    accumulated_t<scalar> (&to_v)[pieces][kLanes<scalar>]) {
  using acc = accumulated_t<scalar>;
  constexpr int each = kLanes<scalar>;
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
    if (teams.has(p, teams.key_size)) {
      acc out[each];
      teams.load(out, v, p);
#pragma unroll
      for (int i = 0; i < each; ++i) {
        const acc h2 = doubled[p][i], for_v = grad_score * h2, y4 = fused(-for_v, h2, grad_score);
        to_query[p][i] += y4;
        to_v[p][i] += for_v;
        out[i] *= y4;
      }
      if (is_wanted && teams.column(p) < teams.key_size) {
        store16_streaming(to + p * kWarp * each, pack<scalar>(out));
      }
    }
  }
}

// The split's dq and dv from its teams' shares; of one split dq is the output.
template <class scalar, int pieces>
__device__ __forceinline__ void finish_gradients(
    const OneStepBackward& call,
    const Place& place,
    const StreamedTeams<scalar, pieces>& teams,
    const Vector16* v,
    accumulated_t<scalar> (&to_query)[pieces][kLanes<scalar>],
    const accumulated_t<scalar> (&to_v)[pieces][kLanes<scalar>]) {
  using acc = accumulated_t<scalar>;
  constexpr int each = kLanes<scalar>;
  const int key_size = teams.key_size;
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
    if (teams.column(p) < key_size) {
      acc x[each];
      teams.load(x, v, p);
#pragma unroll
      for (int i = 0; i < each; ++i) {
        to_query[p][i] *= x[i];
      }
    }
  }
  acc* queries = reinterpret_cast<acc*>(shared_memory());  // [warps][key_size]
  acc* vs = queries + kStepWarps * key_size;               // [warps][key_size]
  sync_threads();                                          // the streams, in whose place the sums stand, and v have been read
  teams.share(queries, to_query, 1, key_size);
  teams.share(vs, to_v, -1, key_size);
  sync_threads();  // every warp's is there
  const int64_t count = call.splits.count;
  acc* of_splits = part_of<acc>(call.splits.partials, place.b * count * key_size);  // [count][key_size]
  acc* grad_v = part_of<acc>(call.partial_grad_v, (place.b * count + place.split) * key_size);
  scalar* grad_query = part_of<scalar>(call.grad_query, place.b * key_size);
  for (int a = threadIdx.x; a < key_size; a += kStepBlock) {
    if (grad_query != nullptr) {
      const acc sum = shared_column(queries, key_size, a);
      if (count == 1) {
        grad_query[a] = from_acc<scalar>(sum);
      } else {
        of_splits[place.split * key_size + a] = sum;
      }
    }
    if (grad_v != nullptr) {
      grad_v[a] = shared_column(vs, key_size, a);
    }
  }
}

template <class scalar, int pieces>
__global__ void __launch_bounds__(kStepBlock, (StreamedTeams<scalar, pieces>::kBackwardBlocks))
    differentiate_one_step_additive_streamed(const OneStepBackward call, const StreamedTeams<scalar, pieces> teams) {
  using acc = accumulated_t<scalar>;
  using Teams = StreamedTeams<scalar, pieces>;
  using Stream = StepStream<Teams>;
  constexpr int rows = Teams::kRows, each = Teams::kEach;
  const Problem& problem = call.problem;
  let_next_launch_begin();
  const Place place(problem, call.splits);
  const Attendable may_attend(problem, place.b, 0);
  const int64_t first = place.b * problem.steps + place.begin;
  const int steps = steps_to_attend(place, may_attend), all_steps = static_cast<int>(place.end - place.begin);
  const int key_size = teams.key_size, memory_size = teams.memory_size;
  const int ahead = Teams::kStages * teams.stride();
  const acc scale = static_cast<acc>(problem.scale);
  // What a step reads and writes is found anew each time: addresses kept would take the registers of the sums.
  const bool has_weights = call.weights != nullptr, has_grad_weights = call.grad_weights.data != nullptr;
  const acc logsumexp = has_weights ? acc(0) : shift_of(static_cast<const acc*>(call.logsumexp)[place.b]);
  const scalar* grad_context = call.grad_context.data == nullptr ? nullptr : row_of<scalar>(call.grad_context, place.b, 0);
  const auto grad_row = [&](void* rows_of_all, int s, int size) {
    return static_cast<scalar*>(rows_of_all) + (first + s) * size + teams.column(0);
  };
  // A weight of 0 passes nothing on, whatever came in.
  const auto pass_nothing = [&](int s) {
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      if (call.grad_memory != nullptr && teams.column(p) < memory_size) {
        store16_streaming(grad_row(call.grad_memory, s, memory_size) + p * kWarp * each, Vector16{});
      }
      if (call.grad_keys != nullptr && teams.column(p) < key_size) {
        store16_streaming(grad_row(call.grad_keys, s, key_size) + p * kWarp * each, Vector16{});
      }
    }
    if (call.grad_scores != nullptr && teams.lane() == 0) {
      static_cast<acc*>(call.grad_scores)[first + s] = 0;
    }
  };

  Vector16* query = reinterpret_cast<Vector16*>(shared_memory() + Stream::kShared);  // [pieces * lanes] each
  Vector16* v = query + pieces * teams.lanes();
  Vector16* grad = v + pieces * teams.lanes();
  teams.bring(query, row_of<scalar>(problem.query, place.b, 0), problem.query.element_stride, key_size, teams.query_by_vectors);
  teams.bring(v, static_cast<const scalar*>(problem.v.data), problem.v.element_stride, key_size, teams.v_by_vectors);
  teams.bring(grad, grad_context, call.grad_context.element_stride, memory_size, teams.grad_by_vectors);
  commit_copies();
  Stream stream(teams, problem, may_attend, place, steps);
  acc context[pieces][each] = {};
  if (grad_context != nullptr) {
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
#pragma unroll
      for (int i = 0; i < each; ++i) {
        const int d = teams.column(p) + i;
        context[p][i] = d < memory_size ? static_cast<const acc*>(call.context)[place.b * memory_size + d] : acc(0);
      }
    }
  }
  acc delta_weights = 0;
  if (has_grad_weights) {
    acc* of_warps = reinterpret_cast<acc*>(grad + pieces * teams.lanes());  // [kStepWarps]
    delta_weights = delta_of_weights<scalar>(call, place, may_attend, of_warps);
  }
  wait_copies<Stream::kPending + 1>();
  sync_threads();  // query, v and grad are there

  // g . c as g . m_s is summed: where a step has all the weight, c is m_s, and their difference 0 to the last bit.
  acc delta[rows] = {};
#pragma unroll
  for (int p = 0; p < pieces; ++p) {
    if (teams.has(p, memory_size)) {
      acc g[each];
      teams.load(g, grad, p);
#pragma unroll
      for (int i = 0; i < each; ++i) {
        delta[0] = fused(g[i], context[p][i], delta[0]);
      }
    }
  }
  teams.sum_in_team(delta);

  acc to_query[pieces][each] = {}, to_v[pieces][each] = {};
  int s0 = 0;
  for (; s0 < steps; s0 += teams.stride()) {
    acc weight[rows] = {}, grad_score[rows] = {}, from_weights[rows], doubled[rows][pieces][each];
    bool attends[rows];
    int step[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      attends[r] = stream.attends(r);
      step[r] = stream.step(r);
      from_weights[r] = 0;
      if (has_grad_weights && attends[r]) {
        from_weights[r] =
            to_acc(row_of<scalar>(call.grad_weights, place.b, 0)[(place.begin + step[r]) * call.grad_weights.element_stride]) -
            delta_weights;
      }
    }
    wait_copies<Stream::kPending>();
    streamed_scores(
        weight, teams, stream, query, v, [&](int r, int p, int i, acc term) { doubled[r][p][i] = doubled_centred(term); });
    stream.ask_for_keys(ahead);
    if (!has_weights) {
      teams.sum_in_team(weight);
    }
    wait_copies<Stream::kPending>();
#pragma unroll
    for (int p = 0; p < pieces; ++p) {
      if (teams.has(p, memory_size)) {
        acc g[each];
        teams.load(g, grad, p);
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          acc row[each];
          unpack<scalar>(row, stream.memory(r, p));
#pragma unroll
          for (int i = 0; i < each; ++i) {
            grad_score[r] = fused(g[i], row[i], grad_score[r]);
          }
        }
      }
    }
    stream.ask_for_memory();
    teams.sum_in_team(grad_score);
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (!attends[r]) {
        weight[r] = 0;
      } else {
        weight[r] = has_weights ? static_cast<const acc*>(call.weights)[first + step[r]]
                                : exponential(product(-2 * scale, weight[r]) - logsumexp);  // the forward's score
      }
      grad_score[r] = scale * (weight[r] * ((grad_score[r] - delta[0]) + from_weights[r]));
      if (step[r] >= all_steps) {
        continue;
      }
      if (weight[r] == 0) {
        pass_nothing(step[r]);
        continue;
      }
      if (call.grad_scores != nullptr && teams.lane() == 0) {
        static_cast<acc*>(call.grad_scores)[first + step[r]] = grad_score[r];
      }
      if (call.grad_memory != nullptr) {
        store_memory_gradient(teams, grad_row(call.grad_memory, step[r], memory_size), weight[r], grad);
      }
      scalar* to = grad_row(call.grad_keys, step[r], key_size);
      add_key_gradient(teams, to, call.grad_keys != nullptr, grad_score[r], doubled[r], v, to_query, to_v);
    }
  }
  for (int s = s0 + teams.team(); s < all_steps; s += teams.teams()) {
    pass_nothing(s);
  }
  wait_copies<0>();  // the last ones are zeros: nobody has waited for them
  if (call.grad_query == nullptr && call.grad_v == nullptr) {
    return;
  }

  finish_gradients(call, place, teams, v, to_query, to_v);
}

}  // namespace attn_ext::cuda

// What an op's kernels are given: the problem and the division of the work. Free of torch headers.
#pragma once

#include "../../problem.h"

#include <cstddef>

namespace attn_ext::cpu {

struct Preparation {
  Dtype dtype;
  int64_t steps;     // S
  int64_t key_size;  // A
  View keys;         // [B, S, A]
  void* prepared;    // [B, S, prepared_size(A)] acc, contiguous
};

// Source steps are taken in tiles of at most kTile rows, queries in chunks of at most kChunk.
constexpr int64_t kTile = 256;
constexpr int64_t kShortTile = 128;  // where memory is not packed: additive scores, few queries
constexpr int64_t kChunk = 128;

// One query takes at most so many source steps at a time.
constexpr int64_t kGroupRows = 128;

// Queries that are many: their products are worth deep tiles, transposed coefficients and, but with AMX, packed panels.
constexpr int64_t kMany = 64;

// One item of work: a chunk of the queries of one batch element against one split of its source steps.
struct Item {
  int64_t batch;
  int64_t first_query;
  int64_t queries;
  int64_t first_step;
  int64_t end_step;

  // Of a tensor [B, T, ...].
  int64_t first_row(const Problem& problem) const {
    return batch * problem.queries + first_query;
  }
};

// a / b of no negative numbers. Of 64 bits it takes the processor as long as a short row's whole softmax.
inline int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

struct Plan {
  int64_t tile;          // source steps per tile, a multiple of every vector's width
  int64_t group;         // source steps that one query takes at a time, a multiple of 4; of several queries 0
  int64_t chunk;         // queries per item, of a forward's at most kChunk
  int64_t chunks;        // items along T
  int64_t split_size;    // source steps per item
  int64_t splits;        // items along S
  int64_t split_tiles;   // tiles per item, at most
  bool prefetches;       // what few queries read may be far: what comes next is prefetched
  bool overlaps;         // one query does what is left of a group of a large memory beside the next one's reading
  bool streams;          // results too large to stay near go past the caches: the gradients of few queries' keys and memory,
  bool streams_queries;  // and few steps' contexts and gradients of queries

  int64_t groups(const Problem& problem) const {
    return problem.batch * chunks;
  }

  int64_t items(const Problem& problem) const {
    return groups(problem) * splits;
  }

  // Whether an item has a query's scores at once, and in a backward their gradients: what a softmax's gradient sums over them, it
  // need not take from the context.
  bool has_whole_rows(const Problem& problem) const {
    return splits == 1 && problem.steps <= (problem.is_one_query() ? group : tile);
  }

  // Items are numbered batch-major, the splits of one group next to each other.
  Item item(const Problem& problem, int64_t index) const {
    const int64_t group = quotient(index, splits);
    const int64_t split = index - group * splits;
    const int64_t batch = quotient(group, chunks);
    const int64_t first_query = (group - batch * chunks) * chunk;
    const int64_t first_step = split * split_size;
    const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    return {
        batch, first_query, least(chunk, problem.queries - first_query), first_step, least(first_step + split_size, problem.steps)};
  }
};

// acc below is float, or double for Dtype::Double; unmarked tensors are of the problem's dtype. Outputs are contiguous.
struct Forward {
  Problem problem;
  Plan plan;
  void* context;        // [B, T, memory_size]
  void* weights;        // [B, T, S], or null
  void* logsumexp;      // [B, T] acc
  void* exact_context;  // of halves, the same as they were accumulated; acc, or null: not wanted
  void* exact_weights;  // likewise
  bool is_read_back;    // a backward may read the context, as it was accumulated
};

struct Backward {
  Problem problem;
  Plan plan;
  View grad_context;       // [B, T, memory_size]; data may be null
  View grad_weights;       // [B, T, S]; data may be null
  View context;            // [B, T, memory_size] acc
  View weights;            // [B, T, S] acc; data null: recomputed from logsumexp
  const void* logsumexp;   // [B, T] acc, contiguous
  View given_grad_scores;  // [B, T, S] acc, where they are known, and none of the five above; data may be null
  void* grad_scores;       // [B, T, S] acc; each output may be null: not wanted
  void* grad_query;
  void* grad_keys;
  void* grad_v;  // [items, key_size] acc: one partial sum an item
  void* grad_memory;
};

// Rows first .. end - 1.
struct RowRange {
  int64_t first;
  int64_t end;
};

// In ascending order, none next to another.
struct RowRanges {
  const RowRange* data;
  int64_t count;
};

// Rows of a product that are not worth transposing b for, which sums along vectors take as it stands: so many at most, and fewer
// where it is shallow, since each of its sums ends across a vector.
constexpr int64_t kFewRows = 32, kDepthOfRow = 8;

inline bool are_few(int64_t rows, int64_t depth) {
  return rows <= (depth / kDepthOfRow < kFewRows ? depth / kDepthOfRow : kFewRows);
}

// out = a b + bias, or out + a b, of a batch of matrices of floats or halves, summed in float.
struct Matmul {
  Dtype a_type, b_type, out_type;
  Dtype product_dtype;  // what both may be rounded to
  int64_t batch;
  int64_t rows;
  int64_t depth;
  int64_t columns;
  View a;                        // [rows, depth], by rows
  View b;                        // [depth, columns], by rows or by columns
  const void* const* a_columns;  // [batch, depth]: instead, and of a batch, where the columns of a
  const void* const* b_rows;     // and the rows of b begin, each without gaps; or null
  void* out;                     // [batch, rows, columns], by rows
  int64_t out_batch;
  int64_t out_row;
  const float* bias;        // [columns], or null
  bool adds_to_out;         // without a bias
  RowRanges row_ranges;     // of the batch's rows: the others of out become 0, or stay as they are where they are added to
  int64_t mean_range_rows;  // of a range, on average
  int64_t height;           // of an item's block of out
  int64_t width;

  bool has_rows_of_b() const {
    return b_rows != nullptr || b.element_stride == 1;
  }

  bool has_few_rows() const {
    return !has_rows_of_b() && are_few(rows, depth);
  }

  int64_t items() const {
    return batch * ceil_div(rows, height) * ceil_div(columns, width);
  }
};

// Features of a memory that an item of centring takes, a multiple of all that its loops take at once, and its scratch.
constexpr int64_t kCentredFeatures = 256;
constexpr size_t kCentringSlot = 3 * kCentredFeatures * sizeof(float);

// centred = memory - its average over the steps, of features that have much in common: whose sum is at least half of their
// magnitudes'. Of halves.
struct Centring {
  Dtype dtype;
  int64_t steps;       // S
  int64_t size;        // Dm
  View memory;         // [B, S, Dm], by rows
  RowRanges attended;  // of the batch's rows: the others count for nothing, and become 0
  void* centred;       // [B, S, Dm], by rows
  int64_t centred_batch;
  int64_t centred_row;

  // Items of a batch element.
  int64_t blocks() const {
    return ceil_div(size, kCentredFeatures);
  }
};

struct MatmulKernels {
  const char* name;  // of their compilation
  size_t (*slot)(const Matmul&);
  void (*run)(const Matmul&, int64_t item, char* slot);
};

// One op at one dtype. A slot is an item's scratch. Where items are merged, each has its own: item i's is slots + i * slot_size.
struct Kernels {
  size_t (*forward_slot)(const Forward&);
  void (*forward)(const Forward&, int64_t item, char* slot);
  void (*merge_forward)(const Forward&, int64_t item, char* slots, size_t slot_size);
  size_t (*backward_slot)(const Backward&);
  void (*backward)(const Backward&, int64_t item, char* slot);
  void (*merge_backward)(const Backward&, int64_t item, char* slots, size_t slot_size);
  // Additive only: of the B S keys; and some of v's gradient out of the items' partial sums.
  void (*prepare)(const Preparation&, int64_t first, int64_t end);
  void (*sum_v)(const Backward&, void* grad_v, int64_t first, int64_t end);
};

}  // namespace attn_ext::cpu

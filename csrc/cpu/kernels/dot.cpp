// Dot scores, e_ts = scale q_t . m_s: the memory is its own keys, so a tile of it serves everything.
//
// Backward: dq_t = sum_s de_ts m_s;  dm_s += sum_t de_ts q_t.
#include "attention.h"
#include "kernels.h"
#include "one_query.h"

namespace attn_ext::cpu::CPU_CAPABILITY {
namespace {

template <class element_>
class DotScore {
 public:
  using element = element_;
  using acc = typename Factors<element>::acc;

  // There are no keys to prepare.
  static constexpr void (*prepare)(const Preparation&, int64_t, int64_t) = nullptr;

  DotScore(const Problem& problem, int64_t queries, int64_t, Arena& arena)
      : size_(problem.key_size),
        scale_(static_cast<acc>(problem.scale)),
        query_(arena, problem.dtype, problem.query, queries, problem.key_size) {}

  void load_queries(int64_t b, int64_t first, int64_t count) {
    query_.load(b, first, count);
  }

  void load_keys(int64_t, const Tile&, const Rows<element>& memory) {
    keys_ = memory.addresses();
  }

  // Of `count` loaded queries from `first` on against the loaded tile; out's rows are `stride` apart.
  void scores(acc* out, int64_t stride, int64_t first, int64_t count, int64_t steps, element* panel) const {
    const int64_t size = Factors<element>::elements(size_);
    dot_products<element>(out, stride, query_.addresses() + first, count, keys_, steps, size, scale_, panel);
  }

 protected:
  int64_t size_;
  acc scale_;
  Rows<element> query_;
  const element* const* keys_ = nullptr;
};

template <class element>
class DotGradient : public DotScore<element> {
 public:
  using acc = typename DotScore<element>::acc;
  static constexpr bool kPads = false;

  DotGradient(const Backward& f, Arena& arena) : DotScore<element>(f.problem, f.plan.chunk, f.plan.tile, arena), f_(f) {}

  void begin(const Item& item, acc*) {
    this->load_queries(item.batch, item.first_query, item.queries);
    adds_ = false;
  }

  void begin_tile(int64_t b, const Tile& tile, int64_t, const Rows<element>& memory) {
    this->load_keys(b, tile, memory);
  }

  // The rows that the gradients of the scores carry into the memory's gradient; returns their end.
  const element** queries_of_memory(const element** rows, int64_t first, int64_t count) const {
    return std::copy_n(this->query_.addresses() + first, count, rows);
  }

  void add(
      const acc* grad_scores,
      int64_t stride,
      int64_t first,
      int64_t count,
      int64_t steps,
      acc* grad_query,
      int64_t query_stride,
      element* panel) {
    if (f_.grad_query != nullptr) {
      acc* out = grad_query + first * query_stride;
      multiply(
          Result<acc>{out, query_stride, adds_},
          count,
          Coefficients<acc>{grad_scores, stride, 1},
          this->keys_,
          steps,
          this->size_,
          panel);
    }
  }

  void end_tile(const Tile&) {
    adds_ = true;
  }

  void end(const Item& item, int64_t, int64_t, acc* grad_query, int64_t query_stride) {
    if (!adds_ && f_.grad_query != nullptr) {
      std::fill_n(grad_query, item.queries * query_stride, acc(0));
    }
  }

  void merge(const Item&, int64_t, int64_t, size_t) const {}

 private:
  const Backward& f_;
  bool adds_ = false;  // the query's gradient has a tile's part
};

// Of one query, both ways.
template <class acc_>
class OneQueryDot {
 public:
  using acc = acc_;

  static constexpr bool kReadsMemory = true;

  OneQueryDot(const Problem& problem, const Plan&, Arena& arena, const Backward* f = nullptr)
      : scale_(static_cast<acc>(problem.scale)),
        query_rows_(arena, problem.dtype, problem.query, 1, problem.key_size),
        wants_query_(f != nullptr && f->grad_query != nullptr) {}

  void begin(int64_t b) {
    query_ = query_rows_.load_only(b);
  }

  void load_keys(int64_t, const Tile&, const Tile&) {}

  void scores(acc* out, const RowGroup<acc>& memory) const {
    memory.dot_products(out, query_, scale_);
  }

  void begin_gradients(const Item&) {}

  // What the gradients of the scores carry into the memory's gradient.
  const acc* query_of_memory() const {
    return query_;
  }

  void add_gradients(const acc* grad_scores, const Tile&, const RowGroup<acc>& memory, acc* grad_query) const {
    if (wants_query_) {
      memory.add_to(grad_query, grad_scores, false);
    }
  }

  void end_gradients(const Item&, int64_t, acc*) {}

 private:
  acc scale_;
  Rows<acc> query_rows_;
  bool wants_query_;
  const acc* query_ = nullptr;
};

}  // namespace

const Kernels& dot_kernels(Dtype dtype, int64_t queries, [[maybe_unused]] int64_t chunk) {
#if defined(__AVX512BF16__)
  // Fewer are bound by memory.
  if (dtype == Dtype::BFloat16 && chunk >= kPanelRows) {
    return kKernels<AttentionForward<DotScore<Pair>>, AttentionBackward<DotGradient<Pair>>, DotScore<Pair>::prepare>;
  }
#endif
  return kernels_of<DotScore, DotGradient, OneQueryDot>(dtype, queries);
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

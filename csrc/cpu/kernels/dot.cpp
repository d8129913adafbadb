// Dot scores, e_ts = scale q_t . k_s. Without keys the memory is its own, k = m, and a tile of it serves everything.
//
// Backward: dq_t = sum_s de_ts k_s;  dk_s = sum_t de_ts q_t, which is part of dm_s where k = m.
#include "kernels.h"
#include "many_queries.h"
#include "one_query.h"

#include <optional>

namespace attn_ext::cpu::CPU_CAPABILITY {
namespace {

template <class element_>
class DotScore {
 public:
  using element = element_;
  using acc = typename ElementTraits<element>::acc;

  // No step of a loop has keys to prepare, and no score a v.
  static constexpr decltype(Kernels::prepare) prepare = nullptr;
  static constexpr decltype(Kernels::sum_v) sum_v = nullptr;

  static bool goes_by_amx(const Problem& problem, const Plan& plan) {
    const AmxExcess excess(problem, plan);
    return is_worth_amx<element>(excess.of_scores(problem.key_size) + excess.of_rows());
  }

  DotScore(const Problem& problem, int64_t queries, int64_t tile, Arena& arena, const Workspace<element>& work)
      : size_(problem.key_size),
        scale_(static_cast<acc>(problem.scale)),
        query_(arena, problem.dtype, problem.query, queries, problem.key_size) {
    if (problem.method == Method::KeyedDot) {
      own_keys_.emplace(arena, problem.dtype, problem.keys, tile, problem.key_size, work.takes_halves());
    }
  }

  void load_queries(int64_t b, int64_t first, int64_t count) {
    query_.load(b, first, count);
  }

  void load_keys(int64_t b, const Tile& tile, const Rows<element>& memory) {
    if (own_keys_) {
      own_keys_->load(b, tile);
    }
    keys_ = (own_keys_ ? *own_keys_ : memory).right();
  }

  // Of `count` loaded queries from `first` on against the loaded tile; out's rows are `stride` apart.
  void scores(acc* out, int64_t stride, int64_t first, int64_t count, int64_t steps, Workspace<element>& work) const {
    const int64_t size = ElementTraits<element>::elements(size_);
    dot_products(out, stride, query_.addresses() + first, count, keys_, steps, size, scale_, work);
  }

 protected:
  int64_t size_;
  acc scale_;
  Rows<element> query_;
  std::optional<Rows<element>> own_keys_;
  RightRows<element> keys_{};
};

template <class element>
class DotGradient : public DotScore<element> {
 public:
  using acc = typename DotScore<element>::acc;
  static constexpr bool kMultipliesKeys = true;

  DotGradient(const Backward& f, Arena& arena, const Workspace<element>& work)
      : DotScore<element>(f.problem, f.plan.chunk, f.plan.tile, arena, work), f_(f) {
    if (f.grad_keys != nullptr) {
      grad_keys_.emplace(arena, f.grad_keys, f.problem, f.plan, f.problem.key_size);
    }
  }

  static bool query_in_place(const Problem&) {
    return true;
  }

  void begin(const Item& item) {
    this->load_queries(item.batch, item.first_query, item.queries);
    if (grad_keys_) {
      grad_keys_->begin_item(item);
    }
  }

  void begin_tile(int64_t b, const Tile& tile, int64_t written, const Rows<element>& memory) {
    this->load_keys(b, tile, memory);
    if (grad_keys_) {
      grad_keys_->begin(tile, written);
    }
  }

  // The rows that the gradients of the scores carry into the memory's gradient; returns their end.
  const element** queries_of_memory(const element** rows, int64_t first, int64_t count) const {
    return this->own_keys_ ? rows : std::copy_n(this->query_.addresses() + first, count, rows);
  }

  bool wants_keys() const {
    return grad_keys_.has_value();
  }

  // Of `count` queries from `first` on; the coefficients, by source step, are the gradients of their scores.
  void add_to_keys(Coefficients<acc> coefficients, int64_t first, int64_t count, int64_t steps, Workspace<element>& work) {
    multiply(grad_keys_->rows(first > 0), steps, coefficients, this->query_.addresses() + first, count, this->size_, &work);
  }

  void add(
      acc* grad_scores, int64_t stride, int64_t, int64_t count, int64_t steps, Result<acc> grad_query, Workspace<element>& work) {
    if (f_.grad_query == nullptr) {
      return;
    }
    if constexpr (kIsPaired<element>) {
      // What rounding adds to the sum of a query's de would multiply what all keys have in common.
      acc gained[kChunk];
      sum_each(gained, count, [&](int64_t t) __attribute__((always_inline)) {
        return gained_by_rounding(grad_scores + t * stride, steps);
      });
      for (int64_t t = 0; t < count; ++t) {
        keep_sum(grad_scores + t * stride, steps, gained[t]);
      }
    }
    multiply(grad_query, count, Coefficients<acc>{grad_scores, stride, 1}, this->keys_, steps, this->size_, &work);
  }

  void end_tile(const Tile& tile) {
    if (grad_keys_) {
      grad_keys_->end(tile);
    }
  }

  void end(const Item& item, int64_t, int64_t written) {
    if (grad_keys_) {
      grad_keys_->zero(written, item.end_step);
    }
  }

  void merge(const Item& item, int64_t first, int64_t end, size_t distance) const {
    if (grad_keys_) {
      grad_keys_->merge(item, first, end, distance);
    }
  }

 private:
  const Backward& f_;
  std::optional<TileGradient<acc>> grad_keys_;  // where the memory is not its own keys
};

// Of one query over a memory that is its own keys, both ways.
template <class acc_>
class OneQueryDot {
 public:
  using acc = acc_;

  OneQueryDot(const Problem& problem, const Plan&, Arena& arena, const Backward* f = nullptr)
      : scale_(static_cast<acc>(problem.scale)),
        query_rows_(arena, problem.dtype, problem.query, 1, problem.key_size),
        wants_query_(f != nullptr && f->grad_query != nullptr) {}

  void begin(int64_t b) {
    query_ = query_rows_.load_only(b);
  }

  void load_keys(int64_t, const Tile&, const Upcoming&) {}

  void scores(acc* out, RowGroup<acc>& memory) const {
    memory.dot_products(out, query_, scale_);
  }

  void begin_gradients(const Item&) {}

  static bool prefetches_beside_gradients(const RowGroup<acc>& memory, const GradientRows<acc>& grad_memory, const acc*) {
    return memory.overlaps() && grad_memory.streams() && !memory.defers_gradients();
  }

  void add_gradients(const GroupGradients<acc>& group) const {
    if (group.memory.overlaps()) {
      return group.defer_sum(query_);
    }
    group.combine_memory(query_);
    if (wants_query_) {
      group.memory.add_to(group.grad_query, group.grad_scores());
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

const Kernels& dot_kernels(Dtype product_dtype, bool one_query, int64_t chunk) {
  return kernels_of<DotScore, DotGradient, OneQueryDot>(product_dtype, one_query, chunk);
}

}  // namespace attn_ext::cpu::CPU_CAPABILITY

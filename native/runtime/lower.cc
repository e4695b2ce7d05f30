#include "runtime/lower.h"

#include <numeric>

namespace haomiao {
namespace {

constexpr double kMostIdle = 1.2;  // the greatest share of a thread over the mean, for fusing by heads

class Lowering {
 public:
  Lowering(const Plan& plan, int threads) : plan_(plan), threads_(threads) {}

  std::vector<Phase> run() {
    for (size_t i = 0; i < plan_.ops.size();) i = take(i);
    return std::move(phases_);
  }

 private:
  template <typename T>
  const T* op_at(size_t i) const {
    return i < plan_.ops.size() ? std::get_if<T>(&plan_.ops[i]) : nullptr;
  }

  int width(int buffer) const { return plan_.buffers[static_cast<size_t>(buffer)].width; }

  // Lower what begins at operation i; returns the next one.
  size_t take(size_t i) {
    const NormOp* norm = op_at<NormOp>(i);
    if (norm) {
      if (const size_t next = take_linear(i + 1, norm, i)) return next;
      const HeadOp* head = op_at<HeadOp>(i + 1);
      if (head && head->source == norm->out) {
        push("head", LogitsPhase{*head, norm->source, static_cast<int>(i)});
        return i + 2;
      }
    }
    if (const size_t next = take_linear(i, nullptr, i)) return next;
    if (const size_t next = take_heads(i)) return next;
    if (const HeadOp* head = op_at<HeadOp>(i)) {
      push("head", LogitsPhase{*head, kNone, kNone});
      return i + 1;
    }
    return take_rowwise(i);
  }

  // A linear at i with its epilogue, and `norm` before it; 0 if there is none or they may not be fused.
  size_t take_linear(size_t i, const NormOp* norm, size_t norm_index) {
    const LinearOp* linear = op_at<LinearOp>(i);
    if (!linear || (norm && linear->source != norm->out)) return 0;
    LinearPhase phase = {*linear, kNone, kNone, Epilogue::none, linear->out, ActivationFunction::silu, 1, {}};
    size_t next = i + 1;
    if (epilogue(i + 1, *linear, &phase)) ++next;
    if (norm) {
      // Threads norm the source while others already write: it must not be what they write. And nobody else may want
      // the normed rows, which are never stored.
      if (norm->source == phase.target || read_later(plan_, norm->out, i + 1)) return 0;
      phase.norm_source = norm->source;
      phase.normed_by = static_cast<int>(norm_index);
    }
    push(plan_.matrices[static_cast<size_t>(linear->weight)].name, phase);
    return next;
  }

  // Fuse the operation at i into the linear before it, if it takes nothing but what the linear made.
  bool epilogue(size_t i, const LinearOp& linear, LinearPhase* phase) const {
    int source = kNone, target = kNone;
    if (const AddOp* add = op_at<AddOp>(i)) {
      phase->epilogue = Epilogue::add, source = add->source, target = add->target;
    } else if (const GluOp* glu = op_at<GluOp>(i)) {
      phase->epilogue = Epilogue::glu, source = glu->source, target = glu->out;
      phase->function = glu->function, phase->unit = 2;
    } else if (const ActivateOp* activate = op_at<ActivateOp>(i)) {
      phase->epilogue = Epilogue::activate, source = activate->source, target = activate->out;
      phase->function = activate->function;
    }
    const bool fits = source == linear.out && target != linear.out && target != linear.source;
    if (fits && !read_later(plan_, linear.out, i + 1)) {
      phase->target = target;
      return true;
    }
    phase->epilogue = Epilogue::none, phase->target = linear.out, phase->unit = 1;
    return false;
  }

  // Head norms and ropes that lead to an attention, then the attention.
  size_t take_heads(size_t i) {
    size_t end = i;
    while (op_at<HeadNormOp>(end) || op_at<RopeOp>(end)) ++end;
    const AttentionOp* attention = op_at<AttentionOp>(end);
    if (!attention || attention->k_offset % attention->head_dim || attention->v_offset % attention->head_dim) return 0;
    HeadWork work = {*attention, {}};
    for (; i < end; ++i) {
      HeadTransform transform;
      if (const HeadNormOp* norm = op_at<HeadNormOp>(i)) {
        if (norm->buffer != attention->qkv || norm->head_dim != attention->head_dim) return 0;
        if (norm->offset % norm->head_dim) return 0;
        transform = {norm->offset / norm->head_dim, norm->heads, norm->weight, norm->eps, kNone};
      } else {
        const RopeOp& rope = *op_at<RopeOp>(i);
        if (rope.buffer != attention->qkv || rope.head_dim != attention->head_dim) return 0;
        if (rope.offset % rope.head_dim) return 0;
        transform = {rope.offset / rope.head_dim, rope.heads, kNone, 0.0f, rope.rope};
      }
      work.transforms.push_back(transform);
    }
    const std::string layer = std::to_string(attention->layer);
    if (!join_linear(work)) push("heads." + layer, HeadsPhase{work});
    push("attention." + layer, AttentionPhase{*attention});
    return end + 1;
  }

  // Give the heads' work to the linear that made them, divided so that a thread owns whole heads.
  bool join_linear(const HeadWork& work) {
    LinearPhase* linear = phases_.empty() ? nullptr : std::get_if<LinearPhase>(&phases_.back().work);
    const AttentionOp& attention = work.attention;
    if (!linear || linear->epilogue != Epilogue::none || linear->linear.out != attention.qkv) return false;
    const int total = width(attention.qkv), unit = std::lcm(attention.head_dim, kTileRows) / kTileRows;
    if (total % attention.head_dim) return false;
    const int tiles = (total + kTileRows - 1) / kTileRows, units = (tiles + unit - 1) / unit;
    const int most = (units + threads_ - 1) / threads_ * unit;
    if (most * threads_ > kMostIdle * tiles) return false;
    linear->epilogue = Epilogue::heads;
    linear->unit = unit;
    linear->work = work;
    return true;
  }

  size_t take_rowwise(size_t i) {
    const Op& op = plan_.ops[i];
    // An attention whose heads do not lie at multiples of head_dim is refused where plans are validated, so what
    // arrives here is rowwise.
    RowwisePhase* last = phases_.empty() ? nullptr : std::get_if<RowwisePhase>(&phases_.back().work);
    if (last) {
      last->ops.push_back(op);
    } else {
      push(phases_.empty() ? "embed" : "rowwise", RowwisePhase{{op}});
    }
    return i + 1;
  }

  template <typename T>
  void push(const std::string& name, T work) {
    phases_.push_back({name, std::move(work)});
  }

  const Plan& plan_;
  const int threads_;
  std::vector<Phase> phases_;
};

}  // namespace

std::vector<Phase> lower(const Plan& plan, int threads) { return Lowering(plan, threads).run(); }

}  // namespace haomiao

// Load and the frame of a step; the phases themselves are in run_*.cc.
#include "runtime/runner.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "runtime/runner_limits.h"

namespace haomiao {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

int checked(const char* what, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    refuse(std::string(what) + " must be " + std::to_string(least) + " to " + std::to_string(most) + ", not " +
           std::to_string(value));
  }
  return static_cast<int>(value);
}

bool is_integer(const Weight& w) { return w.encoding == Encoding::int8 || w.encoding == Encoding::planes; }

// Weights that linear layers and the head multiply with (tables are only read by row).
std::vector<int> multiplied(const Plan& plan) {
  std::vector<int> list;
  for (const Op& op : plan.ops) {
    if (const LinearOp* linear = std::get_if<LinearOp>(&op)) list.push_back(linear->weight);
    if (const HeadOp* head = std::get_if<HeadOp>(&op)) list.push_back(head->weight);
  }
  return list;
}

// Screening leaves a plane or most bytes unread, and needs logits that keep the order of their products.
bool can_screen(const HeadOp& head, const Weight& w) {
  const bool divided = (w.encoding == Encoding::planes && w.lo) || w.encoding == Encoding::int8;
  return divided && !w.mask.bits && head.bias == kNone && head.softcap == 0 && head.scale >= 0x1p-60f &&
         head.scale <= 0x1p60f;
}

int64_t now_ns() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

}  // namespace

Runner::Runner(Plan plan, const KernelTable& kernels, const RunnerOptions& options, std::vector<PointSpec> points)
    : plan_(std::move(plan)),
      kernels_(kernels),
      options_(options),
      points_(std::move(points)),
      pool_(checked("threads", options.threads, 0, kMostThreads), options.pin),
      claims_(pool_.threads()),
      phases_(lower(plan_, pool_.threads())),
      check_({plan_.vocab_size, checked("max_step_tokens", options.max_step_tokens, 1, kMostStepTokens),
              checked("kv_blocks", options.kv_blocks, 1, kMostKvBlocks), plan_.max_context}),
      max_tokens_(static_cast<int>(options.max_step_tokens)) {
  check_points();
  find_tail();
  reserve_memory();
}

// After the last attention a token's row matters only for its own logits. Operations that need to know which token they
// work on do not follow it in any model we know; a plan in which they do is run for all rows to its end.
void Runner::find_tail() {
  last_attention_ = phases_.size();
  size_t last = phases_.size(), after = plan_.ops.size();
  for (size_t i = 0; i < phases_.size(); ++i) {
    if (std::holds_alternative<AttentionPhase>(phases_[i].work)) last = i;
  }
  for (size_t i = 0; i < plan_.ops.size(); ++i) {
    if (std::holds_alternative<AttentionOp>(plan_.ops[i])) after = i + 1;
  }
  if (last == phases_.size()) return;
  for (size_t i = after; i < plan_.ops.size(); ++i) {
    const Op& op = plan_.ops[i];
    if (std::holds_alternative<EmbedOp>(op) || std::holds_alternative<RopeOp>(op)) return;
  }
  const AttentionOp& attention = std::get<AttentionPhase>(phases_[last].work).attention;
  if (read_later(plan_, attention.qkv, after)) return;  // threads read it while rows move
  for (int b = 0; b < static_cast<int>(plan_.buffers.size()); ++b) {
    if (b != attention.out && read_later(plan_, b, after)) carried_.push_back(b);
  }
  last_attention_ = last;
}

void Runner::check_points() const {
  if (points_.empty()) refuse("no operating point was given");
  for (const PointSpec& point : points_) {
    for (const int index : multiplied(plan_)) {
      const Matrix& matrix = plan_.matrices[static_cast<size_t>(index)];
      if (!point.integer && is_integer(matrix.weight)) {
        refuse("point '" + point.name + "' needs float weights, and '" + matrix.name + "' is stored in integer codes");
      }
    }
  }
}

// All sizes are known here, and nothing below is allocated again.
void Runner::reserve_memory() {
  const LinearKernels& linear = *kernels_.linear;
  const AttentionKernels& attention = *kernels_.attention;
  const size_t tokens = static_cast<size_t>(max_tokens_);

  std::vector<size_t> buffer_at, rope_at;
  for (const Buffer& buffer : plan_.buffers) {
    const int64_t stride = (buffer.width + 15) / 16 * 16;
    buffers_.push_back({nullptr, stride});
    buffer_at.push_back(arena_.reserve(tokens * static_cast<size_t>(stride) * sizeof(float)));
  }
  for (const Rope& rope : plan_.ropes) {
    rope_at.push_back(arena_.reserve(tokens * static_cast<size_t>(rope.dim) * sizeof(float)));
  }
  for (const Op& op : plan_.ops) {  // rows that are normed or gathered before they are prepared
    int source = kNone;
    if (const NormOp* norm = std::get_if<NormOp>(&op)) source = norm->source;
    if (const HeadOp* head = std::get_if<HeadOp>(&op)) source = head->source;
    if (const EmbedOp* embed = std::get_if<EmbedOp>(&op)) source = embed->out;
    if (source != kNone) widest_ = std::max(widest_, buffers_[static_cast<size_t>(source)].stride);
  }
  size_t prepared = 0, prepared_few = 0, scratch = 0;
  for (const PointSpec& point : points_) {
    point_ = &point;
    for (const int index : multiplied(plan_)) {
      const Weight& w = weight(index);
      const Activation kind = activation_of(w);
      prepared = std::max(prepared, linear.activation_bytes(kind, max_tokens_, w.padded_cols));
      prepared_few = std::max(prepared_few, linear.activation_bytes(kind, kFewTokens, w.padded_cols));
      scratch = std::max(scratch, linear.scratch_bytes(w, max_tokens_));
    }
  }
  int most_heads = 1;
  for (const Op& op : plan_.ops) {
    if (const AttentionOp* a = std::get_if<AttentionOp>(&op)) most_heads = std::max(most_heads, a->heads / a->kv_heads);
  }
  tile_tokens_ = std::max(1, kTileQueries / most_heads);
  least_kv_heads_ = plan_.layers.empty() ? 1 : plan_.layers[0].kv_heads;
  for (const Op& op : plan_.ops) {
    const AttentionOp* a = std::get_if<AttentionOp>(&op);
    if (!a) continue;
    scratch = std::max(scratch, attention.scratch_bytes(a->heads / a->kv_heads, a->head_dim, tile_tokens_));
    most_kv_heads_ = std::max(most_kv_heads_, a->kv_heads);
    least_kv_heads_ = std::min(least_kv_heads_, a->kv_heads);
  }
  const size_t splits = static_cast<size_t>((plan_.max_context + kKvSplit - 1) / kKvSplit);
  partial_capacity_ = std::min(kMostPartialFloats, splits * static_cast<size_t>(most_kv_heads_) * state_floats(1));

  const size_t activations_at = arena_.reserve(prepared);
  const size_t rows_at = arena_.reserve(tokens * static_cast<size_t>(widest_) * sizeof(float));
  const size_t partials_at = arena_.reserve(partial_capacity_ * sizeof(float));
  for (const Op& op : plan_.ops) {
    const HeadOp* head = std::get_if<HeadOp>(&op);
    if (head) screened_ = !screened_ && can_screen(*head, weight(head->weight)) ? head : nullptr;
  }
  if (screened_ && weight(screened_->weight).encoding == Encoding::int8) {
    reserve_sketch(weight(screened_->weight));
    scratch = std::max(scratch, linear.scratch_bytes(sketch_, max_tokens_));
  }
  const size_t head_tiles = screened_ ? static_cast<size_t>(tiles_of(weight(screened_->weight))) : 0;
  const size_t head_groups = screened_ ? static_cast<size_t>(weight(screened_->weight).padded_cols) / kGroup : 0;
  const size_t lo_norms_at = arena_.reserve(head_tiles * head_groups * sizeof(float));
  const size_t upper_at = arena_.reserve(head_tiles * kFewTokens * sizeof(float));
  if (screened_) {
    single_bytes_ =
        (linear.activation_bytes(Activation::int8, 1, weight(screened_->weight).padded_cols) + 63) / 64 * 64;
  }
  struct Offsets {
    size_t activations, rows, tile, scratch, best, best_at, lengths, singles, reached, kept;
  };
  std::vector<Offsets> threads;
  for (int t = 0; t < pool_.threads(); ++t) {
    threads.push_back(
        {arena_.reserve(prepared_few), arena_.reserve(kFewTokens * static_cast<size_t>(widest_) * sizeof(float)),
         arena_.reserve(kTileFloats * sizeof(float)), arena_.reserve(scratch), arena_.reserve(tokens * sizeof(float)),
         arena_.reserve(tokens * sizeof(int32_t)), arena_.reserve(kFewTokens * head_groups * sizeof(float)),
         arena_.reserve(kFewTokens * single_bytes_), arena_.reserve(kFewTokens * sizeof(float)),
         arena_.reserve(head_tiles * sizeof(int32_t))});
  }
  arena_.commit();
  for (size_t b = 0; b < buffers_.size(); ++b) buffers_[b].data = arena_.at<float>(buffer_at[b]);
  for (const size_t at : rope_at) rope_tables_.push_back(arena_.at<float>(at));
  activations_ = arena_.at<uint8_t>(activations_at);
  rows_ = arena_.at<float>(rows_at);
  partials_ = arena_.at<float>(partials_at);
  lo_norms_ = arena_.at<float>(lo_norms_at);
  upper_ = arena_.at<float>(upper_at);
  for (const Offsets& at : threads) {
    thread_memory_.push_back({arena_.at<uint8_t>(at.activations), arena_.at<float>(at.rows), arena_.at<float>(at.tile),
                              arena_.at<uint8_t>(at.scratch), arena_.at<float>(at.best), arena_.at<int32_t>(at.best_at),
                              arena_.at<float>(at.lengths), arena_.at<uint8_t>(at.singles),
                              arena_.at<float>(at.reached), arena_.at<int32_t>(at.kept)});
  }

  int64_t offset = 0;
  for (const Layer& layer : plan_.layers) {
    const int64_t bytes = static_cast<int64_t>(attention.block_bytes(options_.kv, layer.head_dim));
    layers_.push_back({offset, bytes, layer.kv_heads});
    kv_bytes_per_block_ += bytes * layer.kv_heads;
    if (kv_bytes_per_block_ > kMostKvBytes / options_.kv_blocks) refuse("that many KV blocks do not fit the memory");
    offset += bytes * layer.kv_heads * options_.kv_blocks;
  }
  kv_ = Mapping(static_cast<size_t>(std::max<int64_t>(offset, 64)));

  sequence_of_.resize(tokens);
  positions_.resize(tokens);
  copies_from_.resize(tokens + 1);
  for (Attending* work : {&whole_, &tail_}) {
    work->tiles.reserve(tokens);  // a tile holds at least one token
    work->items.reserve(tokens + static_cast<size_t>(kItemsPerThread) * static_cast<size_t>(pool_.threads()) + 1);
  }
  next_ = std::make_unique<std::atomic<uint32_t>[]>(2 * phases_.size());
  phase_ns_.resize(phases_.size());
}

// Untouched until a step screens, so that who never does does not pay for it.
void Runner::reserve_sketch(const Weight& w) {
  const int64_t tile_bytes = int64_t{w.padded_cols / w.group} * (kTileRows * 2 + w.group * kTileRows / 2);
  sketch_memory_ = Mapping(static_cast<size_t>(tile_bytes * tiles_of(w)));
  sketch_ = w;
  sketch_.encoding = Encoding::planes;
  sketch_.hi = sketch_memory_.data(), sketch_.hi_tile_bytes = tile_bytes;
}

Activation Runner::activation_of(const Weight& weight) const {
  if (is_integer(weight)) return Activation::int8;
  return weight.encoding == Encoding::bf16 ? point_->float_activation : Activation::f32;
}

Runner::Share Runner::share(int count, int unit, int thread) const {
  const int64_t units = (count + unit - 1) / unit, n = pool_.active();
  const int64_t begin = units * thread / n * unit, end = units * (thread + 1) / n * unit;
  return {static_cast<int>(std::min<int64_t>(begin, count)), static_cast<int>(std::min<int64_t>(end, count))};
}

// Tiles from `first` on, counted from there. Under a tile mask threads get as many stored groups, not as many tiles.
Runner::Share Runner::share_tiles(const Weight& weight, int first, int unit, int thread) const {
  const int count = tiles_of(weight) - first, n = pool_.active();
  if (!weight.mask.first) return share(count, unit, thread);
  const int64_t *before = weight.mask.first + first, *end = before + count;
  const auto cut = [&](int k) {
    if (k == 0 || k == n) return k == 0 ? 0 : count;
    const int64_t wanted = *before + (*end - *before) * k / n;
    const int64_t tile = std::lower_bound(before, end, wanted) - before;
    return static_cast<int>(std::min<int64_t>(count, (tile + unit / 2) / unit * unit));
  };
  return {cut(thread), cut(thread + 1)};
}

// The plan ends with its head.
int Runner::hidden_size() const {
  return plan_.buffers[static_cast<size_t>(std::get<HeadOp>(plan_.ops.back()).source)].width;
}

std::string Runner::step(int64_t point, const Batch& batch, float* logits, int32_t* argmax, int64_t* elapsed_ns,
                         float* hidden) {
  const int64_t began = now_ns();
  if (stepping_.exchange(true)) return "another thread is inside this executor";
  struct Leave {
    std::atomic<bool>& flag;
    ~Leave() { flag.store(false); }
  } leave{stepping_};
  if (point < 0 || point >= static_cast<int64_t>(points_.size())) return "the point is not one of this executor's";
  if (std::string wrong = check_(batch); !wrong.empty()) return wrong;
  begin_step(points_[static_cast<size_t>(point)], batch, logits, hidden);
  pool_.run(run_job, this);
  choose_argmax(argmax);
  end_screening();
  *elapsed_ns = now_ns() - began;
  return {};
}

void Runner::begin_step(const PointSpec& point, const Batch& batch, float* logits, float* hidden) {
  batch_ = batch;
  point_ = &point;
  logits_ = logits;
  hidden_ = hidden;
  for (int s = 0; s < batch.sequences(); ++s) {
    for (int t = batch.span_starts[s]; t < batch.span_starts[s + 1]; ++t) {
      sequence_of_[static_cast<size_t>(t)] = s;
      positions_[static_cast<size_t>(t)] = int64_t{batch.past[s]} + t - batch.span_starts[s];
    }
  }
  for (int64_t t = 0, c = 0; batch.copy_count && t <= batch.tokens; ++t) {
    while (c < batch.copy_count && batch.copies[2 * c] < t) ++c;
    copies_from_[static_cast<size_t>(t)] = c;
  }
  plan_items();
  plan_screening();
  for (size_t i = 0; i < 2 * phases_.size(); ++i) next_[i].store(0, std::memory_order_relaxed);
  for (int t = 0; t < pool_.active(); ++t) claims_.open(0, t);
}

void Runner::run_job(void* runner, int thread) { static_cast<Runner*>(runner)->run_phases(thread); }

void Runner::run_phases(int thread) {
  const bool timed = profiling_ && thread == 0;
  int64_t before = timed ? now_ns() : 0;
  for (size_t i = 0; i < phases_.size(); ++i) {
    claims_.open(i + 1, thread);
    std::visit([&](const auto& phase) { run(phase, i, thread); }, phases_[i].work);
    if (i + 1 < phases_.size() || profiling_) pool_.barrier();
    if (timed) {
      const int64_t now = now_ns();
      phase_ns_[i] = now - before;
      before = now;
    }
  }
}

// Join what the threads found.
void Runner::choose_argmax(int32_t* argmax) const {
  for (int64_t r = 0; r < batch_.rows; ++r) {
    float best = 0;
    int32_t at = kNone;
    for (int t = 0; t < pool_.active(); ++t) {
      const Thread& thread = thread_memory_[static_cast<size_t>(t)];
      if (beats(thread.best[r], thread.best_at[r], best, at)) best = thread.best[r], at = thread.best_at[r];
    }
    argmax[r] = at;
  }
}

std::string Runner::copy_blocks(const int32_t* pairs, int64_t count) {
  for (int64_t i = 0; i < 2 * count; ++i) {
    if (pairs[i] < 0 || pairs[i] >= options_.kv_blocks) {
      return "KV block " + std::to_string(pairs[i]) + " does not exist; there are " +
             std::to_string(options_.kv_blocks);
    }
  }
  if (stepping_.exchange(true)) return "another thread is inside this executor";
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const size_t bytes = static_cast<size_t>(layers_[layer].block_bytes) * static_cast<size_t>(layers_[layer].kv_heads);
    for (int64_t i = 0; i < count; ++i) {
      if (pairs[2 * i] == pairs[2 * i + 1]) continue;
      std::memcpy(kv_block(static_cast<int>(layer), pairs[2 * i + 1], 0),
                  kv_block(static_cast<int>(layer), pairs[2 * i], 0), bytes);
    }
  }
  stepping_.store(false);
  return {};
}

}  // namespace haomiao

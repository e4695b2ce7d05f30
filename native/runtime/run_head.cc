// The vocabulary head. Rows of which only the argmax is wanted are screened: the hi plane bounds every tile's logits
// (kernels/head/head.h), and only tiles that may hold the greatest are computed with both planes. What is returned is
// the full head's argmax to the bit, the lowest id among equals.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime/runner.h"
#include "runtime/runner_limits.h"

namespace haomiao {

void Runner::run(const LogitsPhase& phase, size_t index, int thread) {
  const HeadOp& op = phase.head;
  const Weight& w = weight(op.weight);
  const int rows = static_cast<int>(batch_.rows), vocab = plan_.vocab_size;
  write_hidden(phase, thread);
  if (rows == 0) return;
  const RowSource source = {phase.normed_by == kNone ? op.source : phase.norm_source, phase.normed_by,
                            is_tail(index) ? nullptr : batch_.logit_rows};
  const Prepared prepared = prepare(source, w, rows, thread);
  const Thread& memory = thread_memory_[static_cast<size_t>(thread)];
  std::fill(memory.best_at, memory.best_at + rows, kNone);
  if (screening_) return screen(phase, prepared, index, thread);
  const Activation kind = activation_of(w);
  const int stretch = stretch_of(w, rows), stretches = (rows + stretch - 1) / stretch;
  const auto work = [&](int pass, Share tiles) {
    const int first = pass * stretch, last = std::min(rows, first + stretch);
    kernels_.linear->linear({&w, point_->head, kind,
                             prepared.activations + kernels_.linear->activation_bytes(kind, first, w.padded_cols),
                             last - first, tiles.begin, tiles.end, logits_ + int64_t{first} * vocab, vocab,
                             vector(op.bias), memory.scratch});
    const int begin = tiles.begin * kTileRows, count = std::min(tiles.end * kTileRows, vocab) - begin;
    for (int r = first; r < last; ++r) {
      float* logits = logits_ + int64_t{r} * vocab + begin;
      if (op.scale != 1.0f || op.softcap > 0) kernels_.rowwise->scale_softcap(logits, count, op.scale, op.softcap);
      const int32_t at = kernels_.rowwise->argmax(logits, count);
      take_best(memory, r, logits[at], begin + at);
    }
  };
  work_off(index, thread, w, 0, 1, kHeadTiles, stretches, work);
}

// This thread's share of the rows whose hidden states are wanted, normed if the head's are.
void Runner::write_hidden(const LogitsPhase& phase, int thread) const {
  const int width = hidden_size();
  const Share mine = share(static_cast<int>(batch_.hidden_count), 1, thread);
  for (int r = mine.begin; r < mine.end; ++r) {
    float* out = hidden_ + int64_t{r} * width;
    const int token = batch_.hidden_rows[r];
    if (phase.normed_by == kNone) {
      std::memcpy(out, row(phase.head.source, token), sizeof(float) * static_cast<size_t>(width));
    } else {
      norm_row(std::get<NormOp>(plan_.ops[static_cast<size_t>(phase.normed_by)]), row(phase.norm_source, token), out);
    }
  }
}

void Runner::take_best(const Thread& memory, int row, float value, int at) const {
  if (beats(value, at, memory.best[row], memory.best_at[row])) memory.best[row] = value, memory.best_at[row] = at;
}

// If one row is wanted whole, both planes are read anyway and the others ride along.
void Runner::plan_screening() {
  const int64_t rows = batch_.rows;
  screening_ = screened_ && batch_.greedy && rows > 0 && rows <= kFewTokens && point_->head == Planes::both &&
               std::all_of(batch_.greedy, batch_.greedy + rows, [](bool greedy) { return greedy; });
  if (screening_ && unscreened_ > 0) --unscreened_, screening_ = false;
  rescored_pairs_ = 0;
}

void Runner::end_screening() {
  rescored_ = -1;
  if (!screening_) return;
  lo_norms_known_ = true;
  const int64_t pairs = batch_.rows * tiles_of(weight(screened_->weight));
  rescored_ = static_cast<double>(rescored_pairs_) / static_cast<double>(pairs);
  backoff_ =
      static_cast<double>(batch_.rows) * rescored_ <= kMostKept ? 0 : std::clamp(2 * backoff_, 1, kMostUnscreened);
  unscreened_ = backoff_;
}

// Bounds of all tiles; then both planes of the most promising tile of every thread, whose greatest logit is what the
// others must reach; then the tiles that may reach it, divided anew.
void Runner::screen(const LogitsPhase& phase, const Prepared& prepared, size_t index, int thread) {
  const Weight& w = weight(phase.head.weight);
  const int rows = static_cast<int>(batch_.rows), tiles = tiles_of(w);
  const Thread& memory = thread_memory_[static_cast<size_t>(thread)];
  bound_tiles(phase, prepared, index, thread);
  pool_.barrier();
  float needed[kFewTokens];
  int64_t kept = 0;
  for (int r = 0; r < rows; ++r) {
    float reached = -HUGE_VALF;
    for (int t = 0; t < pool_.active(); ++t)
      reached = std::max(reached, thread_memory_[static_cast<size_t>(t)].reached[r]);
    needed[r] = needed_bound(phase.head, reached);
    for (int tile = 0; tile < tiles; ++tile) kept += may_win(r, tile, needed[r]);
  }
  if (thread == 0) rescored_pairs_ = kept;
  const bool together = rows > 1 && kept > tiles;  // one pass for all rows reads less
  for (int r = 0; r < rows; r += together ? rows : 1) {
    int count = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      if (together || may_win(r, tile, needed[r])) memory.kept[count++] = tile;
    }
    const Share mine = share(count, 1, thread);
    for (int i = mine.begin, run = 1; i < mine.end; i += run, run = 1) {
      while (i + run < mine.end && run < kHeadTiles && memory.kept[i + run] == memory.kept[i] + run) ++run;
      rescore(phase.head, prepared, {r, together ? rows : r + 1}, {memory.kept[i], memory.kept[i] + run}, memory);
    }
  }
}

// upper_ for the tiles that this thread takes, and reached: the greatest logit of the one that looks best, per row.
void Runner::bound_tiles(const LogitsPhase& phase, const Prepared& prepared, size_t index, int thread) {
  const Thread& memory = thread_memory_[static_cast<size_t>(thread)];
  const Weight& whole = weight(phase.head.weight);
  const Weight& w = sketch_.hi ? sketch_ : whole;
  const int rows = static_cast<int>(batch_.rows), tiles = tiles_of(w), groups = w.padded_cols / kGroup;
  float seen[kFewTokens];
  int best[kFewTokens];
  for (int r = 0; r < rows; ++r) {
    seen[r] = -HUGE_VALF, best[r] = kNone, memory.reached[r] = -HUGE_VALF;
    const float* x = prepared.x + r * prepared.stride;
    kernels_.head->lengths(x, w.cols, w.padded_cols, memory.lengths + r * groups);
    kernels_.linear->prepare(Activation::int8, x, 0, 1, 0, 1, w.cols, w.padded_cols,
                             memory.singles + static_cast<size_t>(r) * single_bytes_);
  }
  const auto work = [&](int, Share taken) {
    const int first = taken.begin, last = taken.end, stride = kHeadTiles * kTileRows;
    for (int tile = first; tile < last && !lo_norms_known_; ++tile) measure_tile(whole, tile);
    kernels_.linear->linear({&w, Planes::hi, Activation::int8, prepared.activations, rows, first, last,
                             memory.tile - first * kTileRows, stride, nullptr, memory.scratch});
    for (int tile = first; tile < last; ++tile) {
      const float* norms = lo_norms_ + int64_t{tile} * groups;
      for (int r = 0; r < rows; ++r) {
        const float* h = memory.tile + r * stride + (tile - first) * kTileRows;
        const TileBound bound = kernels_.head->bound(w, tile, norms, memory.lengths + r * groups, h);
        upper_[int64_t{r} * tiles + tile] = bound.upper;
        if (bound.seen > seen[r]) seen[r] = bound.seen, best[r] = tile;
      }
    }
  };
  work_off(index, thread, w, 0, 1, kHeadTiles, 1, work);
  for (int r = 0; r < rows; ++r) {
    if (best[r] == kNone) continue;
    multiply_head(phase.head, prepared, {r, r + 1}, {best[r], best[r] + 1}, false, memory);
    const int count = std::min(kTileRows, w.rows - best[r] * kTileRows);
    const float* y = memory.tile;
    memory.reached[r] = y[kernels_.rowwise->argmax(y, count)];
  }
}

// The norms of a tile of the head, and its sketch where that takes the place of a hi plane.
void Runner::measure_tile(const Weight& head, int tile) {
  float* norms = lo_norms_ + int64_t{tile} * (head.padded_cols / kGroup);
  if (!sketch_.hi) return kernels_.head->lo_norms(head, tile, norms);
  kernels_.head->sketch(head, tile, sketch_memory_.data() + tile * sketch_.hi_tile_bytes, norms);
}

// Both planes of a few tiles for one row or all, logits [rows][tiles * 32] in the thread's tile memory.
void Runner::multiply_head(const HeadOp& op, const Prepared& prepared, Share rows, Share tiles, bool scaled,
                           const Thread& memory) {
  const Weight& w = weight(op.weight);
  const int stride = (tiles.end - tiles.begin) * kTileRows;
  const bool single = rows.end == rows.begin + 1;  // its place among the others is the kernels' own business
  const uint8_t* x = single ? memory.singles + static_cast<size_t>(rows.begin) * single_bytes_ : prepared.activations;
  kernels_.linear->linear({&w, Planes::both, Activation::int8, x, rows.end - rows.begin, tiles.begin, tiles.end,
                           memory.tile - tiles.begin * kTileRows, stride, nullptr, memory.scratch});
  if (scaled && op.scale != 1.0f) {
    kernels_.rowwise->scale_softcap(memory.tile, stride * (rows.end - rows.begin), op.scale, 0.0f);
  }
}

void Runner::rescore(const HeadOp& op, const Prepared& prepared, Share rows, Share tiles, const Thread& memory) {
  multiply_head(op, prepared, rows, tiles, true, memory);
  const int first = tiles.begin * kTileRows, stride = (tiles.end - tiles.begin) * kTileRows;
  const int count = std::min(stride, weight(op.weight).rows - first);
  const float* logits = memory.tile;
  for (int r = rows.begin; r < rows.end; ++r, logits += stride) {
    const int32_t at = kernels_.rowwise->argmax(logits, count);
    take_best(memory, r, logits[at], first + at);
  }
}

// What a tile's bound must reach if one of its rows is to win against a logit `reached` before scaling: a little less
// than that, so that rounding the bound, and rounding both after scaling, makes no equals. NaN, which every bound
// reaches, where the scaled logits are too great or too small for that.
float Runner::needed_bound(const HeadOp& op, float reached) const {
  const float scaled = std::abs(reached) * op.scale;
  if (!(scaled < 0x1p120f && scaled > 0x1p-90f && std::abs(reached) > 0x1p-60f)) return std::nanf("");
  return reached - std::abs(reached) * 0x1p-20f;
}

bool Runner::may_win(int row, int tile, float needed) const {
  return !(upper_[int64_t{row} * tiles_of(weight(screened_->weight)) + tile] < needed);
}

}  // namespace haomiao

// Linear layers: rows are normed and prepared, tiles are divided among threads, and what follows elementwise is done
// while a tile's outputs are still in the cache.
#include <algorithm>
#include <cstring>

#include "runtime/runner.h"
#include "runtime/runner_limits.h"

namespace haomiao {

// Activations of `rows` rows as the linear kernels read them. A few rows every thread prepares for itself; many are
// divided, and all threads meet before anyone goes on.
Runner::Prepared Runner::prepare(const RowSource& source, const Weight& weight, int rows, int thread) {
  const bool few = rows <= kFewTokens;
  const Thread& memory = thread_memory_[static_cast<size_t>(thread)];
  const Share mine = few ? Share{0, rows} : share(rows, kActivationBlock, thread);
  const NormOp* norm = source.norm == kNone ? nullptr : &std::get<NormOp>(plan_.ops[static_cast<size_t>(source.norm)]);
  float* gathered = few ? memory.rows : rows_;
  const bool in_place = !norm && !source.index;
  for (int r = mine.begin; r < mine.end && !in_place; ++r) {
    const float* x = row(source.buffer, source.index ? source.index[r] : r);
    float* out = gathered + r * widest_;
    if (norm) {
      norm_row(*norm, x, out);
    } else {
      std::memcpy(out, x, sizeof(float) * static_cast<size_t>(weight.cols));
    }
  }
  const float* x = in_place ? row(source.buffer, 0) : gathered;
  const int64_t stride = in_place ? buffers_[static_cast<size_t>(source.buffer)].stride : widest_;
  uint8_t* out = few ? memory.activations : activations_;
  if (mine.begin < mine.end) {
    kernels_.linear->prepare(activation_of(weight), x, stride, rows, mine.begin, mine.end, weight.cols,
                             weight.padded_cols, out);
  }
  if (!few) pool_.barrier();
  return {out, x, stride};
}

// Rows that one pass over a thread's tiles takes: few enough that their activations stay in the cache.
int Runner::stretch_of(const Weight& weight, int rows) const {
  if (rows <= kLeastStretch) return rows;
  const size_t bytes = kernels_.linear->activation_bytes(activation_of(weight), 1, weight.padded_cols);
  const int fit = static_cast<int>(std::min<size_t>(kStretchBytes / bytes, kMostStretch)) / kActivationBlock;
  return std::max(kLeastStretch, fit * kActivationBlock);
}

// Tiles that a thread takes at once, in whole units.
int Runner::chunk_of(const Weight& weight, int unit) const {
  const int64_t bytes = weight.hi_tile_bytes + (point_->body == Planes::both ? weight.lo_tile_bytes : 0);
  return static_cast<int>(std::max<int64_t>(1, kChunkBytes / (bytes * unit))) * unit;
}

void Runner::run(const LinearPhase& phase, size_t index, int thread) {
  const LinearOp& op = phase.linear;
  const Weight& w = weight(op.weight);
  const int tokens = rows_of(index);
  if (tokens == 0) return;
  const int first_tile = index + 1 == last_attention_ ? skipped_tiles(phase) : 0;
  const RowSource source = {phase.normed_by == kNone ? op.source : phase.norm_source, phase.normed_by, nullptr};
  const uint8_t* activations = prepare(source, w, tokens, thread).activations;
  const Thread& memory = thread_memory_[static_cast<size_t>(thread)];
  const Activation kind = activation_of(w);
  const int stretch = stretch_of(w, tokens), stretches = (tokens + stretch - 1) / stretch;
  const auto work = [&](int pass, Share tiles) {
    const int first = pass * stretch;
    const LinearCall call = {&w,
                             point_->body,
                             kind,
                             activations + kernels_.linear->activation_bytes(kind, first, w.padded_cols),
                             std::min(stretch, tokens - first),
                             first_tile + tiles.begin,
                             first_tile + tiles.end,
                             row(op.out, first),
                             buffers_[static_cast<size_t>(op.out)].stride,
                             vector(op.bias),
                             memory.scratch};
    multiply(phase, call, first, memory);
  };
  work_off(index, thread, w, first_tile, phase.unit, chunk_of(w, phase.unit), stretches, work);
  if (first_tile > 0) multiply_queries(phase, share(first_tile, phase.unit, thread), thread);
}

// Of the last QKV, the tiles of the queries if they are wanted for a few tokens only; 0 if all is computed for all.
int Runner::skipped_tiles(const LinearPhase& phase) const {
  if (!short_tail_ || batch_.rows > kFewTokens || phase.epilogue != Epilogue::heads) return 0;
  const AttentionOp& op = phase.work.attention;
  const int queries = op.heads * op.head_dim;
  const bool apart = queries <= std::min(op.k_offset, op.v_offset) && queries % (phase.unit * kTileRows) == 0;
  return apart ? queries / kTileRows : 0;
}

// The queries' tiles for the rows whose logits are wanted, each prepared and multiplied alone.
void Runner::multiply_queries(const LinearPhase& phase, Share tiles, int thread) {
  const LinearOp& op = phase.linear;
  const Weight& w = weight(op.weight);
  const Thread& memory = thread_memory_[static_cast<size_t>(thread)];
  const bool normed = phase.normed_by != kNone;
  for (int r = 0; r < static_cast<int>(batch_.rows) && tiles.begin < tiles.end; ++r) {
    const int token = batch_.logit_rows[r];
    const RowSource source = {normed ? phase.norm_source : op.source, phase.normed_by, batch_.logit_rows + r};
    const LinearCall call = {&w,
                             point_->body,
                             activation_of(w),
                             prepare(source, w, 1, thread).activations,
                             1,
                             tiles.begin,
                             tiles.end,
                             row(op.out, token),
                             buffers_[static_cast<size_t>(op.out)].stride,
                             vector(op.bias),
                             memory.scratch};
    multiply(phase, call, token, memory);
  }
}

void Runner::multiply(const LinearPhase& phase, LinearCall call, int first_token, const Thread& memory) {
  const LinearKernels& kernels = *kernels_.linear;
  const int rows = call.weight->rows, begin = call.tile_begin, end = call.tile_end;
  if (phase.epilogue == Epilogue::none || phase.epilogue == Epilogue::heads) {
    kernels.linear(call);
    if (phase.epilogue == Epilogue::none) return;
    const int dim = phase.work.attention.head_dim;
    const int last = std::min(end * kTileRows, rows) / dim;
    for (int token = first_token; token < first_token + call.tokens; ++token) {
      for (int head = begin * kTileRows / dim; head < last; ++head) transform_head(phase.work, token, head);
    }
    return;
  }
  const int room = static_cast<int>(kTileFloats) / (call.tokens * kTileRows) / phase.unit * phase.unit;
  const int tiles = std::max(phase.unit, room);
  for (int tile = begin; tile < end; tile += tiles) {
    call.tile_begin = tile;
    call.tile_end = std::min(end, tile + tiles);
    const int first_row = tile * kTileRows, count = std::min(call.tile_end * kTileRows, rows) - first_row;
    call.out_stride = (call.tile_end - tile) * kTileRows;
    call.out = memory.tile - first_row;  // the kernel adds the row
    kernels.linear(call);
    finish(phase, first_token, call.tokens, first_row, count, memory.tile, call.out_stride);
  }
}

// The elementwise end of a linear layer for outputs y [tokens][rows] that begin at `first_row`.
void Runner::finish(const LinearPhase& phase, int first_token, int tokens, int first_row, int rows, const float* y,
                    int64_t stride) {
  const RowwiseKernels& kernels = *kernels_.rowwise;
  const int width = plan_.buffers[static_cast<size_t>(phase.target)].width;
  for (int token = first_token; token < first_token + tokens; ++token, y += stride) {
    float* target = row(phase.target, token);
    if (phase.epilogue == Epilogue::add) {
      kernels.add(target + first_row, y, rows);
    } else if (phase.epilogue == Epilogue::activate) {
      kernels.activate(y, rows, phase.function, target + first_row);
    } else {
      for (int r = 0; r < rows; r += 2 * kTileRows) {
        const int column = (first_row + r) / 2;
        kernels.glu(y + r, y + r + kTileRows, std::min(kTileRows, width - column), phase.function, target + column);
      }
    }
  }
}

}  // namespace haomiao

// Work on one token at a time: embedding, norms, residuals, activations, and the heads between QKV and attention.
#include <cmath>

#include "runtime/runner.h"

namespace haomiao {

void Runner::run(const RowwisePhase& phase, size_t index, int thread) {
  const Share tokens = share(rows_of(index), 1, thread);
  const Thread& memory = thread_memory_[static_cast<size_t>(thread)];
  for (int token = tokens.begin; token < tokens.end; ++token) {
    if (index == 0) fill_rope_tables(token);
    for (const Op& op : phase.ops) rowwise_token(op, token, memory);
  }
}

void Runner::rowwise_token(const Op& op, int token, const Thread& memory) {
  const RowwiseKernels& kernels = *kernels_.rowwise;
  const auto width = [&](int buffer) { return plan_.buffers[static_cast<size_t>(buffer)].width; };
  if (const EmbedOp* e = std::get_if<EmbedOp>(&op)) {
    embed(*e, token, memory);
  } else if (const NormOp* norm = std::get_if<NormOp>(&op)) {
    norm_row(*norm, row(norm->source, token), row(norm->out, token));
  } else if (const AddOp* add = std::get_if<AddOp>(&op)) {
    kernels.add(row(add->target, token), row(add->source, token), width(add->target));
  } else if (const ActivateOp* act = std::get_if<ActivateOp>(&op)) {
    kernels.activate(row(act->source, token), width(act->out), act->function, row(act->out, token));
  } else if (const GluOp* glu = std::get_if<GluOp>(&op)) {
    const float* source = row(glu->source, token);
    for (int column = 0; column < width(glu->out); column += kTileRows, source += 2 * kTileRows) {
      const int left = width(glu->out) - column;
      kernels.glu(source, source + kTileRows, left < kTileRows ? left : kTileRows, glu->function,
                  row(glu->out, token) + column);
    }
  } else if (const HeadNormOp* norm_heads = std::get_if<HeadNormOp>(&op)) {
    float* head = row(norm_heads->buffer, token) + norm_heads->offset;
    for (int h = 0; h < norm_heads->heads; ++h, head += norm_heads->head_dim) {
      kernels.rms_norm(head, vector(norm_heads->weight), norm_heads->head_dim, norm_heads->eps, head);
    }
  } else if (const RopeOp* rope = std::get_if<RopeOp>(&op)) {
    const int dim = plan_.ropes[static_cast<size_t>(rope->rope)].dim;
    kernels.rope(row(rope->buffer, token) + rope->offset, rope->heads, rope->head_dim, dim,
                 rope_tables_[static_cast<size_t>(rope->rope)] + int64_t{token} * dim);
  }
}

void Runner::embed(const EmbedOp& op, int token, const Thread& memory) {
  float* out = row(op.out, token);
  const Weight& table = weight(op.table);
  kernels_.linear->read_row(table, batch_.token_ids[token], out);
  if (op.scale != 1.0f) kernels_.rowwise->scale_softcap(out, table.cols, op.scale, 0.0f);
  if (op.positions == kNone) return;
  kernels_.linear->read_row(weight(op.positions), static_cast<int32_t>(positions_[static_cast<size_t>(token)]),
                            memory.rows);
  kernels_.rowwise->add(out, memory.rows, table.cols);
}

void Runner::norm_row(const NormOp& op, const float* x, float* out) const {
  const int width = plan_.buffers[static_cast<size_t>(op.source)].width;
  if (op.rms) return kernels_.rowwise->rms_norm(x, vector(op.weight), width, op.eps, out);
  kernels_.rowwise->layer_norm(x, vector(op.weight), vector(op.bias), width, op.eps, out);
}

// The angle is rounded to float32 once; cosine and sine are taken in double (docs/ARCHITECTURE.md, section 3).
void Runner::fill_rope_tables(int token) {
  const float position = static_cast<float>(positions_[static_cast<size_t>(token)]);
  for (size_t r = 0; r < plan_.ropes.size(); ++r) {
    const Rope& rope = plan_.ropes[r];
    const int half = rope.dim / 2;
    float* cosines = rope_tables_[r] + int64_t{token} * rope.dim;
    const double factor = static_cast<double>(rope.attention_factor);
    for (int i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position * rope.inv_freq[static_cast<size_t>(i)]);
      cosines[i] = static_cast<float>(std::cos(angle) * factor);
      cosines[half + i] = static_cast<float>(std::sin(angle) * factor);
    }
  }
}

void Runner::run(const HeadsPhase& phase, size_t, int thread) {
  const AttentionOp& op = phase.work.attention;
  const int heads = plan_.buffers[static_cast<size_t>(op.qkv)].width / op.head_dim;
  const Share pieces = share(static_cast<int>(batch_.tokens) * heads, 1, thread);
  for (int i = pieces.begin; i < pieces.end; ++i) transform_head(phase.work, i / heads, i % heads);
}

// Norm and rotation of one head, then into the KV block if it is a key or a value.
void Runner::transform_head(const HeadWork& work, int token, int head) {
  const AttentionOp& op = work.attention;
  float* x = row(op.qkv, token) + int64_t{head} * op.head_dim;
  for (const HeadTransform& t : work.transforms) {
    if (head < t.first_head || head >= t.first_head + t.heads) continue;
    if (t.rope == kNone) {
      kernels_.rowwise->rms_norm(x, vector(t.weight), op.head_dim, t.eps, x);
    } else {
      const int dim = plan_.ropes[static_cast<size_t>(t.rope)].dim;
      const float* table = rope_tables_[static_cast<size_t>(t.rope)] + int64_t{token} * dim;
      kernels_.rowwise->rope(x, 1, op.head_dim, dim, table);
    }
  }
  const int key = head - work.first_key_head(), value = head - work.first_value_head();
  const bool is_key = key >= 0 && key < op.kv_heads, is_value = value >= 0 && value < op.kv_heads;
  if (!is_key && !is_value) return;
  const int64_t position = positions_[static_cast<size_t>(token)];
  const int slot = static_cast<int>(position % kKvBlock);
  const AttentionKernels& kernels = *kernels_.attention;
  const auto write = [&](int32_t block) {
    if (is_key) kernels.write_key(options_.kv, op.head_dim, x, slot, kv_block(op.layer, block, key));
    if (is_value) kernels.write_value(options_.kv, op.head_dim, x, slot, kv_block(op.layer, block, value));
  };
  write(block_table(sequence_of_[static_cast<size_t>(token)])[position / kKvBlock]);
  if (!batch_.copy_count) return;
  const size_t t = static_cast<size_t>(token);
  for (int64_t c = copies_from_[t]; c < copies_from_[t + 1]; ++c) write(batch_.copies[2 * c + 1]);
}

}  // namespace haomiao

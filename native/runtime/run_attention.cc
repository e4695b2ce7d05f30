// Attention of a step: tiles of queries per sequence and kv head are taken by whoever is free (a result does not depend
// on who). A long context with few tiles is divided by splits too, and their states are merged in order.
#include <algorithm>
#include <cstring>

#include "runtime/runner.h"
#include "runtime/runner_limits.h"

namespace haomiao {

// Floats of one split's state of a tile, in the layer where it is largest.
size_t Runner::state_floats(int tokens) const {
  size_t most = 0;
  for (const Op& op : plan_.ops) {
    const AttentionOp* a = std::get_if<AttentionOp>(&op);
    if (a) most = std::max(most, kernels_.attention->partial_floats(a->heads / a->kv_heads, a->head_dim, tokens));
  }
  return most;
}

// Tiles are the same for every layer; kv heads come on top.
void Runner::plan_items() {
  whole_.tiles.clear(), tail_.tiles.clear();
  for (int s = 0; s < batch_.sequences(); ++s) {
    add_tiles(whole_, s, batch_.span_starts[s], batch_.length(s), batch_.span_starts[s]);
  }
  divide_tiles(whole_);
  // hidden states are wanted of nearly every token of a step or of none, and the rows of logits need not be among them
  short_tail_ = last_attention_ < phases_.size() && batch_.rows < batch_.tokens && !batch_.hidden_count;
  if (short_tail_) plan_tail();
}

// Neighbouring rows of a sequence share tiles.
void Runner::plan_tail() {
  const auto sequence = [&](int64_t r) { return sequence_of_[static_cast<size_t>(batch_.logit_rows[r])]; };
  for (int64_t r = 0, n = 1; r < batch_.rows; r += n, n = 1) {
    const int first = batch_.logit_rows[r];
    while (r + n < batch_.rows && batch_.logit_rows[r + n] == first + n && sequence(r + n) == sequence(r)) ++n;
    add_tiles(tail_, sequence(r), first, static_cast<int>(n), static_cast<int>(r));
  }
  divide_tiles(tail_);
}

void Runner::add_tiles(Attending& work, int sequence, int first_token, int tokens, int out_row) const {
  for (int t = 0; t < tokens; t += tile_tokens_) {
    const int n = std::min(tile_tokens_, tokens - t);
    const int64_t last = positions_[static_cast<size_t>(first_token + t + n - 1)];
    work.tiles.push_back({sequence, first_token + t, n, out_row + t, 0, 0, last / kKvSplit + 1, 0});
  }
}

void Runner::divide_tiles(Attending& work) const {
  work.items.clear();
  work.split = false;
  const int64_t pieces = static_cast<int64_t>(work.tiles.size()) * least_kv_heads_, threads = pool_.active();
  const int64_t wanted = kItemsPerThread * threads;
  if (pieces == 0 || threads == 1 || pieces >= wanted || pieces % threads == 0) return;
  size_t floats = 0;
  for (Item& tile : work.tiles) {
    tile.partial = floats;
    floats += static_cast<size_t>(tile.splits) * static_cast<size_t>(most_kv_heads_) * state_floats(tile.tokens);
    work.split = work.split || tile.splits > 1;
  }
  work.split = work.split && floats <= partial_capacity_;
  if (!work.split) return;
  for (const Item& tile : work.tiles) {
    const int64_t groups = std::min((wanted + pieces - 1) / pieces, tile.splits);
    for (int64_t g = 0; g < groups; ++g) {
      Item item = tile;
      item.split_begin = tile.splits * g / groups, item.split_end = tile.splits * (g + 1) / groups;
      work.items.push_back(item);
    }
  }
}

// What is read after the last attention moves to the places of the logit rows: ascending, and never upwards.
void Runner::carry_rows() const {
  for (const int buffer : carried_) {
    const size_t bytes = sizeof(float) * static_cast<size_t>(plan_.buffers[static_cast<size_t>(buffer)].width);
    for (int r = 0; r < static_cast<int>(batch_.rows); ++r) {
      if (batch_.logit_rows[r] != r) std::memcpy(row(buffer, r), row(buffer, batch_.logit_rows[r]), bytes);
    }
  }
}

void Runner::attend_item(const AttentionOp& op, const Item& item, int kv_head, uint8_t* scratch, bool split,
                         bool merge) {
  const AttentionKernels& kernels = *kernels_.attention;
  const KvLayer& layer = layers_[static_cast<size_t>(op.layer)];
  const int per_kv = op.heads / op.kv_heads;
  const int64_t column = int64_t{kv_head} * per_kv * op.head_dim;
  AttentionCall call = {options_.kv,
                        per_kv,
                        op.head_dim,
                        op.scale,
                        op.softcap,
                        op.window,
                        row(op.qkv, item.first_token) + column,
                        buffers_[static_cast<size_t>(op.qkv)].stride,
                        row(op.out, item.out_row) + column,
                        buffers_[static_cast<size_t>(op.out)].stride,
                        item.tokens,
                        positions_[static_cast<size_t>(item.first_token)],
                        kv_block(op.layer, 0, kv_head),
                        layer.block_bytes * layer.kv_heads,
                        block_table(item.sequence),
                        0,
                        0,
                        nullptr,
                        scratch};
  if (!split) return kernels.attend(call);
  const size_t floats = kernels.partial_floats(per_kv, op.head_dim, item.tokens);
  const size_t splits = static_cast<size_t>(item.splits);
  call.partials = partials_ + item.partial + static_cast<size_t>(kv_head) * splits * floats;
  if (merge) return kernels.merge(call, item.splits);
  call.split_begin = item.split_begin, call.split_end = item.split_end;
  call.partials += static_cast<size_t>(item.split_begin) * floats;
  kernels.attend(call);
}

void Runner::run(const AttentionPhase& phase, size_t index, int thread) {
  const AttentionOp& op = phase.attention;
  const bool last = short_tail_ && index == last_attention_;
  const Attending& work = last ? tail_ : whole_;
  uint8_t* scratch = thread_memory_[static_cast<size_t>(thread)].scratch;
  const auto take = [&](std::atomic<uint32_t>& next, const std::vector<Item>& list, bool merge) {
    const uint32_t heads = static_cast<uint32_t>(op.kv_heads), count = static_cast<uint32_t>(list.size()) * heads;
    for (uint32_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      attend_item(op, list[i / heads], static_cast<int>(i % heads), scratch, work.split, merge);
    }
  };
  if (last && thread == 0) carry_rows();
  take(next_[2 * index], work.split ? work.items : work.tiles, false);
  if (!work.split) return;
  pool_.barrier();
  take(next_[2 * index + 1], work.tiles, true);
}

}  // namespace haomiao

// Attention of a step: tiles of queries per sequence and kv head are taken by whoever is free (a result does not depend
// on who). A long context with few tiles is divided by splits too, and their states are merged in order.
#include <algorithm>

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
  tiles_.clear();
  items_.clear();
  split_ = false;
  for (int s = 0; s < batch_.sequences(); ++s) {
    for (int t = batch_.span_starts[s]; t < batch_.span_starts[s + 1]; t += tile_tokens_) {
      const int tokens = std::min(tile_tokens_, batch_.span_starts[s + 1] - t);
      const int64_t last = positions_[static_cast<size_t>(t + tokens - 1)];
      tiles_.push_back({s, t, tokens, 0, 0, last / kKvSplit + 1, 0});
    }
  }
  const int64_t pieces = static_cast<int64_t>(tiles_.size()) * least_kv_heads_, threads = pool_.threads();
  const int64_t wanted = kItemsPerThread * threads;
  if (threads == 1 || pieces >= wanted || pieces % threads == 0) return;
  size_t floats = 0;
  for (Item& tile : tiles_) {
    tile.partial = floats;
    floats += static_cast<size_t>(tile.splits) * static_cast<size_t>(most_kv_heads_) * state_floats(tile.tokens);
    split_ = split_ || tile.splits > 1;
  }
  split_ = split_ && floats <= partial_capacity_;
  if (!split_) return;
  const int64_t groups = (wanted + pieces - 1) / pieces;
  for (const Item& tile : tiles_) divide_tile(tile, std::min(groups, tile.splits));
}

void Runner::divide_tile(const Item& tile, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    Item item = tile;
    item.split_begin = tile.splits * g / groups, item.split_end = tile.splits * (g + 1) / groups;
    items_.push_back(item);
  }
}

void Runner::attend_item(const AttentionOp& op, const Item& item, int kv_head, uint8_t* scratch, bool merge) {
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
                        row(op.out, item.first_token) + column,
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
  if (!split_) return kernels.attend(call);
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
  uint8_t* scratch = thread_memory_[static_cast<size_t>(thread)].scratch;
  const auto take = [&](std::atomic<uint32_t>& next, const std::vector<Item>& list, bool merge) {
    const uint32_t heads = static_cast<uint32_t>(op.kv_heads), count = static_cast<uint32_t>(list.size()) * heads;
    for (uint32_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      attend_item(op, list[i / heads], static_cast<int>(i % heads), scratch, merge);
    }
  };
  take(next_[2 * index], split_ ? items_ : tiles_, false);
  if (!split_) return;
  pool_.barrier();
  take(next_[2 * index + 1], tiles_, true);
}

}  // namespace haomiao

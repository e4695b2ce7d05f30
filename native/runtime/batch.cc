#include "runtime/batch.h"

#include "kernels/attention/attention.h"

namespace haomiao {
namespace {

std::string number(int64_t n) { return std::to_string(n); }

}  // namespace

BatchCheck::BatchCheck(const BatchLimits& limits)
    : limits_(limits),
      written_in_(static_cast<size_t>(limits.kv_blocks)),
      slots_(static_cast<size_t>(limits.kv_blocks)) {}

std::string BatchCheck::operator()(const Batch& batch) {
  if (batch.tokens < 1 || batch.tokens > limits_.max_tokens) {
    return "a step of " + number(batch.tokens) + " tokens; 1 to " + number(limits_.max_tokens) + " are possible";
  }
  for (int64_t i = 0; i < batch.tokens; ++i) {
    if (batch.token_ids[i] < 0 || batch.token_ids[i] >= limits_.vocab_size) {
      return "token id " + number(batch.token_ids[i]) + " is outside the vocabulary of " + number(limits_.vocab_size);
    }
  }
  if (batch.span_count < 2 || batch.past_count != batch.span_count - 1 || batch.table_rows != batch.past_count) {
    return "span_starts must hold one more element than past, and block_tables a row for each";
  }
  if (batch.span_starts[0] != 0 || batch.span_starts[batch.span_count - 1] != batch.tokens) {
    return "span_starts must begin at 0 and end at the number of tokens";
  }
  for (int64_t s = 0; s + 1 < batch.span_count; ++s) {
    if (batch.span_starts[s + 1] <= batch.span_starts[s]) return "span_starts must ascend";
  }
  if (std::string wrong = check_rows("logit", batch.logit_rows, batch.rows, batch.tokens); !wrong.empty()) return wrong;
  if (std::string wrong = check_rows("hidden", batch.hidden_rows, batch.hidden_count, batch.tokens); !wrong.empty()) {
    return wrong;
  }
  ++step_;
  for (int s = 0; s < batch.sequences(); ++s) {
    if (std::string wrong = check_blocks(batch, s); !wrong.empty()) return wrong;
  }
  return check_copies(batch);
}

std::string BatchCheck::check_rows(const char* what, const int32_t* rows, int64_t count, int64_t tokens) {
  for (int64_t r = 0; r < count; ++r) {
    if (rows[r] < 0 || rows[r] >= tokens) return std::string("a ") + what + " row is outside the step";
    if (r > 0 && rows[r] <= rows[r - 1]) return std::string(what) + "_rows must ascend";
  }
  return {};
}

bool BatchCheck::written(int32_t block, uint32_t mask) {
  const size_t b = static_cast<size_t>(block);
  if (written_in_[b] != step_) written_in_[b] = step_, slots_[b] = 0;
  const bool before = (slots_[b] & mask) != 0;
  slots_[b] |= mask;
  return before;
}

std::string BatchCheck::check_copies(const Batch& batch) {
  int64_t sequence = 0;
  for (int64_t i = 0; i < batch.copy_count; ++i) {
    const int32_t token = batch.copies[2 * i], block = batch.copies[2 * i + 1];
    if (token < 0 || token >= batch.tokens) return "a copy is of a token outside the step";
    if (i > 0 && token < batch.copies[2 * i - 2]) return "copies must ascend by their tokens";
    if (block < 0 || block >= limits_.kv_blocks) {
      return "a copy names KV block " + number(block) + "; there are " + number(limits_.kv_blocks);
    }
    while (token >= batch.span_starts[sequence + 1]) ++sequence;
    const int64_t position = int64_t{batch.past[sequence]} + token - batch.span_starts[sequence];
    if (written(block, uint32_t{1} << (position % kKvBlock))) {
      return "two tokens of the step write the same place of KV block " + number(block);
    }
  }
  return {};
}

std::string BatchCheck::check_blocks(const Batch& batch, int sequence) {
  const std::string who = "sequence " + number(sequence);
  const int64_t past = batch.past[sequence];
  if (past < 0) return who + " has a negative past";
  const int64_t end = past + batch.length(sequence);
  if (end > limits_.max_context) {
    return who + " reaches " + number(end) + " tokens, the context holds " + number(limits_.max_context);
  }
  const int64_t needed = (end + kKvBlock - 1) / kKvBlock;
  if (needed > batch.table_columns) return who + " needs " + number(needed) + " KV blocks, its table is shorter";
  const int32_t* table = batch.block_tables + sequence * batch.table_columns;
  for (int64_t b = 0; b < needed; ++b) {
    if (table[b] < 0 || table[b] >= limits_.kv_blocks) {
      return who + " names KV block " + number(table[b]) + "; there are " + number(limits_.kv_blocks);
    }
  }
  for (int64_t b = past / kKvBlock; b < needed; ++b) {
    const int64_t first = past > b * kKvBlock ? past - b * kKvBlock : 0;
    const int64_t last = end < (b + 1) * kKvBlock ? end - b * kKvBlock : kKvBlock;
    const uint32_t mask = static_cast<uint32_t>(((uint64_t{1} << (last - first)) - 1) << first);
    if (written(table[b], mask)) return "two tokens of the step write the same place of KV block " + number(table[b]);
  }
  return {};
}

}  // namespace haomiao

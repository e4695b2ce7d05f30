// One step's batch as it comes from outside, and its check: nothing in it is believed.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace haomiao {

// types.StepBatch: tokens of several sequences one after the other; span s holds tokens [span_starts[s],
// span_starts[s + 1]) at positions past[s], past[s] + 1, ...
struct Batch {
  const int32_t* token_ids;  // [tokens]
  int64_t tokens;
  const int32_t* span_starts;  // [span_count]
  int64_t span_count;
  const int32_t* past;  // [past_count]
  int64_t past_count;
  const int32_t* block_tables;  // [table_rows][table_columns]
  int64_t table_rows, table_columns;
  const int32_t* logit_rows;  // [rows]
  int64_t rows;
  const bool* greedy;  // [rows] true where only the argmax is wanted, or nullptr: every row is wanted whole
  const int32_t* copies = nullptr;  // [copy_count][2] (token, KV block), ascending by token: K and V go there as well
  int64_t copy_count = 0;
  const int32_t* hidden_rows = nullptr;  // [hidden_count] rows whose final hidden states are wanted, ascending
  int64_t hidden_count = 0;

  int sequences() const { return static_cast<int>(past_count); }
  int length(int sequence) const { return span_starts[sequence + 1] - span_starts[sequence]; }
};

struct BatchLimits {
  int vocab_size, max_tokens, kv_blocks;
  int64_t max_context;
};

// Checks batches, and remembers between steps only which slots the last one wrote.
class BatchCheck {
 public:
  explicit BatchCheck(const BatchLimits& limits);
  // One line that says what is wrong, or the empty string.
  std::string operator()(const Batch& batch);

 private:
  static std::string check_rows(const char* what, const int32_t* rows, int64_t count, int64_t tokens);
  std::string check_blocks(const Batch& batch, int sequence);
  std::string check_copies(const Batch& batch);
  bool written(int32_t block, uint32_t mask);  // true if one of the slots was written in this step; now they all are

  BatchLimits limits_;
  uint64_t step_ = 0;
  std::vector<uint64_t> written_in_;  // [kv_blocks] the last step that wrote the block
  std::vector<uint32_t> slots_;       // [kv_blocks] which of its 32 slots
};

}  // namespace haomiao

// Runs a lowered plan: one call is one whole step over a batch. All memory is taken at load; a step allocates nothing,
// takes no lock and, while its threads spin, makes no system call. Knows nothing about Python, files or scheduling.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "kernels/table.h"
#include "runtime/batch.h"
#include "runtime/claims.h"
#include "runtime/lower.h"
#include "runtime/memory.h"
#include "runtime/plan.h"
#include "runtime/pool.h"
#include "runtime/runner_limits.h"

namespace haomiao {

// One operating point: which planes are read, and the activations of weights that are stored as floats.
struct PointSpec {
  std::string name;
  bool integer;  // weights in planes or int8 are allowed
  Planes body, head;
  Activation float_activation;  // f32 or bf16, for bf16 weights
};

struct RunnerOptions {
  KvType kv;
  int64_t kv_blocks;
  int64_t max_step_tokens;
  int threads;  // 0: as many as cores.h chooses
  bool pin;
};

class Runner {
 public:
  // Throws std::invalid_argument with one line, or std::bad_alloc.
  Runner(Plan plan, const KernelTable& kernels, const RunnerOptions& options, std::vector<PointSpec> points);

  // One line that says what is wrong with the batch (nothing was done), or the empty string. logits is
  // [rows, vocab_size], argmax [rows]; logits of greedy rows may be left as they were. hidden is [hidden_count,
  // hidden_size()]: what the head is multiplied with.
  std::string step(int64_t point, const Batch& batch, float* logits, int32_t* argmax, int64_t* elapsed_ns,
                   float* hidden = nullptr);

  // pairs is [count][2]: (from, to). As step().
  std::string copy_blocks(const int32_t* pairs, int64_t count);

  int threads() const { return pool_.threads(); }
  // Threads that compute the steps to come (pool.h); no bit depends on it.
  void set_active(int threads) { pool_.set_active(threads); }
  int active() const { return pool_.active(); }
  bool crowded() const { return pool_.crowded(); }
  const char* isa() const { return kernels_.isa; }
  int64_t kv_bytes_per_block() const { return kv_bytes_per_block_; }
  int64_t max_context() const { return plan_.max_context; }
  int hidden_size() const;
  int64_t buffer_bytes() const { return static_cast<int64_t>(arena_.bytes()); }

  // The share of the head's (row, tile) pairs that the last step computed with both planes after screening; negative if
  // it did not screen.
  double rescored() const { return rescored_; }

  // Nanoseconds of each phase of the last step, while profiling is on; [0, phases()).
  void profile(bool on) { profiling_ = on; }
  const std::vector<Phase>& phases() const { return phases_; }
  const std::vector<int64_t>& phase_ns() const { return phase_ns_; }

 private:
  // Memory of one thread.
  struct Thread {
    uint8_t* activations;  // prepared rows of a small step
    float* rows;           // [kFewTokens][widest]: normed rows of a small step
    float* tile;           // [kTileFloats]: outputs that an epilogue takes in
    uint8_t* scratch;      // of the kernels
    float* best;           // [max tokens]: the greatest logit of this thread's share, per row
    int32_t* best_at;      // kNone where the share is empty
    float* lengths;        // [kFewTokens][groups of the head]: of the rows that are screened
    uint8_t* singles;      // [kFewTokens][single_bytes_]: those rows, each prepared as if it were alone
    float* reached;        // [kFewTokens]: a logit that the greatest is not below
    int32_t* kept;         // [tiles of the head]
  };
  // A piece of every layer's attention: tokens of one sequence against the splits [split_begin, split_end).
  struct Item {
    int sequence, first_token, tokens;
    int out_row;                             // where the first token's output goes
    int64_t split_begin, split_end, splits;  // splits: how many the last token's context has
    size_t partial;                          // floats: where the states of this tile begin
  };
  // One attention of a step: what there is to do, and whether it is divided by splits.
  struct Attending {
    std::vector<Item> tiles, items;  // capacity is reserved at load
    bool split = false;              // tiles are divided into items, joined in a second pass
  };
  struct Share {
    int begin, end;
  };
  // Rows that a linear layer takes in: of a buffer, normed on the way if `norm` is an operation of the plan.
  struct RowSource {
    int buffer, norm;
    const int32_t* index;  // row r is row index[r] of the buffer, or r itself if nullptr
  };
  // Rows as the linear kernels read them, and as they were before; of a small step every thread has its own.
  struct Prepared {
    const uint8_t* activations;
    const float* x;
    int64_t stride;
  };

  void check_points() const;
  void find_tail();
  void reserve_memory();
  void reserve_sketch(const Weight& head);
  void begin_step(const PointSpec& point, const Batch& batch, float* logits, float* hidden);
  void choose_argmax(int32_t* argmax) const;

  static void run_job(void* runner, int thread);
  void run_phases(int thread);
  void run(const RowwisePhase& phase, size_t index, int thread);
  void run(const LinearPhase& phase, size_t index, int thread);
  void run(const HeadsPhase& phase, size_t index, int thread);
  void run(const AttentionPhase& phase, size_t index, int thread);
  void run(const LogitsPhase& phase, size_t index, int thread);

  // run_rowwise.cc
  void rowwise_token(const Op& op, int token, const Thread& memory);
  void embed(const EmbedOp& op, int token, const Thread& memory);
  void norm_row(const NormOp& op, const float* x, float* out) const;
  void fill_rope_tables(int token);
  void transform_head(const HeadWork& work, int token, int head);
  // run_linear.cc
  int skipped_tiles(const LinearPhase& phase) const;
  void multiply_queries(const LinearPhase& phase, Share tiles, int thread);
  Prepared prepare(const RowSource& source, const Weight& weight, int rows, int thread);
  int stretch_of(const Weight& weight, int rows) const;
  int chunk_of(const Weight& weight, int unit) const;
  void multiply(const LinearPhase& phase, LinearCall call, int first_token, const Thread& memory);
  void finish(const LinearPhase& phase, int first_token, int tokens, int first_row, int rows, const float* y,
              int64_t stride);
  // run_head.cc
  void write_hidden(const LogitsPhase& phase, int thread) const;
  void plan_screening();
  void end_screening();
  // Numbers beat NaN, a greater one the smaller, the lower id its equals; kNone is beaten by all.
  static bool beats(float value, int at, float best, int best_at) {
    if (at == kNone || best_at == kNone) return at != kNone;
    const bool none = value != value, had_none = best != best;
    if (none != had_none) return had_none;
    return none || value == best ? at < best_at : value > best;
  }
  void take_best(const Thread& memory, int row, float value, int at) const;
  void screen(const LogitsPhase& phase, const Prepared& prepared, size_t index, int thread);
  void bound_tiles(const LogitsPhase& phase, const Prepared& prepared, size_t index, int thread);
  void measure_tile(const Weight& head, int tile);
  void multiply_head(const HeadOp& op, const Prepared& prepared, Share rows, Share tiles, bool scaled,
                     const Thread& memory);
  void rescore(const HeadOp& op, const Prepared& prepared, Share rows, Share tiles, const Thread& memory);
  float needed_bound(const HeadOp& op, float reached) const;
  bool may_win(int row, int tile, float needed) const;
  // run_attention.cc
  void plan_items();
  void plan_tail();
  void add_tiles(Attending& work, int sequence, int first_token, int tokens, int out_row) const;
  void divide_tiles(Attending& work) const;
  size_t state_floats(int tokens) const;
  void attend_item(const AttentionOp& op, const Item& item, int kv_head, uint8_t* scratch, bool split, bool merge);
  void carry_rows() const;

  Activation activation_of(const Weight& weight) const;
  float* row(int buffer, int token) const {
    const Stored& b = buffers_[static_cast<size_t>(buffer)];
    return b.data + static_cast<int64_t>(token) * b.stride;
  }
  const float* vector(int index) const {
    return index == kNone ? nullptr : plan_.vectors[static_cast<size_t>(index)].data;
  }
  const Weight& weight(int index) const { return plan_.matrices[static_cast<size_t>(index)].weight; }
  uint8_t* kv_block(int layer, int32_t block, int kv_head) const {
    const KvLayer& l = layers_[static_cast<size_t>(layer)];
    return kv_.data() + l.offset + (int64_t{block} * l.kv_heads + kv_head) * l.block_bytes;
  }
  const int32_t* block_table(int sequence) const { return batch_.block_tables + sequence * batch_.table_columns; }
  Share share(int count, int unit, int thread) const;
  Share share_tiles(const Weight& weight, int first, int unit, int thread) const;
  // work(pass, tiles) for every pass over every thread's share of the tiles from `first` on, counted from there,
  // `chunk` tiles a piece, until nothing is left to take: this thread's own first, then those of the next ones.
  template <typename Work>
  void work_off(size_t phase, int thread, const Weight& weight, int first, int unit, int chunk, int passes,
                const Work& work) {
    const int threads = pool_.active(), helped = std::min(threads, 1 + kMostHelped);
    for (int k = 0; k < helped; ++k) {
      const int owner = (thread + k) % threads;
      const Share all = share_tiles(weight, first, unit, owner);
      const int chunks = (all.end - all.begin + chunk - 1) / chunk;
      for (int i; (i = claims_.take(phase, owner, chunks * passes, k > 0)) >= 0;) {
        const int begin = all.begin + i % chunks * chunk;
        work(i / chunks, Share{begin, std::min(all.end, begin + chunk)});
      }
    }
  }
  // Rows that a phase works on, and whether they are the logit rows, moved to the first places.
  bool is_tail(size_t phase) const { return short_tail_ && phase > last_attention_; }
  int rows_of(size_t phase) const { return static_cast<int>(is_tail(phase) ? batch_.rows : batch_.tokens); }

  struct Stored {
    float* data;
    int64_t stride;
  };
  struct KvLayer {
    int64_t offset, block_bytes;  // of the layer in the pool; of one (block, kv head)
    int kv_heads;
  };

  const Plan plan_;
  const KernelTable kernels_;
  const RunnerOptions options_;
  const std::vector<PointSpec> points_;
  Pool pool_;
  Claims claims_;
  const std::vector<Phase> phases_;
  BatchCheck check_;
  int max_tokens_, tile_tokens_ = 1, least_kv_heads_ = 1, most_kv_heads_ = 1;
  int64_t kv_bytes_per_block_ = 0;

  Arena arena_;
  Mapping kv_;
  std::vector<KvLayer> layers_;
  std::vector<Stored> buffers_;
  std::vector<Thread> thread_memory_;
  uint8_t* activations_ = nullptr;  // prepared rows of a large step, all threads'
  float* rows_ = nullptr;           // [max tokens][widest]: normed or gathered rows of a large step
  int64_t widest_ = 0;
  std::vector<float*> rope_tables_;  // per rope [max tokens][dim]: cosines, sines
  float* partials_ = nullptr;
  size_t single_bytes_ = 0;           // of one prepared row of the screened head
  size_t partial_capacity_ = 0;       // floats
  const HeadOp* screened_ = nullptr;  // the head, if its weights can be screened at all
  float* lo_norms_ = nullptr;         // [tiles][groups] of the head, once lo_norms_known_
  float* upper_ = nullptr;            // [kFewTokens][tiles]: bounds of this step's rows
  bool lo_norms_known_ = false;
  Mapping sketch_memory_;  // of a screened head of one-byte codes: a hi plane made from them, once lo_norms_known_
  Weight sketch_{};
  size_t last_attention_ = 0;         // its phase, or phases_.size() if what follows cannot run for some rows alone
  std::vector<int> carried_;          // buffers that are read after the last attention, its own output aside
  int unscreened_ = 0, backoff_ = 0;  // steps to go before screening is tried again; how many the last failure cost

  // This step's.
  Batch batch_{};
  const PointSpec* point_ = nullptr;
  float *logits_ = nullptr, *hidden_ = nullptr;
  std::vector<int32_t> sequence_of_;  // [max tokens]
  std::vector<int64_t> positions_;    // [max tokens]
  std::vector<int64_t> copies_from_;  // [max tokens + 1] the first copy of each token, if the step has any
  Attending whole_, tail_;            // of all tokens; of the rows whose logits are wanted
  bool short_tail_ = false;           // the last attention and what follows run for the logit rows alone
  bool screening_ = false;
  double rescored_ = -1;
  int64_t rescored_pairs_ = 0;                     // (row, tile) pairs
  std::unique_ptr<std::atomic<uint32_t>[]> next_;  // [2 * phases]: the next attention item, the next to merge

  std::atomic<bool> stepping_{false};
  bool profiling_ = false;
  std::vector<int64_t> phase_ns_;
};

}  // namespace haomiao

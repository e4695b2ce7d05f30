// The runner on a small random plan: the same bits at any thread count and cut, hostile batches and plans refused.
// Built with ThreadSanitizer it shows that phases are separated by barriers, with AddressSanitizer that nothing is
// overrun.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/linear/weight.h"
#include "runtime/runner.h"

using namespace haomiao;

namespace {

constexpr int kVocab = 70, kHidden = 64, kHeads = 4, kKvHeads = 2, kDim = 16, kNeurons = 96, kLayers = 2;
constexpr int kQkv = (kHeads + 2 * kKvHeads) * kDim;

// Weights in the encoding that is asked for; owns their bytes.
class Weights {
 public:
  explicit Weights(Encoding encoding) : encoding_(encoding), rng_(7) {}

  Weight matrix(int rows, int cols) {
    const bool planes = encoding_ == Encoding::planes;
    const int tiles = (rows + kTileRows - 1) / kTileRows, groups = (cols + 31) / 32;
    const size_t hi_bytes = planes ? static_cast<size_t>(tiles * groups * (64 + 512)) : size_t(tiles) * cols * 128;
    std::vector<uint8_t>& hi = bytes(hi_bytes);
    if (planes) {
      for (int g = 0; g < tiles * groups; ++g) {
        for (int r = 0; r < 32; ++r)
          hi[static_cast<size_t>(g * 576 + 2 * r)] = 0, hi[size_t(g * 576 + 2 * r + 1)] = 0x24;
      }
    } else {
      std::normal_distribution<float> normal(0.0f, 0.15f);
      float* values = reinterpret_cast<float*>(hi.data());
      for (size_t i = 0; i < hi_bytes / 4; ++i) values[i] = normal(rng_);
    }
    std::vector<uint8_t>* lo = planes ? &bytes(static_cast<size_t>(tiles * groups * 512)) : nullptr;
    Weight weight;
    const char* wrong =
        make_weight(static_cast<uint32_t>(encoding_), rows, cols, planes ? 32 : 0, planes ? 4 : 0, hi.data(), hi.size(),
                    lo ? lo->data() : nullptr, lo ? lo->size() : 0, nullptr, &weight);
    CHECK(wrong == nullptr);
    return weight;
  }

  const float* ones(int n) {
    return reinterpret_cast<const float*>(floats_.emplace_back(static_cast<size_t>(n), 1.0f).data());
  }

 private:
  std::vector<uint8_t>& bytes(size_t n) {
    std::vector<uint8_t>& v = bytes_.emplace_back(n);
    for (uint8_t& b : v) b = static_cast<uint8_t>(rng_());
    return v;
  }

  Encoding encoding_;
  std::mt19937 rng_;
  std::deque<std::vector<uint8_t>> bytes_;
  std::deque<std::vector<float>> floats_;
};

PlanBuilder started(Weights& weights) {
  PlanBuilder b(kVocab, 4000);
  b.buffer("x", kHidden), b.buffer("h", kHidden), b.buffer("y", kHidden), b.buffer("qkv", kQkv);
  b.buffer("a", kHeads * kDim), b.buffer("w", 2 * kNeurons), b.buffer("f", kNeurons);
  b.matrix("embed", weights.matrix(kVocab, kHidden));
  b.vector("one", weights.ones(kHidden), kHidden);
  b.vector("head_one", weights.ones(kDim), kDim);
  b.rope_table(kDim, std::vector<float>(kDim / 2, 0.1f), 1.0f);
  return b;
}

Plan make_plan(Weights& weights, bool post_norm) {
  PlanBuilder b = started(weights);
  b.embed("x", "embed", 1.0f, "");
  for (int i = 0; i < kLayers; ++i) {
    const std::string n = std::to_string(i);
    b.layer(kKvHeads, kDim, i == 0 ? 0 : 30);
    b.matrix(n + "qkv", weights.matrix(kQkv, kHidden)), b.matrix(n + "out", weights.matrix(kHidden, kHeads * kDim));
    b.matrix(n + "gu", weights.matrix(2 * kNeurons, kHidden)), b.matrix(n + "down", weights.matrix(kHidden, kNeurons));
    b.norm("h", "x", "one", 1e-6f, "rms", "");
    b.linear("qkv", "h", n + "qkv", "");
    b.head_norm("qkv", 0, kHeads, kDim, "head_one", 1e-6f);
    b.rope("qkv", 0, kHeads, kDim, 0), b.rope("qkv", kHeads * kDim, kKvHeads, kDim, 0);
    b.attention("a", "qkv", i, kHeads, kKvHeads, kDim, kHeads * kDim, (kHeads + kKvHeads) * kDim, 0.25f,
                i == 0 ? 0 : 30, 0.0f);
    b.linear("y", "a", n + "out", "");
    if (post_norm) b.norm("y", "y", "one", 1e-6f, "layer", "");
    b.add("x", "y");
    b.norm("h", "x", "one", 1e-6f, "rms", "");
    b.linear("w", "h", n + "gu", ""), b.glu("f", "w", "silu");
    b.linear("y", "f", n + "down", ""), b.add("x", "y");
  }
  b.norm("h", "x", "one", 1e-6f, "rms", "");
  b.head("h", "embed", "", 1.0f, 0.0f);
  return b.finish();
}

std::vector<PointSpec> points() {
  return {{"int8", true, Planes::both, Planes::both, Activation::bf16},
          {"int4", true, Planes::hi, Planes::both, Activation::bf16}};
}

// Logits, then hidden states, of every token of one sequence beside `company` tokens of another, `cut` tokens a step.
std::vector<float> logits_of(Runner& runner, int tokens, int cut, int company, int64_t point) {
  std::vector<float> all, states;
  for (int first = 0; first < tokens; first += cut) {
    const int n = std::min(cut, tokens - first);
    std::vector<int32_t> ids, past, starts = {0}, rows, tables(64, -1);
    for (int t = 0; t < company; ++t) ids.push_back(t % 9);
    if (company) starts.push_back(company), past.push_back(0);
    for (int t = first; t < first + n; ++t) ids.push_back(t * 13 % kVocab), rows.push_back(company + t - first);
    starts.push_back(company + n), past.push_back(first);
    for (int s = 0; s < static_cast<int>(past.size()); ++s) {
      const bool own = s + 1 == static_cast<int>(past.size());
      for (int b = 0; b < 32; ++b) tables[static_cast<size_t>(s * 32 + b)] = own ? 31 - b : 32 + b;
    }
    std::vector<float> logits(static_cast<size_t>(n) * kVocab);
    std::vector<int32_t> argmax(static_cast<size_t>(n));
    const int64_t sequences = static_cast<int64_t>(past.size());
    const Batch batch = {ids.data(),
                         static_cast<int64_t>(ids.size()),
                         starts.data(),
                         sequences + 1,
                         past.data(),
                         sequences,
                         tables.data(),
                         sequences,
                         32,
                         rows.data(),
                         n,
                         nullptr};
    int64_t ns = 0;
    const std::string wrong = runner.step(point, batch, logits.data(), argmax.data(), &ns);
    if (!wrong.empty()) std::fprintf(stderr, "%s\n", wrong.c_str());
    CHECK(wrong.empty());
    for (int r = 0; r < n; ++r) {
      const float* row = logits.data() + r * kVocab;
      for (int v = 0; v < kVocab; ++v) CHECK(row[v] <= row[argmax[static_cast<size_t>(r)]]);
    }
    std::vector<char> greedy(static_cast<size_t>(n), 1);
    std::vector<int32_t> screened(static_cast<size_t>(n));
    Batch again = batch;
    again.greedy = reinterpret_cast<const bool*>(greedy.data());
    CHECK(runner.step(point, again, logits.data(), screened.data(), &ns).empty());
    CHECK(screened == argmax);
    CHECK(runner.step(point, batch, logits.data(), argmax.data(), &ns).empty());
    Batch pooled = batch;  // of every token, beside the logits of the last one
    pooled.logit_rows = rows.data() + n - 1, pooled.rows = 1;
    pooled.hidden_rows = rows.data(), pooled.hidden_count = n;
    std::vector<float> hidden(static_cast<size_t>(n) * kHidden), last(kVocab);
    CHECK(runner.hidden_size() == kHidden);
    CHECK(runner.step(point, pooled, last.data(), argmax.data(), &ns, hidden.data()).empty());
    CHECK(std::memcmp(last.data(), logits.data() + int64_t{n - 1} * kVocab, kVocab * sizeof(float)) == 0);
    all.insert(all.end(), logits.begin(), logits.end());
    states.insert(states.end(), hidden.begin(), hidden.end());
  }
  all.insert(all.end(), states.begin(), states.end());
  return all;
}

void test_bits(Encoding encoding, KvType kv, bool post_norm, const char* isa) {
  Weights weights(encoding);
  const char* error = nullptr;
  const KernelTable* kernels = select_kernels(isa, &error);
  CHECK(kernels != nullptr);
  std::vector<float> expected;
  for (const int threads : {1, 2, 4}) {
    Weights same(encoding);
    Runner runner(make_plan(same, post_norm), *kernels, {kv, 64, 128, threads, false}, points());
    CHECK(runner.threads() == threads);
    for (const int cut : {90, 7, 1}) {
      for (const int company : {0, 5, 30}) {
        if (cut == 1 && company) continue;
        const auto found = logits_of(runner, 90, cut, company, 1);
        if (expected.empty()) expected = found;
        CHECK(std::memcmp(found.data(), expected.data(), expected.size() * sizeof(float)) == 0);
      }
    }
    for (const float x : expected) CHECK(std::isfinite(x));
  }
}

// A context long enough for its splits to be divided among threads.
void test_divided_splits() {
  std::vector<float> expected;
  for (const int threads : {1, 3}) {
    Weights weights(Encoding::planes);
    const char* error = nullptr;
    Runner runner(make_plan(weights, false), *select_kernels(nullptr, &error), {KvType::int8, 64, 600, threads, false},
                  points());
    const auto found = logits_of(runner, 601, 600, 0, 0);
    if (expected.empty()) expected = found;
    CHECK(std::memcmp(found.data(), expected.data(), expected.size() * sizeof(float)) == 0);
  }
}

void test_random_batches() {
  Weights weights(Encoding::planes);
  const char* error = nullptr;
  Runner runner(make_plan(weights, false), *select_kernels(nullptr, &error), {KvType::bf16, 4, 16, 2, false}, points());
  std::mt19937 rng(3);
  const auto pick = [&](std::initializer_list<int> list) { return *(list.begin() + rng() % list.size()); };
  int accepted = 0;
  for (int i = 0; i < 3000; ++i) {
    const auto fill = [&](size_t n) {
      std::vector<int32_t> v(n);
      for (int32_t& x : v) x = pick({0, 1, 2, 3, 0, 1, 2, 5, -1, 40, 31, 32, INT32_MAX, INT32_MIN});
      return v;
    };
    auto ids = fill(rng() % 4), past = fill(rng() % 3), rows = fill(rng() % 3), tables = fill(past.size() * 2);
    auto starts = fill(past.size() + 1);
    if (rng() % 2) {
      for (size_t s = 0; s < starts.size(); ++s) starts[s] = static_cast<int32_t>(s);
      ids.resize(past.size(), 3);
    }
    auto wanted = fill(rng() % 3);
    std::vector<float> logits(rows.size() * kVocab + 1), hidden(wanted.size() * kHidden + 1);
    std::vector<int32_t> argmax(rows.size() + 1);
    int64_t ns = 0;
    const Batch batch = {ids.data(),
                         static_cast<int64_t>(ids.size()),
                         starts.data(),
                         static_cast<int64_t>(starts.size()),
                         past.data(),
                         static_cast<int64_t>(past.size()),
                         tables.data(),
                         static_cast<int64_t>(past.size()),
                         2,
                         rows.data(),
                         static_cast<int64_t>(rows.size()),
                         nullptr,
                         nullptr,
                         0,
                         wanted.data(),
                         static_cast<int64_t>(wanted.size())};
    accepted += runner.step(pick({0, 1}), batch, logits.data(), argmax.data(), &ns, hidden.data()).empty();
  }
  CHECK(accepted > 10 && accepted < 2000);
  CHECK(!runner.step(2, {}, nullptr, nullptr, nullptr).empty());
  const int32_t pairs[] = {0, 3, 1, 4};
  CHECK(runner.copy_blocks(pairs, 1).empty() && !runner.copy_blocks(pairs, 2).empty());
}

void refused(const std::function<void(PlanBuilder&)>& wrong) {
  Weights weights(Encoding::f32);
  PlanBuilder b = started(weights);
  b.layer(kKvHeads, kDim, 0);
  b.embed("x", "embed", 1.0f, "");
  bool thrown = false;
  try {
    wrong(b);
  } catch (const std::invalid_argument& error) {
    thrown = std::strlen(error.what()) > 10 && !std::strchr(error.what(), '\n');
  }
  CHECK(thrown);
}

void test_plans_are_refused() {
  refused([](PlanBuilder& b) { b.buffer("x", 3); });
  refused([](PlanBuilder& b) { b.buffer("big", int64_t{1} << 40); });
  refused([](PlanBuilder& b) { b.norm("h", "nothing", "one", 0.0f, "rms", ""); });
  refused([](PlanBuilder& b) { b.norm("h", "x", "head_one", 0.0f, "rms", ""); });
  refused([](PlanBuilder& b) { b.norm("h", "x", "one", NAN, "rms", ""); });
  refused([](PlanBuilder& b) { b.norm("h", "x", "one", 0.0f, "batch", ""); });
  refused([](PlanBuilder& b) { b.linear("qkv", "x", "embed", ""); });
  refused([](PlanBuilder& b) { b.linear("x", "x", "embed", ""); });
  refused([](PlanBuilder& b) { b.rope("x", 60, 1, kDim, 0); });
  refused([](PlanBuilder& b) { b.rope("x", INT64_MAX - 1, 1, kDim, 0); });
  refused([](PlanBuilder& b) { b.rope("x", 0, 1, 8, 0); });
  refused([](PlanBuilder& b) { b.attention("a", "x", 0, 2, 1, kDim, 32, 48, 1.0f, 0, 0.0f); });
  refused([](PlanBuilder& b) { b.attention("a", "x", -1, 2, 2, kDim, 32, 48, 1.0f, 0, 0.0f); });
  refused([](PlanBuilder& b) { b.glu("f", "x", "silu"); });
  refused([](PlanBuilder& b) { b.activate("h", "x", "swish"); });
  refused([](PlanBuilder& b) { b.rope_table(7, {1, 1, 1}, 1.0f); });
  refused([](PlanBuilder& b) { b.finish(); });
  refused([](PlanBuilder& b) { b.head("x", "embed", "", 1.0f, 0.0f), b.finish(); });
}

}  // namespace

int main() {
  test_bits(Encoding::planes, KvType::bf16, false, nullptr);
  test_bits(Encoding::planes, KvType::int8, true, nullptr);
  test_bits(Encoding::f32, KvType::f32, false, nullptr);
  test_bits(Encoding::planes, KvType::bf16, true, "scalar");
  test_divided_splits();
  test_random_batches();
  test_plans_are_refused();
  return haomiao_test::failures != 0;
}

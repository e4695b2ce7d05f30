// The attention kernels of every instruction set give the scalar kernels' bits, however tokens and splits are cut, in
// blocks whose unused places hold NaN, at positions up to 2^31.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/attention/attention.h"
#include "kernels/cpu.h"

using namespace haomiao;

namespace {

struct Aligned {
  explicit Aligned(size_t bytes) : p(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 64) / 64 * 64))) {}
  ~Aligned() { std::free(p); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  uint8_t* p;
};

struct Case {
  KvType kv;
  int heads, dim, keys, tokens;
  int64_t window;
  float softcap;
  int64_t first_key;  // position of the first key that is stored, a multiple of 32
};

std::vector<float> random_floats(size_t n, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> x(n);
  for (float& v : x) v = normal(rng);
  return x;
}

// The last `tokens` of keys [first_key, first_key + keys), `cut` tokens a call; `splits` > 0: ranges of so many splits.
std::vector<float> run(const AttentionKernels& k, const Case& c, int cut, int64_t splits) {
  const int blocks = (c.keys + kKvBlock - 1) / kKvBlock, width = c.heads * c.dim;
  const size_t bytes = k.block_bytes(c.kv, c.dim);
  Aligned pool(bytes * static_cast<size_t>(blocks));
  std::memset(pool.p, 0xff, bytes * static_cast<size_t>(blocks));
  const auto keys = random_floats(static_cast<size_t>(c.keys * c.dim), 1);
  const auto values = random_floats(static_cast<size_t>(c.keys * c.dim), 2);
  const auto queries = random_floats(static_cast<size_t>(c.tokens * width), 3);
  // Only blocks from the window on exist; the table covers all positions, as a real one would.
  const int64_t first_block = c.first_key / kKvBlock;
  std::vector<int32_t> table(static_cast<size_t>(first_block + blocks), INT32_MAX);
  for (int b = 0; b < blocks; ++b) table[static_cast<size_t>(first_block + b)] = blocks - 1 - b;
  for (int i = 0; i < c.keys; ++i) {
    uint8_t* block = pool.p + bytes * static_cast<size_t>(blocks - 1 - i / kKvBlock);
    k.write_key(c.kv, c.dim, keys.data() + i * c.dim, i % kKvBlock, block);
    k.write_value(c.kv, c.dim, values.data() + i * c.dim, i % kKvBlock, block);
  }
  std::vector<float> out(static_cast<size_t>(c.tokens * width), NAN);
  const int64_t all = (c.first_key + c.keys - 1) / kKvSplit + 1;
  for (int t = 0; t < c.tokens; t += cut) {
    const int n = std::min(cut, c.tokens - t);
    Aligned scratch(k.scratch_bytes(c.heads, c.dim, n));
    const size_t floats = k.partial_floats(c.heads, c.dim, n);
    Aligned partials(splits ? floats * sizeof(float) * static_cast<size_t>(all) : 0);
    AttentionCall call = {c.kv,
                          c.heads,
                          c.dim,
                          0.125f,
                          c.softcap,
                          c.window,
                          queries.data() + t * width,
                          width,
                          out.data() + t * width,
                          width,
                          n,
                          c.first_key + c.keys - c.tokens + t,
                          pool.p,
                          static_cast<int64_t>(bytes),
                          table.data(),
                          0,
                          0,
                          nullptr,
                          scratch.p};
    if (!splits) {
      k.attend(call);
      continue;
    }
    float* const states = reinterpret_cast<float*>(partials.p);
    for (int64_t s = 0; s < all; s += splits) {
      call.split_begin = s, call.split_end = std::min(all, s + splits);
      call.partials = states + floats * static_cast<size_t>(s);
      k.attend(call);
    }
    call.partials = states;
    k.merge(call, all);
  }
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void test_case(const Case& c) {
  const auto expected = run(*attention_kernels("scalar"), c, c.tokens, 0);
  for (const float x : expected) CHECK(std::isfinite(x));
  for (const char* const* isa = available_isas(); *isa; ++isa) {
    const AttentionKernels& k = *attention_kernels(*isa);
    CHECK(same_bits(run(k, c, c.tokens, 0), expected));
    CHECK(same_bits(run(k, c, 1, 0), expected));
    CHECK(same_bits(run(k, c, 3, 0), expected));
    if (c.first_key == 0) CHECK(same_bits(run(k, c, 5, 1), expected));
    if (c.first_key == 0) CHECK(same_bits(run(k, c, c.tokens, 2), expected));
  }
}

void test_positions_near_the_limit() {
  // A table for 2^31 positions would be 256 MiB: one for 2^24 shows the 64-bit arithmetic as well.
  const int64_t first = (int64_t{1} << 24) - 64;
  test_case({KvType::bf16, 2, 32, 90, 4, 50, 0.0f, first});
}

}  // namespace

int main() {
  for (const KvType kv : {KvType::f32, KvType::bf16, KvType::int8}) {
    for (const int dim : {8, 32, 64, 80, 96, 128, 256}) test_case({kv, 3, dim, 45, 13, 0, 0.0f, 0});
    for (const int heads : {1, 2, 7, 8, 9, 17}) test_case({kv, heads, 32, 70, 10, 0, 0.0f, 0});
    test_case({kv, 2, 64, 1100, 40, 0, 0.0f, 0});
    test_case({kv, 1, 64, 1100, 40, 20, 0.0f, 0});
    test_case({kv, 4, 64, 600, 30, 530, 3.0f, 0});
    test_case({kv, 5, 24, 1, 1, 0, 0.0f, 0});
  }
  test_positions_near_the_limit();
  CHECK(attention_kernels("sse9") == nullptr);
  return haomiao_test::failures != 0;
}

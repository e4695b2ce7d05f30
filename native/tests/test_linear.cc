// Every instruction set that this machine runs against the scalar kernels, on random sizes: int and f32 results bit for
// bit, bf16 dot products to a tolerance. Weights, activations and results lie at the very end of their allocations, so
// that a sanitizer sees every byte too many; rows that do not exist must stay untouched.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/cpu.h"
#include "kernels/linear/weight.h"

using namespace haomiao;

namespace {

std::mt19937 engine(12345);

int random_int(int least, int greatest) { return std::uniform_int_distribution<int>(least, greatest)(engine); }

// 64-byte aligned and exactly as long as it says, rounded up to the alignment.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : data_(static_cast<uint8_t*>(aligned_alloc(64, (bytes + 64) / 64 * 64))) {}
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint8_t* data() { return data_; }

 private:
  uint8_t* data_;
};

struct Case {
  Encoding encoding;
  Activation activation;
  Planes planes;
  bool with_lo;
  int rows, cols, group, lo_shift, tokens;
  bool with_bias, hostile;

  void print() const {
    std::fprintf(stderr, "  encoding %u activation %u planes %u lo %d rows %d cols %d group %d shift %d tokens %d\n",
                 static_cast<unsigned>(encoding), static_cast<unsigned>(activation), static_cast<unsigned>(planes),
                 with_lo, rows, cols, group, lo_shift, tokens);
  }
};

bool scaled(Encoding e) { return e == Encoding::int8 || e == Encoding::planes; }

Case random_case() {
  Case c;
  c.encoding = static_cast<Encoding>(random_int(0, 3));
  c.activation = scaled(c.encoding)            ? Activation::int8
                 : c.encoding == Encoding::f32 ? Activation::f32
                                               : static_cast<Activation>(random_int(0, 1));
  c.planes = static_cast<Planes>(random_int(0, 1));
  c.with_lo = c.encoding == Encoding::planes && random_int(0, 3) != 0;
  c.rows = random_int(0, 3) == 0 ? 32 * random_int(1, 4) : random_int(1, 130);
  c.cols = random_int(0, 3) == 0 ? 128 * random_int(1, 4) : random_int(1, 700);
  c.group = scaled(c.encoding) ? 32 << random_int(0, 2) : 0;
  c.lo_shift = c.with_lo ? random_int(0, 4) : 0;
  c.tokens = random_int(0, 9) == 0 ? random_int(180, 400) : random_int(1, 40);
  c.with_bias = random_int(0, 1) == 1;
  c.hostile = random_int(0, 7) == 0;
  return c;
}

struct Sizes {
  int64_t padded, hi, lo;
};

Sizes sizes_of(const Case& c) {
  const int64_t tiles = (c.rows + 31) / 32, unit = c.group ? c.group : c.encoding == Encoding::bf16 ? 2 : 1;
  const int64_t padded = (c.cols + unit - 1) / unit * unit;
  switch (c.encoding) {
    case Encoding::f32:
      return {padded, tiles * padded * 128, 0};
    case Encoding::bf16:
      return {padded, tiles * padded * 64, 0};
    case Encoding::int8:
      return {padded, tiles * (padded / c.group) * (64 + 32 * c.group), 0};
    default:
      return {padded, tiles * (padded / c.group) * (64 + 16 * c.group), c.with_lo ? tiles * padded * 16 : 0};
  }
}

// Random codes with harmless scales; floats are random, and padded columns zero where the rule needs it.
void fill_weights(const Case& c, const Sizes& sizes, uint8_t* hi, uint8_t* lo) {
  std::normal_distribution<float> normal;
  if (scaled(c.encoding)) {
    for (int64_t i = 0; i < sizes.hi; ++i) hi[i] = static_cast<uint8_t>(engine());
    for (int64_t i = 0; i < sizes.lo; ++i) lo[i] = static_cast<uint8_t>(engine());
    const int64_t group_bytes = 64 + (c.encoding == Encoding::int8 ? 32 : 16) * c.group;
    for (int64_t g = 0; g < sizes.hi; g += group_bytes) {
      for (int i = 0; i < 32; ++i) {
        const uint16_t scale = static_cast<uint16_t>(random_int(0, 15) == 0 ? random_int(0, 1023)  // subnormal or zero
                                                                            : (engine() & 0x83ff) | 0x2000);
        memcpy(hi + g + i * 2, &scale, 2);
      }
    }
    return;
  }
  const int64_t size = c.encoding == Encoding::f32 ? 4 : 2;
  for (int64_t i = 0; i < sizes.hi; i += size) {
    const float value = normal(engine);
    memcpy(hi + i, reinterpret_cast<const uint8_t*>(&value) + (4 - size), size);
  }
  if (sizes.padded != c.cols) {  // bf16: the second of the last pair of columns of every tile
    const int64_t tile = sizes.padded * 64;
    for (int64_t t = 0; t < sizes.hi; t += tile) {
      for (int r = 0; r < 32; ++r) memset(hi + t + tile - 128 + r * 4 + 2, 0, 2);
    }
  }
}

constexpr float kUntouched = 12345.0f;

struct Run {
  std::vector<float> y;  // [tokens][rows + 3]
  std::vector<uint8_t> prepared;
};

Run run(const LinearKernels& kernels, const Case& c, const Weight& w, const std::vector<float>& x, const float* bias,
        int tile_begin, int tile_end) {
  const int64_t stride = c.rows + 3;
  Run result;
  result.y.assign(static_cast<size_t>(c.tokens) * stride, kUntouched);
  const size_t bytes = kernels.activation_bytes(c.activation, c.tokens, w.padded_cols);
  Buffer prepared(bytes), scratch(kernels.scratch_bytes(w, c.tokens));
  for (int first = 0; first < c.tokens; first += 2 * kActivationBlock) {  // as several threads would share the work
    const int last = first + 2 * kActivationBlock < c.tokens ? first + 2 * kActivationBlock : c.tokens;
    kernels.prepare(c.activation, x.data(), c.cols, c.tokens, first, last, c.cols, w.padded_cols, prepared.data());
  }
  const LinearCall call = {&w,       c.planes,   c.activation,  prepared.data(),
                           c.tokens, tile_begin, tile_end,      result.y.data(),
                           stride,   bias,       scratch.data()};
  kernels.linear(call);
  result.prepared.assign(prepared.data(), prepared.data() + bytes);
  return result;
}

bool same_bits(float a, float b) { return memcmp(&a, &b, 4) == 0 || (isnan(a) && isnan(b)); }

bool equal(const std::vector<float>& a, const std::vector<float>& b, bool exactly, int cols) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (same_bits(a[i], b[i])) continue;
    if (exactly || !(fabsf(a[i] - b[i]) <= 1e-4f * sqrtf(static_cast<float>(cols)))) return false;
  }
  return true;
}

void check_case(const Case& c) {
  const Sizes sizes = sizes_of(c);
  std::vector<uint8_t> hi(sizes.hi), lo(sizes.lo);
  fill_weights(c, sizes, hi.data(), lo.data());
  Weight w;
  const char* wrong = make_weight(static_cast<uint32_t>(c.encoding), c.rows, c.cols, c.group, c.lo_shift, hi.data(),
                                  hi.size(), c.with_lo ? lo.data() : nullptr, lo.size(), &w);
  CHECK(wrong == nullptr);
  if (wrong) return;

  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(c.tokens) * c.cols), bias(c.rows);
  for (float& value : x) value = normal(engine);
  for (float& value : bias) value = normal(engine);
  if (c.hostile) {
    const float strange[] = {NAN, INFINITY, -INFINITY, 1e-38f, -1e-42f, 3e38f, 0.0f};
    for (int i = 0; i < 5; ++i) x[random_int(0, static_cast<int>(x.size()) - 1)] = strange[random_int(0, 6)];
  }
  const float* added = c.with_bias ? bias.data() : nullptr;
  const int tiles = (c.rows + 31) / 32, begin = random_int(0, tiles - 1), end = random_int(begin, tiles);

  const Run want = run(*linear_kernels("scalar"), c, w, x, added, 0, tiles);
  std::vector<float> row_want(c.cols), row_got(c.cols);
  const int row = random_int(0, c.rows - 1);
  linear_kernels("scalar")->read_row(w, row, row_want.data());
  for (const char* const* isa = available_isas(); *isa; ++isa) {
    const LinearKernels& kernels = *linear_kernels(*isa);
    const bool exactly = c.activation != Activation::bf16;
    const Run got = run(kernels, c, w, x, added, 0, tiles);
    const bool same = c.hostile && !exactly ? true : equal(got.y, want.y, exactly, c.cols);
    CHECK(same);
    if (!same) {
      std::fprintf(stderr, "  %s\n", *isa);
      c.print();
    }

    // a range of tiles gives the same bits and touches nothing else
    const Run part = run(kernels, c, w, x, added, begin, end);
    for (int t = 0; t < c.tokens; ++t) {
      for (int r = 0; r < c.rows + 3; ++r) {
        const size_t i = static_cast<size_t>(t) * (c.rows + 3) + r;
        const bool inside = r < c.rows && r / 32 >= begin && r / 32 < end;
        if (!same_bits(part.y[i], inside ? got.y[i] : kUntouched)) {
          CHECK(!"a tile range changed the result");
          c.print();
          return;
        }
      }
    }

    // a token alone gives the same bits as in company
    Case alone = c;
    alone.tokens = 1;
    const int t = random_int(0, c.tokens - 1);
    const std::vector<float> one(x.begin() + int64_t{t} * c.cols, x.begin() + int64_t{t + 1} * c.cols);
    const Run single = run(kernels, alone, w, one, added, 0, tiles);
    const std::vector<float> company(got.y.begin() + int64_t{t} * (c.rows + 3),
                                     got.y.begin() + int64_t{t + 1} * (c.rows + 3));
    CHECK(equal(single.y, company, true, c.cols));

    kernels.read_row(w, row, row_got.data());
    CHECK(memcmp(row_got.data(), row_want.data(), row_got.size() * 4) == 0);
  }
}

void check_refusals() {
  uint8_t bytes[1 << 16];
  Weight w;
  const auto make = [&](uint32_t encoding, int64_t rows, int64_t cols, int64_t group, int64_t shift, uint64_t size,
                        const uint8_t* lo = nullptr, uint64_t lo_size = 0) {
    return make_weight(encoding, rows, cols, group, shift, bytes, size, lo, lo_size, &w);
  };
  CHECK(make(3, 32, 32, 32, 0, 576) == nullptr);
  CHECK(make(3, 32, 32, 32, 4, 576, bytes, 512) == nullptr);
  CHECK(make(2, 32, 32, 32, 0, 1088) == nullptr);
  CHECK(make(1, 32, 3, 0, 0, 256) == nullptr);
  CHECK(make(4, 32, 32, 32, 0, 576) != nullptr);
  CHECK(make(3, 0, 32, 32, 0, 0) != nullptr);
  CHECK(make(3, 32, -1, 32, 0, 576) != nullptr);
  CHECK(make(3, int64_t{1} << 60, int64_t{1} << 60, 32, 0, 576) != nullptr);
  CHECK(make(3, 32, 32, 48, 0, 576) != nullptr);
  CHECK(make(0, 32, 32, 32, 0, 4096) != nullptr);
  CHECK(make(3, 32, 32, 32, 4, 576) != nullptr);
  CHECK(make(3, 32, 32, 32, 5, 576, bytes, 512) != nullptr);
  CHECK(make(3, 32, 32, 32, 4, 576, bytes, 511) != nullptr);
  CHECK(make(2, 32, 32, 32, 0, 1088, bytes, 512) != nullptr);
  CHECK(make(3, 33, 32, 32, 0, 576) != nullptr);
  CHECK(linear_kernels("mmx") == nullptr);
  CHECK(!cpu_supports("mmx"));
  CHECK(cpu_supports("scalar"));
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 150;
  check_refusals();
  for (int i = 0; i < cases; ++i) check_case(random_case());
  std::printf("isas:");
  for (const char* const* isa = available_isas(); *isa; ++isa) std::printf(" %s", *isa);
  std::printf("; %d cases, %d failures\n", cases, haomiao_test::failures);
  return haomiao_test::failures != 0;
}

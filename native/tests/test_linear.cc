// Every instruction set that this machine runs against the scalar kernels, on random sizes: int and f32 results bit for
// bit, bf16 dot products to a tolerance. Weights, activations and results lie at the very end of their allocations, so
// that a sanitizer sees every byte too many; rows that do not exist must stay untouched.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <cstdio>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/cpu.h"
#include "kernels/linear/weight.h"
#include "runtime/tile_mask.h"

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
  bool with_bias, hostile, extreme, masked;

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
  c.extreme = !c.hostile && random_int(0, 3) == 0;
  c.masked = c.group > 0 && random_int(0, 2) == 0;
  if (c.masked && random_int(0, 3) == 0) c.cols = random_int(64 * 32, 64 * 70);  // more groups than a word has bits
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
    if (c.extreme) {  // the least and the greatest codes alone, in runs: where sums of 16 bits would overflow
      for (int64_t i = 0; i < sizes.hi; ++i) hi[i] = i / 256 % 2 ? 0xff : 0;
      for (int64_t i = 0; i < sizes.lo; ++i) lo[i] = i / 512 % 2 ? 0xff : 0;
    }
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

// A random mask of the tiles, and the plane as it is stored under it.
struct Mask {
  std::vector<uint8_t> bytes;
  std::vector<bool> stored;  // [tiles * groups]
  OwnedTileMask owned;

  explicit Mask(const Case& c) {
    const int64_t tiles = (c.rows + 31) / 32, groups = (c.cols + c.group - 1) / c.group, row = (groups + 7) / 8;
    const int share = random_int(0, 4);  // of four; at 0 whole tiles are empty
    bytes.assign(static_cast<size_t>(tiles * row), 0);
    for (int64_t i = 0; i < tiles * groups; ++i) {
      stored.push_back(random_int(0, 3) < share);
      if (stored.back()) bytes[static_cast<size_t>(i / groups * row + i % groups / 8)] |= 1 << i % groups % 8;
    }
    CHECK(owned.read(c.rows, c.cols, c.group, bytes.data(), bytes.size()) == nullptr);
  }

  std::vector<uint8_t> apply(const std::vector<uint8_t>& plane) const {
    const size_t size = plane.size() / stored.size();
    std::vector<uint8_t> out;
    for (size_t i = 0; i < stored.size(); ++i) {
      if (stored[i]) out.insert(out.end(), plane.begin() + i * size, plane.begin() + (i + 1) * size);
    }
    out.reserve(1);  // a pointer even if nothing is stored
    return out;
  }

  // The same weights without a mask: codes 0 where nothing is stored.
  void clear(const Case& c, std::vector<uint8_t>* plane, bool is_hi) const {
    const size_t size = plane->size() / stored.size(), scales = is_hi ? 64 : 0;
    for (size_t i = 0; i < stored.size(); ++i) {
      if (!stored[i])
        memset(plane->data() + i * size + scales, c.encoding == Encoding::int8 ? 0x80 : 0x88, size - scales);
    }
  }
};

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
  std::optional<Mask> mask;
  std::vector<uint8_t> whole_hi = hi, whole_lo = lo;
  if (c.masked) {
    mask.emplace(c);
    hi = mask->apply(whole_hi), lo = c.with_lo ? mask->apply(whole_lo) : lo;
    mask->clear(c, &whole_hi, true);
    if (c.with_lo) mask->clear(c, &whole_lo, false);
  }
  const auto make = [&](std::vector<uint8_t>& a, std::vector<uint8_t>& b, const TileMask* view, Weight* out) {
    const char* wrong = make_weight(static_cast<uint32_t>(c.encoding), c.rows, c.cols, c.group, c.lo_shift, a.data(),
                                    a.size(), c.with_lo ? b.data() : nullptr, b.size(), view, out);
    CHECK(wrong == nullptr);
    return wrong == nullptr;
  };
  Weight w, whole;  // `whole` says the same without a mask
  const TileMask view = mask ? mask->owned.view() : TileMask{};
  if (!make(hi, lo, mask ? &view : nullptr, &w) || !make(whole_hi, whole_lo, nullptr, &whole)) return;

  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(c.tokens) * c.cols), bias(c.rows);
  for (float& value : x) value = normal(engine);
  for (float& value : bias) value = normal(engine);
  if (c.extreme) {  // codes of +-127 alone
    const bool same_sign = random_int(0, 1) == 1;
    for (float& value : x) value = same_sign || value > 0 ? 3.0f : -3.0f;
  }
  if (c.hostile) {
    const float strange[] = {NAN, INFINITY, -INFINITY, 1e-38f, -1e-42f, 3e38f, 0.0f};
    for (int i = 0; i < 5; ++i) x[random_int(0, static_cast<int>(x.size()) - 1)] = strange[random_int(0, 6)];
  }
  const float* added = c.with_bias ? bias.data() : nullptr;
  const int tiles = (c.rows + 31) / 32, begin = random_int(0, tiles - 1), end = random_int(begin, tiles);

  const Run want = run(*linear_kernels("scalar"), c, w, x, added, 0, tiles);
  if (c.masked && !c.hostile) {  // a NaN in a group that is not stored goes nowhere
    CHECK(equal(want.y, run(*linear_kernels("scalar"), c, whole, x, added, 0, tiles).y, true, c.cols));
  }
  std::vector<float> row_want(c.cols), row_got(c.cols);
  const int row = random_int(0, c.rows - 1);
  linear_kernels("scalar")->read_row(whole, row, row_want.data());
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
    for (int i = 0; i < c.cols; ++i) CHECK(row_got[i] == row_want[i]);  // 0 and -0 are one here
  }
}

void check_mask_refusals() {
  const uint8_t bits[] = {0x05, 0x00, 0x01};
  std::vector<uint8_t> body(576 * 3);
  OwnedTileMask mask;
  CHECK(mask.read(96, 96, 32, bits, 3) == nullptr);
  const TileMask view = mask.view();
  CHECK(view.first[1] == 2 && view.first[2] == 2 && view.first[3] == 3);
  Weight w;
  const auto make = [&](Encoding encoding, int64_t rows, int64_t cols, int64_t group, uint64_t size) {
    return make_weight(static_cast<uint32_t>(encoding), rows, cols, group, 0, body.data(), size, nullptr, 0, &view, &w);
  };
  CHECK(make(Encoding::planes, 96, 96, 32, 576 * 3) == nullptr);
  CHECK(make(Encoding::planes, 96, 96, 32, 576 * 2) != nullptr);
  CHECK(make(Encoding::planes, 96, 96, 32, 576 * 9) != nullptr);
  CHECK(make(Encoding::planes, 64, 96, 32, 576 * 3) != nullptr);
  CHECK(make(Encoding::planes, 96, 128, 32, 576 * 3) != nullptr);
  CHECK(make(Encoding::f32, 96, 96, 0, 576 * 3) != nullptr);
  CHECK(mask.read(96, 96, 32, bits, 2) != nullptr);
  CHECK(mask.read(96, 64, 32, bits, 3) != nullptr);  // group 2 does not exist
  CHECK(mask.read(96, 96, 33, bits, 3) != nullptr);
  CHECK(mask.read(0, 96, 32, bits, 0) != nullptr);
  CHECK(mask.read(int64_t{1} << 60, int64_t{1} << 60, 32, bits, 3) != nullptr);
  CHECK(mask.read(96, 96, 32, nullptr, 3) != nullptr);
}

void check_refusals() {
  uint8_t bytes[1 << 16];
  Weight w;
  const auto make = [&](uint32_t encoding, int64_t rows, int64_t cols, int64_t group, int64_t shift, uint64_t size,
                        const uint8_t* lo = nullptr, uint64_t lo_size = 0) {
    return make_weight(encoding, rows, cols, group, shift, bytes, size, lo, lo_size, nullptr, &w);
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
  check_mask_refusals();
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

// The rowwise kernels of every instruction set give the scalar kernels' bits, and touch nothing beyond their row.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "kernels/cpu.h"
#include "kernels/rowwise/rowwise.h"

using namespace haomiao;

namespace {

constexpr float kGuard = 12345.0f;

// n floats in memory of exactly that size, so that AddressSanitizer sees a step beyond; the output ends with a guard.
std::vector<float> random_row(std::mt19937& rng, int n) {
  std::normal_distribution<float> normal(0.3f, 3.0f);
  std::vector<float> row(static_cast<size_t>(n));
  for (float& x : row) x = normal(rng);
  return row;
}

template <typename F>
void same(const RowwiseKernels& a, const RowwiseKernels& b, int n, F run) {
  std::vector<float> x(static_cast<size_t>(n) + 1, kGuard), y = x;
  run(a, x.data());
  run(b, y.data());
  CHECK(x.back() == kGuard && y.back() == kGuard);
  CHECK(std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0);
}

void test_isa(const RowwiseKernels& k, const RowwiseKernels& scalar) {
  std::mt19937 rng(1);
  for (int n = 1; n <= 131; n = n < 70 ? n + 1 : n + 20) {
    const auto x = random_row(rng, n), w = random_row(rng, n), b = random_row(rng, n);
    same(k, scalar, n, [&](const RowwiseKernels& r, float* o) { r.rms_norm(x.data(), w.data(), n, 1e-6f, o); });
    same(k, scalar, n,
         [&](const RowwiseKernels& r, float* o) { r.layer_norm(x.data(), w.data(), b.data(), n, 1e-6f, o); });
    same(k, scalar, n,
         [&](const RowwiseKernels& r, float* o) { r.layer_norm(x.data(), w.data(), nullptr, n, 1e-6f, o); });
    for (const uint32_t f : {0u, 1u, 2u, 3u}) {
      const ActivationFunction function = static_cast<ActivationFunction>(f);
      same(k, scalar, n, [&](const RowwiseKernels& r, float* o) { r.activate(x.data(), n, function, o); });
      same(k, scalar, n, [&](const RowwiseKernels& r, float* o) { r.glu(x.data(), w.data(), n, function, o); });
    }
    const auto copied = [&](float* o) { std::memcpy(o, x.data(), x.size() * sizeof(float)); };
    same(k, scalar, n, [&](const RowwiseKernels& r, float* o) { copied(o), r.add(o, w.data(), n); });
    same(k, scalar, n, [&](const RowwiseKernels& r, float* o) { copied(o), r.scale_softcap(o, n, 0.7f, 2.0f); });
    if (n % 2 == 0) {
      same(k, scalar, n, [&](const RowwiseKernels& r, float* o) { copied(o), r.rope(o, 1, n, n, w.data()); });
    }
    CHECK(k.argmax(x.data(), n) == scalar.argmax(x.data(), n));
  }
}

void test_values_beyond_range(const RowwiseKernels& k) {
  const float infinity = INFINITY;
  const std::vector<float> x = {0.0f,    -0.0f, 1e-40f, -1e-40f, 88.7f,    89.0f,
                                -103.0f, 3e38f, -3e38f, NAN,     infinity, 20.0f};
  std::vector<float> y(x.size());
  for (const uint32_t f : {0u, 1u, 2u, 3u}) {
    k.activate(x.data(), static_cast<int>(x.size()), static_cast<ActivationFunction>(f), y.data());
    CHECK(y[0] == 0 && y[1] == 0 && std::isnan(y[9]) && y[10] == infinity && y[11] == 20.0f && y[7] == 3e38f);
    CHECK(std::fabs(y[6]) < 1e-30f && std::fabs(y[8]) < 1e-30f);
  }
}

}  // namespace

int main() {
  const RowwiseKernels* scalar = rowwise_kernels("scalar");
  for (const char* const* isa = available_isas(); *isa; ++isa) {
    const RowwiseKernels* kernels = rowwise_kernels(*isa);
    CHECK(kernels != nullptr);
    if (!kernels) continue;
    test_isa(*kernels, *scalar);
    test_values_beyond_range(*kernels);
  }
  CHECK(rowwise_kernels("sse9") == nullptr);
  return haomiao_test::failures != 0;
}

// Screening the vocabulary head: what the hi plane alone says about a row of logits, and how wrong it can be.
//
// With both planes a row's logit is Y = sum over groups g of s_g w_g / 2^shift (2^shift hi + lo) . q, with the hi plane
// alone H; what is missing is s_g w_g / 2^shift lo . q, and no longer than |w_g| / 2^shift |lo| |s_g q| (Cauchy,
// Schwarz). So Y <= H + sum of |w_g| norms[g] lengths[g], where norms[g] >= |lo| / 2^shift for every row of the tile
// and lengths[g] >= |s_g q|. Every rounding, of the logits as the linear kernels compute them and of this file's own,
// is inside: the bound holds for the floats, not only for the numbers that they stand for.
//
// A matrix of one-byte codes has no hi plane; sketch() makes one: of a code the nearest multiple of 16, at most
// 112. What that leaves out, -8..15, takes the place of lo with a shift of 4.
#pragma once
#include "kernels/linear/linear.h"

namespace haomiao {

// What screening says of one tile: no row's logit exceeds `upper` (infinite where nothing can be said), and the hi
// plane's greatest is `seen`, a hint where to look first.
struct TileBound {
  float upper, seen;
};

struct HeadKernels {
  const char* isa;
  // norms [padded_cols / 32] of one tile of a matrix with both planes.
  void (*lo_norms)(const Weight& weight, int tile, float* norms);
  // The hi plane of one tile of a matrix of one-byte codes, as `planes` stores a tile (groups of the same size, 16
  // times the scales; infinite where that exceeds f16, so that nothing is said), and the norms of what it leaves out.
  void (*sketch)(const Weight& weight, int tile, uint8_t* hi, float* norms);
  // lengths [padded_cols / 32] of an activation row x [cols] as prepare() of kind int8 will quantize it.
  void (*lengths)(const float* x, int cols, int padded_cols, float* lengths);
  // The bound for a tile from its logits by the hi plane, h [32]; rows beyond the matrix are not looked at.
  TileBound (*bound)(const Weight& weight, int tile, const float* norms, const float* lengths, const float* h);
};

// The kernels of one instruction set ("scalar", "avx2", "avx512", "avx512_bf16", "neon"), or nullptr if not compiled
// in; an operation without a file of its own for an isa returns the next lower one. head/select.cc.
const HeadKernels* head_kernels(const char* isa);

}  // namespace haomiao

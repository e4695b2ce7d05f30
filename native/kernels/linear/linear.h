// Linear layers: the seam between the kernels and the plan runner. Raw pointers and sizes; no allocation, no threads,
// no Python. docs/ARCHITECTURE.md ("Weights in kernel layout") states the byte layouts and the rule that fixes the
// bits.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace haomiao {

inline constexpr int kTileRows = 32;        // rows of one weight tile, in every encoding
inline constexpr int kGroup = 32;           // columns that share one activation scale
inline constexpr int kActivationBlock = 8;  // prepare() works on token ranges that start at a multiple of this

enum class Encoding : uint32_t { f32 = 0, bf16 = 1, int8 = 2, planes = 3 };
enum class Activation : uint32_t { f32 = 0, bf16 = 1, int8 = 2 };
enum class Planes : uint32_t { hi = 0, both = 1 };  // which planes of Encoding::planes are read

// Which groups of `group` columns the tiles of a matrix store (int8 and planes): the others are no part of any sum, and
// take no bytes. Made and checked by runtime/tile_mask.h.
struct TileMask {
  const uint64_t* bits;  // [tiles][words]: bit g % 64 of word g / 64 set where group g is stored; nullptr: all are
  const int64_t* first;  // [tiles + 1]: groups stored before the tile
  int64_t tiles, groups, words;
};

// A weight matrix [rows, cols] in kernel layout. Tiles lie one after the other in ascending rows.
struct Weight {
  Encoding encoding;
  int32_t rows, cols;                    // real sizes
  int32_t padded_cols;                   // multiple of `group` (planes, int8), of 2 (bf16), = cols (f32)
  int32_t group;                         // columns per weight scale: 32, 64 or 128; 0 where there are no scales
  int32_t lo_shift;                      // planes: w = scale / 2^lo_shift * ((hi << lo_shift) + lo); 0..4
  const uint8_t* hi;                     // tiles: hi plane, or the only bytes of the other encodings
  const uint8_t* lo;                     // tiles of the lo plane, or nullptr
  int64_t hi_tile_bytes, lo_tile_bytes;  // of a tile that stores all groups
  TileMask mask;
};

struct LinearCall {
  const Weight* weight;
  Planes planes;
  Activation activation;    // f32 weights: f32; bf16 weights: f32 or bf16; int8 and planes: int8
  const void* activations;  // from prepare() of that kind, for all `tokens`
  int tokens;
  int tile_begin, tile_end;  // [0, ceil(rows / 32)]
  float* out;                // out[t * out_stride + row], rows beyond weight->rows are not written
  int64_t out_stride;        // floats
  const float* bias;         // [rows] or nullptr
  void* scratch;             // scratch_bytes() per thread, 64-byte aligned
};

struct LinearKernels {
  const char* isa;
  // Bytes that prepare() writes for `tokens` rows of `padded_cols`; 64-byte aligned destination. How rows lie is the
  // kernels' own business, but for this: rows that follow a multiple of kActivationBlock begin at its bytes, and can be
  // multiplied apart from those before them.
  size_t (*activation_bytes)(Activation kind, int tokens, int padded_cols);
  // Quantize or convert rows [first, last) of x [tokens, cols] (stride in floats); columns [cols, padded_cols) count as
  // zero. `first` is a multiple of kActivationBlock; `last` is one or equals `tokens`. `tokens` is the step's whole
  // count.
  void (*prepare)(Activation kind, const float* x, int64_t stride, int tokens, int first, int last, int cols,
                  int padded_cols, void* out);
  size_t (*scratch_bytes)(const Weight& weight, int tokens);
  void (*linear)(const LinearCall& call);
  // One row of the matrix as float32 [cols] (embedding): every plane that is there is used.
  void (*read_row)(const Weight& weight, int32_t row, float* out);
};

// The kernels of one instruction set ("scalar", "avx2", "avx512", "avx512_bf16", "neon"), or nullptr if not compiled
// in; an operation without a file of its own for an isa returns the next lower one. linear/select.cc.
const LinearKernels* linear_kernels(const char* isa);

}  // namespace haomiao

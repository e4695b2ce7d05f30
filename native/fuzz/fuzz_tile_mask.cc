// libFuzzer target: the bits of a tile mask, of a matrix whose shape the input chooses. What is accepted must count
// what it stores, and every word must be there for the sanitizer to see.
#include <bit>

#include "runtime/tile_mask.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 8) return 0;
  const int64_t rows = data[0] | data[1] << 8 | data[2] << 16 | data[3] << 24, cols = data[4] | data[5] << 8;
  const int64_t group = data[6] % 4 == 3 ? data[7] : 32 << data[6] % 4;
  haomiao::OwnedTileMask mask;
  if (mask.read(rows, cols, group, data + 8, size - 8)) return 0;
  const haomiao::TileMask view = mask.view();
  int64_t stored = 0;
  for (int64_t tile = 0; tile < view.tiles; ++tile) {
    if (view.first[tile] != stored) __builtin_trap();
    for (int64_t i = 0; i < view.words; ++i) stored += std::popcount(view.bits[tile * view.words + i]);
  }
  if (view.first[view.tiles] != stored || stored > view.tiles * view.groups) __builtin_trap();
  return 0;
}

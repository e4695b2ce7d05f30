// Tile masks as artifacts hold them (docs/ARCHITECTURE.md, section 4), read into memory of their own: kernels find
// their weights by them, so that a mapped file which somebody changes must not move what they read.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/linear/linear.h"

namespace haomiao {

class OwnedTileMask {
 public:
  // Reads [ceil(rows / 32)][ceil(groups / 8)] bytes, bit g % 8 of byte g / 8 set where group g is stored. Returns
  // nullptr, or one line that says what is wrong.
  const char* read(int64_t rows, int64_t cols, int64_t group, const uint8_t* mask, uint64_t bytes);

  // Valid while this, or what it was moved to, lives and is not read again.
  TileMask view() const { return {bits_.data(), first_.data(), tiles_, groups_, words_}; }

 private:
  std::vector<uint64_t> bits_;
  std::vector<int64_t> first_;
  int64_t tiles_ = 0, groups_ = 0, words_ = 0;
};

}  // namespace haomiao

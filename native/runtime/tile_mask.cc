#include "runtime/tile_mask.h"

#include <bit>

namespace haomiao {

const char* OwnedTileMask::read(int64_t rows, int64_t cols, int64_t group, const uint8_t* mask, uint64_t bytes) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (rows < 1 || rows > kMost || cols < 1 || cols > kMost) return "rows or columns are out of range";
  if (group != 32 && group != 64 && group != 128) return "the group does not fit a tile mask";
  tiles_ = (rows + kTileRows - 1) / kTileRows, groups_ = (cols + group - 1) / group;
  const int64_t tile_bytes = (groups_ + 7) / 8;
  if (!mask || bytes != static_cast<uint64_t>(tiles_ * tile_bytes))
    return "the tile mask has not the size that its shape needs";
  words_ = (groups_ + 63) / 64;
  bits_.assign(static_cast<size_t>(tiles_ * words_), 0);  // at most 8 times as long as the bytes that were handed in
  first_.assign(static_cast<size_t>(tiles_) + 1, 0);
  for (int64_t tile = 0; tile < tiles_; ++tile) {
    uint64_t* words = bits_.data() + tile * words_;
    for (int64_t i = 0; i < tile_bytes; ++i) words[i / 8] |= uint64_t{mask[tile * tile_bytes + i]} << i % 8 * 8;
    if (groups_ % 64 != 0 && words[words_ - 1] >> groups_ % 64 != 0)
      return "the tile mask names groups that do not exist";
    int64_t count = 0;
    for (int64_t i = 0; i < words_; ++i) count += std::popcount(words[i]);
    first_[static_cast<size_t>(tile) + 1] = first_[static_cast<size_t>(tile)] + count;
  }
  return nullptr;
}

}  // namespace haomiao

// Sizes that the runner's files share. None of them changes a bit of a result.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/linear/linear.h"

namespace haomiao {

inline constexpr int64_t kMostStepTokens = 1 << 20, kMostKvBlocks = 1 << 28, kMostKvBytes = int64_t{1} << 46;
// Up to so many rows every thread prepares all of them for itself, which is cheaper than meeting at a barrier.
inline constexpr int kFewTokens = 8;
// Outputs of a linear layer that wait in a thread's cache for their epilogue (64 KiB).
inline constexpr size_t kTileFloats = 16384;
// Prepared rows of a large step are worked off in stretches that stay in the second-level cache.
inline constexpr size_t kStretchBytes = 384 << 10;
inline constexpr int kLeastStretch = 64, kMostStretch = 256;
// (token, head) pairs that one attention tile holds, about.
inline constexpr int kTileQueries = 64;
// Tiles are divided by splits until every thread has about so many pieces.
inline constexpr int kItemsPerThread = 4;
inline constexpr size_t kMostPartialFloats = size_t{16} << 20;
// Tiles of the head whose logits wait in a thread's cache for their bound or their argmax.
inline constexpr int kHeadTiles = 8;
// Screening pays while its rows together leave less than this share of the head to both planes; where they left more,
// up to kMostUnscreened steps are computed whole before it is tried again.
inline constexpr double kMostKept = 0.25;
inline constexpr int kMostUnscreened = 64;

// A linear layer's weights that a thread takes at once, about: long enough to be read at the memory's speed.
inline constexpr int64_t kChunkBytes = 64 << 10;
// How many other threads one looks at for work that is left. More would help, and cost a cache line each.
inline constexpr int kMostHelped = 4;

inline int tiles_of(const Weight& w) { return (w.rows + kTileRows - 1) / kTileRows; }

}  // namespace haomiao

// Sizes of a weight matrix in kernel layout (docs/ARCHITECTURE.md, section 4), checked in 64-bit arithmetic.
#include "kernels/linear/weight.h"

namespace haomiao {
namespace {

constexpr int64_t kMostRows = int64_t{1} << 30, kMostCols = int64_t{1} << 24;  // products below fit 64 bits

bool is_group(int64_t group) { return group == 32 || group == 64 || group == 128; }

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

const char* make_weight(uint32_t encoding, int64_t rows, int64_t cols, int64_t group, int64_t lo_shift,
                        const uint8_t* hi, uint64_t hi_bytes, const uint8_t* lo, uint64_t lo_bytes,
                        const TileMask* mask, Weight* weight) {
  if (encoding > static_cast<uint32_t>(Encoding::planes)) return "the encoding is unknown";
  if (rows < 1 || rows > kMostRows || cols < 1 || cols > kMostCols) return "rows or columns are out of range";
  const Encoding kind = static_cast<Encoding>(encoding);
  const bool scaled = kind == Encoding::int8 || kind == Encoding::planes;
  if (scaled ? !is_group(group) : group != 0) return "the group does not fit the encoding";
  if (mask && !scaled) return "only encodings with scales take a tile mask";
  if (lo && kind != Encoding::planes) return "only the encoding 'planes' has a lo plane";
  if (lo_shift < 0 || lo_shift > (lo ? 4 : 0)) return "lo_shift must be 0 to 4, and 0 without a lo plane";

  int64_t padded = cols, tile = 0, lo_tile = 0;
  switch (kind) {
    case Encoding::f32:
      tile = padded * kTileRows * 4;
      break;
    case Encoding::bf16:
      padded = round_up(cols, 2);
      tile = padded * kTileRows * 2;
      break;
    case Encoding::int8:
      padded = round_up(cols, group);
      tile = padded / group * (kTileRows * 2 + group * kTileRows);
      break;
    case Encoding::planes:
      padded = round_up(cols, group);
      tile = padded / group * (kTileRows * 2 + group * kTileRows / 2);
      lo_tile = padded * kTileRows / 2;
      break;
  }
  const int64_t tiles = round_up(rows, kTileRows) / kTileRows;
  int64_t bytes = tiles * tile, bytes_lo = tiles * lo_tile;
  if (mask) {
    const int64_t groups = padded / group;
    if (mask->tiles != tiles || mask->groups != groups) return "the tile mask was made for another shape";
    bytes = mask->first[tiles] * (tile / groups), bytes_lo = mask->first[tiles] * (lo_tile / groups);
  }
  if (!hi || hi_bytes != static_cast<uint64_t>(bytes)) return "the section has not the size that its shape needs";
  if (lo && lo_bytes != static_cast<uint64_t>(bytes_lo)) return "the lo section has not the size that its shape needs";
  *weight = Weight{kind,
                   static_cast<int32_t>(rows),
                   static_cast<int32_t>(cols),
                   static_cast<int32_t>(padded),
                   static_cast<int32_t>(group),
                   static_cast<int32_t>(lo_shift),
                   hi,
                   lo,
                   tile,
                   lo ? lo_tile : 0,
                   mask ? *mask : TileMask{}};
  return nullptr;
}

}  // namespace haomiao

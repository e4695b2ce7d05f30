// The header of model.haomiao (docs/ARCHITECTURE.md, section 5): reads it, and believes nothing that it has not
// checked. Knows the layout and the sizes; knows nothing about Python, kernels or what the weights mean. Never
// allocates more than a small multiple of the section table, which itself lies inside the file. What a tile mask's bits
// say is not looked at (tile_mask.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace haomiao {

inline constexpr uint16_t kArtifactMajor = 1, kArtifactMinor = 0;
inline constexpr uint32_t kArtifactFixedBytes = 64;   // the part before the section table
inline constexpr uint32_t kArtifactEntryBytes = 128;  // one section entry
inline constexpr uint32_t kArtifactAlign = 64;        // of the header's size and of every body's offset
inline constexpr uint64_t kArtifactMetaBytes = 16u << 20;

enum class SectionKind : uint32_t { meta = 1, matrix = 2, vector = 3, tile_mask = 4 };

struct ArtifactSection {
  uint32_t kind;          // a SectionKind, or unknown and not required: to be skipped
  bool known;             // this version reads sections of this kind
  std::string_view name;  // into the header's bytes
  uint64_t offset, bytes;
  uint32_t crc;                      // of the body; not verified here
  uint32_t encoding, plane;          // matrix, mask: kernels/linear/linear.h Encoding; 0 hi or only, 1 lo
  uint32_t group, lo_shift;          // columns per scale; 0 where there are no scales
  uint32_t rows, cols, padded_cols;  // vector: [rows], cols = padded_cols = 1
  uint64_t tile_bytes;               // of this plane, all groups stored; 0 for what is not a matrix
  uint64_t stored;                   // tile mask: groups that the tiles of its matrix store; 0 otherwise
};

struct ArtifactHeader {
  uint16_t major, minor;
  uint32_t header_bytes;
  uint64_t file_bytes;
  std::vector<ArtifactSection> sections;  // in the table's order, which is also ascending in the file
};

// CRC-32 as in zlib (polynomial 0xEDB88320, reflected, inverted in and out); `crc` continues an earlier call.
uint32_t crc32(uint32_t crc, const uint8_t* data, size_t bytes);

// Reads and checks the header of an artifact of `file_bytes` whose first `bytes` (all of header_bytes, or it is
// refused) stand at `data`. Returns an empty string, or the reason for the refusal in one line; `header` is then
// unspecified.
std::string parse_artifact(const uint8_t* data, uint64_t bytes, uint64_t file_bytes, ArtifactHeader* header);

}  // namespace haomiao

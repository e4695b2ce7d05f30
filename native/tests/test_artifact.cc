// The artifact's header: what is right is read, every field that is wrong is refused by its own reason.
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "check.h"
#include "runtime/artifact.h"

namespace {

using haomiao::ArtifactHeader;
using haomiao::parse_artifact;

constexpr uint32_t kEntries = 7;
constexpr uint64_t kNames = 64 + 128 * kEntries;
constexpr uint64_t kHeader = kNames + 64;

// Offsets inside an entry (docs/ARCHITECTURE.md, section 5).
enum Field : size_t {
  kKind = 0,
  kFlags = 4,
  kNameOffset = 8,
  kNameBytes = 12,
  kOffset = 16,
  kBytes = 24,
  kEncoding = 36,
  kPlane = 40,
  kGroup = 44,
  kLoShift = 48,
  kRows = 52,
  kCols = 56,
  kPaddedCols = 60,
  kTileBytes = 64,
  kReserved = 100,
};

void put(std::vector<uint8_t>& data, size_t at, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) data[at + i] = static_cast<uint8_t>(value >> (8 * i));
}

void seal(std::vector<uint8_t>& data) {
  put(data, 32, 0, 4);
  put(data, 32, haomiao::crc32(0, data.data(), kHeader), 4);
}

struct Entry {
  uint32_t kind, flags;
  const char* name;
  uint64_t offset, bytes;
  uint32_t encoding, plane, group, lo_shift, rows, cols, padded;
  uint64_t tile;
};

// planes [40, 70] of group 32: padded to 96 columns, 2 tiles; hi 3 * (64 + 512) bytes a tile, lo 96 * 16.
constexpr uint64_t kHiTile = 3 * (64 + 512), kLoTile = 96 * 16;
// int8 [40, 70] of group 64 under a tile mask: 3 of 2 x 2 groups, each 64 + 64 * 32 bytes.
constexpr uint64_t kGroupBytes = 64 + 64 * 32, kMask = kHeader + 2 * kHiTile + 2 * kLoTile + 128, kMasked = kMask + 64;
const Entry kGood[kEntries] = {
    {2, 1, "w", kHeader, 2 * kHiTile, 3, 0, 32, 4, 40, 70, 96, kHiTile},
    {2, 1, "w", kHeader + 2 * kHiTile, 2 * kLoTile, 3, 1, 32, 4, 40, 70, 96, kLoTile},
    {3, 1, "n", kHeader + 2 * kHiTile + 2 * kLoTile, 28, 0, 0, 0, 0, 7, 1, 1, 0},
    {77, 0, "later", kHeader + 2 * kHiTile + 2 * kLoTile + 64, 5, 9, 9, 9, 9, 9, 9, 9, 9},
    {4, 1, "m.tiles", kMask, 2, 2, 0, 64, 0, 40, 70, 128, 3},
    {2, 1, "m", kMasked, 3 * kGroupBytes, 2, 0, 64, 0, 40, 70, 128, 2 * kGroupBytes},
    {1, 1, "meta", kMasked + 3 * kGroupBytes, 2, 0, 0, 0, 0, 0, 0, 0, 0},
};
constexpr uint64_t kFile = kMasked + 3 * kGroupBytes + 2;

std::vector<uint8_t> build() {
  std::vector<uint8_t> data(kFile);
  std::memcpy(data.data(), "HAOMIAO\0", 8);
  put(data, 8, 1, 2);
  put(data, 12, kHeader, 4);
  put(data, 16, kFile, 8);
  put(data, 24, kEntries, 4);
  size_t name_at = kNames;
  for (uint32_t i = 0; i < kEntries; ++i) {
    const Entry& e = kGood[i];
    const size_t at = 64 + 128 * i, length = std::strlen(e.name);
    const uint32_t words[] = {e.kind, e.flags, static_cast<uint32_t>(name_at), static_cast<uint32_t>(length)};
    for (size_t k = 0; k < 4; ++k) put(data, at + 4 * k, words[k], 4);
    put(data, at + kOffset, e.offset, 8);
    put(data, at + kBytes, e.bytes, 8);
    const uint32_t shape[] = {e.encoding, e.plane, e.group, e.lo_shift, e.rows, e.cols, e.padded};
    for (size_t k = 0; k < 7; ++k) put(data, at + kEncoding + 4 * k, shape[k], 4);
    put(data, at + kTileBytes, e.tile, 8);
    std::memcpy(data.data() + name_at, e.name, length);
    name_at += length;
  }
  seal(data);
  return data;
}

std::string parse(const std::vector<uint8_t>& data) {
  ArtifactHeader header;
  return parse_artifact(data.data(), data.size(), data.size(), &header);
}

// The good header after `change` must be refused for a reason that contains `reason`.
void refused(const char* reason, const std::function<void(std::vector<uint8_t>&)>& change, bool sealed = true) {
  std::vector<uint8_t> data = build();
  change(data);
  if (sealed) seal(data);
  const std::string wrong = parse(data);
  const bool expected = wrong.find(reason) != std::string::npos && wrong.find('\n') == std::string::npos;
  if (!expected) std::fprintf(stderr, "expected '%s', found '%s'\n", reason, wrong.c_str());
  CHECK(expected);
}

void field(const char* reason, uint32_t entry, size_t offset, uint64_t value, int bytes = 4) {
  refused(reason, [=](std::vector<uint8_t>& data) { put(data, 64 + 128 * entry + offset, value, bytes); });
}

// The entry becomes one of an unknown kind that need not be read.
void skipped(const char* reason, uint32_t entry) {
  refused(reason, [=](std::vector<uint8_t>& data) {
    put(data, 64 + 128 * entry + kKind, 6, 4);
    put(data, 64 + 128 * entry + kFlags, 0, 4);
  });
}

void test_good() {
  const std::vector<uint8_t> data = build();
  ArtifactHeader header;
  CHECK(parse_artifact(data.data(), data.size(), data.size(), &header).empty());
  CHECK(header.sections.size() == kEntries && header.major == 1 && header.minor == 0);
  CHECK(header.sections[1].name == "w" && header.sections[1].plane == 1 && header.sections[1].lo_shift == 4);
  CHECK(header.sections[4].known && header.sections[4].stored == 3 && header.sections[5].stored == 0);
  CHECK(!header.sections[3].known && header.sections[6].name == "meta");
  CHECK(parse_artifact(data.data(), kHeader, data.size(), &header).empty());  // the bodies are not needed
}

void test_fixed_part() {
  for (uint64_t size = 0; size < kHeader; ++size) {
    ArtifactHeader header;
    const std::vector<uint8_t> data = build();
    const std::vector<uint8_t> cut(data.begin(), data.begin() + static_cast<ptrdiff_t>(size));  // ASan sees its end
    CHECK(!parse_artifact(cut.data(), size, kFile, &header).empty());
    CHECK(!parse_artifact(cut.data(), size, size, &header).empty());
  }
  refused("magic", [](auto& d) { d[0] = 'h'; });
  refused("version 2", [](auto& d) { put(d, 8, 2, 2); });
  refused("its header says", [](auto& d) { put(d, 16, kFile + 1, 8); });
  refused("its header says", [](auto& d) { put(d, 16, uint64_t{1} << 60, 8); });
  refused("header size", [](auto& d) { put(d, 12, 0, 4); }, false);
  refused("header size", [](auto& d) { put(d, 12, kHeader + 1, 4); }, false);
  refused("header size", [](auto& d) { put(d, 12, 0xFFFFFFC0u, 4); }, false);
  refused("does not fit", [](auto& d) { put(d, 24, kEntries + 1, 4); });
  refused("does not fit", [](auto& d) { put(d, 24, 0xFFFFFFFFu, 4); });
  refused("checksum", [](auto& d) { d[kNames] ^= 1; }, false);
  refused("reserved", [](auto& d) { put(d, 28, 1, 4); });
  refused("reserved", [](auto& d) { d[63] = 1; });
}

void test_entries() {
  field("required", 3, kFlags, 1);
  field("reserved", 0, kFlags, 3);
  field("reserved", 0, kReserved, 1);
  field("outside", 0, kNameOffset, 0);
  field("outside", 0, kNameOffset, kHeader);
  field("outside", 0, kNameOffset, 0xFFFFFFFFu);
  field("outside", 6, kNameBytes, 255);
  field("255", 0, kNameBytes, 0);
  field("255", 0, kNameBytes, 256);
  refused("UTF-8", [](auto& d) { d[kNames] = 0xFF; });
  refused("UTF-8", [](auto& d) { d[kNames] = '\n'; });
  field("aligned", 0, kOffset, kHeader + 1, 8);
  field("overlaps", 0, kOffset, 0, 8);
  field("overlaps", 1, kOffset, kHeader, 8);
  field("beyond", 0, kOffset, uint64_t{1} << 60, 8);
  field("beyond", 0, kBytes, uint64_t{1} << 60, 8);
  field("beyond", 6, kBytes, UINT64_MAX, 8);
  field("beyond", 3, kBytes, UINT64_MAX - 1, 8);  // skipped sections are bounded too
}

void test_shapes() {
  field("encoding", 0, kEncoding, 4);
  field("contradict", 0, kPlane, 2);
  field("contradict", 0, kGroup, 48);
  field("contradict", 0, kLoShift, 5);
  field("contradict", 0, kPaddedCols, 70);
  field("no rows", 0, kRows, 0);
  field("no rows", 0, kCols, 0);
  field("too many", 0, kRows, 0xFFFFFFFFu);
  field("too many", 0, kCols, 0x80000000u);
  field("tile bytes", 0, kTileBytes, kHiTile + 1, 8);
  field("contradict", 0, kRows, 65);  // 3 tiles: hi and lo differ
  field("body size", 0, kBytes, 2 * kHiTile - 1, 8);
  field("contradict", 0, kRows, 41);  // hi and lo differ
  field("contradict", 1, kLoShift, 3);
  field("vector", 2, kCols, 2);
  field("vector", 2, kRows, 0);
  field("body size", 2, kRows, 8);
  field("shape", 6, kRows, 1);
  field("16 MiB", 6, kBytes, 0, 8);
  refused("twice", [](auto& d) {  // the meta section is called like the vector
    put(d, 64 + 128 * 6 + kNameOffset, kNames + 2, 4);
    put(d, 64 + 128 * 6 + kNameBytes, 1, 4);
  });
  skipped("one meta", 6);
  skipped("no hi plane", 0);
  skipped("lo_shift but no lo", 1);
}

void test_tile_masks() {
  field("no such encoding", 4, kEncoding, 0);
  field("no such encoding", 4, kPlane, 1);
  field("no such encoding", 4, kLoShift, 1);
  field("contradict", 4, kGroup, 0);
  field("contradict", 4, kGroup, 48);
  field("contradict", 4, kPaddedCols, 70);
  field("no rows", 4, kRows, 0);
  field("too many", 4, kRows, 0xFFFFFFFFu);
  field("body size", 4, kRows, 65);
  field("body size", 4, kBytes, 3, 8);
  field("more groups", 4, kTileBytes, 0, 8);
  field("more groups", 4, kTileBytes, 5, 8);
  field("more groups", 4, kTileBytes, UINT64_MAX, 8);
  field("'m': body size", 4, kTileBytes, 2, 8);
  field("'m': body size", 5, kBytes, 2 * kGroupBytes, 8);
  field("mask", 4, kRows, 41);  // not its matrix's
  field("mask", 5, kRows, 41);
  field("no matrix", 4, kNameBytes, 6);  // "m.tile"
  refused("no matrix", [](auto& d) {     // "tiles": too short for a suffix
    put(d, 64 + 128 * 4 + kNameOffset, kNames + 1 + 1 + 1 + 5 + 2, 4);
    put(d, 64 + 128 * 4 + kNameBytes, 5, 4);
  });
  skipped("'m': body size", 4);
  skipped("no matrix", 5);
}

void test_later_minor_version() {
  std::vector<uint8_t> data = build();
  put(data, 10, 1, 2);
  put(data, 28, 7, 4);
  put(data, 64 + kFlags, 3, 4);
  put(data, 64 + kReserved, 1, 4);
  seal(data);
  CHECK(parse(data).empty());
}

// Every byte of the header, flipped: refused by the checksum; and with the checksum repaired, refused or harmless.
void test_every_byte() {
  const std::vector<uint8_t> good = build();
  for (size_t at = 0; at < kHeader; ++at) {
    std::vector<uint8_t> data = good;
    data[at] ^= 0x80;
    CHECK(!parse(data).empty());
    seal(data);
    ArtifactHeader header;
    if (!parse_artifact(data.data(), data.size(), data.size(), &header).empty()) continue;
    for (const auto& s : header.sections) CHECK(s.offset <= kFile && s.bytes <= kFile - s.offset);
  }
}

}  // namespace

int main() {
  CHECK(haomiao::crc32(0, reinterpret_cast<const uint8_t*>("123456789"), 9) == 0xCBF43926u);
  test_good();
  test_fixed_part();
  test_entries();
  test_shapes();
  test_tile_masks();
  test_later_minor_version();
  test_every_byte();
  return haomiao_test::failures != 0;
}

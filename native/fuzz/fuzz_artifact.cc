// libFuzzer target: the artifact's header. Every input is read three times: as it is; with magic, sizes and checksum
// repaired, so that mutations reach the section table instead of dying at the checksum; and as a list of changes to a
// good header, one with a tile mask, so that what sections say about each other is reached. To see the core's coverage:
//   cmake -S . -B build-fuzz -DCMAKE_CXX_COMPILER=clang++ -DHAOMIAO_BINDINGS=OFF -DHAOMIAO_FUZZ=ON
//         -DHAOMIAO_SANITIZE=fuzzer-no-link,address,undefined
//   build-fuzz/fuzz_artifact CORPUS -max_len=4096
#include <algorithm>
#include <cstring>
#include <vector>

#include "runtime/artifact.h"

namespace {

using haomiao::kArtifactAlign;

void write_u32(uint8_t* p, uint32_t value) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<uint8_t>(value >> (8 * i));
}

// What was accepted must lie where it says; names are read so that the sanitizer sees them.
void parse(const uint8_t* data, uint64_t bytes, uint64_t file_bytes) {
  haomiao::ArtifactHeader header;
  if (!haomiao::parse_artifact(data, bytes, file_bytes, &header).empty()) return;
  uint64_t end = header.header_bytes;
  for (const auto& s : header.sections) {
    if (s.offset % kArtifactAlign || s.offset < end || s.offset > file_bytes || s.bytes > file_bytes - s.offset)
      __builtin_trap();
    end = s.offset + s.bytes;
    volatile char last = s.name.back();
    (void)last;
  }
}

void write_entry(uint8_t* at, const uint32_t (&words)[16], uint64_t last) {
  for (size_t i = 0; i < 16; ++i) write_u32(at + 4 * i, words[i]);
  write_u32(at + 64, static_cast<uint32_t>(last));
}

// Offsets and bytes alternate: a good header with these changes, sealed again. int8 [40, 70] of group 64 stores 3 of
// its 4 groups of 64 + 64 * 32 bytes.
void parse_changed(const uint8_t* data, size_t size) {
  constexpr uint32_t kNames = 64 + 3 * 128, kHeader = kNames + 64, kGroup = 64 + 64 * 32;
  constexpr uint32_t kMask = kHeader, kBody = kMask + 64, kMeta = kBody + 3 * kGroup + 64 - 3 * kGroup % 64;
  std::vector<uint8_t> header(kHeader);
  std::memcpy(header.data(), "HAOMIAO\0\1\0\0\0", 12);
  write_u32(header.data() + 12, kHeader);
  write_u32(header.data() + 16, kMeta + 2);
  write_u32(header.data() + 24, 3);
  write_entry(header.data() + 64, {4, 1, kNames, 7, kMask, 0, 2, 0, 0, 2, 0, 64, 0, 40, 70, 128}, 3);
  write_entry(header.data() + 192, {2, 1, kNames, 1, kBody, 0, 3 * kGroup, 0, 0, 2, 0, 64, 0, 40, 70, 128}, 2 * kGroup);
  write_entry(header.data() + 320, {1, 1, kNames + 7, 4, kMeta, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0);
  std::memcpy(header.data() + kNames, "w.tilesmeta", 11);
  for (size_t i = 0; i + 3 <= size; i += 3) header[(data[i] | size_t{data[i + 1]} << 8) % kHeader] = data[i + 2];
  write_u32(header.data() + 32, 0);
  write_u32(header.data() + 32, haomiao::crc32(0, header.data(), kHeader));
  parse(header.data(), kHeader, kMeta + 2);
  if (size == 0) {  // what is changed is good to begin with
    haomiao::ArtifactHeader good;
    if (!haomiao::parse_artifact(header.data(), kHeader, kMeta + 2, &good).empty()) __builtin_trap();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  parse(data, size, size);
  parse_changed(data, size);
  if (size < haomiao::kArtifactFixedBytes) return 0;

  const uint64_t claimed = std::max<uint64_t>(size, uint64_t{1} << (data[63] % 64));  // bodies are never read here
  const auto header_bytes = static_cast<uint32_t>(size / kArtifactAlign * kArtifactAlign);
  std::vector<uint8_t> repaired(data, data + size);
  std::memcpy(repaired.data(), "HAOMIAO\0\1\0\0\0", 12);
  write_u32(repaired.data() + 12, header_bytes);
  write_u32(repaired.data() + 16, static_cast<uint32_t>(claimed));
  write_u32(repaired.data() + 20, static_cast<uint32_t>(claimed >> 32));
  std::memset(repaired.data() + 28, 0, 36);
  write_u32(repaired.data() + 32, haomiao::crc32(0, repaired.data(), header_bytes));
  parse(repaired.data(), size, claimed);
  return 0;
}

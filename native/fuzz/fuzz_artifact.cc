// libFuzzer target: the artifact's header. Every input is read twice: as it is, and with magic, sizes and checksum
// repaired, so that mutations reach the section table instead of dying at the checksum. To see the core's coverage:
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

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  parse(data, size, size);
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

#include "runtime/artifact.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/linear/linear.h"

namespace haomiao {
namespace {

constexpr uint8_t kMagic[8] = {'H', 'A', 'O', 'M', 'I', 'A', 'O', 0};
constexpr uint32_t kCrcOffset = 32;
constexpr uint32_t kRequired = 1;
constexpr uint32_t kMaxNameBytes = 255;
constexpr std::string_view kMaskSuffix = ".tiles";  // a matrix's name and this: its tile mask
constexpr uint64_t kMaxDimension = INT32_MAX;       // kernels count rows and columns in int32

uint16_t read_u16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

uint32_t read_u32(const uint8_t* p) {
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
         static_cast<uint32_t>(p[3]) << 24;
}

uint64_t read_u64(const uint8_t* p) { return read_u32(p) | static_cast<uint64_t>(read_u32(p + 4)) << 32; }

bool all_zero(const uint8_t* p, size_t bytes) {
  return std::all_of(p, p + bytes, [](uint8_t byte) { return byte == 0; });
}

// Well-formed UTF-8 (RFC 3629: no overlong forms, surrogates or values above U+10FFFF) without control characters, so
// that a name can stand in a message.
bool printable_utf8(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    const auto first = static_cast<uint8_t>(text[i]);
    const size_t more = first < 0x80 ? 0 : (first >> 5) == 6 ? 1 : (first >> 4) == 14 ? 2 : (first >> 3) == 30 ? 3 : 9;
    if (more == 9 || more >= text.size() - i) return false;
    uint32_t point = more == 0 ? first : first & (0x3Fu >> more);
    for (size_t k = 1; k <= more; ++k) {
      const auto next = static_cast<uint8_t>(text[i + k]);
      if ((next & 0xC0) != 0x80) return false;
      point = point << 6 | (next & 0x3F);
    }
    constexpr uint32_t kLeast[4] = {0, 0x80, 0x800, 0x10000};
    if (point < kLeast[more] || point > 0x10FFFF || (point >= 0xD800 && point <= 0xDFFF)) return false;
    if (point < 0x20 || (point >= 0x7F && point < 0xA0)) return false;
    i += more + 1;
  }
  return true;
}

// The name as it stands in a message. (Appending: g++ 12 warns wrongly about "'" + std::string, GCC bug 105651.)
std::string quoted(std::string_view name) {
  std::string text;
  text.append(1, '\'').append(name).append(1, '\'');
  return text;
}

// Bytes of one tile of 32 rows (section 4); false if the numbers contradict each other.
bool tile_bytes(const ArtifactSection& s, uint64_t* bytes) {
  const auto encoding = static_cast<Encoding>(s.encoding);
  const uint64_t padded = s.padded_cols, group = s.group;
  const bool grouped = encoding == Encoding::int8 || encoding == Encoding::planes;
  if (grouped ? (group != 32 && group != 64 && group != 128) : group != 0) return false;
  if (s.plane > (encoding == Encoding::planes ? 1u : 0u)) return false;
  if (s.lo_shift > (encoding == Encoding::planes ? 4u : 0u)) return false;
  const uint64_t unit = grouped ? group : encoding == Encoding::bf16 ? 2 : 1;
  if (padded != (s.cols + unit - 1) / unit * unit) return false;
  constexpr uint64_t kRows = kTileRows, kScales = 2 * kRows;
  switch (encoding) {  // padded <= 2^31: nothing here overflows
    case Encoding::f32:
      *bytes = padded * kRows * 4;
      return true;
    case Encoding::bf16:
      *bytes = padded * kRows * 2;
      return true;
    case Encoding::int8:
      *bytes = padded / group * (kScales + group * kRows);
      return true;
    case Encoding::planes:
      *bytes = s.plane == 1 ? padded * kRows / 2 : padded / group * (kScales + group * kRows / 2);
      return true;
  }
  return false;
}

// Shape, encoding and group; *tile is the bytes of a tile that stores all groups.
const char* check_shape(const ArtifactSection& s, uint64_t* tile) {
  if (s.encoding > static_cast<uint32_t>(Encoding::planes)) return "unknown encoding";
  if (s.rows == 0 || s.cols == 0) return "no rows or no columns";
  if (s.rows > kMaxDimension || s.cols > kMaxDimension || s.padded_cols > kMaxDimension)
    return "too many rows or columns";
  return tile_bytes(s, tile) ? nullptr : "columns, group, plane and lo_shift contradict the encoding";
}

const char* check_matrix(const ArtifactSection& s) {
  uint64_t tile = 0;
  if (const char* wrong = check_shape(s, &tile)) return wrong;
  return s.tile_bytes == tile ? nullptr : "tile bytes contradict columns and group";  // the body: check_masks()
}

uint64_t tiles_of(const ArtifactSection& s) { return (uint64_t{s.rows} + kTileRows - 1) / kTileRows; }

const char* check_mask(const ArtifactSection& s) {
  const auto encoding = static_cast<Encoding>(s.encoding);
  if ((encoding != Encoding::int8 && encoding != Encoding::planes) || s.plane || s.lo_shift)
    return "a tile mask belongs to no such encoding";
  uint64_t tile = 0;
  if (const char* wrong = check_shape(s, &tile)) return wrong;
  const uint64_t groups = s.padded_cols / s.group;  // tiles * groups < 2^53
  if (s.bytes != tiles_of(s) * ((groups + 7) / 8)) return "body size contradicts rows and columns";
  if (s.stored == 0 || s.stored > tiles_of(s) * groups) return "it names more groups than there are, or none";
  return nullptr;
}

// The body of one plane, whose mask is nullptr if all groups are stored.
bool check_size(const ArtifactSection& s, const ArtifactSection* mask) {
  const uint64_t groups = mask ? s.padded_cols / s.group : 1, count = mask ? mask->stored : tiles_of(s);
  const uint64_t bytes = s.tile_bytes / groups;
  return count <= UINT64_MAX / bytes && s.bytes == count * bytes;
}

const char* check_body(const ArtifactSection& s) {
  const bool encoded = s.encoding || s.plane || s.group || s.lo_shift || s.tile_bytes;
  switch (static_cast<SectionKind>(s.kind)) {
    case SectionKind::meta:
      if (encoded || s.rows || s.cols || s.padded_cols) return "the meta section has a shape";
      return s.bytes == 0 || s.bytes > kArtifactMetaBytes ? "the meta section is empty or above 16 MiB" : nullptr;
    case SectionKind::vector:
      if (encoded || s.rows == 0 || s.rows > kMaxDimension || s.cols != 1 || s.padded_cols != 1)
        return "not a vector's shape";
      return s.bytes != uint64_t{s.rows} * 4 ? "body size contradicts rows" : nullptr;
    case SectionKind::matrix:
      return check_matrix(s);
    case SectionKind::tile_mask:
      return check_mask(s);
    default:
      return nullptr;
  }
}

void read_fields(const uint8_t* entry, ArtifactSection* s) {
  s->kind = read_u32(entry);
  s->known =
      s->kind >= static_cast<uint32_t>(SectionKind::meta) && s->kind <= static_cast<uint32_t>(SectionKind::tile_mask);
  s->offset = read_u64(entry + 16);
  s->bytes = read_u64(entry + 24);
  s->crc = read_u32(entry + 32);
  s->encoding = read_u32(entry + 36);
  s->plane = read_u32(entry + 40);
  s->group = read_u32(entry + 44);
  s->lo_shift = read_u32(entry + 48);
  s->rows = read_u32(entry + 52);
  s->cols = read_u32(entry + 56);
  s->padded_cols = read_u32(entry + 60);
  const bool mask = s->kind == static_cast<uint32_t>(SectionKind::tile_mask);
  (mask ? s->stored : s->tile_bytes) = read_u64(entry + 64);
}

// One entry of the table. `names` is where names may begin; `end` is where the previous body ended and is moved on.
std::string read_entry(const uint8_t* data, const ArtifactHeader& header, uint64_t names, const uint8_t* entry,
                       uint64_t* end, ArtifactSection* s) {
  read_fields(entry, s);
  const uint32_t flags = read_u32(entry + 4);
  const uint64_t name_offset = read_u32(entry + 8), name_bytes = read_u32(entry + 12);
  if (name_bytes == 0 || name_bytes > kMaxNameBytes) return "its name is empty or above 255 bytes";
  if (name_offset < names || name_offset > header.header_bytes || name_bytes > header.header_bytes - name_offset)
    return "its name lies outside the header";
  const std::string_view name(reinterpret_cast<const char*>(data) + name_offset, name_bytes);
  if (!printable_utf8(name)) return "its name is not printable UTF-8";
  s->name = name;
  if (!s->known && (flags & kRequired))
    return "its kind " + std::to_string(s->kind) + " is required and unknown to this version";
  // a later minor version may give reserved bytes a meaning
  if (header.minor <= kArtifactMinor && ((flags & ~kRequired) || !all_zero(entry + 72, kArtifactEntryBytes - 72)))
    return "its reserved bytes are not zero";
  if (s->offset % kArtifactAlign) return "its body is not 64-byte aligned";
  if (s->offset < *end) return "its body overlaps what precedes it";
  if (s->offset > header.file_bytes || s->bytes > header.file_bytes - s->offset) return "its body ends beyond the file";
  *end = s->offset + s->bytes;
  const char* wrong = s->known ? check_body(*s) : nullptr;
  return wrong ? wrong : std::string{};
}

bool same_shape(const ArtifactSection& a, const ArtifactSection& b) {
  return a.encoding == b.encoding && a.rows == b.rows && a.cols == b.cols && a.group == b.group;
}

// The section of that name and plane 0 in a list sorted by name and plane, or nullptr.
const ArtifactSection* find(const std::vector<const ArtifactSection*>& known, std::string_view name) {
  const auto at = std::lower_bound(known.begin(), known.end(), name,
                                   [](const ArtifactSection* s, std::string_view n) { return s->name < n; });
  return at != known.end() && (*at)->name == name && (*at)->plane == 0 ? *at : nullptr;
}

// Every tile mask has a matrix, and matrices have the size that their masks leave them.
std::string check_masks(const std::vector<const ArtifactSection*>& known) {
  const auto is = [](const ArtifactSection* s, SectionKind kind) { return s->kind == static_cast<uint32_t>(kind); };
  for (const ArtifactSection* s : known) {
    if (!is(s, SectionKind::tile_mask)) continue;
    const size_t length = s->name.size() - std::min(s->name.size(), kMaskSuffix.size());
    const bool named = s->name.substr(length) == kMaskSuffix;
    const ArtifactSection* matrix = named ? find(known, s->name.substr(0, length)) : nullptr;
    if (!matrix || !is(matrix, SectionKind::matrix) || !same_shape(*s, *matrix))
      return "section " + quoted(s->name) + " is a tile mask of no matrix that is here";
  }
  std::string name;
  for (const ArtifactSection* s : known) {
    if (!is(s, SectionKind::matrix)) continue;
    name.assign(s->name).append(kMaskSuffix);
    const ArtifactSection* mask = find(known, name);
    if (!check_size(*s, mask && is(mask, SectionKind::tile_mask) ? mask : nullptr))
      return "section " + quoted(s->name) + ": body size contradicts rows and columns";
  }
  return {};
}

// What no entry can show alone: names are unique, there is one meta section, every lo plane belongs to its hi plane.
std::string check_together(const std::vector<ArtifactSection>& sections) {
  std::vector<const ArtifactSection*> known;
  for (const auto& s : sections)
    if (s.known) known.push_back(&s);
  std::sort(known.begin(), known.end(), [](const ArtifactSection* a, const ArtifactSection* b) {
    return a->name != b->name ? a->name < b->name : a->plane < b->plane;
  });
  size_t metas = 0;
  for (size_t i = 0; i < known.size(); ++i) {
    const ArtifactSection& s = *known[i];
    const ArtifactSection* before = i > 0 && known[i - 1]->name == s.name ? known[i - 1] : nullptr;
    const bool lo_follows = i + 1 < known.size() && known[i + 1]->name == s.name && known[i + 1]->plane == 1;
    const std::string name = quoted(s.name);
    metas += s.kind == static_cast<uint32_t>(SectionKind::meta);
    if (before && before->plane == s.plane) return "section " + name + " stands twice";
    if (s.plane == 0) {
      if (s.lo_shift != 0 && !lo_follows) return "section " + name + " has lo_shift but no lo plane";
    } else if (!before) {
      return "section " + name + " has a lo plane and no hi plane";
    } else if (!same_shape(*before, s) || before->lo_shift != s.lo_shift) {
      return "the planes of section " + name + " contradict each other";
    }
  }
  if (metas != 1) return "there must be one meta section, not " + std::to_string(metas);
  return check_masks(known);
}

std::string read_fixed(const uint8_t* data, uint64_t bytes, uint64_t file_bytes, ArtifactHeader* header,
                       uint32_t* count) {
  if (bytes < kArtifactFixedBytes || bytes > file_bytes) return "truncated header";
  if (std::memcmp(data, kMagic, sizeof kMagic) != 0) return "not a Haomiao artifact (wrong magic)";
  header->major = read_u16(data + 8);
  header->minor = read_u16(data + 10);
  header->header_bytes = read_u32(data + 12);
  header->file_bytes = read_u64(data + 16);
  *count = read_u32(data + 24);
  if (header->major != kArtifactMajor)
    return "format version " + std::to_string(header->major) + "; this build reads version " +
           std::to_string(kArtifactMajor);
  if (header->file_bytes != file_bytes)
    return "the file has " + std::to_string(file_bytes) + " bytes, its header says " +
           std::to_string(header->file_bytes);
  if (header->header_bytes < kArtifactFixedBytes || header->header_bytes % kArtifactAlign ||
      header->header_bytes > bytes)
    return "wrong header size";
  if (*count > (header->header_bytes - kArtifactFixedBytes) / kArtifactEntryBytes)
    return "the section table does not fit the header";
  constexpr uint8_t kZero[4] = {};
  uint32_t crc = crc32(0, data, kCrcOffset);
  crc = crc32(crc, kZero, sizeof kZero);
  crc = crc32(crc, data + kCrcOffset + 4, header->header_bytes - kCrcOffset - 4);
  if (crc != read_u32(data + kCrcOffset)) return "the header's checksum is wrong";
  if (header->minor <= kArtifactMinor && (read_u32(data + 28) || !all_zero(data + 36, kArtifactFixedBytes - 36)))
    return "reserved bytes of the header are not zero";
  return {};
}

}  // namespace

uint32_t crc32(uint32_t crc, const uint8_t* data, size_t bytes) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = (c & 1) ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  crc = ~crc;
  for (size_t i = 0; i < bytes; ++i) crc = table[(crc ^ data[i]) & 0xFF] ^ (crc >> 8);
  return ~crc;
}

std::string parse_artifact(const uint8_t* data, uint64_t bytes, uint64_t file_bytes, ArtifactHeader* header) {
  uint32_t count = 0;
  if (std::string wrong = read_fixed(data, bytes, file_bytes, header, &count); !wrong.empty()) return wrong;
  const uint64_t names = kArtifactFixedBytes + uint64_t{count} * kArtifactEntryBytes;
  uint64_t end = header->header_bytes;
  header->sections.clear();
  header->sections.reserve(count);  // at most as many as there are entries in the header's bytes
  for (uint32_t i = 0; i < count; ++i) {
    ArtifactSection section{};
    const uint8_t* entry = data + kArtifactFixedBytes + uint64_t{i} * kArtifactEntryBytes;
    const std::string wrong = read_entry(data, *header, names, entry, &end, &section);
    if (!wrong.empty()) {
      const std::string which = section.name.empty() ? std::to_string(i) : quoted(section.name);
      return "section " + which + ": " + wrong;
    }
    header->sections.push_back(section);
  }
  return check_together(header->sections);
}

}  // namespace haomiao

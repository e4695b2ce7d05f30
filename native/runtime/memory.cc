#include "runtime/memory.h"

#include <sys/mman.h>

#include <new>
#include <utility>

namespace haomiao {

Mapping::Mapping(size_t bytes) : bytes_(bytes) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
  flags |= MAP_NORESERVE;
#endif
  void* p = bytes ? mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) : MAP_FAILED;
  if (p == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(p);
#if defined(MADV_HUGEPAGE)
  madvise(p, bytes, MADV_HUGEPAGE);  // advice: a refusal costs speed, nothing else
#endif
}

Mapping::~Mapping() {
  if (data_) munmap(data_, bytes_);
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

size_t Arena::reserve(size_t bytes) {
  const size_t offset = size_;
  if (bytes > SIZE_MAX / 2 - size_) throw std::bad_alloc();
  size_ += (bytes + 63) / 64 * 64;
  return offset;
}

}  // namespace haomiao

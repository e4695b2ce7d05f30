// Anonymous memory for buffers and KV: mapped once at load, touched lazily, in huge pages where the system grants them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace haomiao {

// Owns one mapping. Throws std::bad_alloc if the system refuses it.
class Mapping {
 public:
  Mapping() = default;
  explicit Mapping(size_t bytes);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// Pieces of one mapping: reserve() all of them, commit(), then at(). Every piece starts at 64 bytes.
class Arena {
 public:
  size_t reserve(size_t bytes);
  void commit() { mapping_ = Mapping(size_ ? size_ : 64); }
  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(mapping_.data() + offset);
  }
  size_t bytes() const { return size_; }

 private:
  size_t size_ = 0;
  Mapping mapping_;
};

}  // namespace haomiao

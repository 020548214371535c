// common/core/hash.h - SHA-256 for identity, XXH3 for integrity.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace flux {

using Sha256Digest = std::array<std::byte, 32>;

/// For unordered containers: a digest is as good as its first bytes.
struct DigestHash {
  size_t operator()(const Sha256Digest& digest) const {
    size_t value;
    std::memcpy(&value, digest.data(), sizeof value);
    return value;
  }
};

/// SHA-256 over what is added, in order (FIPS 180-4, by OpenSSL).
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(Sha256&&) noexcept;
  Sha256& operator=(Sha256&&) noexcept;

  Sha256& add(std::span<const std::byte> bytes);
  Sha256& add(std::string_view text);
  /// Adds `value` as 8 bytes, little-endian.
  Sha256& add_u64(uint64_t value);
  /// Adds the length as 8 bytes and then the bytes, so that two fields cannot run together.
  Sha256& add_field(std::string_view bytes);
  Sha256Digest digest();

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

Sha256Digest sha256(std::span<const std::byte> bytes);
Sha256Digest sha256(std::string_view text);
/// Throws InputError if the file cannot be read.
Sha256Digest sha256_file(const std::filesystem::path& path);

uint64_t xxh3_64(std::span<const std::byte> bytes);
/// XXH3-64 over what is added, in order.
class Xxh3 {
 public:
  Xxh3();
  ~Xxh3();
  Xxh3(const Xxh3&) = delete;
  Xxh3& operator=(const Xxh3&) = delete;

  Xxh3& add(std::span<const std::byte> bytes);
  uint64_t digest() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};
/// XXH3-128 in canonical (big-endian) byte order as 32 hex digits, as xxhsum -H2 prints it.
std::string xxh3_128_hex(std::span<const std::byte> bytes);

std::string to_hex(std::span<const std::byte> bytes);
/// Throws std::invalid_argument unless `hex` is 64 hex digits.
Sha256Digest digest_from_hex(std::string_view hex);

inline std::span<const std::byte> as_bytes(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

}  // namespace flux

#include "common/core/hash.h"

#include <openssl/evp.h>
#include <xxhash.h>

#include <bit>
#include <cstring>
#include <new>
#include <stdexcept>

#include "common/core/file.h"

namespace flux {

static_assert(std::endian::native == std::endian::little,
              "files of this project are little-endian");

struct Sha256::Context {
  EVP_MD_CTX* evp = EVP_MD_CTX_new();
  ~Context() { EVP_MD_CTX_free(evp); }
};

Sha256::Sha256() : context_(std::make_unique<Context>()) {
  if (!context_->evp || EVP_DigestInit_ex(context_->evp, EVP_sha256(), nullptr) != 1) {
    throw std::runtime_error("libcrypto has no SHA-256");
  }
}
Sha256::~Sha256() = default;
Sha256::Sha256(Sha256&&) noexcept = default;
Sha256& Sha256::operator=(Sha256&&) noexcept = default;

Sha256& Sha256::add(std::span<const std::byte> bytes) {
  EVP_DigestUpdate(context_->evp, bytes.data(), bytes.size());
  return *this;
}

Sha256& Sha256::add(std::string_view text) { return add(as_bytes(text)); }

Sha256& Sha256::add_u64(uint64_t value) {
  std::array<std::byte, 8> bytes;
  std::memcpy(bytes.data(), &value, sizeof value);
  return add(bytes);
}

Sha256& Sha256::add_field(std::string_view bytes) { return add_u64(bytes.size()).add(bytes); }

Sha256Digest Sha256::digest() {
  Sha256Digest out;
  unsigned int size = 0;
  EVP_DigestFinal_ex(context_->evp, reinterpret_cast<unsigned char*>(out.data()), &size);
  return out;
}

Sha256Digest sha256(std::span<const std::byte> bytes) { return Sha256().add(bytes).digest(); }

Sha256Digest sha256(std::string_view text) { return sha256(as_bytes(text)); }

Sha256Digest sha256_file(const std::filesystem::path& path) {
  Sha256 hash;
  read_chunks(path, [&](std::span<const std::byte> chunk) { hash.add(chunk); });
  return hash.digest();
}

struct Xxh3::State {
  XXH3_state_t* xxh = XXH3_createState();
  ~State() { XXH3_freeState(xxh); }
};

Xxh3::Xxh3() : state_(std::make_unique<State>()) {
  if (!state_->xxh) throw std::bad_alloc();
  XXH3_64bits_reset(state_->xxh);
}
Xxh3::~Xxh3() = default;

Xxh3& Xxh3::add(std::span<const std::byte> bytes) {
  XXH3_64bits_update(state_->xxh, bytes.data(), bytes.size());
  return *this;
}

uint64_t Xxh3::digest() const { return XXH3_64bits_digest(state_->xxh); }

uint64_t xxh3_64(std::span<const std::byte> bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

std::string xxh3_128_hex(std::span<const std::byte> bytes) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(bytes.data(), bytes.size()));
  return to_hex(std::as_bytes(std::span(canonical.digest)));
}

std::string to_hex(std::span<const std::byte> bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  out.reserve(bytes.size() * 2);
  for (const std::byte b : bytes) {
    out += kDigits[std::to_integer<unsigned>(b) >> 4];
    out += kDigits[std::to_integer<unsigned>(b) & 15];
  }
  return out;
}

Sha256Digest digest_from_hex(std::string_view hex) {
  const auto value = [](char c) -> int {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return -1;
  };
  Sha256Digest out;
  if (hex.size() != out.size() * 2) throw std::invalid_argument("a SHA-256 has 64 hex digits");
  for (size_t i = 0; i < out.size(); ++i) {
    const int high = value(hex[2 * i]), low = value(hex[2 * i + 1]);
    if (high < 0 || low < 0) throw std::invalid_argument("a SHA-256 has 64 lower-case hex digits");
    out[i] = static_cast<std::byte>(high * 16 + low);
  }
  return out;
}

}  // namespace flux

#include "formats/cache/superblock.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "common/core/error.h"
#include "common/core/text.h"
#include "formats/cache/files.h"

namespace flux::cache {
namespace {

template <class T>
T at(std::span<const std::byte> bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

}  // namespace

uint32_t lookup3(std::span<const std::byte> bytes) {
  uint32_t a = 0xdeadbeefu + static_cast<uint32_t>(bytes.size()), b = a, c = a;
  const auto take = [&](size_t count) {  // up to 12 bytes, the missing ones as zeros
    std::array<uint32_t, 3> words{};
    std::memcpy(words.data(), bytes.data(), count);
    a += words[0], b += words[1], c += words[2];
    bytes = bytes.subspan(count);
  };
  while (bytes.size() > 12) {
    take(12);
    a -= c, a ^= std::rotl(c, 4), c += b;
    b -= a, b ^= std::rotl(a, 6), a += c;
    c -= b, c ^= std::rotl(b, 8), b += a;
    a -= c, a ^= std::rotl(c, 16), c += b;
    b -= a, b ^= std::rotl(a, 19), a += c;
    c -= b, c ^= std::rotl(b, 4), b += a;
  }
  if (bytes.empty()) return c;
  take(bytes.size());
  c ^= b, c -= std::rotl(b, 14);
  a ^= c, a -= std::rotl(c, 11);
  b ^= a, b -= std::rotl(a, 25);
  c ^= b, c -= std::rotl(b, 16);
  a ^= c, a -= std::rotl(c, 4);
  b ^= a, b -= std::rotl(a, 14);
  c ^= b, c -= std::rotl(b, 24);
  return c;
}

std::string check_superblock(std::span<const std::byte> head, uint64_t file_bytes) {
  // Source: HDF5 File Format Specification 3.0, II.A, superblock version 3.
  constexpr std::string_view kSignature("\x89HDF\r\n\x1a\n", 8);
  if (file_bytes == 0) return "is empty";
  if (head.size() < 8 || std::memcmp(head.data(), kSignature.data(), 8) != 0) {
    return "is not an HDF5 file (no signature at its start: another format, or a user block)";
  }
  if (head.size() < kSuperblockBytes)
    return fmt::format("is cut off: {} bytes, the superblock has 48", file_bytes);
  const auto byte = [&](size_t i) { return std::to_integer<int>(head[i]); };
  if (byte(8) != 3) return fmt::format("has HDF5 superblock version {}, a cache has 3", byte(8));
  if (byte(9) != 8 || byte(10) != 8) {
    return fmt::format(
        "has HDF5 offsets and lengths of {} and {} bytes, a cache has 8 and 8", byte(9), byte(10));
  }
  if (at<uint32_t>(head, 44) != lookup3(head.first(44)))
    return "has a damaged HDF5 superblock (checksum)";
  if (byte(11) != 0)
    return fmt::format("was not closed by its writer (HDF5 status flags {}, expected 0)", byte(11));
  if (at<uint64_t>(head, 12) != 0)
    return fmt::format("has a user block of {} bytes", at<uint64_t>(head, 12));
  if (at<uint64_t>(head, 20) != UINT64_MAX) return "has an HDF5 superblock extension";
  if (at<uint64_t>(head, 28) != file_bytes) {
    return fmt::format("has {} bytes, its superblock says {}", file_bytes, at<uint64_t>(head, 28));
  }
  if (at<uint64_t>(head, 36) >= file_bytes) return "has its root group outside the file";
  return {};
}

void check_superblock(const std::filesystem::path& path) {
  const auto refuse = [&](const std::string& text) {
    throw CacheError(fmt::format("{}: {}", show(path), text));
  };
  const int fd = open(path.c_str(),
                      O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO would block for ever otherwise
  if (fd < 0) {
    const int number = errno;
    const auto text =
        fmt::format("{}: cannot be read: {}", show(path), std::generic_category().message(number));
    refuse_unreadable(path);
    throw CacheError(text);
  }
  std::array<std::byte, kSuperblockBytes> head;
  struct stat info {};
  const bool regular = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
  const ssize_t got = regular ? pread(fd, head.data(), head.size(), 0) : 0;
  close(fd);
  if (!regular) refuse("is not a regular file");
  if (got < 0) refuse("cannot be read");
  const auto text = check_superblock(std::span(head).first(static_cast<size_t>(got)),
                                     static_cast<uint64_t>(info.st_size));
  if (!text.empty()) refuse(text);
}

}  // namespace flux::cache

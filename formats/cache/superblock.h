// formats/cache/superblock.h - the first 48 bytes of an HDF5 file, checked before HDF5 sees it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

namespace flux::cache {

inline constexpr size_t kSuperblockBytes = 48;

/// Returns which rule of FORMAT.md section 2 the superblock of a file of `file_bytes` breaks, or an
/// empty text: signature, version 3, sizes of offsets and lengths 8, flags 0 (closed properly),
/// base address 0 (no user block), no extension, end of file equal to the file's size, checksum.
std::string check_superblock(std::span<const std::byte> first_bytes, uint64_t file_bytes);
/// The same for a file; also: a regular file. Throws CacheError.
void check_superblock(const std::filesystem::path& path);

/// Bob Jenkins' lookup3 hashlittle() with initial value 0, which HDF5 uses for its metadata.
/// Source: HDF5 File Format Specification 3.0, III.A; burtleburtle.net/bob/c/lookup3.c (public
/// domain).
uint32_t lookup3(std::span<const std::byte> bytes);

}  // namespace flux::cache

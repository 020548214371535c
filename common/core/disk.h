// common/core/disk.h - whether what is to be written will fit.
#pragma once
#include <cstdint>
#include <filesystem>

namespace flux {

/// Throws ResourceError, naming the bytes needed and free, if fewer than `bytes` are free where
/// `path` will be: it and folders above it need not exist yet. What cannot be asked is no error.
void require_free_space(const std::filesystem::path& path, uint64_t bytes);

}  // namespace flux

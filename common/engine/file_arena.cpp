#include "common/engine/file_arena.h"

#include <cerrno>
#include <exception>
#include <string>

#include "common/core/scratch_file.h"

namespace flux::engine {
namespace {

constexpr char kPurpose[] = "streamed weights and states";

}  // namespace

FileArena::FileArena(const std::filesystem::path& folder,
                     std::vector<int64_t> record_bytes,
                     FileAccess access)
    : bytes_(std::move(record_bytes)) {
  begins_.push_back(0);
  for (const int64_t length : bytes_) begins_.push_back(begins_.back() + length);
  const int64_t total = begins_.back();
  ScratchFile scratch(folder, kPurpose);
  scratch.reserve(total);
  // a file that ends too early was shortened by somebody: an error of the device
  const auto failure = [folder](const std::string& what, int number) {
    return std::make_exception_ptr(
        ScratchFile::failure(folder, kPurpose, what, number == 0 ? EIO : number));
  };
  file_ = std::make_unique<RecordFile>(scratch.release(), choose_access(access, total), failure);
}

FileArena::~FileArena() = default;

void FileArena::read(int64_t index, int64_t offset, std::span<std::byte> to) const {
  check_range(index, offset, to.size());
  file_->read(begins_[static_cast<size_t>(index)] + offset, to);
}

void FileArena::write(int64_t index, int64_t offset, std::span<const std::byte> from) {
  check_range(index, offset, from.size());
  file_->write(begins_[static_cast<size_t>(index)] + offset, from);
}

void FileArena::prefetch(int64_t index) const {
  file_->prefetch(begins_.at(static_cast<size_t>(index)), record_bytes(index));
}

int64_t FileArena::staging_bytes() const {
  // memory and places are aligned: nothing goes over the buffer
  return 0;
}

}  // namespace flux::engine

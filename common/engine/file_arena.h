// common/engine/file_arena.h - records in a scratch file that has no name.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

#include "common/engine/record_file.h"
#include "common/engine/record_store.h"

namespace flux::engine {

/// A ScratchFile in `folder`, so that nothing of it is left however the process ends. Its blocks are reserved when it is
/// made: a later write does not find the disk full. Records are zero at first.
class FileArena final : public RecordStore {
 public:
  /// Throws ResourceError: the folder is not writable; not enough room on its disk, naming the folder, the bytes needed
  /// and those free.
  FileArena(const std::filesystem::path& folder,
            std::vector<int64_t> record_bytes,
            FileAccess access = kDefaultFileAccess);
  ~FileArena() override;

  int64_t num_records() const override { return static_cast<int64_t>(bytes_.size()); }
  int64_t record_bytes(int64_t index) const override {
    return bytes_.at(static_cast<size_t>(index));
  }
  using RecordStore::read;
  using RecordStore::write;
  /// Throws ResourceError naming the folder and the system's reason.
  void read(int64_t index, int64_t offset, std::span<std::byte> to) const override;
  bool writable() const override { return true; }
  void write(int64_t index, int64_t offset, std::span<const std::byte> from) override;
  void prefetch(int64_t index) const override;
  int64_t staging_bytes() const override;

 private:
  std::vector<int64_t> bytes_, begins_;
  std::unique_ptr<RecordFile> file_;
};

}  // namespace flux::engine

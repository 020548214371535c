// pipelines/train/append_file.h - a file that a run adds to, record by record.
#pragma once
#include <filesystem>
#include <string_view>

namespace flux::train {

/// Every failure is a ResourceError that names the path.
class AppendFile {
 public:
  /// Opens a file, or makes it.
  explicit AppendFile(std::filesystem::path path);
  ~AppendFile();
  AppendFile(const AppendFile&) = delete;
  AppendFile& operator=(const AppendFile&) = delete;

  /// Adds `record` in one write, so that a process killed at any moment leaves all of it or nothing.
  void write(std::string_view record);
  /// Puts what was written on the disk.
  void flush();

 private:
  [[noreturn]] void fail() const;
  std::filesystem::path path_;
  int fd_;
};

}  // namespace flux::train

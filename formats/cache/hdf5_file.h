// formats/cache/hdf5_file.h - HDF5 as this format uses it: files built in memory, files read with
// suspicion.
//
// All calls into HDF5 happen here, one at a time (Debian's library serialises them anyway, others
// are not thread-safe). Values pass as whole compressed chunks, so that HDF5's filter pipeline
// never runs: it is slower and holds the lock.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace flux::cache {

enum class Element { kU8, kU32, kU64, kF64, kBF16, kF16, kF32 };
int64_t element_bytes(Element element);

/// Rows of a table's chunk: about 1 MiB, at most `rows`.
int64_t table_chunk_rows(int64_t rows, int64_t row_bytes);

/// Builds a file in memory. Any failure is a std::runtime_error: nothing here touches a disk.
class Hdf5Image {
 public:
  Hdf5Image();
  ~Hdf5Image();
  Hdf5Image(const Hdf5Image&) = delete;
  Hdf5Image& operator=(const Hdf5Image&) = delete;

  /// Root attributes: a text of fixed length, or a 64-bit integer. Throws std::invalid_argument
  /// beyond 60,000 bytes.
  void attribute(const std::string& name, std::string_view text);
  void attribute(const std::string& name, int64_t value);
  /// A table [rows] or, with `columns` > 0, [rows, columns], at least one row. Compressed here.
  void table(const std::string& name,
             Element element,
             int64_t rows,
             int64_t columns,
             std::span<const std::byte> data);
  /// A dataset of `shape` whose chunk i is the frame `frames[i]` of row i.
  void frames(const std::string& name,
              Element element,
              std::span<const int64_t> shape,
              std::span<const std::span<const std::byte>> frames);
  /// The finished file's bytes. Nothing can be added afterwards.
  std::vector<std::byte> finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

using AttributeValue = std::variant<std::string, int64_t>;

/// A file opened for reading. Everything that FORMAT.md section 2 forbids is refused by name with a
/// CacheError.
class Hdf5File {
 public:
  /// Checks the superblock, opens the file, reads root attributes and lists datasets.
  explicit Hdf5File(const std::filesystem::path& path);
  ~Hdf5File();
  Hdf5File(const Hdf5File&) = delete;
  Hdf5File& operator=(const Hdf5File&) = delete;

  const std::filesystem::path& path() const { return path_; }
  const std::map<std::string, AttributeValue>& attributes() const { return attributes_; }
  const std::string& text_attribute(const std::string& name) const;
  int64_t number_attribute(const std::string& name) const;
  const std::vector<std::string>& datasets() const { return datasets_; }

  /// Refuses what the constructor met beside texts, integers and hard links to datasets. Apart, so
  /// that a newer schema is named first.
  void refuse_oddities() const;

  /// A whole table of `rows` x `columns` (0: of rank 1). `rows` -1: as many as there are, at most
  /// `max_rows`.
  std::vector<std::byte> table(const std::string& name,
                               Element element,
                               int64_t rows,
                               int64_t columns,
                               int64_t max_rows = INT64_MAX) const;

  /// A dataset of exactly `shape`, one chunk a row, kept open for frame().
  class Frames;
  std::shared_ptr<Frames> open_frames(const std::string& name,
                                      Element element,
                                      std::span<const int64_t> shape) const;
  /// The compressed chunk of row `row`, which decodes to `bytes`, in `buffer`, which only grows.
  /// Thread-safe.
  std::span<const std::byte> frame(const Frames& frames,
                                   int64_t row,
                                   int64_t bytes,
                                   std::vector<std::byte>& buffer) const;

  /// Throws CacheError("PATH: text").
  [[noreturn]] void refuse(const std::string& text, const std::string& hint = {}) const;

 private:
  struct State;
  std::filesystem::path path_;
  std::map<std::string, AttributeValue> attributes_;
  std::vector<std::string> datasets_;
  std::string oddity_;  // the first one
  std::unique_ptr<State> state_;
};

}  // namespace flux::cache

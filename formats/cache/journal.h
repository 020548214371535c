// formats/cache/journal.h - finished samples that are not in a segment yet, so that a kill loses
// none.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <mutex>
#include <span>
#include <stop_token>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "formats/cache/schema.h"
#include "formats/cache/segment_writer.h"

namespace flux::cache {

/// The journal of one running writer, `.journal-<16 hex digits>` (FORMAT.md section 8). Private
/// scratch of the tools.
class Journal {
 public:
  /// Makes the file. Throws ResourceError.
  Journal(const std::filesystem::path& folder, const SegmentHeader& header);
  ~Journal();  // leaves the file
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  /// Appends one record; the system has all of it when this returns. A thread flushes it to the disk
  /// within a second, however long the next record takes. After a ResourceError the file ends with
  /// the last whole record.
  void append(const Record& record);
  /// Throws the ResourceError of a flush that failed since.
  void check();
  /// Deletes the file: its samples are published.
  void remove();

 private:
  [[noreturn]] void fail(const char* what, int number) const;
  void flush_later(const std::stop_token& stop);
  void close_file();
  void stop_flusher();
  int flush_data() const;
  std::filesystem::path path_;
  int fd_ = -1;
  uint64_t size_ = 0;
  std::mutex mutex_;  // of the two below
  bool dirty_ = false;
  int flush_error_ = 0;  // errno
  std::condition_variable_any changed_;
  std::jthread flusher_;
};

/// What a journal starts with.
inline constexpr std::string_view kJournalMagic = "FXCJHEAD";
/// ".journal-<16 hex digits>"
bool is_journal_name(std::string_view name);

struct JournalContent {
  SegmentHeader header;
  std::vector<Record> records;
  uint64_t valid_bytes = 0;  // what follows is the torn end of a killed writer
};
/// The valid prefix. A file whose header is torn or damaged has no records and valid_bytes 0. Never
/// throws for bad bytes. Throws CacheError if the header is whole, but of a schema that this build
/// does not read.
JournalContent parse_journal(std::span<const std::byte> bytes, const std::filesystem::path& path);

}  // namespace flux::cache

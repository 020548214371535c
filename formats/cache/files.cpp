#include "formats/cache/files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <system_error>

#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/cache/folder.h"
#include "formats/cache/header.h"
#include "formats/cache/journal.h"
#include "formats/cache/lock.h"
#include "formats/cache/manifest.h"
#include "formats/cache/segment_writer.h"

namespace flux::cache {
namespace fs = std::filesystem;
namespace {

// Files that a reader opens, or a writer puts in place of another.
bool is_published_name(std::string_view name) {
  return is_segment_name(name) || name == kManifestName || name == kIndexName ||
         name == kQuarantineName;
}

// The first bytes of a regular file; nothing if it is something else or cannot be read.
std::optional<std::string> head_of(const fs::path& path, size_t count) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return std::nullopt;
  struct stat info {};
  std::optional<std::string> out;
  if (fstat(fd, &info) == 0 && S_ISREG(info.st_mode)) {
    std::string bytes(count, '\0');
    const ssize_t got = pread(fd, bytes.data(), count, 0);
    if (got >= 0) out = bytes.substr(0, static_cast<size_t>(got));
  }
  close(fd);
  return out;
}

// What a power cut makes of a file whose name reached the disk before its bytes.
bool is_blank(std::string_view head) {
  constexpr size_t kEnough = 8;
  return head.substr(0, kEnough).find_first_not_of('\0') == std::string_view::npos;
}

bool is_hdf5_of_ours(const fs::path& path);
bool is_journal_of_ours(const fs::path& path);

bool is_manifest_of_ours(const fs::path& path) {
  constexpr uint64_t kMaxBytes = uint64_t{1} << 30;
  std::string text;
  try {
    text = read_file(path, kMaxBytes);
  } catch (const InputError&) {
    return false;
  }
  // two marks, so that damage to one of them does not make it a stranger's
  if (is_blank(text) || text.find("\"flux-cache\"") != std::string::npos ||
      text.find("\"plan_digest\"") != std::string::npos) {
    return true;
  }
  if (nlohmann::json::accept(text)) return false;
  const fs::path folder = path.parent_path();
  return std::ranges::any_of(names_in(folder), [&](const std::string& name) {
    return (is_segment_name(name) && is_hdf5_of_ours(folder / name)) ||
           (is_journal_name(name) && is_journal_of_ours(folder / name));
  });
}

bool is_hdf5_of_ours(const fs::path& path) {
  constexpr size_t kHead = 4096;  // the attribute `format` is the first of them
  const auto head = head_of(path, kHead);
  if (!head) return false;
  constexpr std::string_view kSignature("\x89HDF\r\n\x1a\n", 8), kRootGroup = "OHDR";
  constexpr size_t kRootAt = 48;
  const bool hdf5 =
      head->starts_with(kSignature) ||
      (head->size() > kRootAt && std::string_view(*head).substr(kRootAt).starts_with(kRootGroup));
  const bool cut_off = head->size() < 2 * kRootAt;  // before any mark
  return is_blank(*head) || (hdf5 && (cut_off || head->find(kFormat) != std::string::npos));
}

bool is_journal_of_ours(const fs::path& path) {
  auto head = head_of(path, kJournalMagic.size());
  if (!head) return false;
  head->erase(head->find_last_not_of('\0') + 1);  // torn within the magic, if there is any
  return kJournalMagic.starts_with(*head);
}

bool is_quarantine_of_ours(const fs::path& path) {
  constexpr size_t kLine = 1 << 16;
  const auto head = head_of(path, kLine);
  return head && (is_blank(*head) || (head->find("\"item\":") != std::string::npos &&
                                      head->find("\"reason\":") != std::string::npos));
}

bool is_last_run_of_ours(const fs::path& path) {
  constexpr size_t kHead = 1 << 16;
  const auto head = head_of(path, kHead);
  return head && (is_blank(*head) || head->find("\"stage_seconds\":") != std::string::npos);
}

constexpr char kUnchanged[] = "; nothing was changed";

[[noreturn]] void refuse(const fs::path& path, const char* kind) {
  throw CacheError(
      fmt::format("{}: is not {} of a cache, but has the name of one; nothing was changed",
                  show(path),
                  kind),
      "move that file away, or name another folder");
}

std::optional<FileStamp> manifest_stamp(const fs::path& folder) {
  try {
    return file_stamp(folder / kManifestName);
  } catch (const InputError&) {
    return std::nullopt;
  }
}

}  // namespace

bool is_temporary_name(std::string_view name) {
  constexpr std::string_view kMiddle = ".tmp-";
  constexpr size_t kDigits = 16;
  if (name.size() <= kMiddle.size() + kDigits || !name.starts_with('.')) return false;
  const auto end = name.size() - kMiddle.size() - kDigits;
  if (name.substr(end, kMiddle.size()) != kMiddle ||
      !is_hex(name.substr(end + kMiddle.size()), kDigits))
    return false;
  const auto hidden = name.substr(0, end), plain = name.substr(1, end - 1);
  const auto is_hidden_file = [](std::string_view of) {
    return of == kWriterLockName || is_reader_lock_name(of) || of == kLastRunName;
  };
  return is_published_name(plain) || is_hidden_file(plain) || is_hidden_file(hidden);
}

bool is_file_of_cache(std::string_view name) {
  return is_published_name(name) || is_journal_name(name) || is_temporary_name(name) ||
         is_reader_lock_name(name) || name == kWriterLockName || name == kLastRunName;
}

void require_folder(const fs::path& folder) {
  std::error_code error;
  const auto status = fs::status(folder, error);
  if (fs::is_directory(status)) return;
  if (fs::exists(status)) {
    throw CacheError(show(folder) + ": is a file, not the folder of a cache",
                     "give the folder that --out of a cache tool named");
  }
  if (status.type() == fs::file_type::not_found) {
    throw CacheError(show(folder) + ": there is no such folder",
                     "check the path, or make the cache first");
  }
  throw CacheError(fmt::format("{}: cannot be read: {}", show(folder), error.message()),
                   "check the path and its permissions");
}

void refuse_foreign_manifest(const fs::path& folder) {
  const fs::path path = folder / kManifestName;
  refuse_unreadable(path, kUnchanged);
  if (is_there(path) && !is_manifest_of_ours(path)) refuse(path, "the manifest");
}

void refuse_foreign_files(const fs::path& folder) {
  std::error_code error;
  if (!fs::is_directory(folder, error)) return;
  refuse_foreign_manifest(folder);
  bool has_manifest = false;  // that can be read, and vouches for files
  std::set<std::string> named;
  try {
    if (const auto manifest = read_manifest_if_there(folder)) {
      has_manifest = true;
      for (const auto& entry : manifest->segments) named.insert(entry.name);
    }
  } catch (const SchemaError&) {
    throw;
  } catch (const CacheError&) {
    // ours, but damaged: it names nothing
  }
  for (const auto& name : names_in(folder)) {
    const fs::path path = folder / name;
    if (is_published_name(name) || is_journal_name(name)) refuse_unreadable(path, kUnchanged);
    if (is_segment_name(name)) {
      if (fs::is_directory(path, error) || (!named.contains(name) && !is_hdf5_of_ours(path)))
        refuse(path, "a segment");
    } else if (name == kIndexName) {
      if (fs::is_directory(path, error) || (!has_manifest && !is_hdf5_of_ours(path)))
        refuse(path, "the index");
    } else if (is_journal_name(name)) {
      if (!is_journal_of_ours(path)) refuse(path, "a journal");
    } else if (name == kQuarantineName) {
      if (fs::is_directory(path, error) || (!has_manifest && !is_quarantine_of_ours(path)))
        refuse(path, "the list of quarantined items");
    } else if (name == kLastRunName) {
      if (fs::is_directory(path, error) || !is_last_run_of_ours(path))
        refuse(path, "the record of a run");
    }
  }
}

bool is_there(const fs::path& path) {
  struct stat info {};
  return lstat(path.c_str(), &info) == 0 || (errno != ENOENT && errno != ENOTDIR);
}

void refuse_unreadable(const fs::path& path, std::string_view consequence) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  const int number = errno;
  if (fd >= 0) {
    close(fd);
  } else if (number != ENOENT && number != ELOOP && number != ENXIO && is_there(path)) {
    throw UnreadableError(
        fmt::format("{}: cannot be read: {}{}",
                    show(path),
                    std::generic_category().message(number),
                    consequence),
        "check its permissions, its disk and the limit on open files (ulimit -n)");
  }
}

int64_t bytes_of_file(const fs::path& path) {
  std::error_code error;
  const auto bytes = fs::file_size(path, error);
  if (error) throw CacheError(fmt::format("{}: cannot be read: {}", show(path), error.message()));
  return static_cast<int64_t>(bytes);
}

std::string message_of(const Error& error) {
  const std::string_view text = error.what();
  return std::string(text.substr(0, text.find("\n  hint: ")));
}

std::string repair_hint(const fs::path& folder) {
  return fmt::format("flux-cache repair {}, then run the caching tool again", show(folder));
}

void read_unchanged(const std::vector<fs::path>& folders, const std::function<void()>& read) {
  std::vector<std::optional<FileStamp>> before;
  for (const auto& folder : folders) before.push_back(manifest_stamp(folder));
  try {
    read();
  } catch (const CacheError&) {
    for (size_t i = 0; i < folders.size(); ++i) {
      if (before[i] == manifest_stamp(folders[i])) continue;
      throw CacheError(
          show(folders[i]) + ": has changed while it was read: another tool works on it",
          "run this again when nothing else works on that folder");
    }
    throw;
  }
}

std::string counted(int64_t count, std::string_view noun) {
  return fmt::format("{} {}{}", count, noun, count == 1 ? "" : "s");
}

}  // namespace flux::cache

#include "formats/cache/copy.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <memory>
#include <optional>
#include <string>
#include <system_error>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/cache/folder.h"
#include "formats/cache/header.h"
#include "formats/cache/lock.h"
#include "formats/cache/manifest.h"

namespace flux::cache {
namespace fs = std::filesystem;
namespace {

// One file of the manifest.
struct Wanted {
  std::string name;
  int64_t bytes = 0;
  std::string xxh3_128;
};

// The XXH3-128 of what is on the disk, not of what the system remembers of it.
std::string read_back(const fs::path& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd >= 0) {
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
  }
  return file_xxh3_128(path);
}

bool has(const fs::path& folder, const Wanted& file, bool verify) {
  std::error_code error;
  const auto bytes = fs::file_size(folder / file.name, error);
  if (error || bytes != static_cast<uintmax_t>(file.bytes)) return false;
  return !verify || read_back(folder / file.name) == file.xxh3_128;
}

[[noreturn]] void refuse_source(const fs::path& folder,
                                const std::string& name,
                                const std::string& text) {
  throw CacheError(fmt::format("{}: {}", show(folder / name), text), repair_hint(folder));
}

// The file's bytes, which are what the manifest says.
std::unique_ptr<MappedFile> open_source(const fs::path& folder, const Wanted& file) {
  std::unique_ptr<MappedFile> source;
  try {
    source = std::make_unique<MappedFile>(folder / file.name);
  } catch (const InputError& error) {
    refuse_unreadable(folder / file.name);
    throw CacheError(message_of(error), repair_hint(folder));
  }
  const auto bytes = source->bytes();
  if (bytes.size() != static_cast<size_t>(file.bytes)) {
    refuse_source(folder,
                  file.name,
                  fmt::format("has {} bytes, the manifest says {}", bytes.size(), file.bytes));
  }
  const std::string hash = xxh3_128_hex(bytes);
  if (hash != file.xxh3_128) {
    refuse_source(
        folder,
        file.name,
        fmt::format("is damaged: XXH3-128 {}, the manifest says {}", hash, file.xxh3_128));
  }
  return source;
}

void require_read_back(const fs::path& folder, const Wanted& file) {
  const std::string hash = read_back(folder / file.name);
  if (hash == file.xxh3_128) return;
  throw CacheError(fmt::format("{}: does not read back: XXH3-128 {}, written were {}",
                               show(folder / file.name),
                               hash,
                               file.xxh3_128),
                   "check the disk and its connection, then copy again");
}

// The manifest that is in `to`, if it can be read and is of the same kind.
std::optional<Manifest> manifest_there(const fs::path& to, Kind kind) {
  std::optional<Manifest> there;
  try {
    there = read_manifest_if_there(to);
  } catch (const SchemaError&) {
    throw;
  } catch (const CacheError&) {
    return std::nullopt;  // damaged: it is written anew
  }
  if (there && there->recipe.kind != kind) {
    throw CacheError(fmt::format("{}: holds a {} cache, the copy is a {} cache",
                                 show(to),
                                 kind_name(there->recipe.kind),
                                 kind_name(kind)),
                     "give each cache a folder of its own");
  }
  return there;
}

CopyReport copy(const fs::path& from,
                const fs::path& to,
                bool verify,
                const std::function<void(int64_t, int64_t)>& progress) {
  read_manifest(from);  // throws: no complete cache
  const std::string text = read_file(from / kManifestName);
  const Manifest manifest = parse_manifest(text, from / kManifestName);
  std::error_code error;
  if (fs::equivalent(from, to, error) && !error) {
    throw UsageError(fmt::format("{}: is the cache that is to be copied", show(to)),
                     "name another folder with --out");
  }
  refuse_foreign_files(to);
  make_folder(to);
  const WriterLock lock(to);
  manifest_there(to, manifest.recipe.kind);
  finish_publication(to);
  remove_temporary_files(to);
  const auto there = manifest_there(to, manifest.recipe.kind);

  CopyReport report;
  report.num_samples = manifest.num_samples;
  report.num_segments = std::ssize(manifest.segments);
  const Wanted index{kIndexName, manifest.index_bytes, manifest.index_xxh3_128};
  int64_t total = index.bytes, done = 0;
  for (const auto& entry : manifest.segments) total += entry.bytes;
  const auto advance = [&](int64_t bytes) {
    done += bytes;
    if (progress) progress(done, total);
  };
  for (const auto& entry : manifest.segments) {
    const Wanted file{entry.name, entry.bytes, entry.xxh3_128};
    if (has(to, file, verify)) {
      ++report.already;
    } else {
      const auto source = open_source(from, file);
      AtomicFile copy(to / file.name);
      copy.write(source->bytes());
      copy.commit();
      if (verify) require_read_back(to, file);
      ++report.copied;
      report.copied_bytes += file.bytes;
    }
    advance(file.bytes);
  }

  const std::string quarantined = quarantine_text(manifest.quarantined);
  if (write_quarantine(to, manifest.quarantined)) {
    report.copied_bytes += std::ssize(quarantined);
    report.changed = true;
  }
  const bool same_index = there && there->index_xxh3_128 == index.xxh3_128 &&
                          has(to, index, true);  // small, and the manifest vouches for it
  if (!same_index || read_file(to / kManifestName) != text) {
    const auto source = open_source(from, index);
    publish_files(to, text, same_index ? std::span<const std::byte>() : source->bytes(), [&] {
      if (verify) require_read_back(to, index);
    });
    report.copied_bytes += std::ssize(text) + (same_index ? 0 : index.bytes);
    report.changed = true;
  }
  if (verify && read_file(to / kManifestName) != text) {
    throw CacheError(fmt::format("{}: does not read back", show(to / kManifestName)),
                     "check the disk and its connection, then copy again");
  }
  advance(index.bytes);
  report.changed = report.changed || report.copied > 0;
  report.num_bytes = total + std::ssize(text) + std::ssize(quarantined);
  return report;
}

}  // namespace

CopyReport copy_cache(const fs::path& from,
                      const fs::path& to,
                      bool verify,
                      const std::function<void(int64_t, int64_t)>& progress) {
  CopyReport report;
  read_unchanged({from}, [&] { report = copy(from, to, verify, progress); });
  return report;
}

}  // namespace flux::cache

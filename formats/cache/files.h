// formats/cache/files.h - the files of a cache folder: their names, and what shows that one of them
// is ours.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "common/core/error.h"

namespace flux::cache {

/// The system does not let a file of a cache be read (permissions, its disk, too many open files):
/// that says nothing about what is in it, and is no damage.
struct UnreadableError : CacheError {
  using CacheError::CacheError;
};

inline constexpr char kManifestName[] = "manifest.json";
inline constexpr char kIndexName[] = "index.h5";
inline constexpr char kQuarantineName[] = "quarantine.jsonl";
inline constexpr char kWriterLockName[] = ".writer.lock";
/// What flux-cache-latents and -text keep of a run that has published no manifest yet.
inline constexpr char kLastRunName[] = "last-run.json";

/// What an interrupted AtomicFile or lock leaves of a file of a cache: ".NAME.tmp-<16 hex digits>",
/// of a file that is hidden itself also without the first point.
bool is_temporary_name(std::string_view name);
/// The names of FORMAT.md section 1, temporary ones too. Nothing else in a folder is of a cache.
bool is_file_of_cache(std::string_view name);

/// Throws CacheError unless `folder` is there and a folder.
void require_folder(const std::filesystem::path& folder);
/// Throws CacheError if manifest.json is there and not a cache's: not a file, or without a mark of
/// ours. A damaged one of ours passes.
void refuse_foreign_manifest(const std::filesystem::path& folder);
/// Throws CacheError naming the first file of `folder` that has one of our names and is something
/// else, and says that nothing was changed: for all that replaces or removes files, before it does.
/// Ours, however damaged, are: a manifest with the format's mark or a plan digest, or one that is no
/// JSON beside segments or journals of ours; segments and an index that a readable manifest names, or that
/// start as an HDF5 file with our mark; journals that start with their magic; a list of quarantined
/// items beside a readable manifest, or with such items; empty files and such that start with zeros,
/// as a power cut leaves them. Does nothing where there is no such folder.
void refuse_foreign_files(const std::filesystem::path& folder);

/// Whether something has this name, also where it cannot be asked. Never throws.
bool is_there(const std::filesystem::path& path);
/// Throws UnreadableError if something of this name is there and the system does not let it be
/// opened. `consequence` goes behind the reason.
void refuse_unreadable(const std::filesystem::path& path, std::string_view consequence = {});
/// Throws CacheError if the file is not there or cannot be asked.
int64_t bytes_of_file(const std::filesystem::path& path);

/// What an error says, without its hint, for one with another hint.
std::string message_of(const Error& error);
/// What to do about damage: the hint of errors about it.
std::string repair_hint(const std::filesystem::path& folder);
/// Runs `read`; what it throws about a file of `folder` gets the hint to repair it, unless it has a
/// hint.
template <class Read>
auto with_repair_hint(const std::filesystem::path& folder, const Read& read) {
  try {
    return read();
  } catch (const CacheError& error) {
    if (std::string_view(error.what()).find("\n  hint: ") != std::string_view::npos) throw;
    throw CacheError(error.what(), repair_hint(folder));
  }
}
/// Runs `read`, which reads caches without a lock. If it fails and one of the folders has another
/// manifest than before, because another tool has worked on it, the CacheError says so.
void read_unchanged(const std::vector<std::filesystem::path>& folders,
                    const std::function<void()>& read);

/// "1 sample", "3 samples".
std::string counted(int64_t count, std::string_view noun);

}  // namespace flux::cache

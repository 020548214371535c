#include "formats/cache/lock.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/core/process.h"
#include "common/core/text.h"
#include "formats/cache/files.h"
#include "formats/cache/schema.h"

namespace flux::cache {
namespace fs = std::filesystem;
namespace {

std::string first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string process_namespace() {
  std::error_code error;
  return fs::read_symlink("/proc/self/ns/pid", error).string();
}

std::string this_host() {
  char name[256] = {};
  gethostname(name, sizeof name - 1);
  return fmt::format("{} {}", printable(name), first_line("/etc/machine-id"));
}

/// The Slurm job that this is part of, and how often it was queued again; empty: none.
struct Job {
  std::string id;
  int64_t restarts = 0;
};

Job this_job() {
  const auto variable = [](const char* name) {
    const char* const value = std::getenv(name);
    return std::string(value ? value : "");
  };
  const std::string id = variable("SLURM_JOB_ID");
  if (id.empty()) return {};
  return {fmt::format("{} {}", printable(variable("SLURM_CLUSTER_NAME")), printable(id)),
          std::strtoll(variable("SLURM_RESTART_COUNT").c_str(), nullptr, 10)};
}

std::string this_process(const PinnedFolder& folder) {
  const auto started = process_stat(getpid());
  nlohmann::json owner = {{"host", this_host()},
                          {"boot", first_line("/proc/sys/kernel/random/boot_id")},
                          {"namespace", process_namespace()},
                          {"pid", getpid()},
                          {"started", started ? started->start_ticks : std::string()},
                          {"folder", folder.inode()},
                          {"id", random_name()}};
  if (const Job job = this_job(); !job.id.empty()) {
    owner["job"] = job.id;
    owner["restarts"] = job.restarts;
  }
  return owner.dump() + "\n";
}

// Nothing: there is no file of this name. Empty: one that tells nothing (a folder, no permission).
std::optional<std::string> content(const fs::path& path) {
  constexpr uint64_t kMaxBytes = 1 << 16;
  try {
    return read_file(path, kMaxBytes);
  } catch (const InputError&) {
    return is_there(path) ? std::optional(std::string()) : std::nullopt;
  }
}

// Whether the process that wrote this lock has certainly ended, or certainly works in another folder.
bool is_dead(const fs::path& folder, const std::string& text) {
  const auto owner = nlohmann::json::parse(text, nullptr, false);
  try {
    // Slurm starts a job again when it has ended, wherever that was
    if (const Job job = this_job(); !job.id.empty() &&
                                    owner.value("job", std::string()) == job.id &&
                                    owner.value("restarts", job.restarts) < job.restarts)
      return true;
    if (owner.at("host") != this_host()) return false;
    if (owner.at("boot") != first_line("/proc/sys/kernel/random/boot_id")) return true;
    if (owner.at("namespace") != process_namespace()) return false;
    const auto pid = owner.at("pid").get<int64_t>();
    if (pid < 1 || pid > INT32_MAX) return false;
    if (kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH) return true;
    const auto stat = process_stat(static_cast<pid_t>(pid));
    if (!stat) return false;
    // killed, and nobody has asked how it ended; or the number belongs to another process now
    if (stat->state == 'Z' || stat->state == 'X' || owner.at("started") != stat->start_ticks)
      return true;
    const std::string of = owner.value("folder", std::string());
    const std::string here = PinnedFolder(folder).inode();
    return !of.empty() && !here.empty() && of != here;
  } catch (const nlohmann::json::exception&) {
    return false;
  }
}

std::string describe(const std::string& text) {
  const auto owner = nlohmann::json::parse(text, nullptr, false);
  try {
    return fmt::format("process {} on {}",
                       owner.at("pid").get<int64_t>(),
                       printable(split(owner.at("host").get<std::string>(), ' ')[0]));
  } catch (const nlohmann::json::exception&) {
    return "unknown owner";
  }
}

// A lock's file cannot be made.
struct Failed : ResourceError {
  Failed(const fs::path& path, int error)
      : ResourceError(
            fmt::format(
                "{}: cannot be made: {}", show(path), std::generic_category().message(error)),
            write_failure_hint(error)),
        number(error) {}
  int number;
};

[[noreturn]] void fail(const fs::path& path, int number) { throw Failed(path, number); }

// The whole file appears under its name at once. False: the name is taken.
bool make_lock(const fs::path& path, const std::string& text) {
  const fs::path temporary =
      path.parent_path() / fmt::format("{}.tmp-{}", path.filename().native(), random_name());
  const auto write_new = [&](const fs::path& to) {
    const int fd = open(to.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0) return false;
    // flushed, so that a power cut does not leave a lock without an owner, which all must respect
    const bool whole = write_all(fd, as_bytes(text)) && flush_to_disk(fd);
    const int number = errno;
    close(fd);
    if (whole) return true;
    unlink(to.c_str());
    fail(path, number);
  };
  if (!write_new(temporary)) fail(path, errno);
  const int result = link(temporary.c_str(), path.c_str());
  int number = errno;
  unlink(temporary.c_str());
  if (result == 0) return true;
  if (number == EPERM || number == ENOTSUP ||
      number == ENOSYS) {  // a file system without hard links
    if (write_new(path)) return true;
    number = errno;
  }
  if (number != EEXIST && number != ENOENT)
    fail(path, number);  // ENOENT: tidied away by the owner, try again
  return false;
}

// Two processes may find the same dead owner, and the slower one must not remove the faster one's
// lock: one at a time looks again. They are on one host, so flock() on the folder is enough; a file
// system that does not know it leaves the race.
void remove_dead(const fs::path& folder, const fs::path& path, const std::string& owner) {
  const int fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) fail(folder, errno);
  while (flock(fd, LOCK_EX) != 0 && errno == EINTR) {
  }
  const bool failed = content(path) == owner && unlink(path.c_str()) != 0 && errno != ENOENT;
  const int number = errno;
  close(fd);
  if (failed) fail(path, number);
}

}  // namespace

PinnedFolder::PinnedFolder(const fs::path& folder)
    : fd_(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {}

PinnedFolder::~PinnedFolder() {
  if (fd_ >= 0) close(fd_);
}

std::string PinnedFolder::inode() const {
  struct stat status;
  return fd_ >= 0 && fstat(fd_, &status) == 0 ? fmt::to_string(status.st_ino) : std::string();
}

WriterLock::WriterLock(const fs::path& folder, Needed needed)
    : folder_(folder), path_(folder / kWriterLockName), owner_(this_process(folder_)) {
  for (int attempt = 0; attempt < 100; ++attempt) {
    try {
      if (held() && make_lock(path_, owner_)) return;
    } catch (const Failed& failed) {
      const bool read_only =
          failed.number == EROFS || failed.number == EACCES || failed.number == EPERM;
      if (needed == Needed::kAlways || !read_only) throw;
      refusal_ = failed;
    }
    const auto other = content(path_);
    if (!other && !held()) return;
    if (!other) continue;  // released meanwhile
    std::error_code error;
    if (const auto status = fs::symlink_status(path_, error);
        fs::exists(status) && !fs::is_regular_file(status)) {
      throw CacheError(
          fmt::format("{}: has the name of the writer's lock, but is not a file", show(path_)),
          "remove it, or move it away");
    }
    if (!is_dead(folder, *other)) {
      throw CacheError(
          fmt::format("{}: another writer is at work: {}", show(folder), describe(*other)),
          fmt::format("wait for it; if it is gone for certain, remove {}", show(path_)));
    }
    if (!held()) return;
    remove_dead(folder, path_, *other);
  }
  throw CacheError(
      fmt::format("{}: the writer lock changes hands all the time", show(folder)),
      fmt::format("let one tool at a time write there; if none does, remove {}", show(path_)));
}

void WriterLock::require_held() const {
  if (refusal_) throw ResourceError(*refusal_);
}

WriterLock::~WriterLock() {
  if (held() && content(path_) == owner_) unlink(path_.c_str());
}

ReaderLock::ReaderLock(const fs::path& folder) : folder_(folder) {
  try {
    path_ = folder / fmt::format(".reader-{}.lock", random_name());
    const std::string owner = this_process(folder_);
    // a writer that starts may tidy away the temporary file before it has its name
    for (int attempt = 0; attempt < 10 && owner_.empty(); ++attempt) {
      if (make_lock(path_, owner)) owner_ = owner;
    }
  } catch (const Error&) {
    // a folder on a read-only disk can be read all the same; nothing can be removed from it either
  }
}

ReaderLock::~ReaderLock() {
  if (held() && content(path_) == owner_) unlink(path_.c_str());
}

bool is_reader_lock_name(std::string_view name) {
  constexpr std::string_view kStart = ".reader-", kEnd = ".lock";
  return name.size() == kStart.size() + 16 + kEnd.size() && name.starts_with(kStart) &&
         name.ends_with(kEnd) && is_hex(name.substr(kStart.size(), 16), 16);
}

std::vector<fs::path> require_no_readers(const fs::path& folder) {
  std::vector<fs::path> dead;
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error)) {
    const fs::path& path = entry->path();
    if (!is_reader_lock_name(path.filename().native())) continue;
    const auto owner = content(path);
    if (!owner && !is_there(path)) continue;  // released meanwhile
    if (!owner || !is_dead(folder, *owner)) {
      throw CacheError(
          fmt::format(
              "{}: a reader is at work: {}", show(folder), describe(owner.value_or(std::string()))),
          fmt::format("wait for it; if it is gone for certain, remove {}", show(path)));
    }
    dead.push_back(path);
  }
  if (error)
    throw ResourceError(fmt::format("{}: cannot be listed: {}", show(folder), error.message()),
                        write_failure_hint(error.value()));
  std::sort(dead.begin(), dead.end());
  return dead;
}

}  // namespace flux::cache

#include "common/core/file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

#include "common/core/error.h"
#include "common/core/lost_file.h"
#include "common/core/text.h"

namespace flux {
namespace fs = std::filesystem;
namespace {

std::string errno_text(int number) { return std::generic_category().message(number); }

int64_t nanoseconds(const struct timespec& time) {
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

FileStamp stamp_of(const fs::path& path, const struct stat& info) {
  return {path,
          info.st_dev,
          info.st_ino,
          static_cast<uint64_t>(info.st_size),
          nanoseconds(info.st_mtim),
          nanoseconds(info.st_ctim)};
}

// An open descriptor of a regular file, its size and its stamp.
struct Input {
  int fd = -1;
  uint64_t size = 0;
  FileStamp stamp;

  explicit Input(const fs::path& path) {
    // O_NONBLOCK: a FIFO under the name would block for ever in open()
    fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
      const int number = errno;
      throw InputError(fmt::format("{}: cannot be read: {}", show(path), errno_text(number)),
                       number == ENOENT ? "check the path" : "check its permissions and its disk");
    }
    struct stat info {};
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
      close(fd);
      throw InputError(fmt::format("{}: is {}, not a file",
                                   show(path),
                                   S_ISDIR(info.st_mode) ? "a folder" : "a device, pipe or socket"),
                       "name a file");
    }
    stamp = stamp_of(path, info);
    size = stamp.size_bytes;
  }
  ~Input() { close(fd); }
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;

  size_t read_some(const fs::path& path, std::span<std::byte> into) const {
    for (;;) {
      const ssize_t got = read(fd, into.data(), into.size());
      if (got >= 0) return static_cast<size_t>(got);
      if (errno != EINTR)
        throw InputError(fmt::format("{}: reading failed: {}", show(path), errno_text(errno)));
    }
  }
};

// rename() that fails with EEXIST instead of replacing.
bool rename_new(const fs::path& from, const fs::path& to) {
  if (renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return true;
  if (errno != EINVAL && errno != ENOSYS && errno != ENOTSUP) return false;
  // NFS and some others have no RENAME_NOREPLACE; link() does not replace either
  return link(from.c_str(), to.c_str()) == 0 && unlink(from.c_str()) == 0;
}

// What a signal handler can read of the mapped files; those beyond the table go unnamed.
struct Mapping {
  std::atomic<const std::byte*> data{nullptr};  // set last
  size_t size = 0;
  char path[1024] = {};
};
Mapping g_mappings[64];
std::mutex g_mappings_mutex;
char g_program[64] = "";

void remember_mapping(const std::byte* data, size_t size, const std::string& path) {
  const std::lock_guard lock(g_mappings_mutex);
  for (Mapping& mapping : g_mappings) {
    if (mapping.data.load()) continue;
    mapping.size = size;
    std::snprintf(mapping.path, sizeof mapping.path, "%s", path.c_str());
    mapping.data.store(data);
    return;
  }
}

void forget_mapping(const std::byte* data) {
  const std::lock_guard lock(g_mappings_mutex);
  for (Mapping& mapping : g_mappings) {
    if (mapping.data.load() == data) mapping.data.store(nullptr);
  }
}

extern "C" void on_bus_error(int, siginfo_t* info, void*) {
  const auto* address = static_cast<const std::byte*>(info->si_addr);
  const char* path = nullptr;
  for (const Mapping& mapping : g_mappings) {
    const std::byte* data = mapping.data.load();
    if (data && address >= data && address < data + mapping.size) path = mapping.path;
  }
  if (!path) return;  // not a file of ours: it happens again, and ends the process
  for (const char* part : {static_cast<const char*>(g_program),
                           ": error: ",
                           path,
                           ": reading failed: its disk reports an error, or the file was cut off\n"
                           "  hint: check the file and run again\n"}) {
    (void)!::write(STDERR_FILENO, part, std::strlen(part));
  }
  _exit(static_cast<int>(ExitCode::kResource));
}

fs::path folder_of(const fs::path& path) {
  return path.has_parent_path() ? path.parent_path() : fs::path(".");
}

}  // namespace

std::string read_file(const fs::path& path, uint64_t max_bytes) {
  const Input input(path);
  if (input.size > max_bytes) {
    throw InputError(
        fmt::format("{}: {} bytes, at most {} are read", show(path), input.size, max_bytes));
  }
  std::string out(input.size, '\0');
  size_t done = 0;
  while (done < out.size()) {
    const size_t got = input.read_some(path, std::as_writable_bytes(std::span(out).subspan(done)));
    if (got == 0) break;  // shortened meanwhile
    done += got;
  }
  out.resize(done);
  return out;
}

void read_chunks(const fs::path& path,
                 const std::function<void(std::span<const std::byte>)>& take) {
  const Input input(path);
  std::vector<std::byte> buffer(size_t{1} << 20);
  while (const size_t got = input.read_some(path, buffer)) take(std::span(buffer).first(got));
}

FileStamp file_stamp(const fs::path& path) {
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) {
    throw InputError(fmt::format("{}: cannot be read: {}", show(path), errno_text(errno)),
                     "check the path");
  }
  return stamp_of(path, info);
}

MappedFile::MappedFile(const fs::path& path) {
  const Input input(path);
  stamp_ = input.stamp;
  size_ = input.size;
  if (size_ == 0) return;  // mmap refuses length 0
  void* mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, input.fd, 0);
  if (mapped == MAP_FAILED) {
    throw InputError(fmt::format("{}: cannot be mapped: {}", show(path), errno_text(errno)));
  }
  data_ = static_cast<const std::byte*>(mapped);
  remember_mapping(data_, size_, show(path));
}

MappedFile::~MappedFile() {
  if (!data_) return;
  forget_mapping(data_);
  munmap(const_cast<std::byte*>(data_), size_);
}

void report_lost_mappings(std::string_view program) {
  std::snprintf(
      g_program, sizeof g_program, "%.*s", static_cast<int>(program.size()), program.data());
  struct sigaction action {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_RESETHAND;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, nullptr);
}

/// Pieces of at least this are sent on to the disk at once.
constexpr ssize_t kEarlyBytes = ssize_t{1} << 20;

AtomicFile::AtomicFile(fs::path path) : path_(std::move(path)) {
  temporary_ =
      folder_of(path_) / fmt::format(".{}.tmp-{}", path_.filename().native(), random_name());
  if (temporary_.filename().native().size() > 255)
    temporary_ = folder_of(path_) / (".tmp-" + random_name());
  fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0) fail("cannot be created");
}

AtomicFile::AtomicFile(fs::path path, fs::path temporary)
    : path_(std::move(path)), temporary_(std::move(temporary)), keep_(true) {
  fd_ = open(temporary_.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd_ < 0) fail("cannot be opened for writing");
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  close(fd_);
  if (!keep_) unlink(temporary_.c_str());
}

void AtomicFile::fail(const char* what) const {
  const int number = errno;
  throw ResourceError(fmt::format("{}: {}: {}", show(path_), what, errno_text(number)),
                      write_failure_hint(number));
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  if (!write_all(fd_, bytes)) fail("writing failed");
  size_ += bytes.size();
}

void AtomicFile::write(std::string_view text) { write(std::as_bytes(std::span(text))); }

void AtomicFile::write_at(uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t put = pwrite(fd_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (put < 0) {
      if (errno == EINTR) continue;
      fail("writing failed");
    }
    // the disk begins while the next bytes are made; a failure is the flush's to report
    if (put >= kEarlyBytes)
      sync_file_range(fd_, static_cast<off_t>(offset), put, SYNC_FILE_RANGE_WRITE);
    bytes = bytes.subspan(static_cast<size_t>(put));
    offset += static_cast<uint64_t>(put);
  }
  size_ = std::max(size_, offset);
}

void AtomicFile::commit() { publish(true); }
void AtomicFile::commit_new() { publish(false); }

void AtomicFile::flush() {
  if (!flush_to_disk(fd_)) fail("flushing to the disk failed");
}

fs::path AtomicFile::share(uint64_t size_bytes) {
  if (ftruncate(fd_, static_cast<off_t>(size_bytes)) != 0) fail("cannot be made longer");
  size_ = size_bytes;
  flush();
  return temporary_;
}

void AtomicFile::leave() {
  flush();
  const bool closed = close(std::exchange(fd_, -1)) == 0 || errno == EINTR;
  if (!closed) fail("closing failed");
}

void AtomicFile::publish(bool replace) {
  if (!flush_to_disk(fd_)) fail("flushing to the disk failed");
  const int fd = std::exchange(fd_, -1);
  const bool closed = close(fd) == 0 || errno == EINTR;  // interrupted, but closed and flushed
  if (!closed ||
      !(replace ? rename(temporary_.c_str(), path_.c_str()) == 0 : rename_new(temporary_, path_))) {
    const int number = errno;
    if (!keep_) unlink(temporary_.c_str());
    errno = number;
    fail(closed ? "cannot be renamed into place" : "closing failed");
  }
  sync_folder(folder_of(path_));
}

void write_file_atomic(const fs::path& path, std::string_view bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

bool write_file_if_changed(const fs::path& path, std::string_view bytes) {
  std::error_code error;
  if (fs::is_regular_file(path, error) && fs::file_size(path, error) == bytes.size() &&
      read_file(path) == bytes) {
    return false;
  }
  write_file_atomic(path, bytes);
  return true;
}

bool write_all(int fd, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t put = write(fd, bytes.data(), bytes.size());
    if (put < 0) {
      if (errno == EINTR) continue;
      return false;
    }
    bytes = bytes.subspan(static_cast<size_t>(put));
  }
  return true;
}

bool flush_to_disk(int fd) {
  while (fsync(fd) != 0) {
    if (errno != EINTR) return false;
  }
  return true;
}

void make_folder(const fs::path& path) {
  std::error_code error;
  std::vector<fs::path> parents;  // of folders that are made: a power cut must not take them back
  for (fs::path made = fs::absolute(path, error).lexically_normal();
       made.has_relative_path() && !fs::exists(made, error);
       made = made.parent_path()) {
    parents.push_back(made.parent_path());
  }
  fs::create_directories(path, error);
  if (error || !fs::is_directory(path)) {
    throw ResourceError(fmt::format("{}: folder cannot be made: {}",
                                    show(path),
                                    error ? error.message() : "something else has this name"),
                        "choose another --out, or make it writable");
  }
  for (const auto& parent : parents) {
    if (access(parent.c_str(), R_OK) == 0) sync_folder(parent);
  }
}

void sync_folder(const fs::path& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) {
    const int number = errno;
    throw ResourceError(fmt::format("{}: cannot be opened: {}", show(path), errno_text(number)),
                        write_failure_hint(number));
  }
  const bool flushed = flush_to_disk(fd);
  const int number = errno;
  close(fd);
  // some file systems do not know fsync on folders; they have no separate flush to ask for
  if (!flushed && number != EINVAL) {
    throw ResourceError(
        fmt::format("{}: flushing to the disk failed: {}", show(path), errno_text(number)),
        write_failure_hint(number));
  }
}

std::string write_failure_hint(int number) {
  switch (number) {
    case ENOSPC:
    case EDQUOT:
      return "free some disk space and run again";
    case EFBIG:
      return "raise the limit on the size of files (ulimit -f) and run again";
    case EIO:
      return "look at the disk: it reports an error of its own";
    case EROFS:
      return "choose a folder on a disk that is mounted for writing";
    default:
      return "check that the folder exists and is writable";
  }
}

std::optional<fs::path> user_cache_folder() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  if (cache && *cache == '/') return fs::path(cache) / "flux-stages";
  const char* home = std::getenv("HOME");
  if (home && *home == '/') return fs::path(home) / ".cache" / "flux-stages";
  return std::nullopt;
}

std::string random_name() {
  uint64_t value = 0;
  while (getrandom(&value, sizeof value, 0) != static_cast<ssize_t>(sizeof value)) {
  }
  return fmt::format("{:016x}", value);
}

namespace {

uint64_t status_bytes(std::string_view field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(field)) return std::stoull(line.substr(field.size())) * 1024;
  }
  return 0;
}

}  // namespace

uint64_t peak_rss_bytes() { return status_bytes("VmHWM:"); }
uint64_t rss_bytes() { return status_bytes("VmRSS:"); }

}  // namespace flux

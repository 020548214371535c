// LD_PRELOAD library: records what a program does to the files of one folder, and makes one of these
// operations fail or be the last one. For the programs of this folder.
//
//   TORTURE_FOLDER   absolute path; operations on it and on what is below it are seen
//   TORTURE_LOG      file to which each operation is appended (format: torture.py, read_log)
//   TORTURE_OPS      letters of the operations that are counted; all if not set
//   TORTURE_AT       number of the counted operation that something is done to, from 1
//   TORTURE_DO       kill_before, kill_after, kill_half (half of a write), short (half of a write,
//                    without an error), or an errno as a number
//   TORTURE_ON       set: an errno is returned from that operation on, not once
//   TORTURE_PAUSE_US, TORTURE_PAUSE_EVERY  microseconds that the program waits after each n-th write
//                    to a journal
//
// Letters: C file made, W write or pwrite, L ftruncate, S fsync or fdatasync, R rename, H link, U
// unlink, M mkdir, X close of a file that was opened for writing. In the log a small letter is an
// operation that failed by itself.
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

namespace {

struct File {
  std::string path;  // empty: not ours
  bool writing = false, append = false;
  off_t position = 0;
};

struct State {
  std::recursive_mutex mutex;
  std::string folder, ops, action;
  int log = -1;
  int64_t at = 0, count = 0, pause_us = 0, pause_every = 1, journal_writes = 0;
  bool on = false;
  File files[4096];
};

template <class F>
F* real(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

const char* text_of(const char* name) {
  const char* value = getenv(name);
  return value ? value : "";
}

State& state() {
  static State& s = *[] {
    auto* made = new State;  // never destroyed: other destructors write too
    made->folder = text_of("TORTURE_FOLDER");
    made->ops = text_of("TORTURE_OPS");
    made->action = text_of("TORTURE_DO");
    made->at = atoll(text_of("TORTURE_AT"));
    made->pause_us = atoll(text_of("TORTURE_PAUSE_US"));
    made->pause_every = std::max<int64_t>(1, atoll(text_of("TORTURE_PAUSE_EVERY")));
    made->on = *text_of("TORTURE_ON") != 0;
    if (*text_of("TORTURE_LOG")) {
      made->log = real<int(const char*, int, ...)>("open")(
          text_of("TORTURE_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    }
    return made;
  }();
  return s;
}

using Lock = std::lock_guard<std::recursive_mutex>;

bool ours(const char* path) {
  const auto& folder = state().folder;
  return !folder.empty() && path && strncmp(path, folder.c_str(), folder.size()) == 0 &&
         (path[folder.size()] == '\0' || path[folder.size()] == '/');
}

File* file_of(int fd) {
  State& s = state();
  if (fd < 0 || fd >= 4096 || s.files[fd].path.empty()) return nullptr;
  return &s.files[fd];
}

int64_t now() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

// Fixed head: letter, lengths of both paths (u32), start, end, offset, length, bytes of data (i64).
void record(char letter,
            int64_t start,
            const std::string& a,
            const char* b = "",
            int64_t offset = 0,
            int64_t length = 0,
            const void* data = nullptr) {
  State& s = state();
  if (s.log < 0) return;
  std::string out(1, letter);
  const auto number = [&](auto value) {
    out.append(reinterpret_cast<const char*>(&value), sizeof value);
  };
  number(static_cast<uint32_t>(a.size()));
  number(static_cast<uint32_t>(strlen(b)));
  for (const int64_t value : {start, now(), offset, length, data ? length : int64_t{0}})
    number(value);
  out += a + b;
  if (data) out.append(static_cast<const char*>(data), static_cast<size_t>(length));
  static auto* const write = real<ssize_t(int, const void*, size_t)>("write");
  if (write(s.log, out.data(), out.size()) != static_cast<ssize_t>(out.size())) _exit(97);
}

char small(char letter) { return static_cast<char>(letter - 'A' + 'a'); }

enum class Fate { kGoOn, kFail, kHalf };

[[noreturn]] void die() {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// Counts the operation; errno is set where it is to fail. `half`: the operation is a write.
Fate fate_of(char letter, bool half = false) {
  State& s = state();
  if (s.at == 0 || (!s.ops.empty() && s.ops.find(letter) == std::string::npos)) return Fate::kGoOn;
  ++s.count;
  if (s.count < s.at || (s.count > s.at && !s.on)) return Fate::kGoOn;
  if (s.action == "kill_before") die();
  if (s.action == "kill_half" && !half) die();
  if (s.action == "kill_half" || s.action == "short") return half ? Fate::kHalf : Fate::kGoOn;
  if (s.action == "kill_after") return Fate::kGoOn;
  errno = atoi(s.action.c_str());
  return Fate::kFail;
}

void done(char letter) {
  State& s = state();
  if (s.action != "kill_after" || s.count != s.at) return;
  if (s.ops.empty() || s.ops.find(letter) != std::string::npos) die();
}

int opened(const char* name, const char* path, int flags, mode_t mode) {
  auto* const next = real<int(const char*, int, ...)>(name);
  if (!ours(path)) return next(path, flags, mode);
  const Lock lock(state().mutex);
  const int64_t start = now();
  const bool makes = (flags & O_CREAT) != 0;
  if (makes && fate_of('C') == Fate::kFail) return -1;
  const int fd = next(path, flags, mode);
  if (fd >= 0 && fd < 4096) {
    state().files[fd] = {path, (flags & O_ACCMODE) != O_RDONLY, (flags & O_APPEND) != 0, 0};
    if (makes) record('C', start, path);
    if (flags & O_TRUNC) record('L', start, path);
  } else if (makes) {
    record('c', start, path);
  }
  if (makes) done('C');
  return fd;
}

ssize_t written(int fd, const void* data, size_t size, off_t offset, bool at_offset) {
  static auto* const write = real<ssize_t(int, const void*, size_t)>("write");
  static auto* const pwrite = real<ssize_t(int, const void*, size_t, off_t)>("pwrite");
  const auto put = [&](size_t bytes) {
    return at_offset ? pwrite(fd, data, bytes, offset) : write(fd, data, bytes);
  };
  if (state().folder.empty()) return put(size);
  std::unique_lock<std::recursive_mutex> lock(state().mutex);
  File* const file = file_of(fd);
  if (!file) {
    lock.unlock();
    return put(size);
  }
  const int64_t start = now();
  const Fate fate = fate_of('W', true);
  if (fate == Fate::kFail) return -1;
  if (fate == Fate::kHalf) size = (size + 1) / 2;
  if (!at_offset && file->append) file->position = lseek(fd, 0, SEEK_END);
  const ssize_t result = put(size);
  if (result > 0) {
    record('W', start, file->path, "", at_offset ? offset : file->position, result, data);
    if (!at_offset) file->position += result;
  } else {
    record('w', start, file->path);
  }
  if (fate == Fate::kHalf && state().action == "kill_half") die();
  done('W');
  State& s = state();
  const bool waits = s.pause_us > 0 && file->path.find("/.journal-") != std::string::npos &&
                     ++s.journal_writes % s.pause_every == 0;
  lock.unlock();
  if (waits) usleep(static_cast<useconds_t>(s.pause_us));
  return result;
}

template <class Call>
int on_descriptor(char letter, int fd, int64_t length, Call call) {
  if (state().folder.empty()) return call();
  std::unique_lock<std::recursive_mutex> lock(state().mutex);
  const File* const file = file_of(fd);
  if (!file) {
    lock.unlock();
    return call();
  }
  const int64_t start = now();
  if (fate_of(letter) == Fate::kFail) return -1;
  const int result = call();
  record(result == 0 ? letter : small(letter), start, file->path, "", 0, length);
  done(letter);
  return result;
}

template <class Call>
int on_path(char letter, const char* a, const char* b, Call call) {
  if (!ours(a) && !ours(b)) return call();
  const Lock lock(state().mutex);
  const int64_t start = now();
  if (fate_of(letter) == Fate::kFail) return -1;
  const int result = call();
  record(result == 0 ? letter : small(letter), start, a, b);
  done(letter);
  return result;
}

}  // namespace

#define TORTURE_OPEN(name)                                            \
  extern "C" int name(const char* path, int flags, ...) {             \
    va_list more;                                                     \
    va_start(more, flags);                                            \
    const mode_t mode = (flags & O_CREAT) ? va_arg(more, mode_t) : 0; \
    va_end(more);                                                     \
    return opened(#name, path, flags, mode);                          \
  }
TORTURE_OPEN(open)
TORTURE_OPEN(open64)

extern "C" ssize_t write(int fd, const void* data, size_t size) {
  return written(fd, data, size, 0, false);
}
extern "C" ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  return written(fd, data, size, offset, true);
}
extern "C" ssize_t pwrite64(int fd, const void* data, size_t size, off_t offset) {
  return written(fd, data, size, offset, true);
}
extern "C" int ftruncate(int fd, off_t length) noexcept {
  return on_descriptor(
      'L', fd, length, [&] { return real<int(int, off_t)>("ftruncate")(fd, length); });
}
extern "C" int ftruncate64(int fd, off_t length) noexcept { return ftruncate(fd, length); }
extern "C" int fsync(int fd) {
  return on_descriptor('S', fd, 0, [&] { return real<int(int)>("fsync")(fd); });
}
extern "C" int fdatasync(int fd) {
  return on_descriptor('S', fd, 0, [&] { return real<int(int)>("fdatasync")(fd); });
}
extern "C" int close(int fd) {
  static auto* const next = real<int(int)>("close");
  if (state().folder.empty()) return next(fd);
  const Lock lock(state().mutex);
  File* const file = file_of(fd);
  if (!file) return next(fd);
  const File copy = *file;
  const int64_t start = now();
  const bool fails = copy.writing && fate_of('X') == Fate::kFail;
  const int number = errno;
  *file = File();
  const int result = next(fd);  // the descriptor is gone in any case, as with the real one
  if (copy.writing) {
    record('X', start, copy.path);
    done('X');
  }
  if (!fails) return result;
  errno = number;
  return -1;
}
extern "C" int rename(const char* from, const char* to) noexcept {
  return on_path(
      'R', from, to, [&] { return real<int(const char*, const char*)>("rename")(from, to); });
}
extern "C" int renameat2(
    int from_fd, const char* from, int to_fd, const char* to, unsigned flags) noexcept {
  return on_path('R', from, to, [&] {
    return real<int(int, const char*, int, const char*, unsigned)>("renameat2")(
        from_fd, from, to_fd, to, flags);
  });
}
extern "C" int link(const char* from, const char* to) noexcept {
  return on_path(
      'H', from, to, [&] { return real<int(const char*, const char*)>("link")(from, to); });
}
extern "C" int unlink(const char* path) noexcept {
  return on_path('U', path, "", [&] { return real<int(const char*)>("unlink")(path); });
}
extern "C" int remove(const char* path) noexcept {
  return on_path('U', path, "", [&] { return real<int(const char*)>("remove")(path); });
}
extern "C" int mkdir(const char* path, mode_t mode) noexcept {
  return on_path(
      'M', path, "", [&] { return real<int(const char*, mode_t)>("mkdir")(path, mode); });
}

// Kinds hostile-*: files that must be refused, and files that must not be.
#include <fmt/format.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <functional>
#include <new>
#include <string>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/sanitizer.h"
#include "common/core/text.h"
#include "common/dataset/caption.h"
#include "common/image/image.h"
#include "formats/cache/segment_reader.h"
#include "formats/safetensors/reader.h"
#include "pipelines/check/case.h"
#include "pipelines/check/lines.h"

namespace flux::check {
namespace fs = std::filesystem;
using Json = nlohmann::json;
namespace {

/// What became of one file.
struct Outcome {
  std::string refusal;     // why it was refused; empty: accepted
  std::string wrong = {};  // read or refused, but not in the way that is recorded
};

/// Takes the file's name off the reason.
Outcome refused(const fs::path& file, const std::string& what) {
  const std::string reason = what.substr(0, what.find('\n')), name = show(file) + ": ";
  return {reason.starts_with(name) ? reason.substr(name.size()) : reason};
}

/// Judges each file of the case that the index lists under `list`.
void judge(const Case& c,
           const char* list,
           const std::function<Outcome(const fs::path& file, const Json& entry)>& read) {
  const fs::path path = c.required("index", "index.json");
  const auto index = read_object(path);
  if (!index.contains(list) || !index[list].is_array())
    throw InputError(fmt::format("{}: no list '{}'", show(path), list));
  for (const auto& entry : index[list]) {
    const fs::path file = path.parent_path() / entry.at("file").get<std::string>();
    const std::string expect = entry.at("expect"), name = file.filename().native();
    std::error_code error;
    if (!c.has(name) || !fs::equivalent(file, c.folder / name, error))
      continue;  // a case may hold a part of the files
    const auto outcome = read(file, entry);
    const bool is_refused = !outcome.refusal.empty();
    const bool known = expect == "policy" || expect == "refuse" || expect == "accept";
    const bool ok = known && outcome.wrong.empty() &&
                    (expect == "policy" || is_refused == (expect == "refuse"));
    c.report->verdict(name,
                      ok,
                      fmt::format("{}, {}",
                                  expect,
                                  !outcome.wrong.empty() ? outcome.wrong
                                  : is_refused           ? outcome.refusal
                                                         : "accepted"));
  }
}

// ---- reading in a child that may crash, hang and eat memory

constexpr rlim_t kMaxSeconds = 10;
constexpr rlim_t kMaxBytes = 64 << 20;

/// Bytes of addresses this process has.
rlim_t address_space() {
  std::ifstream stream("/proc/self/statm");
  rlim_t pages = 0;
  stream >> pages;
  return pages * static_cast<rlim_t>(sysconf(_SC_PAGESIZE));
}

void set_limits() {
  const rlimit no_core{0, 0}, time{kMaxSeconds, kMaxSeconds},
      memory{address_space() + kMaxBytes, address_space() + kMaxBytes};
  setrlimit(RLIMIT_CORE, &no_core);
  setrlimit(RLIMIT_CPU, &time);
#if !FLUX_ADDRESS_SANITIZER  // it keeps what was freed
  setrlimit(RLIMIT_AS, &memory);
#else
  (void)memory;
#endif
  alarm(12 * kMaxSeconds);  // one that waits; a slow machine is no hang
}

/// Runs `read` in a child with limits of time and memory.
Outcome in_child(const std::function<Outcome()>& read) {
  int ends[2];
  if (pipe(ends) != 0) throw ResourceError("no pipe to read a file in a process of its own");
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child < 0) {
    close(ends[0]), close(ends[1]);
    throw ResourceError("no process to read a file in");
  }
  if (child == 0) {
    close(ends[0]);
    std::signal(SIGALRM, SIG_DFL);
    set_limits();
    std::string text;
    try {
      const auto outcome = read();
      text = outcome.wrong.empty() ? "r" + outcome.refusal : "w" + outcome.wrong;
    } catch (const std::bad_alloc&) {
      text = "wneeds more than 64 MiB";
    } catch (const std::exception& error) {
      text = std::string("w") + error.what();
    }
    for (size_t at = 0; at < text.size();) {
      const ssize_t count = write(ends[1], text.data() + at, text.size() - at);
      if (count <= 0) _exit(1);
      at += static_cast<size_t>(count);
    }
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t count; (count = ::read(ends[0], buffer, sizeof buffer)) != 0;) {
    if (count > 0) text.append(buffer, static_cast<size_t>(count));
    if (count < 0 && errno != EINTR) break;
  }
  close(ends[0]);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFSIGNALED(status)) {
    const int signal = WTERMSIG(status);
    const bool hangs = signal == SIGALRM || signal == SIGXCPU || signal == SIGKILL;
    return {{}, hangs ? "does not end" : fmt::format("ends the program with signal {}", signal)};
  }
  if (text.empty()) return {{}, fmt::format("ends the program with {}", WEXITSTATUS(status))};
  return text[0] == 'r' ? Outcome{text.substr(1)} : Outcome{{}, text.substr(1)};
}

}  // namespace

void check_hostile_safetensors(const Case& c) {
  judge(c, "safetensors", [](const fs::path& file, const Json& entry) -> Outcome {
    try {
      const auto read = safetensors::File::open(file);
      const auto count = read->tensors().size();
      if (entry.contains("tensors") && entry["tensors"] != count)
        return {{}, fmt::format("{} tensors, golden {}", count, entry["tensors"].dump())};
      return {};
    } catch (const InputError& error) {
      return refused(file, error.what());
    }
  });
}

void check_hostile_images(const Case& c) {
  judge(c, "images", [](const fs::path& file, const Json& entry) -> Outcome {
    try {
      const auto size = image::decode(as_bytes(read_file(file)), {Profile::kKohya}).size;
      (void)image::decode(as_bytes(read_file(file)));
      const Json got{size.width, size.height};
      if (entry.contains("size") && entry["size"] != got)
        return {{}, fmt::format("size {}, golden {}", got.dump(), entry["size"].dump())};
      return {};
    } catch (const InputError& error) {
      return refused(file, error.what());
    }
  });
}

void check_hostile_captions(const Case& c) {
  judge(c, "captions", [](const fs::path& file, const Json& entry) -> Outcome {
    try {
      const auto text = dataset::read_caption_file(file, false, Profile::kDefault);
      if (entry.contains("text") && entry["text"] != text)
        return {{}, fmt::format("'{}', golden {}", text.substr(0, 100), entry["text"].dump())};
      return {};
    } catch (const InputError& error) {
      return refused(file, error.what());
    }
  });
}

void check_hostile_hdf5(const Case& c) {
  judge(c, "hdf5", [](const fs::path& file, const Json&) {
    return in_child([&]() -> Outcome {
      try {
        const cache::Segment segment(file);
        for (int64_t i = 0; i < segment.num_samples(); ++i) segment.read(i);
        return {};
      } catch (const CacheError& error) {
        return refused(file, error.what());
      }
    });
  });
}

}  // namespace flux::check

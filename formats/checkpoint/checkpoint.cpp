#include "formats/checkpoint/checkpoint.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <charconv>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/core/log.h"
#include "common/core/text.h"

namespace flux::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr char kStateName[] = "state.json";
constexpr uint64_t kMaxStateBytes = 64 << 20;

/// A checkpoint that is not whole, or not what was written.
struct Damage : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void fail(const char* what, const fs::path& path, const std::error_code& error) {
  throw ResourceError(fmt::format("{}: {}: {}", show(path), what, error.message()),
                      write_failure_hint(error.value()));
}

std::optional<int64_t> step_of(const std::string& name) {
  constexpr std::string_view kPrefix = "step-";
  if (!name.starts_with(kPrefix)) return std::nullopt;
  int64_t step = 0;
  const char* const end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(name.data() + kPrefix.size(), end, step);
  if (error != std::errc{} || stop != end || step < 0 || step_name(step) != name)
    return std::nullopt;
  return step;
}

// ".NAME.tmp-<16 hex digits>", as AtomicFile calls what is not whole yet.
bool is_temporary(const std::string& name) {
  const size_t end = name.rfind(".tmp-");
  return name.starts_with('.') && end != std::string::npos && end > 0 && name.size() == end + 21 &&
         name.find_first_not_of("0123456789abcdef", end + 5) == std::string::npos;
}

std::vector<fs::path> entries(const fs::path& folder) {
  std::vector<fs::path> out;
  std::error_code error;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error))
    out.push_back(at->path());
  if (error == std::errc::not_a_directory)
    throw ResourceError(fmt::format("{}: is or lies in a file, not a folder", show(folder)),
                        "give a folder for the run, which may be new");
  if (error && error != std::errc::no_such_file_or_directory)
    fail("cannot be listed", folder, error);
  return out;
}

std::vector<safetensors::TensorSpec> specs(std::span<const Tensor> tensors) {
  std::vector<safetensors::TensorSpec> out;
  for (const Tensor& tensor : tensors) out.push_back(tensor.spec);
  return out;
}

// Of the state without its member `checksum`.
std::string checksum(nlohmann::json state) {
  state.erase("checksum");
  return xxh3_128_hex(as_bytes(state.dump()));
}

struct FileSum {
  uint64_t bytes = 0;
  std::string xxh3_128;
};

/// In pieces: a mapped model would count as memory of this process.
FileSum sum_of(const fs::path& path) {
  FileSum sum;
  const std::unique_ptr<XXH3_state_t, void (*)(XXH3_state_t*)> state(
      XXH3_createState(), [](XXH3_state_t* s) { XXH3_freeState(s); });
  XXH3_128bits_reset(state.get());
  read_chunks(path, [&](std::span<const std::byte> bytes) {
    XXH3_128bits_update(state.get(), bytes.data(), bytes.size());
    sum.bytes += bytes.size();
  });
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state.get()));
  sum.xxh3_128 = to_hex(std::as_bytes(std::span(canonical.digest)));
  return sum;
}

/// What is wrong, without the hint: it is not the user's file.
std::string reason_of(const InputError& error) { return split(error.what(), '\n').front(); }

void check_files(const Checkpoint& checkpoint) {
  const auto files = checkpoint.state.value("files", nlohmann::json::object());
  for (const auto& [name, expected] : files.items()) {
    const fs::path path = checkpoint.folder / name;
    const auto require = [&](const char* what, const nlohmann::json& found) {
      const nlohmann::json wanted = expected.value(what, nlohmann::json());
      if (found != wanted)
        throw Damage(fmt::format("{}: damaged: {} {}, state.json says {}",
                                 show(path),
                                 what,
                                 found.dump(),
                                 wanted.dump()));
    };
    try {
      const FileSum sum = sum_of(path);
      require("bytes", sum.bytes);
      require("xxh3_128", sum.xxh3_128);
    } catch (const InputError& error) {
      throw Damage(reason_of(error));
    }
  }
}

/// Without its files. Throws Damage, and CacheError for another schema.
Checkpoint read_state(const fs::path& run, int64_t step) {
  Checkpoint found{run / step_name(step), step, nullptr};
  const fs::path file = found.folder / kStateName;
  const auto damaged = [&](const std::string& what) {
    throw Damage(fmt::format("{}: {}", show(file), what));
  };
  try {
    found.state = nlohmann::json::parse(read_file(file, kMaxStateBytes));
  } catch (const InputError& error) {
    throw Damage(reason_of(error));
  } catch (const nlohmann::json::exception&) {
    damaged("is not JSON");
  }
  if (!found.state.is_object() || found.state.value("format", nlohmann::json()) != kFormat)
    damaged("is not a state of flux-train");
  const auto version = found.state.value("schema_version", nlohmann::json());
  if (version != kSchemaVersion)
    throw CacheError(fmt::format("{}: schema {}, this build reads {}",
                                 show(file),
                                 printable(version.dump()),
                                 kSchemaVersion),
                     "use the version that wrote it, or move that folder away to resume from the "
                     "one before it");
  if (found.state.value("step", nlohmann::json()) != step)
    damaged(fmt::format("is of step {}, not {}",
                        printable(found.state.value("step", nlohmann::json()).dump()),
                        step));
  const auto sum = found.state.value("checksum", nlohmann::json());
  if (const auto actual = checksum(found.state); sum != actual)
    damaged(fmt::format(
        "damaged or edited: checksum {}, its content has {}", printable(sum.dump()), actual));
  return found;
}

std::map<std::string_view, std::span<const std::byte>> bytes_by_name(
    std::span<const Tensor> tensors) {
  std::map<std::string_view, std::span<const std::byte>> out;
  for (const Tensor& tensor : tensors) out.emplace(tensor.spec.name, tensor.bytes);
  return out;
}

}  // namespace

std::string step_name(int64_t step) { return fmt::format("step-{:06}", step); }

std::vector<int64_t> steps_in(const fs::path& run) {
  std::vector<int64_t> steps;
  for (const fs::path& entry : entries(run)) {
    if (const auto step = step_of(entry.filename().string())) steps.push_back(*step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

void remove_leftovers(const fs::path& run) {
  for (const fs::path& entry : entries(run)) {
    const std::string name = entry.filename().string();
    if (!name.starts_with(".step-") && !is_temporary(name)) continue;
    std::error_code ignored;
    fs::remove_all(entry, ignored);
  }
}

std::optional<fs::path> start_run(const fs::path& run) {
  std::optional<fs::path> moved;
  if (!steps_in(run).empty()) {
    // "run/" and "run" are one folder, and "run/.old-1" would be inside it
    const fs::path named = run.has_filename() ? run : run.parent_path();
    for (int64_t n = 1; !moved; ++n) {
      fs::path old = named;
      old += fmt::format(".old-{}", n);
      std::error_code error;
      if (fs::exists(fs::symlink_status(old, error))) continue;
      fs::rename(named, old, error);
      if (error) fail("cannot be renamed", named, error);
      moved = old;
    }
  }
  make_folder(run);
  remove_leftovers(run);
  return moved;
}

void remove_older(const fs::path& run,
                  int64_t step,
                  int64_t keep,
                  const std::set<int64_t>& needed) {
  std::vector<int64_t> steps = steps_in(run);
  std::erase_if(steps, [&](int64_t other) { return other > step; });
  steps.resize(steps.size() - std::min(steps.size(), static_cast<size_t>(keep)));
  for (const int64_t old : steps) {
    if (needed.contains(old)) continue;
    // without its name first, so that no kill leaves half a checkpoint
    const fs::path folder = run / step_name(old),
                   unnamed = run / fmt::format(".{}.{}", step_name(old), random_name());
    std::error_code error;
    fs::rename(folder, unnamed, error);
    if (!error) fs::remove_all(unnamed, error);
    if (error) log::warn("{}: cannot be removed: {}", show(folder), error.message());
  }
}

Writer::Writer(fs::path run, int64_t step)
    : run_(std::move(run)),
      temporary_(run_ / fmt::format(".{}.{}", step_name(step), random_name())),
      step_(step) {
  make_folder(temporary_);
}

Writer::~Writer() {
  std::error_code ignored;
  fs::remove_all(temporary_, ignored);
}

void Writer::add(const std::string& file_name,
                 std::span<const Tensor> tensors,
                 const safetensors::Metadata& metadata) {
  safetensors::Writer writer(temporary_ / file_name, specs(tensors), metadata);
  const auto bytes = bytes_by_name(tensors);
  const std::vector<safetensors::TensorSpec> order = writer.order();
  for (const auto& spec : order) writer.write(spec.name, bytes.at(spec.name));
  writer.commit();
  added(file_name);
}

void Writer::added(const std::string& file_name) {
  const FileSum sum = sum_of(temporary_ / file_name);
  files_[file_name] = {{"bytes", sum.bytes}, {"xxh3_128", sum.xxh3_128}};
}

fs::path Writer::commit(nlohmann::json state) {
  state["format"] = kFormat;
  state["schema_version"] = kSchemaVersion;
  state["step"] = step_;
  state["files"] = files_;
  state["checksum"] = checksum(state);
  write_file_atomic(temporary_ / kStateName, state.dump(1) + "\n");
  sync_folder(temporary_);
  const fs::path folder = run_ / step_name(step_);
  std::error_code error;
  if (fs::exists(folder)) {
    const fs::path old = run_ / fmt::format(".{}.{}", step_name(step_), random_name());
    fs::rename(folder, old, error);
    if (error) fail("cannot be renamed", folder, error);
    fs::rename(temporary_, folder, error);
    std::error_code ignored;
    if (error) {
      fs::rename(old, folder, ignored);
    } else {
      fs::remove_all(old, ignored);
    }
  } else {
    fs::rename(temporary_, folder, error);
  }
  if (error) fail("cannot be renamed", temporary_, error);
  sync_folder(run_);
  return folder;
}

std::optional<Checkpoint> read_latest(const fs::path& run) {
  const std::vector<int64_t> steps = steps_in(run);
  std::string newest;  // what is wrong with it
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    try {
      Checkpoint found = read_state(run, *step);
      check_files(found);
      return found;
    } catch (const Damage& damage) {
      if (newest.empty()) newest = damage.what();
      if (std::next(step) != steps.rend())
        log::warn("{}; the checkpoint before it is looked at", damage.what());
    }
  }
  if (steps.empty()) return std::nullopt;
  throw CacheError(
      fmt::format("{}{}", newest, steps.size() > 1 ? "; no older checkpoint is good either" : ""),
      "bring back the files as they were, or start anew with --replace, which moves the run aside");
}

Checkpoint read_unchecked(const fs::path& run, int64_t step) try {
  return read_state(run, step);
} catch (const Damage& damage) {
  throw CacheError(damage.what(), "all ranks must see the folder that rank 0 reads and writes");
}

LoraHashes lora_hashes(std::span<const Tensor> tensors, const safetensors::Metadata& metadata) {
  constexpr uint64_t kBegin = 1 << 20, kEnd = kBegin + (64 << 10);
  safetensors::Metadata kept;
  for (const auto& entry : metadata) {
    if (entry.first.starts_with("ss_")) kept.insert(entry);
  }
  Sha256 model, legacy;
  uint64_t offset = 0;
  const auto add_legacy =
      [&](std::span<const std::byte> bytes) {  // the part of `bytes` that lies in the window
        const uint64_t from = std::max(kBegin, offset), to = std::min(kEnd, offset + bytes.size());
        if (from < to) legacy.add(bytes.subspan(from - offset, to - from));
        offset += bytes.size();
      };
  add_legacy(as_bytes(safetensors::header_bytes(specs(tensors), kept)));
  const auto bytes = bytes_by_name(tensors);
  for (const auto& spec : safetensors::in_file_order(specs(tensors))) {
    model.add(bytes.at(spec.name));
    add_legacy(bytes.at(spec.name));
  }
  return {to_hex(model.digest()), to_hex(legacy.digest()).substr(0, 8)};
}

}  // namespace flux::checkpoint

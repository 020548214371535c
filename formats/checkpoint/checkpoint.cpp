#include "formats/checkpoint/checkpoint.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <charconv>
#include <memory>
#include <string_view>
#include <system_error>
#include <utility>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/core/text.h"

namespace flux::checkpoint {
namespace {

namespace fs = std::filesystem;

constexpr char kStateName[] = "state.json";
constexpr uint64_t kMaxStateBytes = 64 << 20;
constexpr char kDamagedHint[] = "move that folder away to resume from the one before it";

[[noreturn]] void fail(const char* what, const fs::path& path, const std::error_code& error) {
  throw ResourceError(fmt::format("{}: {}: {}", show(path), what, error.message()));
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

std::vector<fs::path> entries(const fs::path& folder) {
  std::vector<fs::path> out;
  std::error_code error;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error))
    out.push_back(at->path());
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

void check_files(const Checkpoint& checkpoint) {
  const auto files = checkpoint.state.value("files", nlohmann::json::object());
  for (const auto& [name, expected] : files.items()) {
    const fs::path path = checkpoint.folder / name;
    const auto refuse = [&](const char* what, const nlohmann::json& found) {
      throw CacheError(fmt::format("{}: damaged: {} {}, state.json says {}",
                                   show(path),
                                   what,
                                   found.dump(),
                                   expected.value(what, nlohmann::json()).dump()),
                       kDamagedHint);
    };
    try {
      const FileSum sum = sum_of(path);
      if (const nlohmann::json bytes = sum.bytes;
          bytes != expected.value("bytes", nlohmann::json()))
        refuse("bytes", bytes);
      if (const nlohmann::json hash = sum.xxh3_128;
          hash != expected.value("xxh3_128", nlohmann::json()))
        refuse("xxh3_128", hash);
    } catch (const InputError& error) {
      throw CacheError(error.what(), kDamagedHint);
    }
  }
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
    if (!entry.filename().string().starts_with(".step-")) continue;
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

Checkpoint read_latest(const fs::path& run) {
  const std::vector<int64_t> steps = steps_in(run);
  if (steps.empty()) {
    throw CacheError(fmt::format("{}: no checkpoint to resume from", show(run)),
                     "leave out --resume to start a new run");
  }
  Checkpoint found{run / step_name(steps.back()), steps.back(), nullptr};
  const fs::path file = found.folder / kStateName;
  const auto refuse = [&](const std::string& what) {
    throw CacheError(fmt::format("{}: {}", show(file), what), kDamagedHint);
  };
  try {
    found.state = nlohmann::json::parse(read_file(file, kMaxStateBytes));
  } catch (const InputError& error) {
    throw CacheError(error.what());
  } catch (const nlohmann::json::exception&) {
    refuse("is not JSON");
  }
  if (!found.state.is_object() || found.state.value("format", nlohmann::json()) != kFormat)
    refuse("is not a state of flux-train");
  const auto version = found.state.value("schema_version", nlohmann::json());
  if (version != kSchemaVersion) {
    refuse(
        fmt::format("schema {}, this build reads {}", printable(version.dump()), kSchemaVersion));
  }
  if (found.state.value("step", nlohmann::json()) != found.step) {
    refuse(fmt::format("is of step {}, not {}",
                       printable(found.state.value("step", nlohmann::json()).dump()),
                       found.step));
  }
  const auto sum = found.state.value("checksum", nlohmann::json());
  if (const auto actual = checksum(found.state); sum != actual) {
    refuse(fmt::format(
        "damaged or edited: checksum {}, its content has {}", printable(sum.dump()), actual));
  }
  check_files(found);
  return found;
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

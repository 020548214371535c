#include "formats/safetensors/set_writer.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <system_error>

#include "common/core/disk.h"
#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/text.h"

namespace flux::safetensors {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kSuffix = ".safetensors";

bool is_file_name(const fs::path& path) { return path.extension() == kSuffix; }

}  // namespace

void require_replaceable(const fs::path& file, const std::string& key, std::string_view maker) {
  std::error_code error;
  if (!fs::exists(fs::symlink_status(file, error))) return;
  bool ours = false;
  if (fs::is_directory(file, error)) throw UsageError(show(file) + ": is a folder, name a file");
  try {
    ours = File::open(file)->metadata().contains(key);
  } catch (const InputError&) {
    // something else has the name
  }
  if (!ours)
    throw UsageError(fmt::format("{}: is there, and no weights that {} made", show(file), maker),
                     "write into another folder, or move the file away");
  log::warn("{}: is replaced", show(file));
}

fs::path SetPlace::folder() const { return is_file_name(out) ? out.parent_path() : out; }
std::string SetPlace::name() const { return is_file_name(out) ? out.stem().string() : base; }

SetWriter::SetWriter(SetPlace place,
                     const std::vector<TensorSpec>& tensors,
                     const Metadata& metadata,
                     const std::string& key,
                     std::string_view maker)
    : place_(std::move(place)) {
  std::vector<std::vector<TensorSpec>> shards(1);
  uint64_t filled = 0;
  for (const TensorSpec& tensor : tensors) {
    const uint64_t bytes = safetensors::tensor_bytes(tensor.dtype, tensor.shape);
    if (place_.shard_bytes > 0 && filled > 0 && filled + bytes > place_.shard_bytes) {
      shards.emplace_back();
      filled = 0;
    }
    filled += bytes;
    tensor_bytes_ += bytes;
    shards.back().push_back(tensor);
    shard_of_[tensor.name] = shards.size() - 1;
  }
  const size_t n = shards.size();
  if (n > 99999)
    throw UsageError(fmt::format("{} shards are more than 99999", n), "make them larger");
  for (size_t i = 0; i < n; ++i) {
    names_.push_back(n == 1
                         ? place_.name() + std::string(kSuffix)
                         : fmt::format("{}-{:05d}-of-{:05d}{}", place_.name(), i + 1, n, kSuffix));
    total_ += header_bytes(shards[i], metadata).size();
  }
  total_ += tensor_bytes_;
  const fs::path folder = place_.folder();
  for (const std::string& name : names_) require_replaceable(folder / name, key, maker);
  std::error_code error;
  if (!is_file_name(place_.out) && fs::is_directory(folder, error)) {
    for (const auto& entry : fs::directory_iterator(folder, error)) {
      const std::string name = entry.path().filename().string();
      if (name.find(kSuffix) == std::string::npos || std::ranges::count(names_, name) > 0 ||
          (n > 1 && entry.path() == path()))
        continue;
      throw UsageError(fmt::format("{}: holds other weights, {}", show(folder), show(name)),
                       "write into another folder, or move them away");
    }
  }
  require_free_space(folder.empty() ? fs::path(".") : folder, total_);
  if (!folder.empty()) make_folder(folder);
  for (size_t i = 0; i < n; ++i)
    files_.push_back(
        std::make_unique<ScatteredWriter>(folder / names_[i], std::move(shards[i]), metadata));
  written_ = total_ - tensor_bytes_;
}

void SetWriter::write(std::string_view name, std::span<const std::byte> bytes) {
  const auto shard = shard_of_.find(name);
  if (shard == shard_of_.end())
    throw std::invalid_argument(fmt::format("no tensor '{}' is to be written", printable(name)));
  files_[shard->second]->write(name, bytes);
  written_ += bytes.size();
}

fs::path SetWriter::path() const {
  return place_.folder() /
         (names_.size() == 1 ? names_[0] : place_.name() + std::string(kSuffix) + ".index.json");
}

void SetWriter::commit() {
  for (const auto& file : files_) file->commit();
  if (files_.size() == 1) return;
  nlohmann::json map = nlohmann::json::object();
  for (const auto& [name, shard] : shard_of_) map[name] = names_[shard];
  const nlohmann::json index{{"metadata", {{"total_size", tensor_bytes_}}}, {"weight_map", map}};
  write_file_atomic(path(), index.dump(2) + "\n");
}

}  // namespace flux::safetensors

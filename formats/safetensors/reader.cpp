#include "formats/safetensors/reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <system_error>
#include <utility>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/text.h"

namespace flux::safetensors {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kIndexSuffix = ".safetensors.index.json";
constexpr uint64_t kMaxIndexBytes = 100'000'000;

/// "base-00002-of-00003.safetensors" taken apart.
struct ShardName {
  std::string base;
  int64_t number = 0, total = 0;

  std::string file(int64_t n) const {
    return fmt::format("{}-{:05d}-of-{:05d}.safetensors", base, n, total);
  }
};

std::optional<ShardName> shard_name(const std::string& name) {
  constexpr std::string_view kShape = "-00000-of-00000.safetensors";  // 0: any digit
  if (name.size() < kShape.size()) return std::nullopt;
  const std::string tail = name.substr(name.size() - kShape.size());
  const auto fits = [](char shape, char c) {
    return shape == '0' ? c >= '0' && c <= '9' : shape == c;
  };
  if (!std::equal(kShape.begin(), kShape.end(), tail.begin(), fits)) return std::nullopt;
  return ShardName{name.substr(0, name.size() - kShape.size()),
                   std::stoll(tail.substr(1, 5)),
                   std::stoll(tail.substr(10, 5))};
}

/// The set's tensors are each in one file only.
FileSet make_set(std::vector<fs::path> paths) {
  std::sort(paths.begin(), paths.end());
  FileSet set;
  std::map<std::string_view, const File*> owners;
  for (const fs::path& path : paths) {
    set.files.push_back(File::open(path));
    const File& file = *set.files.back();
    for (const Tensor& tensor : file.tensors()) {
      const auto [owner, fresh] = owners.emplace(tensor.name, &file);
      if (!fresh) {
        throw InputError(fmt::format("{}: tensor '{}' is in {} too",
                                     show(path),
                                     printable(tensor.name),
                                     show(owner->second->path())),
                         "shards of different models may be mixed in this folder");
      }
    }
    set.metadata.insert(file.metadata().begin(), file.metadata().end());
  }
  return set;
}

FileSet open_shards(const fs::path& first, const ShardName& name) {
  if (name.number != 1) {
    throw InputError(
        fmt::format("{}: is shard {} of {}", show(first), name.number, name.total),
        fmt::format("give the folder, the index or the first shard, {}", name.file(1)));
  }
  std::vector<fs::path> paths;
  for (int64_t n = 1; n <= name.total; ++n) {
    paths.push_back(first.parent_path() / name.file(n));
    std::error_code error;
    if (!fs::exists(paths.back(), error)) {
      throw InputError(
          fmt::format("{}: shard {} of {} is not there", show(paths.back()), n, name.total),
          "download the whole set into one folder");
    }
  }
  return make_set(std::move(paths));
}

/// weight_map and total_size of an index file, each key once.
struct Index {
  std::map<std::string, std::string> files;  // tensor name -> file name
  std::optional<uint64_t> total_size;
};

Index read_index(const fs::path& path) {
  const auto refuse = [&](const std::string& reason) {
    throw InputError(fmt::format("{}: not an index of safetensors shards: {}", show(path), reason),
                     "download the index again, or give the first shard");
  };
  const std::string text = read_file(path, kMaxIndexBytes);
  std::vector<std::set<std::string>> keys;  // of every open object
  const auto once = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    using Event = nlohmann::json::parse_event_t;
    if (depth > 8) refuse("it is nested too deeply");
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key && !keys.back().insert(value.get<std::string>()).second) {
      refuse(fmt::format("key '{}' appears twice", printable(value.get<std::string>())));
    }
    return true;
  };
  nlohmann::json json;
  try {
    json = nlohmann::json::parse(text, once);
  } catch (const nlohmann::json::exception&) {
    refuse("it is not valid JSON");
  }
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object())
    refuse("it has no weight_map");
  Index index;
  for (const auto& [name, file] : json["weight_map"].items()) {
    if (!file.is_string()) refuse(fmt::format("the file of '{}' is not a string", printable(name)));
    const auto& file_name = file.get_ref<const std::string&>();
    if (file_name.empty() || file_name == "." || file_name == ".." ||
        file_name.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos) {
      refuse(fmt::format("'{}' is not a plain file name", printable(file_name)));
    }
    index.files.emplace(name, file_name);
  }
  if (index.files.empty()) refuse("its weight_map is empty");
  if (json.contains("metadata") && json["metadata"].is_object()) {
    const auto total = json["metadata"].find("total_size");
    if (total != json["metadata"].end() && total->is_number_unsigned())
      index.total_size = total->get<uint64_t>();
  }
  return index;
}

FileSet open_index(const fs::path& path) {
  const Index index = read_index(path);
  std::set<std::string> names;
  for (const auto& [tensor, file] : index.files) names.insert(file);
  std::vector<fs::path> paths;
  for (const std::string& name : names) paths.push_back(path.parent_path() / name);
  FileSet set = make_set(std::move(paths));

  std::vector<std::string> unlisted, misplaced;
  uint64_t total = 0;
  size_t found = 0;
  for (const auto& file : set.files) {
    for (const Tensor& tensor : file->tensors()) {
      total += tensor.bytes.size();
      const auto listed = index.files.find(tensor.name);
      if (listed == index.files.end()) {
        unlisted.push_back(printable(tensor.name));
      } else if (listed->second != file->path().filename()) {
        misplaced.push_back(printable(tensor.name));
      } else {
        ++found;
      }
    }
  }
  std::vector<std::string> absent;
  if (found + misplaced.size() < index.files.size()) {
    std::set<std::string_view> present;
    for (const auto& file : set.files) {
      for (const Tensor& tensor : file->tensors()) present.insert(tensor.name);
    }
    for (const auto& [tensor, file] : index.files) {
      if (!present.contains(tensor)) absent.push_back(printable(tensor));
    }
  }
  std::string problems;
  for (const auto& [what, list] : {std::pair("listed, but in no shard", &absent),
                                   std::pair("listed in another shard", &misplaced),
                                   std::pair("in a shard, but not listed", &unlisted)}) {
    if (!list->empty())
      problems += fmt::format("\n  {} {}: {}", list->size(), what, join_some(*list));
  }
  if (!problems.empty()) {
    throw InputError(
        fmt::format("{}: index and shards disagree{}", show(path), problems),
        "index and shards are of different downloads: fetch them again, or give the first shard");
  }
  if (index.total_size && *index.total_size != total) {
    log::warn("index gives another size than its shards have path={} index_bytes={} shard_bytes={}",
              show(path),
              *index.total_size,
              total);
  }
  return set;
}

FileSet open_folder(const fs::path& folder) {
  std::vector<std::string> indexes, files;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().native();
    if (name.ends_with(kIndexSuffix)) indexes.push_back(name);
    if (name.ends_with(".safetensors")) files.push_back(name);
  }
  if (error) throw InputError(fmt::format("{}: cannot be read: {}", show(folder), error.message()));
  std::sort(indexes.begin(), indexes.end());
  std::sort(files.begin(), files.end());
  if (indexes.size() == 1) return open_index(folder / indexes[0]);
  const auto& names = indexes.empty() ? files : indexes;
  if (names.empty()) {
    throw InputError(fmt::format("{}: no .safetensors file in this folder", show(folder)),
                     "give the folder or file that holds the weights");
  }
  const auto first = shard_name(names[0]);
  const bool one_set =
      first && first->number == 1 && static_cast<int64_t>(names.size()) == first->total;
  if (names.size() == 1 || one_set) return open_set(folder / names[0]);
  std::vector<std::string> shown;
  for (const std::string& name : names) shown.push_back(printable(name));
  throw InputError(
      fmt::format(
          "{}: holds {} files of weights: {}", show(folder), names.size(), join_some(shown)),
      "give one of them");
}

}  // namespace

File::File(const fs::path& path) : mapping_(path), contents_(parse(mapping_.bytes(), show(path))) {
  for (const Tensor& tensor : contents_.tensors) by_name_.emplace(tensor.name, &tensor);
}

std::shared_ptr<const File> File::open(const fs::path& path) {
  return std::shared_ptr<const File>(new File(path));
}

const Tensor* File::find(std::string_view name) const {
  const auto it = by_name_.find(name);
  return it == by_name_.end() ? nullptr : it->second;
}

FileSet open_set(const fs::path& path) {
  std::error_code error;
  if (fs::is_directory(path, error)) return open_folder(path);
  const std::string name = path.filename().native();
  if (name.ends_with(kIndexSuffix)) return open_index(path);
  if (const auto shard = shard_name(name)) return open_shards(path, *shard);
  return make_set({path});
}

}  // namespace flux::safetensors

#include "pipelines/decode/sources.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <memory>
#include <nlohmann/json.hpp>

#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "common/tensor/tensor.h"
#include "formats/cache/files.h"
#include "formats/cache/lock.h"
#include "formats/cache/reader.h"
#include "formats/samples/samples.h"

namespace flux::decode {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

std::string word(const Json& value) {
  return value.is_string() ? value.get<std::string>() : value.dump();
}

/// As other programs write it: the prompt, a line of what to avoid, a line of settings.
std::string parameters_text(const samples::Info& picture, const Json& settings) {
  std::string out = picture.prompt;
  if (!picture.negative.empty()) out += "\nNegative prompt: " + picture.negative;
  std::vector<std::string> items;
  const auto add = [&](const char* title, const char* key) {
    if (const auto found = settings.find(key); found != settings.end() && !found->is_array())
      items.push_back(fmt::format("{}: {}", title, word(*found)));
  };
  add("Steps", "steps");
  items.push_back("Sampler: Euler");
  add("Schedule type", "schedule");
  add("CFG scale", "cfg-scale");
  add("Distilled CFG Scale", "guidance");
  items.push_back(fmt::format("Seed: {}", picture.seed));
  items.push_back(fmt::format("Picture: {}", picture.index));
  items.push_back(fmt::format("Size: {}x{}", picture.width * 8, picture.height * 8));
  add("Model", "model");
  if (const auto loras = settings.find("lora"); loras != settings.end() && loras->is_array()) {
    std::vector<std::string> names;
    for (const Json& lora : *loras) names.push_back(word(lora));
    items.push_back(fmt::format("Lora: \"{}\"", fmt::join(names, ", ")));
  }
  add("Training step", "step");
  items.push_back(fmt::format("Version: flux-stages {}", tool_version()));
  return out + "\n" + fmt::format("{}", fmt::join(items, ", "));
}

/// What a JSON text may hold: bytes that are not UTF-8 are written \xNN.
std::string utf8(const std::string& text) {
  return first_invalid_utf8(text) ? printable(text) : text;
}

std::string json_text(const samples::Info& picture, const samples::Header& header) {
  return Json{{"prompt", utf8(picture.prompt)},
              {"negative_prompt", utf8(picture.negative)},
              {"prompt_number", picture.prompt_number},
              {"index", picture.index},
              {"seed", picture.seed},
              {"width", picture.width * 8},
              {"height", picture.height * 8},
              {"settings", header.settings},
              {"model_sha256", header.model_sha256},
              {"tool", header.provenance.tool},
              {"tool_version", header.provenance.tool_version},
              {"created", header.created}}
      .dump();
}

/// That of pictures which a training made; of flux-sample's file in a run's samples/, that of its name, step-000000 for the base.
std::optional<int64_t> step_of(const Json& settings, const fs::path& path) {
  if (const auto found = settings.find("step");
      found != settings.end() && found->is_number_integer())
    return found->get<int64_t>();
  const std::string stem = path.stem().native();
  constexpr std::string_view kPrefix = "step-";
  int64_t step = 0;
  const char* const end = stem.data() + stem.size();
  if (!stem.starts_with(kPrefix)) return {};
  const auto [stop, error] = std::from_chars(stem.data() + kPrefix.size(), end, step);
  if (error != std::errc() || stop != end || step < 0) return {};
  return step;
}

void add_samples(const fs::path& path, std::vector<Source>& out) {
  const auto file = std::make_shared<samples::File>(path);
  const Json& settings = file->header().settings;
  const std::optional<int64_t> step = step_of(settings, path);
  for (size_t i = 0; i < file->pictures().size(); ++i) {
    const samples::Info& picture = file->pictures()[i];
    Source source;
    source.file = path;
    source.folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
    source.name =
        fmt::format("{}-{:04}-{:02}", path.stem().native(), picture.prompt_number, picture.index);
    source.height = picture.height;
    source.width = picture.width;
    source.prompt_number = picture.prompt_number;
    source.prompt = utf8(picture.prompt);
    source.parameters = utf8(parameters_text(picture, settings));
    source.json = json_text(picture, file->header());
    source.step = step;
    source.raw = [file, i] {
      const samples::Info& info = file->pictures()[i];
      const auto values = file->latents(static_cast<int64_t>(i));
      return from_values<float>(
          values, std::vector<int64_t>{1, samples::kChannels, info.height, info.width});
    };
    out.push_back(std::move(source));
  }
}

/// A latents cache that is being read.
struct OpenCache {
  explicit OpenCache(const fs::path& folder) : lock(folder), cache(folder, cache::Kind::kLatents) {}
  cache::ReaderLock lock;
  cache::Cache cache;
};

/// A name for a file: the last part of a path without its extension, of letters that any system takes.
std::string file_name(std::string_view path) {
  std::string stem = fs::path(path).stem().native();
  constexpr size_t kMost = 80;
  stem = shortened(utf8(stem), kMost);
  for (char& c : stem)
    if (static_cast<unsigned char>(c) < 32 ||
        std::string_view("/\\:*?\"<>|").find(c) != std::string_view::npos)
      c = '_';
  return stem.empty() ? "sample" : stem;
}

/// The posterior's mean where the cache has mean and log-variance.
at::Tensor cached_latents(const OpenCache& open, const cache::IndexVariant& variant) {
  const cache::Sample sample = open.cache.read(variant);
  const cache::Layout& layout = open.cache.layout();
  const at::Tensor stored =
      borrow(sample.tensors.front(),
             layout.dtype,
             std::vector<int64_t>{1, layout.channels, variant.height, variant.width},
             nullptr);
  return stored.narrow(1, 0, samples::kChannels).to(at::kFloat, false, /*copy=*/true).contiguous();
}

void add_cache(const fs::path& folder, int64_t limit, std::vector<Source>& out) {
  const auto open = std::make_shared<OpenCache>(folder);
  const cache::Index& index = open->cache.index();
  const auto manifest = folder / cache::kManifestName;
  for (int64_t i = 0; i < index.num_items(); ++i) {
    for (const cache::IndexVariant& variant : index.variants(i)) {
      if (limit > 0 && std::ssize(out) >= limit) return;
      if (variant.segment == cache::kOtherShard) continue;
      const bool flipped = (variant.flags & cache::kSampleFlipped) != 0;
      Source source;
      source.file = manifest;
      source.name =
          fmt::format("{}-{}", file_name(index.path(i)), to_hex(variant.key).substr(0, 8));
      source.height = variant.height;
      source.width = variant.width;
      source.prompt_number = static_cast<uint64_t>(i);
      source.prompt = utf8(std::string(index.path(i)));
      source.parameters = fmt::format("{}\nCached latents: {}x{}{}",
                                      source.prompt,
                                      variant.width * 8,
                                      variant.height * 8,
                                      flipped ? ", mirrored" : "");
      source.json = Json{{"path", source.prompt},
                         {"key", to_hex(variant.key)},
                         {"flipped", flipped},
                         {"parameters", open->cache.manifest().recipe.parameters}}
                        .dump();
      source.raw = [open, variant] { return cached_latents(*open, variant); };
      out.push_back(std::move(source));
    }
  }
}

std::vector<fs::path> sample_files(const fs::path& folder) {
  std::vector<fs::path> files;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error))
    if (entry.path().extension() == ".h5" && entry.is_regular_file(error) &&
        !entry.path().filename().native().starts_with('.'))
      files.push_back(entry.path());
  std::ranges::sort(files);
  return files;
}

}  // namespace

Sources find_sources(const Options& o) {
  Sources sources;
  std::error_code error;
  for (const std::string& input : o.inputs) {
    const fs::path path(input);
    if (!fs::exists(path, error))
      throw InputError(fmt::format("{}: is not there", show(path)),
                       "give a file of samples, a folder of them, or a latents cache");
    if (!fs::is_directory(path, error)) {
      add_samples(path, sources.all);
      continue;
    }
    if (cache::is_there(path / cache::kManifestName)) {
      sources.of_cache = true;
      add_cache(path, o.limit, sources.all);
      continue;
    }
    std::vector<fs::path> files = sample_files(path);
    const bool run = files.empty() && fs::is_directory(path / "samples", error);
    if (run) files = sample_files(path / "samples");
    if (files.empty())
      throw CacheError(
          fmt::format("{}: neither a latents cache nor a folder of samples", show(path)),
          "flux-cache-latents makes the one, flux-train --sample-every the other");
    for (const fs::path& file : files) add_samples(file, sources.all);
    fs::path folder = fs::absolute(path, error).lexically_normal();
    if (!folder.has_filename()) folder = folder.parent_path();  // "RUN/samples/"
    sources.run_folders.push_back(run ? folder : folder.parent_path());
  }
  if (o.limit > 0 && std::ssize(sources.all) > o.limit)
    sources.all.resize(static_cast<size_t>(o.limit));
  return sources;
}

}  // namespace flux::decode

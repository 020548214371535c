#include "pipelines/cache/export.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <thread>
#include <tuple>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/ordered.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "formats/safetensors/writer.h"
#include "pipelines/cache/decode.h"
#include "pipelines/cache/npz.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using ByKey = std::map<Sha256Digest, const ListedSample*>;

constexpr char kExportIndexName[] = "index.jsonl";
constexpr size_t kKeyDigits = 64;

const char* extension(ExportFormat format) {
  return format == ExportFormat::kNpz ? ".npz" : ".safetensors";
}

std::string file_name(const Sha256Digest& key, ExportFormat format) {
  return to_hex(key) + extension(format);
}

bool is_sample_name(std::string_view name, ExportFormat format) {
  return name.size() > kKeyDigits && is_hex(name.substr(0, kKeyDigits), kKeyDigits) &&
         name.substr(kKeyDigits) == extension(format);
}

// ".NAME.tmp-<16 hex digits>", as AtomicFile calls what a kill leaves of NAME.
bool is_scratch_name(std::string_view name, ExportFormat format) {
  const auto end = name.rfind(".tmp-");
  if (!name.starts_with('.') || end == std::string_view::npos || !is_hex(name.substr(end + 5), 16))
    return false;
  const auto of = name.substr(1, end - 1);
  return of == kExportIndexName || is_sample_name(of, format);
}

// Removes what a killed run left. Returns the samples' files that are there.
std::set<std::string> take_over(const fs::path& out, ExportFormat format) {
  make_folder(out);
  std::set<std::string> names;
  std::vector<std::string> others;
  std::error_code error;
  fs::directory_iterator entry(out, error), end;
  for (; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().native();
    std::error_code gone;
    if (is_scratch_name(name, format))
      fs::remove(entry->path(), gone);
    else if (is_sample_name(name, format))
      names.insert(name);
    else if (name != kExportIndexName)
      others.push_back(printable(name));
  }
  if (error)
    throw InputError(fmt::format("{}: cannot be listed: {}", show(out), error.message()),
                     "check its permissions");
  if (others.empty()) return names;
  std::ranges::sort(others);
  throw InputError(
      fmt::format(
          "{}: holds files that are not of such an export: {}", show(out), join_some(others)),
      "give --out a folder that is empty or does not exist");
}

// JSON is UTF-8: text as it is, or escaped where it is something else.
Json text_json(std::string_view text) {
  return first_invalid_utf8(text) ? Json(printable(text)) : Json(text);
}

Json variant_json(const IndexVariant& variant,
                  const ListedSample* sample,
                  const Contents& contents,
                  ExportFormat format) {
  Json out{
      {"key", to_hex(variant.key)},
      {"weight", variant.weight},
      {"file", sample ? Json(file_name(variant.key, format)) : Json()}};  // else in another shard
  if (contents.kind == Kind::kLatents) {
    out["flipped"] = (variant.flags & kSampleFlipped) != 0;
    out["bucket"] = bucket_text(variant.height, variant.width);
  } else if (sample) {
    out["caption"] = text_json(sample->info.text);
    out["tokens"] = {{"t5", sample->info.t5_tokens}, {"clip", sample->info.clip_tokens}};
  }
  return out;
}

std::string index_text(const Contents& contents, const ByKey& samples, ExportFormat format) {
  std::string out;
  const Index& index = *contents.index;
  for (int64_t i = 0; i < index.num_items(); ++i) {
    const IndexItem& item = index.item(i);
    const bool empty = (item.flags & kItemEmptyCaption) != 0;
    Json line{{"item", to_hex(item.item)},
              {"path", empty ? Json() : text_json(index.path(i))},
              {"subset", item.subset},
              {"repeats", item.repeats},
              {"is_reg", (item.flags & kItemRegularization) != 0},
              {"validation", (item.flags & kItemValidation) != 0},
              {"empty_caption", empty},
              {"variants", Json::array()}};
    for (const auto& variant : index.variants(i)) {
      const auto sample = samples.find(variant.key);
      line["variants"].push_back(variant_json(
          variant, sample == samples.end() ? nullptr : sample->second, contents, format));
    }
    out += line.dump() + "\n";
  }
  return out;
}

std::string safetensors_bytes(const std::vector<NamedTensor>& tensors, const Sha256Digest& key) {
  std::vector<safetensors::TensorSpec> specs;
  for (const auto& tensor : tensors) specs.push_back({tensor.name, tensor.dtype, tensor.shape});
  auto metadata = safetensors::pt_metadata();
  metadata["key"] = to_hex(key);
  std::string out = safetensors::header_bytes(specs, metadata);
  for (const auto& spec : safetensors::in_file_order(specs)) {
    const auto& bytes = std::ranges::find(tensors, spec.name, &NamedTensor::name)->bytes;
    out.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  return out;
}

// Returns whether it wrote.
bool export_sample(Segments& segments, const ListedSample& sample, const ExportOptions& options) {
  cancel::check();
  auto tensors = decode(segments, sample);
  if (tensors[0].name == "t5") {
    const int64_t length = tensors[0].shape[0];
    std::vector<std::byte> mask(static_cast<size_t>(length), std::byte{0});
    std::fill_n(mask.begin(), std::min<int64_t>(sample.info.t5_tokens, length), std::byte{1});
    tensors.push_back({"t5_mask", DType::kU8, {length}, std::move(mask)});
  }
  return write_file_if_changed(options.out / file_name(sample.info.key, options.format),
                               options.format == ExportFormat::kNpz
                                   ? npz_bytes(tensors)
                                   : safetensors_bytes(tensors, sample.info.key));
}

}  // namespace

void add_flags(ExportOptions& options, Tool& tool) {
  tool.about(
      "Writes each sample of a cache as a file of its own, and index.jsonl, which says what item "
      "has which. Does not change the cache.",
      "flux-cache export cache/latents --out latents-npz --format npz");
  tool.arguments(options.folders, "DIR", "cache folder");
  tool.flag("out", options.out, "DIR", "folder for the files; empty, or with an earlier export");
  tool.flag("format",
            options.format,
            {{"safetensors", ExportFormat::kSafetensors}, {"npz", ExportFormat::kNpz}},
            "safetensors in the stored dtype, or numpy's npz in float32");
}

void check(const ExportOptions& options) {
  constexpr char kExample[] = "flux-cache export cache/latents --out latents-npz --format npz";
  require_one_folder(options.folders, kExample);
  if (options.out.empty()) throw UsageError("--out is needed", kExample);
}

std::string ExportReport::line() const {
  return fmt::format("{} in {}: {} written, {} kept{}",
                     counted(num_samples, "sample"),
                     show(out),
                     written,
                     kept,
                     left ? fmt::format("; {} of samples that the cache does not hold", left) : "");
}

Json ExportReport::json() const {
  return {{"out", printable(out.native())},
          {"num_samples", num_samples},
          {"written", written},
          {"kept", kept},
          {"left", left}};
}

ExportReport export_cache(const Contents& contents, const ExportOptions& options) {
  require_readable(contents);
  if (!contents.complete)
    throw CacheError(show(contents.folder) + ": the cache is not complete",
                     "run the caching tool again: it goes on where it stopped");
  auto there = take_over(options.out, options.format);
  ByKey by_key;
  std::vector<const ListedSample*> samples;
  for (const auto& sample : contents.samples) {
    by_key[sample.info.key] = &sample;
    samples.push_back(&sample);
  }
  std::ranges::sort(samples, {}, [](const ListedSample* s) { return std::tie(s->file, s->row); });

  // no index beside files that it does not describe
  const std::string index = index_text(contents, by_key, options.format);
  const fs::path index_path = options.out / kExportIndexName;
  std::error_code error;
  if (fs::exists(index_path, error) && read_file(index_path) != index) {
    fs::remove(index_path, error);
    if (error)
      throw ResourceError(
          fmt::format("{}: cannot be removed: {}", show(index_path), error.message()),
          write_failure_hint(error.value()));
    sync_folder(options.out);
  }

  ExportReport out;
  out.out = options.out;
  out.num_samples = static_cast<int64_t>(samples.size());
  const int num_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  Segments segments(contents.folder);
  Progress progress("export", "samples", out.num_samples);
  Ordered<bool> files(out.num_samples, num_threads, 2 * num_threads, [&](int64_t i) {
    return export_sample(segments, *samples[static_cast<size_t>(i)], options);
  });
  for (const ListedSample* sample : samples) {
    ++(files.take() ? out.written : out.kept);
    there.erase(file_name(sample->info.key, options.format));
    progress.update(out.written + out.kept);
  }
  cancel::check();
  write_file_if_changed(index_path, index);
  out.left = static_cast<int64_t>(there.size());
  return out;
}

}  // namespace flux::cache

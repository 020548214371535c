#include "pipelines/stage/options.h"

#include <fmt/format.h>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::stage {

void add_flags(DatasetOptions& options, Tool& tool) {
  tool.flag("dataset", options.dataset, "FILE.toml", "data set in sd-scripts' format");
  tool.flag("images",
            options.images,
            "DIR",
            "folder of images with captions beside them, instead of --dataset");
  tool.flag("profile",
            options.profile,
            Choices<Profile>{{"default", Profile::kDefault}, {"kohya", Profile::kKohya}},
            "rules for reading images and captions; kohya is what sd-scripts does");
}

void check(const DatasetOptions& options,
           std::string_view other_flag,
           const std::filesystem::path& other) {
  std::string flags = "--dataset FILE.toml, --images DIR";
  if (!other_flag.empty()) flags += fmt::format(", --{} FILE", other_flag);
  const int given = (options.dataset.empty() ? 0 : 1) + (options.images.empty() ? 0 : 1) +
                    (other.empty() ? 0 : 1);
  if (given == 0) throw UsageError("nothing to read: one of " + flags + " is required");
  if (given > 1) throw UsageError("only one of " + flags + " can be given");
}

dataset::Resolved resolve(const DatasetOptions& options, int64_t width, int64_t height) {
  constexpr int64_t kDefaultSide = 1024;
  if (options.dataset.empty()) {
    return dataset::resolve_folder(options.images,
                                   width == 0 ? kDefaultSide : width,
                                   height == 0 ? kDefaultSide : height,
                                   options.profile);
  }
  std::vector<dataset::Fallback> fallbacks;
  if (width != 0) fallbacks.push_back({"resolution", fmt::format("[{}, {}]", width, height)});
  auto resolved = dataset::resolve_file(options.dataset, options.profile, fallbacks);
  if (!resolved.unused_fallbacks.empty()) {
    throw UsageError("--" + resolved.unused_fallbacks.front() +
                         " has no effect: " + show(options.dataset) + " says it itself",
                     "change the file, or leave the flag out");
  }
  dataset::refuse_uncacheable(resolved);
  return resolved;
}

dataset::Resolved resolve_captions(const DatasetOptions& options) {
  if (options.dataset.empty()) return resolve(options, 0, 0);
  auto resolved = dataset::resolve_file(
      options.dataset, options.profile, {{"resolution", "512"}});  // any will do
  dataset::refuse_uncacheable(resolved);
  return resolved;
}

std::string_view precision_word(Precision precision) {
  return precision == Precision::kF32 ? "f32" : "bf16";
}

void add_flags(EncodeOptions& options, Tool& tool, bool precision_auto) {
  tool.flag("out", options.out, "DIR", "cache folder, made if it is not there");
  tool.flag("dtype",
            options.dtype,
            Choices<DType>{{"bf16", DType::kBF16}, {"f16", DType::kF16}, {"f32", DType::kF32}},
            "type of the stored numbers");
  const std::string words = precision_auto ? "auto|f32|bf16" : "f32|bf16";
  tool.flag("precision",
            words,
            "precision of the computation; without it, the one that the folder has",
            precision_auto ? "auto" : "f32",
            [&options, words, precision_auto](const std::string& text) {
              if (text == "f32") {
                options.precision = Precision::kF32;
              } else if (text == "bf16") {
                options.precision = Precision::kBF16;
              } else if (precision_auto && text == "auto") {
                options.precision.reset();
              } else {
                throw UsageError("'" + text + "' is not one of " + words);
              }
            });
  tool.flag("device", options.device, device_choices(), "where to compute");
  tool.flag("batch-size",
            options.batch_size,
            "N",
            "samples encoded at once; changes speed and memory, no bits",
            1,
            4096);
  tool.flag("max-failed",
            options.max_failed,
            "N",
            "bad items above which no manifest is written (exit 6)");
  tool.flag("rehash", options.rehash, "hash files again instead of trusting their times and sizes");
}

void check(const EncodeOptions& options) {
  if (options.out.empty()) throw UsageError("--out DIR is required");
}

std::optional<cache::Manifest> previous_manifest(const std::filesystem::path& folder) {
  try {
    return cache::read_manifest_if_there(folder);
  } catch (const CacheError&) {
    return std::nullopt;
  }
}

Precision choose_precision(const EncodeOptions& options,
                           const std::optional<cache::Manifest>& previous,
                           Precision otherwise) {
  if (options.precision) return *options.precision;
  if (!previous) return otherwise;
  const auto found = previous->recipe.parameters.find("precision");
  if (found == previous->recipe.parameters.end()) return otherwise;
  return *found == "bf16" ? Precision::kBF16 : *found == "f32" ? Precision::kF32 : otherwise;
}

}  // namespace flux::stage

#include "pipelines/stage/options.h"

#include <fmt/format.h>

#include <charconv>
#include <system_error>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/cache/reader.h"

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
  if (given > 1) throw UsageError("only one of " + flags + " can be given", "leave the others out");
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
  auto resolved = dataset::resolve_file(options.dataset, options.profile, {}, {}, /*pixels=*/false);
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
  tool.bytes_flag(
      "max-bytes", options.max_bytes, "stop before the cache's files have more bytes (exit 5)");
  tool.flag("shard",
            "I/N",
            "part I (from 0) of N, for machines side by side; flux-cache merge joins them",
            "0/1",
            [&options](const std::string& text) { options.shard = parse_shard(text); });
  tool.flag("reproduce",
            options.reproduce,
            "N",
            "encode N random samples of the finished cache again and compare; writes nothing");
  tool.flag("rehash",
            options.rehash,
            "hash files again instead of trusting their times and sizes, and check the segments'");
}

void check(const EncodeOptions& options) {
  if (options.out.empty()) throw UsageError("--out DIR is required");
  if (options.reproduce == 0) return;
  for (const auto& [flag, given] : {std::pair{"--max-bytes", options.max_bytes != 0},
                                    {"--max-failed", options.max_failed != 0}}) {
    if (given) {
      throw UsageError(std::string(flag) + " has no effect with --reproduce, which writes nothing",
                       "leave one of them out");
    }
  }
}

cache::Shard parse_shard(const std::string& text) {
  constexpr int64_t kMaxShards = 65536;
  const auto parts = split(text, '/');
  cache::Shard shard{-1, -1};
  const auto read = [](const std::string& part, int64_t& value) {
    const char* const end = part.data() + part.size();
    const auto [stop, error] = std::from_chars(part.data(), end, value);
    return error == std::errc{} && stop == end;
  };
  if (parts.size() != 2 || !read(parts[0], shard.index) || !read(parts[1], shard.count) ||
      shard.index < 0 || shard.index >= shard.count || shard.count > kMaxShards) {
    throw UsageError(
        fmt::format("'{}' is not a part such as 0/8: I/N with I from 0 to N - 1 and N up to {}",
                    printable(text),
                    kMaxShards));
  }
  return shard;
}

Precision choose_precision(const EncodeOptions& options, Precision otherwise) {
  if (options.precision) return *options.precision;
  const auto known = cache::newest_parameters(options.out).value("precision", nlohmann::json());
  return known == "bf16" ? Precision::kBF16 : known == "f32" ? Precision::kF32 : otherwise;
}

}  // namespace flux::stage

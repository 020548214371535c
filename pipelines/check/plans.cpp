// Kind data-plans: dataset files as sd-scripts resolves them.
#include <fmt/format.h>

#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "common/dataset/dataset.h"
#include "common/image/bucket.h"
#include "common/image/image.h"
#include "pipelines/check/case.h"
#include "pipelines/check/data.h"
#include "pipelines/check/lines.h"

namespace flux::check {
namespace fs = std::filesystem;
using Json = nlohmann::json;
namespace {

/// "# args: --resolution 96,96 --enable_bucket" of the first line, as sd-scripts' command line
/// reads them.
std::vector<dataset::Fallback> fallbacks_of(const fs::path& toml) {
  const std::string text = read_file(toml);
  const std::string line = text.substr(0, text.find('\n'));
  std::vector<dataset::Fallback> out;
  constexpr std::string_view kMark = "# args: ";
  if (!line.starts_with(kMark)) return out;
  std::istringstream words(line.substr(kMark.size()));
  for (std::string word; words >> word;) {
    if (word.starts_with("--")) {
      word.erase(0, 2);
      if (word == "train_batch_size") word = "batch_size";
      if (word == "dataset_repeats") word = "num_repeats";
      out.push_back({word, "true"});
    } else if (!out.empty()) {
      const bool number = word.find_first_not_of("0123456789.,") == std::string::npos;
      out.back().value = !number                               ? "\"" + word + "\""
                         : word.find(',') != std::string::npos ? "[" + word + "]"
                                                               : word;
    }
  }
  return out;
}

Json text_or_null(const std::string& text) { return text.empty() ? Json() : Json(text); }

/// One part (training or validation) of one [[datasets]] as the reference writes it down. Whether an
/// option is cacheable is what the reference says of it.
Json describe(const dataset::Resolved& r,
              const dataset::Dataset& d,
              bool validation,
              const fs::path& base) {
  Json subsets = Json::array(), images = Json::array(), buckets = Json::array();
  std::map<image::Size, int64_t> counts;
  int64_t num_train = 0, num_reg = 0, batches = 0;
  bool latents_cacheable = true, text_cacheable = true;
  Json out{{"batch_size", d.batch_size}};
  const auto relative = [&](const fs::path& path) {
    return path.lexically_relative(base).native();
  };
  for (const auto& s : r.subsets) {
    if (s.dataset != d.index || (validation && s.is_reg)) continue;
    const auto& o = s.captions;
    const auto& p = s.pixels;
    const image::Buckets places({.resolution = {p.width, p.height},
                                 .enabled = p.buckets,
                                 .min_side = p.min_side,
                                 .max_side = p.max_side,
                                 .steps = p.steps,
                                 .no_upscale = p.no_upscale,
                                 .profile = Profile::kKohya});
    int64_t count = 0;
    for (const auto& i : r.images) {
      if (i.subset != s.index || i.validation != validation) continue;
      const auto bytes = read_file(i.file);
      const auto size = image::read_header(as_bytes(bytes)).decoded_size(Profile::kKohya);
      const auto placement = places.place(size);
      images.push_back({{"key", s.metadata_file.empty() ? relative(i.file) : i.name},
                        {"caption", dataset::read_caption(r, i).value_or("")},
                        {"num_repeats", i.repeats},
                        {"is_reg", s.is_reg},
                        {"size", json_of(size)},
                        {"bucket", json_of(placement.bucket)},
                        {"resized", json_of(placement.resized)},
                        {"resize_interpolation", text_or_null(p.interpolation)}});
      counts[placement.bucket] += i.repeats;
      ++count;
      if (!s.is_reg) num_train += i.repeats;
    }
    if (s.is_reg) num_reg += count * s.num_repeats;
    latents_cacheable &= !s.color_aug && !s.random_crop;
    text_cacheable &=
        !(o.dropout_rate > 0 || o.shuffle || o.token_warmup_step > 0 || o.tag_dropout_rate > 0);
    const auto when = [&](bool enabled, int64_t value) { return enabled ? Json(value) : Json(); };
    out.update({{"class", s.metadata_file.empty() ? "DreamBoothDataset" : "FineTuningDataset"},
                {"resolution", {p.width, p.height}},
                {"enable_bucket", p.buckets},
                {"min_bucket_reso", when(p.buckets, places.min_side())},
                {"max_bucket_reso", when(p.buckets, places.max_side())},
                {"bucket_reso_steps", when(p.buckets, p.steps)},
                {"bucket_no_upscale", p.buckets && p.no_upscale}});
    Json subset{{"num_repeats", s.num_repeats},
                {"alpha_mask", s.alpha_mask},
                {"shuffle_caption", o.shuffle},
                {"caption_separator", o.separator},
                {"keep_tokens", o.keep_tokens},
                {"keep_tokens_separator", o.keep_tokens_separator},
                {"secondary_separator", text_or_null(o.secondary_separator)},
                {"enable_wildcard", o.wildcards},
                {"color_aug", s.color_aug},
                {"flip_aug", s.flip_aug},
                {"random_crop", s.random_crop},
                {"caption_dropout_rate", o.dropout_rate},
                {"caption_dropout_every_n_epochs", o.dropout_every_n_epochs},
                {"caption_tag_dropout_rate", o.tag_dropout_rate},
                {"caption_prefix", text_or_null(o.prefix)},
                {"caption_suffix", text_or_null(o.suffix)},
                {"token_warmup_min", o.token_warmup_min},
                {"token_warmup_step", o.token_warmup_step},
                {"validation_seed", d.validation_seed},
                {"validation_split", d.validation_split},
                {"img_count", count},
                {"resize_interpolation", text_or_null(p.interpolation)},
                {"is_reg", s.is_reg},
                {"class_tokens", s.has_class_tokens ? Json(s.class_tokens) : Json()},
                {"caption_extension", s.caption_extensions.at(0)},
                // of these only whether they are there is kept
                {"face_crop", s.face_crop},
                {"has_attributes", s.custom_attributes}};
    if (!s.folder.empty()) subset["image_dir"] = relative(s.folder);
    if (!s.metadata_file.empty()) subset["metadata_file"] = relative(s.metadata_file);
    subsets.push_back(std::move(subset));
  }
  for (const auto& [size, count] : counts) {
    buckets.push_back({{"resolution", json_of(size)}, {"count", count}});
    batches += num_batches(count, d.batch_size);
  }
  out.update({{"num_train_images", num_train},
              {"num_reg_images", num_reg},
              {"latents_cacheable", latents_cacheable},
              {"text_cacheable", text_cacheable},
              {"batches_per_epoch", batches},
              {"buckets", std::move(buckets)}});
  // compared one by one
  out["parts"] = {{"subsets", std::move(subsets)}, {"images", std::move(images)}};
  return out;
}

/// Adds what is compared under another name than the reference gives it.
Json with_flags(Json subset) {
  if (const auto it = subset.find("face_crop_aug_range"); it != subset.end())
    subset["face_crop"] = !it->is_null();
  if (const auto it = subset.find("custom_attributes"); it != subset.end())
    subset["has_attributes"] = !it->empty();
  return subset;
}

Json by_key(const Json& images) {
  Json out = Json::object();
  for (const auto& i : images) out[i.at("key").get<std::string>()] = i;
  return out;
}

/// The first difference between one dataset's part and the golden one. If images are held out, whose
/// they are is each program's choice: then only numbers and options are compared here, and
/// `known_images` holds the images of both parts.
std::string compare_part(Json ours, const Json& golden, bool split, const Json& known_images) {
  const Json parts = ours.at("parts");
  ours.erase("parts");
  if (split) {
    for (const char* key : {"buckets", "batches_per_epoch"}) ours.erase(key);
  }
  if (const auto text = difference(ours, golden, /*needs_one=*/false); !text.empty()) return text;
  const auto& subsets = golden.at("subsets");
  if (subsets.size() != parts.at("subsets").size())
    return fmt::format("{} subsets, golden {}", parts["subsets"].size(), subsets.size());
  for (size_t i = 0; i < subsets.size(); ++i) {
    const auto text = difference(parts["subsets"][i], with_flags(subsets[i]));
    if (!text.empty()) return fmt::format("subset {}: {}", i, text);
  }
  const auto& images = golden.at("images");
  if (images.size() != parts.at("images").size())
    return fmt::format("{} images, golden {}", parts["images"].size(), images.size());
  for (const auto& image : images) {
    const std::string key = image.at("key");
    const auto it = known_images.find(key);
    if (it == known_images.end()) return fmt::format("no image {}", key);
    Json mine = *it;
    if (split) mine.erase("num_repeats");  // 1 in the part that is held out
    if (const auto text = difference(mine, image); !text.empty())
      return fmt::format("{}: {}", key, text);
  }
  return {};
}

/// The first difference between what the files resolve to and `golden`, or "".
std::string compare_plan(const dataset::Resolved& r, const Json& golden, const fs::path& base) {
  const auto& train = golden.at("train");
  const Json held_out = golden.value("validation", Json::array());
  if (train.size() != r.datasets.size())
    return fmt::format("{} datasets, golden {}", r.datasets.size(), train.size());
  size_t num_held_out = 0;
  int64_t batches = 0, held_out_batches = 0;
  for (size_t n = 0; n < r.datasets.size(); ++n) {
    const auto& d = r.datasets[n];
    const bool split = d.validation_split > 0;
    const Json mine = describe(r, d, false, base), rest = describe(r, d, true, base);
    Json images = by_key(mine["parts"]["images"]);
    images.update(by_key(rest["parts"]["images"]));
    if (const auto text = compare_part(mine, train[n], split, images); !text.empty())
      return fmt::format("train {}: {}", n, text);
    batches += mine["batches_per_epoch"].get<int64_t>();
    if (!split) continue;
    if (num_held_out >= held_out.size()) return "a validation part, golden has none";
    const auto text = compare_part(rest, held_out[num_held_out], split, images);
    if (!text.empty()) return fmt::format("validation {}: {}", num_held_out, text);
    ++num_held_out;
    held_out_batches += rest["batches_per_epoch"].get<int64_t>();
  }
  if (num_held_out != held_out.size())
    return fmt::format("{} validation parts, golden {}", num_held_out, held_out.size());
  if (num_held_out > 0) return {};  // other members: other buckets and batches
  return difference({{"batches_per_epoch", batches}, {"validation_batches", held_out_batches}},
                    golden,
                    /*needs_one=*/false);
}

void check_plan(const Case& c, const fs::path& toml, const Json& golden, const fs::path& base) {
  const std::string name = show(toml.filename());
  const bool refuse = golden.contains("expect") || golden.value("refuse", false);
  std::string note;
  bool ok = false;
  try {
    const auto r = dataset::resolve_file(toml, Profile::kKohya, fallbacks_of(toml), base);
    for (const auto& i : r.images) (void)dataset::read_caption(r, i);
    note = refuse ? "accepted" : compare_plan(r, golden, base);
    ok = !refuse && note.empty();
    if (ok) note = "equal";
  } catch (const InputError& error) {
    ok = refuse;
    note = fmt::format("refused: {}", first_line(error.what()));
  }
  c.report->verdict(name, ok, note);
}

}  // namespace

void check_plans(const Case& c) {
  const fs::path base = c.required("sets", "../sets").lexically_normal();
  for (const std::string& name : c.files("", ".json")) {
    if (name == "case.json" || name == "config.json") continue;
    const auto golden = read_object(c.folder / name);
    const std::string toml =
        golden.value("file", fs::path(name).replace_extension(".toml").native());
    if (c.has(toml)) check_plan(c, c.folder / toml, golden, base);
  }
}

}  // namespace flux::check

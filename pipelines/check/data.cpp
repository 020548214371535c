// Kinds data-*: what sd-scripts and Pillow make of sizes, captions, pictures and dataset files.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/core/text.h"
#include "common/dataset/caption.h"
#include "common/dataset/dataset.h"
#include "common/image/bucket.h"
#include "common/image/image.h"
#include "formats/safetensors/reader.h"
#include "pipelines/check/case.h"
#include "pipelines/check/lines.h"

namespace flux::check {
namespace fs = std::filesystem;
using Json = nlohmann::json;
namespace {

image::Size size_of(const Json& json) { return {json.at(0), json.at(1)}; }
Json json_of(image::Size size) { return {size.width, size.height}; }

/// Compares the fields that both objects have; the first that differ, or "".
std::string difference(const Json& ours, const Json& golden) {
  std::string out;
  for (const auto& [key, value] : ours.items()) {
    const auto it = golden.find(key);
    if (it == golden.end() || *it == value) continue;
    if (!out.empty()) return out + ", ...";
    out = fmt::format("{} {}, golden {}", key, value.dump(), it->dump());
  }
  return out;
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

/// limits.PART.NAME of case.json, else `fallback`.
double limit_or(const Case& c, const char* part, const char* name, double fallback) {
  const auto pointer = Json::json_pointer(fmt::format("/limits/{}/{}", part, name));
  const auto value = c.json.contains(pointer) ? c.json.at(pointer) : Json();
  return value.is_number() ? value.get<double>() : fallback;
}

// ---- buckets

int64_t num_batches(int64_t visits, int64_t batch_size) {
  return (visits + batch_size - 1) / batch_size;
}

/// What one list of options gives; nothing in it if they are refused.
std::optional<image::Buckets> buckets_of(image::BucketOptions options) {
  options.profile = Profile::kKohya;
  try {
    return image::Buckets(options);
  } catch (const std::invalid_argument&) {
    return std::nullopt;
  }
}

const char* filter_of(image::Size from, image::Size to) {
  if (from == to) return "none";
  const auto kind = image::choose_interpolation(image::Interpolation::kAuto, from, to);
  return kind == image::Interpolation::kArea ? "area" : "lanczos";
}

std::map<int64_t, std::optional<image::Buckets>> check_bucket_lists(const Case& c) {
  std::map<int64_t, std::optional<image::Buckets>> all;
  if (!c.has("buckets.json")) return all;
  Tally tally;
  const auto json = read_object(c.folder / "buckets.json");
  int64_t index = 0;
  for (const auto& golden : json.at("configs")) {
    image::BucketOptions options;
    options.resolution = size_of(golden.at("resolution"));
    options.min_side = golden.at("min"), options.max_side = golden.at("max");
    options.steps = golden.at("steps"), options.no_upscale = golden.at("no_upscale");
    const int64_t number = golden.value("config", index++);
    const auto& buckets = all[number] = buckets_of(options);
    const std::string name = fmt::format("config {}", number);
    if (golden.contains("error") || !buckets) {
      const bool refused = !buckets;
      tally.add(refused == golden.contains("error"), name, refused ? "refused" : "accepted");
      continue;
    }
    Json list = Json::array();
    for (const auto& size : buckets->list()) list.push_back(json_of(size));
    const auto differs = difference({{"min_adjusted", buckets->min_side()},
                                     {"max_adjusted", buckets->max_side()},
                                     {"buckets", list}},
                                    golden);
    tally.add(differs.empty(), name, differs);
  }
  tally.report(*c.report, "buckets.json", "configurations");
  return all;
}

void check_select(const Case& c, const std::map<int64_t, std::optional<image::Buckets>>& all) {
  if (!c.has("select.jsonl")) return;
  Tally tally;
  int64_t number = 0;
  for_each_line(c, "select.jsonl", [&](const Json& golden) {
    const std::string name = fmt::format("line {}", ++number);
    std::optional<image::Buckets> fixed;
    if (golden.contains("fixed")) {
      image::BucketOptions options;
      options.resolution = size_of(golden["fixed"]), options.enabled = false;
      fixed = buckets_of(options);
    } else if (const auto it = all.find(golden.at("config")); it != all.end()) {
      fixed = it->second;
    }
    if (!fixed) return tally.add(false, name, "no such configuration");
    const auto picture = size_of(golden.at("wh"));
    try {
      const auto p = fixed->place(picture);
      const auto differs = difference({{"bucket", json_of(p.bucket)},
                                       {"resized", json_of(p.resized)},
                                       {"crop_xy", {p.crop_x, p.crop_y}},
                                       {"filter", filter_of(picture, p.resized)}},
                                      golden);
      const bool accepts = !golden.contains("error");
      tally.add(accepts && differs.empty(), name, accepts ? differs : "accepted");
    } catch (const InputError& error) {
      tally.add(golden.contains("error"), name, error.what());
    }
  });
  tally.report(*c.report, "select.jsonl");
}

// ---- captions

/// Draws written down beforehand.
class Script : public dataset::Draws {
 public:
  explicit Script(Json draws) : draws_(std::move(draws)) {}
  bool chance(double probability) override {
    return next("random").at("random").get<double>() < probability;
  }
  size_t choice(size_t n) override {
    const auto draw = next("choice");
    if (draw.at("of").get<size_t>() != n)
      throw std::runtime_error(fmt::format("a choice of {}, golden of {}", n, draw["of"].dump()));
    return draw.at("choice");
  }
  std::vector<size_t> shuffle(size_t n) override {
    const auto order = next("shuffle").at("shuffle").get<std::vector<size_t>>();
    if (order.size() != n) throw std::runtime_error(fmt::format("a shuffle of {}", n));
    return order;
  }
  bool used_up() const { return at_ == draws_.size(); }

 private:
  Json next(const char* kind) {
    if (at_ == draws_.size() || !draws_[at_].contains(kind))
      throw std::runtime_error(fmt::format("draws a {} that is not recorded", kind));
    return draws_[at_++];
  }
  Json draws_;
  size_t at_ = 0;
};

dataset::CaptionOptions caption_options(const Json& line) {
  dataset::CaptionOptions o;
  o.prefix = line.value("caption_prefix", ""), o.suffix = line.value("caption_suffix", "");
  o.separator = line.value("caption_separator", ",");
  o.secondary_separator = line.value("secondary_separator", "");
  o.keep_tokens_separator = line.value("keep_tokens_separator", "");
  o.keep_tokens = line.value("keep_tokens", 0);
  o.shuffle = line.value("shuffle_caption", false);
  o.wildcards = line.value("enable_wildcard", false);
  o.tag_dropout_rate = line.value("caption_tag_dropout_rate", 0.0);
  o.dropout_rate = line.value("caption_dropout_rate", 0.0);
  o.dropout_every_n_epochs = line.value("caption_dropout_every_n_epochs", 0);
  o.token_warmup_min = line.value("token_warmup_min", 1);
  o.token_warmup_step = line.value("token_warmup_step", 0.0);
  return o;
}

// ---- pictures

image::Rgb rgb_of(const safetensors::Tensor& t) {
  if (t.shape.size() != 3 || t.shape[2] != 3 ||
      t.bytes.size() != static_cast<size_t>(3 * t.shape[0] * t.shape[1]))
    throw InputError(fmt::format("tensor {}: not u8 [height, width, 3]", printable(t.name)));
  const auto* bytes = reinterpret_cast<const uint8_t*>(t.bytes.data());
  return {{t.shape[1], t.shape[0]}, {bytes, bytes + t.bytes.size()}};
}

struct PixelErrors {
  int max = 0;
  double mean = 0;
};
PixelErrors errors_of(const image::Rgb& got, const image::Rgb& golden) {
  PixelErrors out;
  for (size_t i = 0; i < got.data.size(); ++i) {
    const int error = std::abs(int{got.data[i]} - int{golden.data[i]});
    out.max = std::max(out.max, error), out.mean += error;
  }
  out.mean /= static_cast<double>(std::max<size_t>(1, got.data.size()));
  return out;
}

/// Whether the mean of each colour is what was recorded, to four decimals, within `tolerance`.
bool has_mean(const image::Rgb& picture, const Json& mean, double tolerance) {
  for (size_t c = 0; c < 3; ++c) {
    double sum = 0;
    for (size_t i = c; i < picture.data.size(); i += 3) sum += picture.data[i];
    const double golden = mean.at(c);
    if (!(std::abs(sum / static_cast<double>(picture.data.size() / 3) - golden) <=
          tolerance + 1e-4))
      return false;
  }
  return true;
}

std::string hash_of(const image::Rgb& picture) {
  return to_hex(sha256(std::as_bytes(std::span(picture.data))));
}

/// PNG with 16 bits a colour, of which Pillow keeps the high byte.
bool is_wide_colour(std::string_view file) {
  return file.starts_with("\x89PNG") && file.size() > 25 && file[24] == 16 && file[25] != 0;
}

struct PictureLimits {
  double max = 0, mean = 0;
};

/// One form of a picture: as sd-scripts or a careful reader decodes it.
void check_form(const Case& c,
                const std::string& name,
                const Json& golden,
                std::string_view file,
                const image::DecodeOptions& options,
                const safetensors::Tensor* pixels,
                const PictureLimits& within) {
  image::Rgb got;
  try {
    got = image::decode(as_bytes(file), options);
  } catch (const InputError& error) {
    return c.report->verdict(name, false, fmt::format("refused: {}", first_line(error.what())));
  }
  const image::Size size{golden.at("width"), golden.at("height")},
      head = image::read_header(as_bytes(file)).decoded_size(options.profile);
  if (got.size != size || head != size) {
    return c.report->verdict(name,
                             false,
                             fmt::format("{}x{}, its head {}x{}, golden {}x{}",
                                         got.size.width,
                                         got.size.height,
                                         head.width,
                                         head.height,
                                         size.width,
                                         size.height));
  }
  const std::string sha256 = golden.at("sha256");
  if (golden.contains("mean") && !has_mean(got, golden["mean"], within.mean))
    return c.report->verdict(name, false, "another mean");
  if (pixels == nullptr) {
    if (within.max > 0)  // not to the bit, and nothing else to compare with
      return c.report->verdict(name, true, fmt::format("mean within {}", within.mean));
    const bool same = hash_of(got) == sha256;
    return c.report->verdict(name, same, same ? "exact" : "another SHA-256");
  }
  const auto wanted = rgb_of(*pixels);
  if (wanted.size != size || hash_of(wanted) != sha256)
    return c.report->verdict(name, false, "its SHA-256 and its tensor do not agree");
  if (golden.contains("mean") && !has_mean(wanted, golden["mean"], 0))
    return c.report->verdict(name, false, "its mean and its tensor do not agree");
  const auto errors = errors_of(got, wanted);
  c.report->verdict(
      name,
      errors.max <= within.max && errors.mean <= within.mean,
      fmt::format(
          "max {} of {}  mean {:.3f} of {}", errors.max, within.max, errors.mean, within.mean));
}

void check_picture(const Case& c, const Json& golden, const safetensors::File* pixels) {
  const std::string name = golden.at("file");
  if (!c.has(name)) return;
  const std::string file = read_file(c.folder / name);
  if (golden.contains("bytes") && golden["bytes"] != file.size())
    return c.report->verdict(
        name, false, fmt::format("{} bytes, golden {}", file.size(), golden["bytes"].dump()));
  if (golden.value("refuse", false)) {
    for (const auto profile : {Profile::kDefault, Profile::kKohya}) {
      std::string note = "accepted";
      try {
        image::decode(as_bytes(file), {profile});
      } catch (const InputError& error) {
        note = fmt::format("refused: {}", first_line(error.what()));
      }
      c.report->verdict(
          name + (profile == Profile::kKohya ? " kohya" : " default"), note != "accepted", note);
    }
    return;
  }
  const bool lossless = golden.at("lossless");
  PictureLimits within;
  if (!lossless) within = {limit_or(c, "lossy", "max", 3), limit_or(c, "lossy", "mean", 0.5)};
  if (lossless && is_wide_colour(file))
    within = {limit_or(c, "sixteen", "max", 1), limit_or(c, "sixteen", "mean", 1)};
  constexpr std::array<uint8_t, 3> kBlack{0, 0, 0};
  const std::pair<const char*, image::DecodeOptions> kForms[] = {
      {"kohya", {.profile = Profile::kKohya}},
      {"proper", {}},
      {"over_white", {}},
      {"over_black", {.background = kBlack}}};
  for (const auto& [form, options] : kForms) {
    if (!golden.contains(form)) continue;
    const auto find = [&](const std::string& key) {
      return pixels == nullptr ? nullptr : pixels->find(key);
    };
    const auto* tensor = find(fmt::format("{}/{}", form, name));
    if (tensor == nullptr) tensor = find("kohya/" + name);  // kept only where it differs
    check_form(c, fmt::format("{} {}", name, form), golden[form], file, options, tensor, within);
  }
  const auto header = image::read_header(as_bytes(file));
  const std::string container = golden.value("container", "");
  if (golden.contains("frames") &&  // pages of a TIFF are no animation
      (container == "GIF" || container == "PNG" || container == "WEBP")) {
    const bool several = golden["frames"] > 1;
    c.report->verdict(
        name + " frames", header.animated == several, header.animated ? "several" : "one");
  }
  if (golden.contains("exif_orientation")) {
    const auto& stored = golden["exif_orientation"];
    const bool valid = stored.is_number_integer() && stored >= 1 && stored <= 8;
    c.report->verdict(name + " exif_orientation",
                      header.orientation == (valid ? stored.get<int>() : 1),
                      fmt::format("{}, golden {}", header.orientation, stored.dump()));
  }
}

// ---- scaling

void check_scaling(const Case& c, const Json& golden, const safetensors::File& tensors) {
  const auto id = golden.at("id").dump();
  const auto* source = tensors.find(id + "/src");
  if (source == nullptr) return;
  const auto picture = rgb_of(*source);
  const auto resized = size_of(golden.at("resized")), bucket = size_of(golden.at("bucket"));
  const Json described{{"src", json_of(picture.size)}, {"rule", filter_of(picture.size, resized)}};
  const auto differs = difference(described, golden);
  c.report->verdict(id + "/rule", differs.empty(), differs);
  // how far each may be off: builds of OpenCV differ by one in cubic, the rest is equal to the bit
  const auto compare = [&](const std::string& name, const image::Rgb& got, double fallback) {
    const auto* t = tensors.find(id + "/" + name);
    if (t == nullptr) return;
    const auto wanted = rgb_of(*t);
    const double limit = limit_or(c, name.c_str(), "max", fallback);
    if (got.size != wanted.size) return c.report->verdict(id + "/" + name, false, "another size");
    const int max = errors_of(got, wanted).max;
    c.report->verdict(id + "/" + name, max <= limit, fmt::format("max {} of {}", max, limit));
  };
  const image::Placement placement{
      resized, bucket, (resized.width - bucket.width) / 2, (resized.height - bucket.height) / 2};
  const auto out = image::place(picture, placement, image::Interpolation::kAuto);
  compare("out", out, 0);
  if (golden.contains("out_mean"))
    c.report->verdict(id + "/out_mean",
                      has_mean(out, golden["out_mean"], limit_or(c, "out_mean", "max", 0)),
                      golden["out_mean"].dump());
  const std::pair<const char*, image::Interpolation> kFilters[] = {
      {"cv2_linear", image::Interpolation::kLinear},
      {"cv2_cubic", image::Interpolation::kCubic},
      {"cv2_area", image::Interpolation::kArea},
      {"pil_lanczos", image::Interpolation::kLanczos},
      {"pil_box", image::Interpolation::kBox}};
  for (const auto& [name, kind] : kFilters) {
    if (tensors.find(id + "/" + name) == nullptr) continue;
    compare(
        name, image::resize(picture, resized, kind), kind == image::Interpolation::kCubic ? 1 : 0);
  }
  if (const auto* t = tensors.find(id + "/chw_float")) {
    std::vector<float> pixels(out.data.size());
    image::to_pixels(out, pixels);
    const bool same = t->bytes.size() == pixels.size() * sizeof(float) &&
                      std::memcmp(pixels.data(), t->bytes.data(), t->bytes.size()) == 0;
    c.report->verdict(id + "/chw_float", same, same ? "exact" : "not equal");
  }
}

// ---- dataset files

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
  if (const auto text = difference(ours, golden); !text.empty()) return text;
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
                    golden);
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

void check_buckets(const Case& c) {
  check_select(c, check_bucket_lists(c));
  if (!c.has("batches.json")) return;
  Tally tally;
  const auto json = read_object(c.folder / "batches.json");
  for (const auto& golden : json.at("cases")) {
    int64_t batches = 0;
    for (const int64_t count : golden.at("bucket_counts"))
      batches += num_batches(count, golden.at("batch_size"));
    tally.add(batches == golden.at("batches"), golden.dump(), fmt::format("{} batches", batches));
  }
  tally.report(*c.report, "batches.json", "cases");
}

void check_captions(const Case& c) {
  if (c.has("captions.jsonl")) {
    Tally tally;
    for_each_line(c, "captions.jsonl", [&](const Json& line) {
      const std::string name = "id " + line.value("id", Json()).dump();
      Script script(line.value("draws", Json::array()));
      const dataset::CaptionTime time{line.value("current_epoch", int64_t{1}),
                                      line.value("current_step", int64_t{0}),
                                      line.value("max_train_steps", int64_t{0})};
      try {
        const auto got = dataset::process_caption(
            line.at("caption").get<std::string>(), caption_options(line), time, script);
        const bool same = got == line.at("result").get<std::string>() && script.used_up();
        tally.add(same, name, script.used_up() ? Json(got).dump() : "draws are left");
      } catch (const std::runtime_error& error) {
        tally.add(false, name, error.what());
      }
    });
    tally.report(*c.report, "captions.jsonl");
  }
  if (!c.has("validation_split.json")) return;
  Tally tally;
  const auto json = read_object(c.folder / "validation_split.json");
  for (const auto& golden : json.at("cases")) {
    std::vector<Sha256Digest> items;
    for (int64_t i = 0; i < golden.at("n"); ++i)
      items.push_back(dataset::item_digest(0, std::to_string(i)));
    const auto members = dataset::validation_members(items, golden.at("split"), 7);
    const auto held_out = std::count(members.begin(), members.end(), true),
               train = std::ssize(members) - held_out;
    // the reference rounds both parts on their own, and then trains on one that it holds out
    const auto rounded =
        std::llrint(static_cast<double>(members.size()) * golden["split"].get<double>());
    const bool disjoint = train + rounded <= std::ssize(members);
    const bool same = train == golden.at("train") &&
                      golden.value("disjoint", disjoint) == disjoint &&
                      golden.at("validation") == (disjoint ? held_out : rounded);
    tally.add(same,
              fmt::format("n {} split {}", golden["n"].dump(), golden["split"].dump()),
              fmt::format("{} and {}", train, held_out));
  }
  tally.report(*c.report, "validation_split.json", "splits");
}

void check_images(const Case& c) {
  const auto json = read_object(c.required("expected", "expected.json"));
  std::shared_ptr<const safetensors::File> pixels;
  if (c.has("decoded.safetensors"))
    pixels = safetensors::File::open(c.folder / "decoded.safetensors");
  for (const auto& golden : json.at("images")) check_picture(c, golden, pixels.get());
}

void check_resize(const Case& c) {
  const auto json = read_object(c.required("index", "resize.json"));
  const auto tensors = safetensors::File::open(c.required("tensors", "resize.safetensors"));
  for (const auto& golden : json.at("cases")) check_scaling(c, golden, *tensors);
}

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

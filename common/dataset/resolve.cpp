#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <system_error>
#include <unordered_map>
#include <vector>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/reason.h"
#include "common/core/text.h"
#include "common/dataset/config.h"
#include "common/dataset/dataset.h"

namespace flux::dataset {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr uint64_t kMaxMetadataBytes = uint64_t{2} << 30;

constexpr const char* kMayBeRead = "check its permissions and those of the folders above it";

std::string_view extension_of(std::string_view name) {
  const size_t dot = name.rfind('.');
  return dot == std::string_view::npos ? std::string_view() : name.substr(dot + 1);
}

// Endings of pictures; in profile kohya all letters small, or all capitals.
std::vector<std::string_view> image_extensions(Profile profile) {
  std::vector<std::string_view> out = {"png", "jpg", "jpeg", "webp", "bmp"};
  if (profile == Profile::kDefault) out.insert(out.end(), {"gif", "tif", "tiff"});
  return out;
}

bool is_image_name(std::string_view name, Profile profile) {
  if (name.starts_with('.')) return false;  // hidden: "._x.jpg" of macOS is no picture
  const auto extension = extension_of(name);
  const auto lower = lower_ascii(extension);
  const bool capitals =
      std::none_of(extension.begin(), extension.end(), [](char c) { return c >= 'a' && c <= 'z'; });
  if (profile == Profile::kKohya && extension != lower && !capitals) return false;
  const auto known = image_extensions(profile);
  return std::find(known.begin(), known.end(), lower) != known.end();
}

}  // namespace

// Bytewise sorted. A link to nothing is listed: it fails as an
// item, not silently.
std::vector<std::string> list_images(const fs::path& folder, Profile profile) {
  std::error_code error;
  const bool there = fs::exists(folder, error);
  if (error) throw InputError(show(folder) + ": " + error.message(), kMayBeRead);
  constexpr const char* kHint = "give the folder that holds the images";
  if (!there) throw InputError(show(folder) + ": there is no such folder", kHint);
  if (!fs::is_directory(folder, error))
    throw InputError(show(folder) + ": is a file, not a folder", kHint);
  std::vector<std::string> names;
  fs::directory_iterator entries(folder, error);
  for (; !error && entries != fs::directory_iterator(); entries.increment(error)) {
    const std::string name = entries->path().filename().native();
    std::error_code ignored;
    if (is_image_name(name, profile) && !entries->is_directory(ignored)) names.push_back(name);
  }
  if (error) throw InputError(show(folder) + ": " + error.message(), kMayBeRead);
  std::sort(names.begin(), names.end());
  return names;
}

namespace {

// Text of a member, empty if it is absent. null counts as absent.
std::optional<std::string> text_member(const Json& entry,
                                       const char* name,
                                       const std::string& where) {
  const auto found = entry.find(name);
  if (found == entry.end() || found->is_null()) return std::nullopt;
  if (!found->is_string()) throw InputError(where + ": " + name + " must be text");
  return found->get<std::string>();
}

// caption and tags become one caption. Source: kohya-ss/sd-scripts,
// library/train_util.py (FineTuningDataset).
std::optional<std::string> metadata_caption(const Json& entry,
                                            const Subset& subset,
                                            const std::string& where) {
  auto caption = text_member(entry, "caption", where);
  auto tags = text_member(entry, "tags", where);
  if (!caption) std::swap(caption, tags);
  if (!caption || !tags || tags->empty()) return caption;
  const auto& separator = subset.captions.separator;
  if (!subset.captions.wildcards) return caption->empty() ? tags : *caption + separator + *tags;
  // a random line is chosen later: each gets the tags, which are one line
  std::string flat, out;
  for (const auto& line : split(*tags, '\n')) flat += (flat.empty() ? "" : separator) + line;
  for (const auto& line : split(*caption, '\n')) {
    if (!strip_unicode(line).empty()) out += (out.empty() ? "" : "\n") + line + separator + flat;
  }
  return out.empty() ? flat : out;
}

// The picture that a metadata file means: sd-scripts' tools write names without an ending too.
fs::path picture_of(const fs::path& named, Profile profile) {
  std::error_code ignored;
  if (is_image_name(named.filename().native(), profile) || fs::exists(named, ignored)) return named;
  for (const auto extension : image_extensions(profile)) {
    for (const bool capitals : {false, true}) {
      fs::path file = named;
      file += ".";
      for (const char c : extension) file += capitals ? static_cast<char>(c - 'a' + 'A') : c;
      if (fs::exists(file, ignored)) return file;
    }
  }
  return named;  // fails as an item, by its name
}

// The images that a metadata file names.
std::vector<Image> read_metadata(const Subset& subset, Profile profile) {
  const auto& file = subset.metadata_file;
  const auto extension = lower_ascii(extension_of(file.native()));
  if (extension != "json" && extension != "jsonl") {
    throw InputError(show(file) + ": a metadata file is .json or .jsonl");
  }
  std::error_code error;
  if (!subset.folder.empty() && !fs::is_directory(subset.folder, error))
    throw InputError("image_dir " + show(subset.folder) + ": there is no such folder");
  std::vector<Image> images;
  std::unordered_map<std::string, std::string> named;  // picture -> how the file spells it
  const auto add = [&](const std::string& name, const Json& entry, const std::string& where) {
    if (!entry.is_object()) throw InputError(where + ": must be an object");
    if (name.empty() || name.find('\0') != std::string::npos)
      throw InputError(where + ": no usable image path");
    Image image;
    image.name = name;
    image.file = name;
    if (image.file.is_relative()) {
      if (subset.folder.empty()) {
        throw InputError(where + ": a relative path needs image_dir in the subset",
                         "add image_dir");
      }
      image.file = subset.folder / name;
    } else {
      // what the item is called must not change when everything is moved together
      const auto root = subset.folder.empty() ? file.parent_path() : subset.folder;
      const auto relative =
          image.file.lexically_relative(fs::absolute(root, error).lexically_normal());
      if (!relative.empty() && *relative.begin() != "..") image.name = relative.native();
    }
    image.file = picture_of(image.file, profile);
    const auto [other, is_new] =
        named.try_emplace(fs::absolute(image.file, error).lexically_normal().native(), name);
    if (!is_new) {
      throw InputError(
          where + ": " +
              (other->second == name ? printable(name) + " is named twice"
                                     : fmt::format("'{}' and '{}' name one picture, {}",
                                                   printable(other->second),
                                                   printable(name),
                                                   show(image.file))),
          "name each picture once");
    }
    image.metadata_caption = metadata_caption(entry, subset, where);
    images.push_back(std::move(image));
  };
  const std::string text = read_file(file, kMaxMetadataBytes);
  if (extension == "json") {
    const auto root = parse_json(text, file, 1);
    if (!root.is_object()) throw InputError(show(file) + ": must be an object of image paths");
    for (const auto& [name, entry] : root.items())
      add(name, entry, show(file) + ": " + printable(name));
  } else {
    std::string_view rest = text;
    for (int64_t number = 1; !rest.empty(); ++number) {
      const size_t end = std::min(rest.find('\n'), rest.size());
      const auto line = trim(rest.substr(0, end));
      rest.remove_prefix(std::min(end + 1, rest.size()));
      if (line.empty()) continue;
      const auto where = show(file) + ": line " + std::to_string(number);
      const auto entry = parse_json(line, file, number);
      if (!entry.is_object()) throw InputError(where + ": must be an object");
      const auto name = text_member(entry, "image_path", where);
      if (!name) throw InputError(where + ": image_path is required");
      add(*name, entry, where);
    }
  }
  std::sort(
      images.begin(), images.end(), [](const Image& a, const Image& b) { return a.name < b.name; });
  return images;
}

std::vector<Image> list_folder(const fs::path& folder, Profile profile) {
  std::vector<Image> images;
  for (auto& name : list_images(folder, profile)) {
    Image image;
    image.file = folder / name;
    image.name = std::move(name);
    images.push_back(std::move(image));
  }
  return images;
}

// Errors name the dataset file, the subset and its key, and then the folder or file.
std::vector<Image> list_subset(const Subset& subset, Profile profile) {
  const bool metadata = !subset.metadata_file.empty();
  const auto& source = metadata ? subset.metadata_file : subset.folder;
  try {
    auto images = metadata ? read_metadata(subset, profile) : list_folder(source, profile);
    if (images.empty()) {
      throw InputError(
          show(source) + ": no images in it",
          metadata
              ? "name images in it"
              : fmt::format("images are {}{}",
                            fmt::join(image_extensions(profile), " "),
                            profile == Profile::kKohya ? ", in small letters or capitals" : ""));
    }
    return images;
  } catch (const InputError& error) {
    if (subset.where.empty()) throw;
    const std::string what = error.what();
    const bool named = what.starts_with("image_dir ");
    const bool has_hint = what.find("\n  hint: ") != std::string::npos;
    throw InputError(
        subset.where + ": " +
            (named      ? ""
             : metadata ? "metadata_file "
                        : "image_dir ") +
            what,
        has_hint ? "" : "mend it, or see \"A file\" in docs/datasets.md for what is read");
  }
}

// Images of all subsets, with validation and regularisation worked out dataset by dataset.
void add_images(Resolved& out) {
  for (const auto& dataset : out.datasets) {
    int64_t num_train = 0;
    std::vector<Image> images;
    std::vector<int64_t> reg_repeats;
    for (const auto& subset : out.subsets) {
      if (subset.dataset != dataset.index) continue;
      auto listed = list_subset(subset, out.profile);
      std::vector<Sha256Digest> names;  // so that a picture is held out at all its resolutions
      for (auto& image : listed) {
        image.subset = subset.index;
        image.item = item_digest(subset.index, image.name);
        image.repeats = subset.num_repeats;
        names.push_back(sha256(image.name));
      }
      if (subset.is_reg) {
        reg_repeats.insert(reg_repeats.end(), listed.size(), subset.num_repeats);
      } else {
        const auto held_out =
            validation_members(names, dataset.validation_split, dataset.validation_seed);
        for (size_t i = 0; i < listed.size(); ++i) {
          listed[i].validation = held_out[i];
          if (held_out[i]) listed[i].repeats = 1;
          num_train += held_out[i] ? 0 : subset.num_repeats;
        }
      }
      images.insert(images.end(),
                    std::make_move_iterator(listed.begin()),
                    std::make_move_iterator(listed.end()));
    }
    const auto repeats = regularisation_repeats(reg_repeats, num_train);
    size_t next_reg = 0, unused = 0;
    for (auto& image : images) {
      if (out.subset(image.subset).is_reg && (image.repeats = repeats[next_reg++]) == 0) {
        ++unused;
        continue;
      }
      out.images.push_back(std::move(image));
    }
    if (unused > 0) {
      log::info("{}: {} regularisation {} than needed, left out",
                dataset.where,
                unused,
                unused == 1 ? "image is more" : "images are more");
    }
  }
  const bool any = std::any_of(
      out.images.begin(), out.images.end(), [](const Image& image) { return !image.validation; });
  if (!any) {
    throw InputError(out.source + ": the data set has no images to train on",
                     "num_repeats 0, surplus regularisation images and those held out by "
                     "validation_split do not count");
  }
}

// Throws InputError if that cannot be told: taking another caption then would hide it.
bool is_there(const fs::path& path) {
  std::error_code error;
  const bool there = fs::exists(path, error);
  if (error && error != std::errc::filename_too_long)
    throw InputError(show(path) + ": " + error.message(), kMayBeRead);
  return there;
}

}  // namespace

Json parse_json(std::string_view text, const fs::path& file, int64_t line) {
  try {
    return Json::parse(text);
  } catch (const Json::parse_error& error) {
    const auto before = text.substr(0, std::min(error.byte, text.size()));
    throw InputError(fmt::format("{}: line {}: not JSON: {}",
                                 show(file),
                                 line + std::count(before.begin(), before.end(), '\n'),
                                 json_reason(error.what())));
  } catch (const Json::exception&) {  // a number beyond all bounds
    throw InputError(fmt::format("{}: line {}: not JSON: a value out of range", show(file), line));
  }
}

const Subset& Resolved::subset(int64_t index) const {
  const auto found =
      std::lower_bound(subsets.begin(), subsets.end(), index, [](const Subset& s, int64_t i) {
        return s.index < i;
      });
  if (found == subsets.end() || found->index != index)
    throw std::invalid_argument("Resolved::subset: no such subset");
  return *found;
}

Resolved resolve_file(const fs::path& toml,
                      Profile profile,
                      const std::vector<Fallback>& fallbacks,
                      const fs::path& base,
                      bool pixels) {
  auto resolved = read_config(toml, profile, fallbacks, base, pixels);
  add_images(resolved);
  return resolved;
}

Resolved resolve_folder(const fs::path& folder, int64_t width, int64_t height, Profile profile) {
  Resolved out;
  out.source = show(folder);
  out.profile = profile;
  out.datasets.emplace_back();
  Subset subset;
  subset.folder = folder;
  subset.caption_extensions = {".txt", ".caption"};
  auto& p = subset.pixels;
  p.width = width, p.height = height;
  p.buckets = true;
  p.min_side = 32, p.max_side = 4 * std::max(width, height), p.steps = 16;
  out.subsets.push_back(std::move(subset));
  add_images(out);
  return out;
}

void refuse_uncacheable(const Resolved& resolved) {
  for (const auto& d : resolved.datasets) {
    if (d.network_multiplier != 1) {
      throw InputError(d.where + ": option network_multiplier: not supported",
                       "remove it, or set it to 1.0");
    }
  }
  for (const auto& s : resolved.subsets) {
    const auto refuse =
        [&](const std::string& option, const std::string& why, const std::string& what_to_do) {
          const auto& where = s.where.empty() ? resolved.source : s.where;
          throw InputError(where + ": option " + option + ": " + why, what_to_do);
        };
    const std::string pixels =
        "changes the pixels at every visit, so that latents cannot be cached";
    if (s.color_aug) refuse("color_aug", pixels, "set color_aug = false");
    if (s.random_crop) refuse("random_crop", pixels, "set random_crop = false; crops are central");
    if (s.face_crop) refuse("face_crop_aug_range", pixels, "remove it");
    if (s.custom_attributes) refuse("custom_attributes", "not supported", "remove it");
    if (s.captions.token_warmup_step > 0) {
      refuse("token_warmup_step",
             "changes captions with the training step, so that they cannot be cached",
             "remove it");
    }
    if (s.pixels.buckets && s.pixels.steps % 16 != 0) {
      refuse("bucket_reso_steps",
             std::to_string(s.pixels.steps) + " is not a multiple of 16, which FLUX needs",
             "use 16, 32 or 64");
    }
    if (!s.pixels.buckets && (s.pixels.width % 16 != 0 || s.pixels.height % 16 != 0)) {
      refuse("resolution",
             fmt::format("the sides of {}x{} are not multiples of 16, which FLUX needs",
                         s.pixels.width,
                         s.pixels.height),
             "change it, or set enable_bucket = true");
    }
  }
}

std::optional<std::string> read_caption(const Resolved& resolved, const Image& image) {
  const auto& subset = resolved.subset(image.subset);
  if (!subset.metadata_file.empty()) return image.metadata_caption;
  const auto& name = image.file.native();
  const auto slash = name.rfind('/') + 1;  // 0 if there is none
  const std::string stem = name.substr(0, std::max(name.rfind('.'), slash));
  std::vector<std::string> stems = {stem};
  // "x_10_20_30_40", a face cut out of x, may share x's caption
  size_t end = stem.size();
  for (int i = 0; i < 4 && end != std::string::npos; ++i)
    end = end == 0 ? std::string::npos : stem.rfind('_', end - 1);
  if (end != std::string::npos && end >= slash) stems.push_back(stem.substr(0, end));
  for (const auto& base : stems) {
    for (const auto& extension : subset.caption_extensions) {
      const fs::path file = base + extension;
      if (is_there(file))
        return read_caption_file(file, subset.captions.wildcards, resolved.profile);
    }
  }
  if (subset.has_class_tokens) return subset.class_tokens;
  return std::nullopt;
}

}  // namespace flux::dataset

#include "common/dataset/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <sstream>
#include <system_error>
#include <toml.hpp>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/reason.h"
#include "common/core/text.h"

namespace flux::dataset {
namespace {

constexpr uint64_t kMaxFileBytes = 4 << 20;
constexpr int kMaxNesting = 64;

enum class Type { kBool, kInt, kFloat, kNumber, kText, kSize, kRange, kTable, kInterpolation };

// Where a key may stand.
constexpr unsigned kGeneral = 1, kFolderDataset = 2, kMetadataDataset = 4, kFolderSubset = 8,
                   kMetadataSubset = 16;
constexpr unsigned kDataset = kFolderDataset | kMetadataDataset,
                   kSubsets = kFolderSubset | kMetadataSubset,
                   kFolders = kGeneral | kFolderDataset | kFolderSubset,
                   kAnywhere = kGeneral | kDataset | kSubsets;

struct Key {
  const char* name;
  Type type;
  unsigned where;
  double low = -1e300, high = 1e300;
};

// Source: kohya-ss/sd-scripts, library/config_util.py.
constexpr Key kKeys[] = {
    {"batch_size", Type::kInt, kGeneral | kDataset, 1},
    {"resolution", Type::kSize, kGeneral | kDataset, 1, 65535},
    {"enable_bucket", Type::kBool, kGeneral | kDataset},
    {"min_bucket_reso", Type::kInt, kGeneral | kDataset, 1, 65535},
    {"max_bucket_reso", Type::kInt, kGeneral | kDataset, 1, 65535},
    {"bucket_reso_steps", Type::kInt, kGeneral | kDataset, 1, 65535},
    {"bucket_no_upscale", Type::kBool, kGeneral | kDataset},
    {"network_multiplier", Type::kFloat, kGeneral | kDataset},
    {"validation_split", Type::kFloat, kGeneral | kDataset, 0, 1},
    {"validation_seed", Type::kInt, kGeneral | kDataset},
    {"resize_interpolation", Type::kInterpolation, kAnywhere},
    {"num_repeats", Type::kInt, kAnywhere, 0, 1e9},
    {"flip_aug", Type::kBool, kAnywhere},
    {"color_aug", Type::kBool, kAnywhere},
    {"random_crop", Type::kBool, kAnywhere},
    {"face_crop_aug_range", Type::kRange, kAnywhere},
    {"shuffle_caption", Type::kBool, kAnywhere},
    {"keep_tokens", Type::kInt, kAnywhere, 0},
    {"keep_tokens_separator", Type::kText, kAnywhere},
    {"secondary_separator", Type::kText, kAnywhere},
    {"caption_separator", Type::kText, kAnywhere},
    {"enable_wildcard", Type::kBool, kAnywhere},
    {"token_warmup_min", Type::kInt, kAnywhere, 0},
    {"token_warmup_step", Type::kNumber, kAnywhere, 0},
    {"caption_prefix", Type::kText, kAnywhere},
    {"caption_suffix", Type::kText, kAnywhere},
    {"custom_attributes", Type::kTable, kAnywhere},
    {"caption_dropout_rate", Type::kNumber, kAnywhere, 0, 1},
    {"caption_dropout_every_n_epochs", Type::kInt, kAnywhere, 0},
    {"caption_tag_dropout_rate", Type::kNumber, kAnywhere, 0, 1},
    {"caption_extension", Type::kText, kFolders},
    {"class_tokens", Type::kText, kFolders},
    {"cache_info", Type::kBool, kFolders},
    {"image_dir", Type::kText, kSubsets},
    {"metadata_file", Type::kText, kMetadataSubset},
    {"is_reg", Type::kBool, kFolderSubset},
    {"alpha_mask", Type::kBool, kSubsets},
    {"conditioning_data_dir", Type::kText, kSubsets},
};

constexpr const char* kInterpolations[] = {
    "lanczos", "area", "bilinear", "linear", "bicubic", "cubic", "nearest", "box"};

const Key* find_key(std::string_view name) {
  const auto found = std::find_if(
      std::begin(kKeys), std::end(kKeys), [&](const Key& k) { return k.name == name; });
  return found == std::end(kKeys) ? nullptr : &*found;
}

/// Says where in the file something is wrong: "set.toml: [[datasets]] 1, subset 2: key resolution".
class Place {
 public:
  explicit Place(std::string text) : text_(std::move(text)) {}
  Place in(const std::string& part) const { return Place(text_ + ": " + part); }
  const std::string& text() const { return text_; }
  [[noreturn]] void fail(const std::string& what, const std::string& hint = {}) const {
    throw InputError(text_ + ": " + what,
                     hint.empty() ? "docs/datasets.md has the keys and what they may be" : hint);
  }

 private:
  std::string text_;
};

std::string type_name(Type type) {
  switch (type) {
    case Type::kBool:
      return "true or false";
    case Type::kInt:
      return "a whole number";
    case Type::kFloat:
      return "a number with a decimal point";
    case Type::kNumber:
      return "a number";
    case Type::kText:
      return "text in quotes";
    case Type::kSize:
      return "a whole number or [width, height]";
    case Type::kRange:
      return "a pair of numbers";
    case Type::kTable:
      return "a table";
    case Type::kInterpolation:
      return "text in quotes";
  }
  return {};
}

/// A value as a message shows it.
std::string shown(const toml::value& value) {
  constexpr size_t kMaxText = 60, kMaxElements = 4;
  if (value.is_string()) return "\"" + printable(shortened(value.as_string().str, kMaxText)) + "\"";
  if (value.is_boolean()) return value.as_boolean() ? "true" : "false";
  if (value.is_integer()) return std::to_string(value.as_integer());
  if (value.is_floating()) {
    const std::string text = fmt::format("{}", value.as_floating());
    return text.find_first_not_of("-0123456789") == std::string::npos ? text + ".0" : text;
  }
  if (value.is_table()) return "a table";
  if (!value.is_array()) return "a date or time";
  const auto& list = value.as_array();
  if (list.size() > kMaxElements) return fmt::format("a list of {}", list.size());
  std::vector<std::string> parts;
  for (const auto& element : list) parts.push_back(element.is_array() ? "a list" : shown(element));
  return "[" + join_some(parts) + "]";
}

bool has_type(const toml::value& value, Type type) {
  const auto list_of_two = [&](auto is) {
    return value.is_array() && value.as_array().size() == 2 && is(value.as_array()[0]) &&
           is(value.as_array()[1]);
  };
  const auto is_int = [](const toml::value& v) { return v.is_integer(); };
  const auto is_number = [](const toml::value& v) { return v.is_integer() || v.is_floating(); };
  switch (type) {
    case Type::kBool:
      return value.is_boolean();
    case Type::kInt:
      return value.is_integer();
    case Type::kFloat:
      return value.is_floating();
    case Type::kNumber:
      return is_number(value);
    case Type::kText:
    case Type::kInterpolation:
      return value.is_string();
    case Type::kSize:
      return value.is_integer() || list_of_two(is_int);
    case Type::kRange:
      return list_of_two(is_number);
    case Type::kTable:
      return value.is_table();
  }
  return false;
}

double as_number(const toml::value& value) {
  return value.is_integer() ? static_cast<double>(value.as_integer()) : value.as_floating();
}

void check_value(const toml::value& value, const Key& key, const Place& place) {
  if (!has_type(value, key.type))
    place.fail("must be " + type_name(key.type) + ", not " + shown(value));
  const auto check_range = [&](const toml::value& v) {
    const double number = as_number(v);
    if (std::isfinite(number) && number >= key.low && number <= key.high) return;
    const bool open = key.high > 1e200;
    place.fail(
        fmt::format("{} is out of range, which is {}{}", number, open ? "at least " : "", key.low) +
        (open ? "" : fmt::format(" to {}", key.high)));
  };
  if (key.type == Type::kInt || key.type == Type::kFloat || key.type == Type::kNumber)
    check_range(value);
  if (key.type == Type::kSize) {
    if (value.is_integer()) return check_range(value);
    for (const auto& side : value.as_array()) check_range(side);
  }
  if (key.type == Type::kText && value.as_string().str.find('\0') != std::string::npos)
    place.fail("holds a NUL character");
  if (key.type == Type::kInterpolation) {
    const auto& name = value.as_string().str;
    if (std::find(std::begin(kInterpolations), std::end(kInterpolations), name) ==
        std::end(kInterpolations)) {
      place.fail("'" + printable(name) +
                 "' is none of lanczos, area, bilinear, linear, bicubic, cubic, nearest, box");
    }
  }
}

// The sections in which a key can stand.
std::string sections_of(unsigned where) {
  std::vector<std::string> names;
  if (where & kGeneral) names.push_back("[general]");
  if (where & kDataset) names.push_back("[[datasets]]");
  if (where & kSubsets) names.push_back("[[datasets.subsets]]");
  return join_some(names);
}

// Checks names and types of one table. `where` is its level; `skip` names the tables below it.
void check_table(const toml::value& value,
                 unsigned where,
                 const Place& place,
                 const char* skip = nullptr) {
  std::vector<std::string> known;
  if (skip != nullptr) known.push_back(skip);
  for (const auto& key : kKeys) {
    if (key.where & where) known.push_back(key.name);
  }
  for (const auto& [name, element] : value.as_table()) {
    if (skip != nullptr && name == skip) continue;
    const Key* key = find_key(name);
    if (key == nullptr || (key->where & where) == 0) {
      if (key != nullptr) {
        const bool other_kind = (where & kDataset && key->where & kDataset) ||
                                (where & kSubsets && key->where & kSubsets);
        place.fail("key " + name + " cannot stand here",
                   !other_kind ? "it belongs in " + sections_of(key->where)
                   : (where & (kMetadataDataset | kMetadataSubset))
                       ? "subsets with metadata_file take no " + name
                       : name + " belongs to subsets with metadata_file");
      }
      const auto near = nearest_name(name, known);
      place.fail("unknown key " + printable(name), near ? "did you mean " + *near + "?" : "");
    }
    check_value(element, *key, place.in("key " + name));
  }
}

// A file that nests deeper than any dataset file would exhaust the parser's stack.
void check_nesting(std::string_view text, const Place& place) {
  int depth = 0, dots = 0;
  for (const char c : text) {
    if (c == '[' || c == '{') ++depth;
    if (c == ']' || c == '}') depth = std::max(depth - 1, 0);
    dots = c == '\n' ? 0 : dots + (c == '.' ? 1 : 0);
    if (depth > kMaxNesting || dots > 4 * kMaxNesting) place.fail("nested too deeply");
  }
}

toml::value parse(const std::string& text, const std::string& name, const Place& place) {
  check_nesting(text, place);
  std::istringstream stream(text);
  try {
    return toml::parse(stream, name);
  } catch (const toml::exception& error) {
    const std::string_view said = error.what();
    place.fail(fmt::format("line {}: not TOML: {}", error.location().line(), toml_reason(said)),
               said.find("parse_basic_string") != std::string_view::npos
                   ? "a backslash in \"...\" is an escape; paths with it go in '...'"
                   : "");
  } catch (const std::exception& error) {
    place.fail("not TOML: " + toml_reason(error.what()));
  }
}

// A dataset file in JSON, as sd-scripts takes it too, has the same tables and keys.
toml::value from_json(const nlohmann::json& json, const Place& place) {
  if (json.is_object()) {
    toml::table table;
    for (const auto& [name, member] : json.items())
      table.emplace(name, from_json(member, place.in(printable(name))));
    return table;
  }
  if (json.is_array()) {
    toml::array list;
    for (const auto& element : json) list.push_back(from_json(element, place));
    return list;
  }
  if (json.is_string()) return json.get<std::string>();
  if (json.is_boolean()) return json.get<bool>();
  if (json.is_number_float()) return json.get<double>();
  if (json.is_null()) place.fail("null is no value", "leave the key out");
  if (json.is_number_unsigned() && json.get<uint64_t>() > INT64_MAX)
    place.fail(json.dump() + " is out of range");
  return json.get<int64_t>();
}

toml::value parse_file(const std::string& text,
                       const std::filesystem::path& file,
                       const Place& place) {
  if (lower_ascii(file.extension().native()) != ".json") return parse(text, file.native(), place);
  check_nesting(text, place);
  const auto json = parse_json(text, file);
  if (!json.is_object()) place.fail("must be an object with \"datasets\"");
  return from_json(json, place);
}

/// What the command line gives, and which of it was needed.
struct CommandLine {
  toml::value values;
  std::set<std::string> used;
};

/// One table of the file, and where it stands.
struct Level {
  const toml::value* table;
  Place place;
};

/// One key looked up from the subset outwards.
class Scope {
 public:
  Scope(std::vector<Level> levels, CommandLine& command_line)
      : levels_(std::move(levels)), command_line_(command_line) {}

  const toml::value* find(const char* name) const {
    if (const auto* level = level_of(name)) return &level->table->at(name);
    if (!command_line_.values.contains(name)) return nullptr;
    command_line_.used.insert(name);
    return &command_line_.values.at(name);
  }
  /// The table of the file that gives the key; null if none does.
  const Level* level_of(const char* name) const {
    const auto found = std::find_if(
        levels_.begin(), levels_.end(), [&](const Level& l) { return l.table->contains(name); });
    return found == levels_.end() ? nullptr : &*found;
  }
  bool flag(const char* name) const {
    const auto* v = find(name);
    return v != nullptr && v->as_boolean();
  }
  int64_t integer(const char* name, int64_t otherwise) const {
    const auto* v = find(name);
    return v == nullptr ? otherwise : v->as_integer();
  }
  double number(const char* name, double otherwise) const {
    const auto* v = find(name);
    return v == nullptr ? otherwise : as_number(*v);
  }
  std::string text(const char* name, const char* otherwise = "") const {
    const auto* v = find(name);
    return v == nullptr ? otherwise : v->as_string().str;
  }

 private:
  std::vector<Level> levels_;
  CommandLine& command_line_;
};

/// Keys that are written down but change nothing. A key of [general] is in vain only if it is so
/// for each subset that takes its value.
class Vain {
 public:
  /// `name` as `scope` sees it has an effect or not; `why` says what it needs. A value that asks
  /// for nothing (false, 0, "") is passed over.
  void note(const Scope& scope, const char* name, bool has_effect, const char* why) {
    const auto* level = scope.level_of(name);
    if (level == nullptr) return;
    const auto& value = level->table->at(name);
    const bool asks = value.is_boolean()   ? value.as_boolean()
                      : value.is_integer() ? value.as_integer() != 0
                      : value.is_string()  ? !value.as_string().str.empty()
                                           : true;
    if (!asks) return;
    const auto [at, is_new] = numbers_.try_emplace(&value, keys_.size());
    if (is_new) keys_.push_back({level->place.in(std::string("key ") + name).text(), why, false});
    keys_[at->second].has_effect |= has_effect;
  }
  void warn() const {
    for (const auto& key : keys_) {
      if (!key.has_effect) log::warn("{}: has no effect: {}", key.where, key.why);
    }
  }

 private:
  struct Key {
    std::string where;
    const char* why;
    bool has_effect;
  };
  std::map<const toml::value*, size_t> numbers_;
  std::vector<Key> keys_;
};

// What a subset's keys need to have an effect.
void note_vain(const Scope& scope, const Subset& s, const Dataset& d, Profile profile, Vain& vain) {
  const auto& c = s.captions;
  const bool tags = c.shuffle || c.tag_dropout_rate > 0 || c.token_warmup_step > 0,
             metadata = !s.metadata_file.empty();
  vain.note(scope,
            "keep_tokens",
            tags,
            "tags are moved or dropped only with shuffle_caption or caption_tag_dropout_rate");
  vain.note(
      scope,
      "keep_tokens_separator",
      tags,
      "tags are moved or dropped only with shuffle_caption or caption_tag_dropout_rate; without "
      "them the separator stays in the captions");
  vain.note(scope,
            "caption_separator",
            tags || metadata || !c.secondary_separator.empty() || c.separator == ",",
            "captions are split only with shuffle_caption or caption_tag_dropout_rate");
  vain.note(scope, "token_warmup_min", c.token_warmup_step > 0, "it needs token_warmup_step");
  vain.note(scope, "validation_seed", d.validation_split > 0, "it needs validation_split");
  for (const char* name :
       {"min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"}) {
    const bool limit = std::string_view(name).ends_with("_reso"),
               ignored = limit && s.pixels.no_upscale && profile == Profile::kKohya;
    vain.note(scope,
              name,
              s.pixels.buckets && !ignored,
              s.pixels.buckets ? "bucket_no_upscale leaves it out, as in sd-scripts"
                               : "it needs enable_bucket = true");
  }
  for (const char* name : {"caption_extension", "class_tokens"})
    vain.note(scope, name, !metadata, "captions come from metadata_file");
  vain.note(scope, "cache_info", false, "sizes are not kept: no picture is read twice");
}

PixelOptions read_pixels(const Scope& scope, const Place& place, bool required) {
  PixelOptions p;
  p.buckets = scope.flag("enable_bucket");
  const auto* resolution = scope.find("resolution");
  if (resolution == nullptr && !required) return p;
  if (resolution == nullptr)
    place.fail("resolution is required", "add 'resolution = 1024' to [general] or [[datasets]]");
  if (resolution->is_integer()) {
    p.width = p.height = resolution->as_integer();
  } else {
    p.width = resolution->as_array()[0].as_integer(),
    p.height = resolution->as_array()[1].as_integer();
  }
  p.min_side = scope.integer("min_bucket_reso", p.min_side);
  p.max_side = scope.integer("max_bucket_reso", p.max_side);
  p.steps = scope.integer("bucket_reso_steps", p.steps);
  p.no_upscale = scope.flag("bucket_no_upscale");
  p.interpolation = scope.text("resize_interpolation");
  if (!p.buckets) return p;
  const int64_t low = p.min_side - p.min_side % p.steps,
                high = (p.max_side + p.steps - 1) / p.steps * p.steps;
  const std::string size = fmt::format("{}x{}", p.width, p.height);
  if (std::min(p.width, p.height) < low) {
    place.fail(fmt::format("min_bucket_reso {} is above the resolution {}", p.min_side, size),
               "lower min_bucket_reso");
  }
  if (std::max(p.width, p.height) > high) {
    place.fail(fmt::format("max_bucket_reso {} is below the resolution {}", p.max_side, size),
               "raise max_bucket_reso");
  }
  return p;
}

CaptionOptions read_captions(const Scope& scope) {
  CaptionOptions c;
  c.prefix = scope.text("caption_prefix");
  c.suffix = scope.text("caption_suffix");
  c.separator = scope.text("caption_separator", ",");
  c.secondary_separator = scope.text("secondary_separator");
  c.keep_tokens_separator = scope.text("keep_tokens_separator");
  c.keep_tokens = scope.integer("keep_tokens", 0);
  c.shuffle = scope.flag("shuffle_caption");
  c.wildcards = scope.flag("enable_wildcard");
  c.tag_dropout_rate = scope.number("caption_tag_dropout_rate", 0);
  c.dropout_rate = scope.number("caption_dropout_rate", 0);
  c.dropout_every_n_epochs = scope.integer("caption_dropout_every_n_epochs", 0);
  c.token_warmup_min = scope.integer("token_warmup_min", 1);
  c.token_warmup_step = scope.number("token_warmup_step", 0);
  return c;
}

Subset read_subset(const toml::value& table,
                   const Scope& scope,
                   const Place& place,
                   const std::filesystem::path& base) {
  Subset s;
  if (table.contains("metadata_file")) {
    s.metadata_file = base / table.at("metadata_file").as_string().str;
  } else if (!table.contains("image_dir")) {
    place.fail("image_dir is required");
  }
  if (table.contains("image_dir")) s.folder = base / table.at("image_dir").as_string().str;
  s.caption_extensions = {scope.text("caption_extension", ".caption")};
  const auto& extension = s.caption_extensions.front();
  if (!extension.starts_with('.') && s.metadata_file.empty()) {
    log::warn("{}: key caption_extension: \"{}\" has no dot: the caption of x.png is x{}",
              place.text(),
              extension,
              extension);
  }
  const auto* class_tokens = scope.find("class_tokens");
  s.has_class_tokens = class_tokens != nullptr && s.metadata_file.empty();
  if (s.has_class_tokens) s.class_tokens = class_tokens->as_string().str;
  s.num_repeats = scope.integer("num_repeats", 1);
  s.is_reg = table.contains("is_reg") && table.at("is_reg").as_boolean();
  s.flip_aug = scope.flag("flip_aug");
  s.captions = read_captions(scope);
  if (s.captions.separator.empty()) place.in("key caption_separator").fail("must not be empty");
  s.color_aug = scope.flag("color_aug");
  s.random_crop = scope.flag("random_crop");
  s.face_crop = scope.find("face_crop_aug_range") != nullptr;
  s.alpha_mask = table.contains("alpha_mask") && table.at("alpha_mask").as_boolean();
  if (table.contains("conditioning_data_dir")) {
    s.mask_folder = base / table.at("conditioning_data_dir").as_string().str;
    if (s.alpha_mask)
      place.fail("conditioning_data_dir and alpha_mask contradict each other: both make masks",
                 "leave one of them out");
  }
  const auto* attributes = scope.find("custom_attributes");
  s.custom_attributes = attributes != nullptr && !attributes->as_table().empty();
  return s;
}

// The tables of an array such as [[datasets]].
const std::vector<toml::value>& tables_of(const toml::value& parent,
                                          const char* name,
                                          const Place& place) {
  const std::string title =
      name == std::string_view("subsets") ? "[[datasets.subsets]]" : "[[datasets]]";
  if (!parent.contains(name)) place.fail(title + " is required");
  const auto& value = parent.at(name);
  if (!value.is_array() || value.as_array().empty() ||
      !std::all_of(value.as_array().begin(), value.as_array().end(), [](const auto& v) {
        return v.is_table();
      })) {
    place.fail(std::string(name) + " must be tables: " + title);
  }
  return value.as_array();
}

bool has_metadata(const toml::value& dataset) {
  if (!dataset.contains("subsets")) return false;
  const auto& subsets = dataset.at("subsets");
  return subsets.is_array() && !subsets.as_array().empty() && subsets.as_array()[0].is_table() &&
         subsets.as_array()[0].contains("metadata_file");
}

/// Finds what stands twice in one dataset.
class Twins {
 public:
  /// False if the subset is left out: in profile kohya, for a path spelled as an earlier one is.
  /// Another spelling of it is trained twice there, as sd-scripts does, with a warning. Throws
  /// InputError in profile default, whatever the spelling (links, "..", a slash at the end).
  bool take(const std::filesystem::path& path, size_t number, const Place& at, Profile profile) {
    std::error_code error;
    auto real = std::filesystem::weakly_canonical(std::filesystem::absolute(path, error), error);
    if (error) real = path.lexically_normal();  // cannot be read: said when it is listed
    if (!real.has_filename()) real = real.parent_path();
    const bool new_text = texts_.insert(path.native()).second;
    const auto [first, is_new] = numbers_.try_emplace(real, number);
    if (is_new) return true;
    const std::string what =
        fmt::format("{} is the same as in subset {} of this dataset", show(path), first->second);
    if (profile == Profile::kDefault)
      at.fail(what, "use one subset with num_repeats, or put it into another [[datasets]]");
    log::warn("{}: {}: {} as sd-scripts does",
              at.text(),
              what,
              new_text ? "spelled otherwise, trained again" : "left out");
    return new_text;
  }

 private:
  std::map<std::filesystem::path, size_t> numbers_;  // of the first subset with this real path
  std::set<std::string> texts_;
};

toml::value parse_fallbacks(const std::vector<Fallback>& fallbacks) {
  std::string text;
  for (const auto& f : fallbacks) text += f.key + " = " + f.value + "\n";
  const Place place("the command line");
  auto value = parse(text, "command line", place);
  check_table(value, kGeneral, place);
  return value;
}

}  // namespace

Resolved read_config(const std::filesystem::path& file,
                     Profile profile,
                     const std::vector<Fallback>& fallbacks,
                     const std::filesystem::path& base,
                     bool pixels) {
  const Place top(show(file));
  const std::string text = read_file(file, kMaxFileBytes);
  if (const auto bad = first_invalid_utf8(text))
    top.fail("not UTF-8 at byte " + std::to_string(*bad));
  const auto root = parse_file(text, file, top);
  CommandLine command_line{parse_fallbacks(fallbacks), {}};
  for (const auto& [name, value] : root.as_table()) {
    if (name == "general" || name == "datasets") continue;
    const auto near = nearest_name(name, std::array<std::string, 2>{"general", "datasets"});
    top.fail("unknown section " + printable(name),
             near ? "did you mean " + *near + "?" : "sections are [general] and [[datasets]]");
  }
  const toml::value* general = nullptr;
  if (root.contains("general")) {
    general = &root.at("general");
    if (!general->is_table()) top.fail("general must be a table: [general]");
    check_table(*general, kGeneral, top.in("[general]"));
  }

  Resolved out;
  out.source = show(file);
  out.profile = profile;
  std::vector<Level> outer;
  if (general != nullptr) outer.push_back({general, top.in("[general]")});
  Vain vain;
  int64_t subset_index = 0;
  for (const auto& dataset_table : tables_of(root, "datasets", top)) {
    const auto number = static_cast<int64_t>(out.datasets.size());
    const Place place = top.in("[[datasets]] " + std::to_string(number + 1));
    const bool metadata = has_metadata(dataset_table);
    check_table(dataset_table, metadata ? kMetadataDataset : kFolderDataset, place, "subsets");
    std::vector<Level> levels{{&dataset_table, place}};
    levels.insert(levels.end(), outer.begin(), outer.end());
    const Scope scope(levels, command_line);
    Dataset d;
    d.index = number;
    d.where = place.text();
    d.batch_size = scope.integer("batch_size", 1);
    d.validation_split = scope.number("validation_split", 0);
    d.validation_seed = scope.integer("validation_seed", 0);
    d.network_multiplier = scope.number("network_multiplier", 1);
    out.datasets.push_back(d);

    const auto& tables = tables_of(dataset_table, "subsets", place);
    Twins twins;
    for (size_t i = 0; i < tables.size(); ++i) {
      const Place at = place.in("[[datasets.subsets]] " + std::to_string(i + 1));
      if (tables[i].contains("metadata_file") != metadata) {
        at.fail("subsets with and without metadata_file cannot be mixed",
                "put them into two [[datasets]]");
      }
      check_table(tables[i], metadata ? kMetadataSubset : kFolderSubset, at);
      levels.insert(levels.begin(), {&tables[i], at});
      const Scope inner(levels, command_line);
      levels.erase(levels.begin());
      auto subset = read_subset(tables[i], inner, at, base);
      subset.pixels = read_pixels(inner, at, pixels);
      subset.where = at.text();
      subset.index = subset_index++;
      subset.dataset = number;
      if (subset.num_repeats == 0) {
        log::info("{}: left out, num_repeats is 0", at.text());
        continue;
      }
      if (!twins.take(metadata ? subset.metadata_file : subset.folder, i + 1, at, profile))
        continue;
      note_vain(inner, subset, d, profile, vain);
      out.subsets.push_back(std::move(subset));
    }
  }
  vain.warn();
  for (const auto& f : fallbacks) {
    if (!command_line.used.contains(f.key)) out.unused_fallbacks.push_back(f.key);
  }
  return out;
}

}  // namespace flux::dataset

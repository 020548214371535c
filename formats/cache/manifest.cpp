#include "formats/cache/manifest.h"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <set>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/cache/files.h"
#include "formats/cache/header.h"
#include "formats/cache/segment_writer.h"

namespace flux::cache {
namespace {

using nlohmann::json;
constexpr uint64_t kMaxManifestBytes = uint64_t{1} << 30;
constexpr char kChecksum[] = "checksum";

std::string shown(const json& value) {
  const std::string text = printable(value.dump(-1, ' ', false, json::error_handler_t::replace));
  return text.size() <= 200 ? text : text.substr(0, 200) + "...";
}

// The members of one object of a manifest, each asked for once; whoever is left over is unknown.
class Fields {
 public:
  Fields(const json& object, std::string name, const std::filesystem::path& path)
      : object_(object), name_(std::move(name)), path_(path) {
    if (!object.is_object())
      refuse(name_.empty() ? "" : name_, fmt::format("is {}, expected an object", shown(object)));
  }

  [[noreturn]] void refuse(const std::string& field, const std::string& text) const {
    throw CacheError(
        fmt::format(
            "{}: {}{}", show(path_), field.empty() ? "" : "'" + printable(field) + "' ", text),
        repair_hint(path_.parent_path()));
  }
  const json& get(const char* field) {
    seen_.insert(field);
    const auto found = object_.find(field);
    if (found == object_.end()) refuse(full(field), "is absent");
    return *found;
  }
  std::string text(const char* field) {
    const json& value = get(field);
    if (!value.is_string())
      refuse(full(field), fmt::format("is {}, expected a text", shown(value)));
    return value.get<std::string>();
  }
  std::string hex(const char* field, size_t digits) {
    std::string value = text(field);
    if (!is_hex(value, digits))
      refuse(full(field), fmt::format("is {}, expected {} hex digits", shown(value), digits));
    return value;
  }
  int64_t count(const char* field, int64_t low = 0, int64_t high = INT64_MAX) {
    const json& value = get(field);
    // a number above INT64_MAX is unsigned in the JSON library
    if (!value.is_number_integer() || value > json(INT64_MAX) || value < json(low) ||
        value > json(high)) {
      refuse(full(field),
             fmt::format("is {}, expected a whole number from {} to {}", shown(value), low, high));
    }
    return value.get<int64_t>();
  }
  json object(const char* field) {
    const json& value = get(field);
    if (!value.is_object())
      refuse(full(field), fmt::format("is {}, expected an object", shown(value)));
    return value;
  }
  const json& list(const char* field) {
    const json& value = get(field);
    if (!value.is_array()) refuse(full(field), fmt::format("is {}, expected a list", shown(value)));
    return value;
  }
  void nothing_else() const {
    for (const auto& [field, value] : object_.items()) {
      if (!seen_.contains(field) && !field.starts_with("x_"))
        refuse(full(field), "is not a field of a manifest");
    }
  }

 private:
  std::string full(const std::string& field) const {
    return name_.empty() ? field : name_ + "." + field;
  }
  const json& object_;
  std::string name_;
  const std::filesystem::path& path_;
  std::set<std::string> seen_;
};

json to_json(const Manifest& manifest) {
  json segments = json::array(), quarantined = json::array();
  for (const auto& segment : manifest.segments) {
    segments.push_back({{"name", segment.name},
                        {"bytes", segment.bytes},
                        {"xxh3_128", segment.xxh3_128},
                        {"num_samples", segment.num_samples}});
  }
  for (const auto& item : manifest.quarantined) {
    quarantined.push_back({{"item", to_hex(item.item)},
                           {"subset", item.subset},
                           {"path", printable(item.path)},
                           {"reason", printable(item.reason)}});
  }
  return {{"format", kFormat},
          {"schema_version", kSchemaVersion},
          {"required_features", manifest.required_features},
          {"kind", kind_name(manifest.recipe.kind)},
          {"complete", true},
          {"parameters", manifest.recipe.parameters},
          {"weights", manifest.recipe.weights},
          {"tokenizers", manifest.recipe.tokenizers},
          {"plan", manifest.plan},
          {"plan_digest", manifest.plan_digest},
          {"segments", segments},
          {"index",
           {{"name", kIndexName},
            {"bytes", manifest.index_bytes},
            {"xxh3_128", manifest.index_xxh3_128}}},
          {"num_items", manifest.num_items},
          {"num_samples", manifest.num_samples},
          {"quarantined", quarantined},
          {"shard", {{"index", manifest.shard.index}, {"count", manifest.shard.count}}},
          {"provenance", manifest.provenance}};
}

// nlohmann keeps the last of two members of one name; a manifest has each once.
json parse_strictly(std::string_view text, const std::filesystem::path& path) {
  constexpr int kMaxDepth = 64;  // writing JSON is recursive
  const std::string hint = repair_hint(path.parent_path());
  std::vector<std::set<std::string>> open;
  const auto watch = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > kMaxDepth)
      throw CacheError(fmt::format("{}: is nested deeper than {} levels", show(path), kMaxDepth),
                       hint);
    if (event == json::parse_event_t::object_start) open.emplace_back();
    if (event == json::parse_event_t::object_end) open.pop_back();
    if (event == json::parse_event_t::key && !open.back().insert(value.get<std::string>()).second) {
      throw CacheError(
          fmt::format("{}: '{}' is there twice", show(path), printable(value.get<std::string>())),
          hint);
    }
    return true;
  };
  try {
    return json::parse(text, watch);
  } catch (const json::parse_error& error) {
    throw CacheError(fmt::format("{}: is not JSON: damaged or cut off at byte {} of {}",
                                 show(path),
                                 error.byte,
                                 text.size()),
                     hint);
  } catch (const json::out_of_range&) {
    throw CacheError(fmt::format("{}: holds a number that is too large", show(path)), hint);
  }
}

std::string checksum_of(json object) {
  object.erase(kChecksum);
  return xxh3_128_hex(as_bytes(canonical_json(object)));
}

}  // namespace

std::string canonical_json(const json& value) { return value.dump(); }

std::string manifest_text(const Manifest& manifest) {
  json object = to_json(manifest);
  object[kChecksum] = checksum_of(object);
  return object.dump(1) + "\n";
}

Manifest parse_manifest(std::string_view text, const std::filesystem::path& path) {
  const json object = parse_strictly(text, path);
  Fields fields(object, "", path);
  if (fields.text("format") != kFormat)
    fields.refuse("format", fmt::format("is {}, expected {}", shown(object["format"]), kFormat));
  const json provenance = fields.object("provenance");
  const auto from = [&](const char* name) {
    return provenance.contains(name) && provenance[name].is_string()
               ? provenance[name].get<std::string>()
               : std::string();
  };
  const std::string problem =
      schema_problem(fields.count("schema_version"), from("tool"), from("tool_version"));
  if (!problem.empty()) throw SchemaError(fmt::format("{}: {}", show(path), problem));
  for (const auto& feature : fields.list("required_features")) {
    if (feature == kMasksFeature) continue;
    throw SchemaError(fmt::format(
        "{}: needs the feature {}, which this build does not know", show(path), shown(feature)));
  }
  const std::string checksum = fields.hex(kChecksum, 32), found = checksum_of(object);
  if (checksum != found) {
    throw CacheError(
        fmt::format(
            "{}: is damaged or was edited: checksum {}, expected {}", show(path), found, checksum),
        "run the cache tool again: it encodes nothing that is there and writes a new manifest");
  }

  Manifest out;
  if (!fields.list("required_features").empty()) out.required_features = {kMasksFeature};
  const std::string kind = fields.text("kind");
  if (kind != "latents" && kind != "text")
    fields.refuse("kind", fmt::format("is {}, expected latents or text", shown(kind)));
  out.recipe.kind = kind == "latents" ? Kind::kLatents : Kind::kText;
  if (fields.get("complete") != true)
    fields.refuse("complete", fmt::format("is {}, expected true", shown(object["complete"])));
  out.recipe.parameters = fields.object("parameters");
  out.recipe.weights = fields.object("weights");
  out.recipe.tokenizers = fields.object("tokenizers");
  out.plan = fields.object("plan");
  out.plan_digest = fields.hex("plan_digest", 64);
  out.num_items = fields.count("num_items");
  out.num_samples = fields.count("num_samples");
  out.provenance = provenance;

  for (const auto& entry : fields.list("segments")) {
    Fields segment(entry, fmt::format("segments[{}]", out.segments.size()), path);
    SegmentEntry value;
    value.name = segment.text("name");
    if (!is_segment_name(value.name))
      segment.refuse("segments", fmt::format("names {}, which is no segment", shown(value.name)));
    if (!out.segments.empty() && value.name <= out.segments.back().name)
      segment.refuse("segments", "is not sorted by name");
    value.bytes = segment.count("bytes", 1);
    value.xxh3_128 = segment.hex("xxh3_128", 32);
    value.num_samples = segment.count("num_samples", 1, kMaxSegmentSamples);
    segment.nothing_else();
    out.segments.push_back(std::move(value));
  }
  Fields index(fields.get("index"), "index", path);
  if (index.text("name") != kIndexName)
    index.refuse("index.name", fmt::format("is not {}", kIndexName));
  out.index_bytes = index.count("bytes", 1);
  out.index_xxh3_128 = index.hex("xxh3_128", 32);
  index.nothing_else();

  for (const auto& entry : fields.list("quarantined")) {
    Fields item(entry, fmt::format("quarantined[{}]", out.quarantined.size()), path);
    out.quarantined.push_back({digest_from_hex(item.hex("item", 64)),
                               static_cast<uint32_t>(item.count("subset", 0, UINT32_MAX)),
                               item.text("path"),
                               item.text("reason")});
    item.nothing_else();
  }
  Fields shard(fields.get("shard"), "shard", path);
  out.shard.count = shard.count("count", 1);
  out.shard.index = shard.count("index", 0, out.shard.count - 1);
  shard.nothing_else();
  fields.nothing_else();
  try {
    check_recipe(out.recipe);
  } catch (const CacheError& error) {
    throw CacheError(fmt::format("{}: {}", show(path), error.what()),
                     repair_hint(path.parent_path()));
  }
  return out;
}

Manifest read_manifest(const std::filesystem::path& folder) {
  auto manifest = read_manifest_if_there(folder);
  if (!manifest) {
    require_folder(folder);
    throw CacheError(
        fmt::format("{}: not a complete cache: it has no {}", show(folder), kManifestName),
        "run the cache tool until it ends without an error: it goes on where it stopped");
  }
  return std::move(*manifest);
}

std::optional<Manifest> read_manifest_if_there(const std::filesystem::path& folder) {
  const auto path = folder / kManifestName;
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) {
    if (error && error != std::errc::no_such_file_or_directory &&
        error != std::errc::not_a_directory) {
      throw UnreadableError(fmt::format("{}: cannot be read: {}", show(path), error.message()),
                            "check the path and its permissions");
    }
    return std::nullopt;
  }
  std::string text;
  try {
    text = read_file(path, kMaxManifestBytes);
  } catch (const InputError& failure) {
    refuse_unreadable(path);
    throw CacheError(message_of(failure), "check the path and its permissions");
  }
  return parse_manifest(text, path);
}

bool same_content(const Manifest& a, const Manifest& b) {
  json left = to_json(a), right = to_json(b);
  left.erase("provenance");
  right.erase("provenance");
  return left == right;
}

std::vector<FieldDifference> field_differences(std::string_view what,
                                               const json& found,
                                               const json& expected) {
  std::vector<FieldDifference> out;
  const auto visit =
      [&](const auto& self, const std::string& name, const json* a, const json* b) -> void {
    if (a && b && a->is_object() && b->is_object()) {
      for (const auto& [key, value] : a->items())
        self(self, name + "." + key, &value, b->contains(key) ? &(*b)[key] : nullptr);
      for (const auto& [key, value] : b->items()) {
        if (!a->contains(key)) self(self, name + "." + key, nullptr, &value);
      }
    } else if (a && b && a->is_array() && b->is_array()) {
      for (size_t i = 0; i < std::max(a->size(), b->size()); ++i) {
        self(self,
             fmt::format("{}.{}", name, i),
             i < a->size() ? &(*a)[i] : nullptr,
             i < b->size() ? &(*b)[i] : nullptr);
      }
    } else if (!a || !b || *a != *b) {
      out.push_back({printable(name), a ? shown(*a) : "nothing", b ? shown(*b) : "nothing"});
    }
  };
  visit(visit, std::string(what), &found, &expected);
  return out;
}

namespace {

std::string line_of(const FieldDifference& difference,
                    std::string_view found_name,
                    std::string_view expected_name) {
  return fmt::format("{}: {}: {}, {}: {}",
                     difference.field,
                     found_name,
                     difference.found,
                     expected_name,
                     difference.expected);
}

}  // namespace

std::vector<std::string> differences(std::string_view what,
                                     const json& found,
                                     std::string_view found_name,
                                     const json& expected,
                                     std::string_view expected_name) {
  std::vector<std::string> out;
  for (const auto& difference : field_differences(what, found, expected))
    out.push_back(line_of(difference, found_name, expected_name));
  return out;
}

void refuse_differences(const std::vector<FieldDifference>& differences,
                        std::string_view found_name,
                        std::string_view expected_name,
                        std::string_view hint) {
  if (differences.empty()) return;
  constexpr size_t kWithValues = 5, kNamed = 10;
  std::string message = "caches do not fit: ";
  std::vector<std::string> others;
  for (size_t i = 0; i < differences.size(); ++i) {
    if (i < kWithValues)
      message += (i ? "\n  " : "") + line_of(differences[i], found_name, expected_name);
    else
      others.push_back(differences[i].field);
  }
  if (!others.empty())
    message += fmt::format("\n  and {} more: {}", others.size(), join_some(others, kNamed));
  throw CacheError(message, std::string(hint));
}

void require_equal(std::string_view what,
                   const json& found,
                   std::string_view found_name,
                   const json& expected,
                   std::string_view expected_name,
                   std::string_view hint) {
  refuse_differences(field_differences(what, found, expected), found_name, expected_name, hint);
}

std::vector<FieldDifference> plan_differences(const Manifest& found, const Manifest& expected) {
  auto out = field_differences("plan", found.plan, expected.plan);
  // digests of other plans are others: that says nothing more
  if (out.empty()) out = field_differences("plan_digest", found.plan_digest, expected.plan_digest);
  return out;
}

void require_joinable(const Manifest& latents,
                      std::string_view latents_name,
                      const Manifest& text,
                      std::string_view text_name) {
  const auto require_kind = [](const Manifest& manifest, std::string_view name, Kind kind) {
    if (manifest.recipe.kind != kind) {
      throw CacheError(fmt::format("{}: is a {} cache, expected {}",
                                   name,
                                   kind_name(manifest.recipe.kind),
                                   kind_name(kind)),
                       "check which folder was given to which flag");
    }
    if (manifest.shard.count != 1) {
      throw CacheError(
          fmt::format("{}: is shard {} of {}, not a whole cache",
                      name,
                      manifest.shard.index,
                      manifest.shard.count),
          fmt::format("flux-cache merge {} ... --out DIR with all {} parts, and give DIR",
                      name,
                      manifest.shard.count));
    }
  };
  require_kind(latents, latents_name, Kind::kLatents);
  require_kind(text, text_name, Kind::kText);
  constexpr char kHint[] = "make both caches from the same dataset file";
  refuse_differences(plan_differences(latents, text), latents_name, text_name, kHint);
}

}  // namespace flux::cache

#include "formats/cache/header.h"

#include <fmt/format.h>

#include <algorithm>

#include "common/core/error.h"
#include "common/core/text.h"

namespace flux::cache {

void write_header(Hdf5Image& image,
                  Kind kind,
                  std::string_view content,
                  std::string_view features) {
  image.attribute("format", kFormat);
  image.attribute("schema_version", kSchemaVersion);
  image.attribute("kind", kind_name(kind));
  image.attribute("content", content);
  image.attribute("required_features", features);
  image.attribute("optional_features", "");
}

void write_provenance(Hdf5Image& image, const Provenance& provenance, std::string_view created) {
  constexpr size_t kMaxCommandLine = 8192;  // an attribute has to stay small
  image.attribute("tool", printable(provenance.tool));
  image.attribute("tool_version", printable(provenance.tool_version));
  image.attribute("command_line", printable(provenance.command_line).substr(0, kMaxCommandLine));
  image.attribute("device", printable(provenance.device));
  image.attribute("created", created);
}

std::string schema_problem(int64_t schema, std::string_view tool, std::string_view tool_version) {
  if (schema >= kOldestSchema && schema <= kNewestSchema) return {};
  std::string text =
      fmt::format("schema {}, this build reads {} to {}", schema, kOldestSchema, kNewestSchema);
  if (!tool.empty())
    text += fmt::format("\n  written by {} {}", printable(tool), printable(tool_version));
  return text;
}

Kind read_header(const Hdf5File& file,
                 std::string_view content,
                 std::initializer_list<std::string_view> more) {
  const auto text = [&](const char* name) {  // for the message alone: "" where it is absent
    const auto found = file.attributes().find(name);
    const auto* value =
        found == file.attributes().end() ? nullptr : std::get_if<std::string>(&found->second);
    return value ? *value : std::string();
  };
  if (text("format") != kFormat) file.refuse("is not a file of a cache (root attribute 'format')");
  const std::string problem =
      schema_problem(file.number_attribute("schema_version"), text("tool"), text("tool_version"));
  if (!problem.empty()) throw SchemaError(fmt::format("{}: {}", show(file.path()), problem));
  for (const auto& feature : split(file.text_attribute("required_features"), ',')) {
    if (!feature.empty() && !(feature == kMasksFeature && content == kSegmentContent)) {
      throw SchemaError(fmt::format("{}: needs the feature '{}', which this build does not know",
                                    show(file.path()),
                                    printable(feature)));
    }
  }
  file.refuse_oddities();
  constexpr std::string_view kKnown[] = {
      "format", "schema_version", "kind", "content", "required_features", "optional_features"};
  for (const auto& [name, value] : file.attributes()) {
    if (std::find(std::begin(kKnown), std::end(kKnown), name) == std::end(kKnown) &&
        std::find(more.begin(), more.end(), name) == more.end()) {
      file.refuse(fmt::format("has the unknown root attribute '{}'", printable(name)));
    }
  }
  file.text_attribute("optional_features");
  if (file.text_attribute("content") != content) {
    file.refuse(fmt::format(
        "is a cache's '{}', expected '{}'", printable(file.text_attribute("content")), content));
  }
  const std::string& kind = file.text_attribute("kind");
  if (kind == "latents") return Kind::kLatents;
  if (kind == "text") return Kind::kText;
  file.refuse(fmt::format("is of kind '{}', expected latents or text", printable(kind)));
}

}  // namespace flux::cache

// formats/cache/header.h - the root attributes that segments and indexes share (FORMAT.md section
// 3).
#pragma once
#include <initializer_list>
#include <string>
#include <string_view>

#include "common/core/error.h"
#include "formats/cache/hdf5_file.h"
#include "formats/cache/schema.h"

namespace flux::cache {

inline constexpr char kSegmentContent[] = "segment", kIndexContent[] = "index";

/// A file of a schema or with a feature that this build does not know: nothing is wrong with it, so
/// nothing may replace it.
struct SchemaError : CacheError {
  explicit SchemaError(const std::string& message)
      : CacheError(message,
                   "make the cache again with this version, or use a newer one of these tools") {}
};

void write_header(Hdf5Image& image,
                  Kind kind,
                  std::string_view content,
                  std::string_view features = "");

/// Who made a file and when: root attributes of segments, and of files of samples. A command line beyond 8192 bytes is cut.
void write_provenance(Hdf5Image& image, const Provenance& provenance, std::string_view created);

/// Checks, in this order: format, schema version, required features, anything odd in the file,
/// unknown attributes (beyond `more`), content. Returns the kind. Throws CacheError.
Kind read_header(const Hdf5File& file,
                 std::string_view content,
                 std::initializer_list<std::string_view> more);

/// "schema 3, this build reads 1 to 2 / written by ..." or nothing if this build reads `schema`.
/// For manifests too.
std::string schema_problem(int64_t schema, std::string_view tool, std::string_view tool_version);

}  // namespace flux::cache

// formats/cache/segment_writer.h - samples -> the bytes of a segment.
#pragma once
#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "formats/cache/schema.h"

namespace flux::cache {

/// What a segment says about itself in its root attributes.
struct SegmentHeader {
  Recipe recipe;
  Provenance provenance;
  std::string created;  // UTC, RFC 3339

  bool operator==(const SegmentHeader&) const = default;
};

/// 1 to kMaxSegmentSamples records, all of the recipe's layout (prepare() saw to it).
std::vector<std::byte> encode_segment(const SegmentHeader& header, std::span<const Record> records);

/// "seg-0123456789abcdef.h5" with random digits.
std::string new_segment_name();
bool is_segment_name(std::string_view name);

}  // namespace flux::cache

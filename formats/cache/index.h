// formats/cache/index.h - index.h5: one row a wanted item and variant, so that a million samples
// open in seconds.
#pragma once
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/cache/schema.h"

namespace flux::cache {

struct Manifest;

/// On an item: not part of the data set, but the record used where a caption is dropped (text); the
/// join leaves it out.
inline constexpr uint32_t kItemEmptyCaption = 1;
/// On an item: regularisation image; belongs to the validation split.
inline constexpr uint32_t kItemRegularization = 2;
inline constexpr uint32_t kItemValidation = 4;

/// As the segment of a variant: it belongs to another part of a cache that is made in parts.
inline constexpr uint32_t kOtherShard = 0xFFFFFFFF;

/// Where one encoded form of an item is. Latents: the plain and, with flip_aug, the mirrored one.
/// Text: caption variants.
struct IndexVariant {
  Sha256Digest key{};
  uint32_t segment = 0;            // position in the manifest's list of segments, or kOtherShard
  uint32_t row = 0;                // sample of that segment
  uint32_t height = 0, width = 0;  // latent rows and columns; 0 for text
  uint32_t flags = 0;              // kSampleFlipped
  double weight = 1;               // share of visits; an item's weights sum to 1

  bool operator==(const IndexVariant&) const = default;
};

struct IndexItem {
  Sha256Digest item{};  // SHA-256(subset index, path relative to the subset): the join's key
  uint32_t subset = 0, repeats = 1, flags = 0;
  uint64_t first_variant = 0, first_path_byte = 0;  // ends are the next item's

  bool operator==(const IndexItem&) const = default;
};

/// Items in the order they were added, each with at least one variant.
class Index {
 public:
  int64_t num_items() const { return static_cast<int64_t>(items_.size()); }
  const IndexItem& item(int64_t i) const { return items_[static_cast<size_t>(i)]; }
  std::span<const IndexItem> items() const { return items_; }
  std::span<const IndexVariant> variants() const { return variants_; }
  /// The variants of item `i`, at least one.
  std::span<const IndexVariant> variants(int64_t i) const;
  /// Path of item `i` relative to its subset's folder; any bytes, so show() it.
  std::string_view path(int64_t i) const;

  void add(const IndexItem& item, std::string_view path, std::span<const IndexVariant> variants);

  bool operator==(const Index&) const = default;

 private:
  friend std::vector<std::byte> encode_index(const Index&, Kind);
  friend Index read_index(const std::filesystem::path&, Kind);
  std::vector<IndexItem> items_;
  std::vector<IndexVariant> variants_;
  std::string paths_;
};

/// The bytes of index.h5; equal for equal content.
std::vector<std::byte> encode_index(const Index& index, Kind kind);
/// Throws CacheError naming the first rule of FORMAT.md that the file breaks.
Index read_index(const std::filesystem::path& path, Kind kind);
/// The index of a manifest: its XXH3-128 is the one that the manifest says, and it names only
/// segments and samples that the manifest has. Throws CacheError with the hint to repair.
Index read_index_of(const std::filesystem::path& folder, const Manifest& manifest);

}  // namespace flux::cache

#include "formats/cache/index.h"

#include <fmt/format.h>

#include <cmath>
#include <stdexcept>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/text.h"
#include "formats/cache/folder.h"
#include "formats/cache/header.h"
#include "formats/cache/manifest.h"
#include "formats/cache/tables.h"

namespace flux::cache {
namespace {

constexpr int64_t kMaxRows = int64_t{1} << 31;
constexpr int64_t kMaxPathsBytes = int64_t{1} << 36;

}  // namespace

std::span<const IndexVariant> Index::variants(int64_t i) const {
  const auto k = static_cast<size_t>(i);
  const uint64_t end = k + 1 < items_.size() ? items_[k + 1].first_variant : variants_.size();
  return std::span(variants_).subspan(items_[k].first_variant, end - items_[k].first_variant);
}

std::string_view Index::path(int64_t i) const {
  const auto k = static_cast<size_t>(i);
  const uint64_t end = k + 1 < items_.size() ? items_[k + 1].first_path_byte : paths_.size();
  return std::string_view(paths_).substr(items_[k].first_path_byte,
                                         end - items_[k].first_path_byte);
}

void Index::add(const IndexItem& item,
                std::string_view path,
                std::span<const IndexVariant> variants) {
  if (variants.empty()) throw std::invalid_argument("an index item without variants");
  items_.push_back(item);
  items_.back().first_variant = variants_.size();
  items_.back().first_path_byte = paths_.size();
  variants_.insert(variants_.end(), variants.begin(), variants.end());
  paths_ += path;
}

std::vector<std::byte> encode_index(const Index& index, Kind kind) {
  Hdf5Image image;
  write_header(image, kind, kIndexContent);
  image.attribute("num_items", index.num_items());
  image.attribute("num_variants", static_cast<int64_t>(index.variants_.size()));
  if (index.num_items() == 0) return image.finish();

  const std::span<const IndexItem> items = index.items_;
  write_column(image, "items_item", items, [](const IndexItem& i) { return i.item; });
  write_column(image, "items_subset", items, [](const IndexItem& i) { return i.subset; });
  write_column(image, "items_repeats", items, [](const IndexItem& i) { return i.repeats; });
  write_column(image, "items_flags", items, [](const IndexItem& i) { return i.flags; });
  write_column(
      image, "items_first_variant", items, [](const IndexItem& i) { return i.first_variant; });
  write_texts(image, "items_path", items.size(), [&](size_t i) {
    return index.path(static_cast<int64_t>(i));
  });

  const std::span<const IndexVariant> variants = index.variants_;
  write_column(image, "variants_key", variants, [](const IndexVariant& v) { return v.key; });
  write_column(
      image, "variants_segment", variants, [](const IndexVariant& v) { return v.segment; });
  write_column(image, "variants_row", variants, [](const IndexVariant& v) { return v.row; });
  write_column(image, "variants_bucket", variants, [](const IndexVariant& v) {
    return std::array{v.height, v.width};
  });
  write_column(image, "variants_flags", variants, [](const IndexVariant& v) { return v.flags; });
  write_column(image, "variants_weight", variants, [](const IndexVariant& v) { return v.weight; });
  return image.finish();
}

Index read_index(const std::filesystem::path& path, Kind kind) {
  const Hdf5File file(path);
  const Kind found = read_header(file, kIndexContent, {"num_items", "num_variants"});
  if (found != kind)
    file.refuse(
        fmt::format("is the index of a {} cache, expected {}", kind_name(found), kind_name(kind)));
  const int64_t num_items = file.number_attribute("num_items"),
                num_variants = file.number_attribute("num_variants");
  if (num_items < 0 || num_items > kMaxRows || num_variants < num_items ||
      num_variants > kMaxRows) {
    file.refuse(fmt::format("says it has {} items with {} variants", num_items, num_variants));
  }
  const size_t num_datasets = num_items == 0 ? 0 : 13;
  if (file.datasets().size() != num_datasets) {
    file.refuse(
        fmt::format("has {} datasets, {} belong to it", file.datasets().size(), num_datasets));
  }
  Index out;
  if (num_items == 0) {
    if (num_variants != 0) file.refuse("has variants, but no items");
    return out;
  }
  // a table that is as long as it says, before memory is taken for all of them
  const auto keys = file.table("variants_key", Element::kU8, num_variants, 32);
  const auto digests = file.table("items_item", Element::kU8, num_items, 32);
  out.items_.resize(static_cast<size_t>(num_items));
  out.variants_.resize(static_cast<size_t>(num_variants));
  for (size_t i = 0; i < out.items_.size(); ++i)
    std::memcpy(out.items_[i].item.data(), digests.data() + 32 * i, 32);
  for (size_t i = 0; i < out.variants_.size(); ++i)
    std::memcpy(out.variants_[i].key.data(), keys.data() + 32 * i, 32);

  const std::span<IndexItem> items = out.items_;
  read_column<uint32_t>(
      file, "items_subset", items, [](IndexItem& i, uint32_t v) { i.subset = v; });
  read_column<uint32_t>(
      file, "items_repeats", items, [](IndexItem& i, uint32_t v) { i.repeats = v; });
  read_column<uint32_t>(file, "items_flags", items, [](IndexItem& i, uint32_t v) { i.flags = v; });
  read_column<uint64_t>(
      file, "items_first_variant", items, [](IndexItem& i, uint64_t v) { i.first_variant = v; });
  Texts paths = read_texts(file, "items_path", items.size(), kMaxPathsBytes);
  for (size_t i = 0; i < items.size(); ++i) {
    items[i].first_path_byte = paths.offsets[i];
    const uint64_t end =
        i + 1 < items.size() ? items[i + 1].first_variant : static_cast<uint64_t>(num_variants);
    if (items[i].first_variant >= end || (i == 0 && items[i].first_variant != 0)) {
      file.refuse(fmt::format("item {} has no variants of its own", i));
    }
  }
  paths.bytes.pop_back();  // the zero behind the last text
  out.paths_ = std::move(paths.bytes);

  const std::span<IndexVariant> variants = out.variants_;
  read_column<uint32_t>(
      file, "variants_segment", variants, [](IndexVariant& v, uint32_t n) { v.segment = n; });
  read_column<uint32_t>(
      file, "variants_row", variants, [](IndexVariant& v, uint32_t n) { v.row = n; });
  read_column<std::array<uint32_t, 2>>(
      file, "variants_bucket", variants, [](IndexVariant& v, const auto& hw) {
        v.height = hw[0], v.width = hw[1];
      });
  read_column<uint32_t>(
      file, "variants_flags", variants, [](IndexVariant& v, uint32_t n) { v.flags = n; });
  read_column<double>(
      file, "variants_weight", variants, [](IndexVariant& v, double n) { v.weight = n; });
  for (size_t i = 0; i < variants.size(); ++i) {
    const double weight = variants[i].weight;
    if (!(weight >= 0 && weight <= 1))
      file.refuse(fmt::format("variant {} has the weight {}, expected 0 to 1", i, weight));
  }
  return out;
}

Index read_index_of(const std::filesystem::path& folder, const Manifest& manifest) {
  const auto path = folder / kIndexName;
  return with_repair_hint(folder, [&] {
    if (!is_there(path)) throw CacheError(show(path) + ": is absent; the manifest names it");
    const std::string found = file_xxh3_128(path);
    if (found != manifest.index_xxh3_128) {
      throw CacheError(fmt::format("{}: is damaged: XXH3-128 {}, the manifest says {}",
                                   show(path),
                                   found,
                                   manifest.index_xxh3_128),
                       repair_hint(folder));
    }
    Index index = read_index(path, manifest.recipe.kind);
    for (const auto& variant : index.variants()) {
      if (variant.segment == kOtherShard && manifest.shard.count > 1) continue;
      if (variant.segment >= manifest.segments.size()) {
        throw CacheError(fmt::format(
            "{}: names segment {} of {}", show(path), variant.segment, manifest.segments.size()));
      }
      const SegmentEntry& segment = manifest.segments[variant.segment];
      if (variant.row >= segment.num_samples) {
        throw CacheError(fmt::format("{}: names sample {} of {} in {}",
                                     show(path),
                                     variant.row,
                                     segment.num_samples,
                                     segment.name));
      }
    }
    return index;
  });
}

}  // namespace flux::cache

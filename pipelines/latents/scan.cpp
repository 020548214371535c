#include "pipelines/latents/scan.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <thread>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/core/threads.h"
#include "common/image/bucket.h"
#include "pipelines/latents/memo.h"
#include "pipelines/latents/read.h"
#include "pipelines/stage/finish.h"

namespace flux::latents {
namespace {

constexpr int64_t kSemanticsRevision =
    1;  // raise it when the same picture and parameters give other latents

image::Buckets buckets_of(const dataset::PixelOptions& p, Profile profile) {
  image::BucketOptions o;
  o.resolution = {p.width, p.height}, o.enabled = p.buckets, o.min_side = p.min_side,
  o.max_side = p.max_side;
  o.steps = p.steps, o.no_upscale = p.no_upscale, o.profile = profile;
  return image::Buckets(o);
}

/// A picture, or why it is none.
struct Found {
  std::optional<Picture> picture;
  std::string reason;
};

Found look_at(const std::filesystem::path& file, Memo& memo, std::mutex& memo_lock) {
  try {
    const auto before = file_stamp(file);
    {
      const std::lock_guard guard(memo_lock);
      if (const auto known = memo.find(before)) return {known, {}};
    }
    const auto bytes = read_picture(file);
    const Picture picture{sha256(bytes), image::read_header(as_bytes(bytes))};
    if (file_stamp(file) == before) {
      const std::lock_guard guard(memo_lock);
      memo.add(before, picture);
    }
    return {picture, {}};
  } catch (const InputError& error) {
    return {std::nullopt, stage::reason_of(error.what(), file.parent_path())};
  }
}

// All pictures, in several threads: hashing is bound by the disk and one core each.
std::vector<Found> look_at_all(const std::vector<std::filesystem::path>& files, bool rehash) {
  std::map<std::filesystem::path, Memo> memos;
  std::set<std::filesystem::path> folders;
  for (const auto& file : files) folders.insert(file.parent_path());
  for (const auto& folder : folders) {
    std::error_code error;
    const auto real = folder.empty() ? std::filesystem::path(".") : folder;
    if (std::filesystem::is_directory(real, error)) memos.emplace(folder, Memo(real, rehash));
  }
  std::vector<Found> found(files.size());
  std::mutex memo_lock, error_lock;
  std::exception_ptr failure;
  std::atomic<size_t> next{0}, done{0}, ended{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    try {
      for (size_t i; (i = next++) < found.size() && !cancel::requested() && !failed; ++done) {
        const auto& file = files[i];
        const auto memo = memos.find(file.parent_path());
        if (memo == memos.end()) {
          found[i].reason = "there is no such file";
        } else {
          found[i] = look_at(file, memo->second, memo_lock);
        }
      }
    } catch (...) {
      const std::lock_guard guard(error_lock);
      failure = std::current_exception();
      failed = true;
    }
    ++ended;
  };
  {
    const auto count = std::clamp(std::thread::hardware_concurrency(), 1u, 16u);
    const auto threads = start_threads(static_cast<int>(count), work);
    Progress progress("hashing", "images", static_cast<int64_t>(found.size()));
    while (ended < threads.size()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      progress.update(static_cast<int64_t>(done.load()));
    }
  }
  if (failure) std::rethrow_exception(failure);
  for (const auto& [folder, memo] : memos) memo.save();
  cancel::check();
  return found;
}

}  // namespace

std::string background_text(const KeyParameters& p) {
  if (p.profile == Profile::kKohya) return "none";
  return fmt::format("#{:02x}{:02x}{:02x}", p.background[0], p.background[1], p.background[2]);
}

uint32_t Sample::flags() const {
  return (flip ? cache::kSampleFlipped : 0u) | (mask ? cache::kSampleMasked : 0u);
}

Sha256Digest sample_key(const Sample& s, const KeyParameters& p) {
  nlohmann::json key{{"kind", "latents"},
                     {"revision", kSemanticsRevision},
                     {"source_sha256", to_hex(s.source_sha256)},
                     {"profile", p.profile == Profile::kKohya ? "kohya" : "default"},
                     {"background", background_text(p)},
                     {"resized", {s.placement.resized.height, s.placement.resized.width}},
                     {"crop", {s.placement.crop_y, s.placement.crop_x}},
                     {"bucket", {s.placement.bucket.height, s.placement.bucket.width}},
                     {"flip", s.flip},
                     {"weights", p.weights_sha256},
                     {"precision", p.precision},
                     {"dtype", p.dtype},
                     {"store", p.store}};
  if (p.store == "sample") key["seed"] = p.seed;
  if (!s.mask_file.empty())
    key["mask_sha256"] = to_hex(s.mask_sha256);
  else if (s.mask)
    key["alpha_mask"] = true;
  if (s.interpolation != image::Interpolation::kAuto)
    key["interpolation"] = image::interpolation_name(s.interpolation);
  return sha256(cache::canonical_json(key));
}

Scan scan(const dataset::Resolved& resolved,
          const KeyParameters& parameters,
          Animated animated,
          bool rehash) {
  const std::vector<dataset::MaskFile> masks = dataset::find_masks(resolved);
  std::vector<std::filesystem::path> files;  // those of the images, then those of masks
  for (const auto& image : resolved.images) files.push_back(image.file);
  std::vector<size_t> mask_at(masks.size(), 0);
  for (size_t i = 0; i < masks.size(); ++i) {
    if (masks[i].file.empty()) continue;
    mask_at[i] = files.size();
    files.push_back(masks[i].file);
  }
  const auto found = look_at_all(files, rehash);
  std::map<int64_t, image::Buckets> buckets;
  for (const auto& s : resolved.subsets)
    buckets.emplace(s.index, buckets_of(s.pixels, resolved.profile));

  Scan out;
  std::set<Sha256Digest> seen;
  for (size_t i = 0; i < resolved.images.size(); ++i) {
    const auto& image = resolved.images[i];
    const auto& subset = resolved.subset(image.subset);
    const auto fail = [&](const std::string& reason) {
      out.quarantined.push_back(
          stage::leave_out(image.item, static_cast<uint32_t>(image.subset), image.name, reason));
    };
    if (!found[i].picture) {
      fail(found[i].reason);
      continue;
    }
    if (found[i].picture->header.animated && animated == Animated::kRefuse) {
      fail("an animation of several frames; --animated first takes the first one");
      continue;
    }
    Sample sample;
    sample.source_sha256 = found[i].picture->sha256;
    sample.image = i;
    sample.original = found[i].picture->header.decoded_size(resolved.profile);
    sample.interpolation = image::interpolation_from_name(subset.pixels.interpolation);
    sample.mask = subset.alpha_mask;
    if (!subset.mask_folder.empty()) {
      const Found& mask = found[mask_at[i]];
      if (!masks[i].reason.empty() || !mask.picture) {
        fail(masks[i].reason.empty() ? "its mask: " + mask.reason : masks[i].reason);
        continue;
      }
      const image::Size size = mask.picture->header.decoded_size(resolved.profile);
      if (size != sample.original) {
        fail(fmt::format("its mask {} is {}x{}, the picture {}x{}",
                         show(masks[i].file),
                         size.width,
                         size.height,
                         sample.original.width,
                         sample.original.height));
        continue;
      }
      sample.mask = true;
      sample.mask_file = masks[i].file;
      sample.mask_sha256 = mask.picture->sha256;
    }
    try {
      sample.placement = buckets.at(image.subset).place(sample.original);
    } catch (const InputError& error) {
      fail(one_line(error.what()));
      continue;
    }
    cache::WantedItem item;
    item.item = image.item;
    item.subset = static_cast<uint32_t>(image.subset);
    item.repeats = static_cast<uint32_t>(image.repeats);
    item.flags = (subset.is_reg ? cache::kItemRegularization : 0u) |
                 (image.validation ? cache::kItemValidation : 0u);
    item.path = image.name;
    for (const bool flip : {false, true}) {
      if (flip && !subset.flip_aug) break;
      sample.flip = flip;
      sample.key = sample_key(sample, parameters);
      item.variants.push_back({sample.key,
                               subset.flip_aug ? 0.5 : 1.0,
                               sample.flags(),
                               static_cast<uint32_t>(sample.placement.bucket.height / 8),
                               static_cast<uint32_t>(sample.placement.bucket.width / 8)});
      if (seen.insert(sample.key).second) out.samples.push_back(sample);
    }
    out.items.push_back(std::move(item));
  }
  return out;
}

}  // namespace flux::latents

// pipelines/latents/scan.h - which latents the data set needs: each picture's content, placement
// and key.
#pragma once
#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "common/dataset/dataset.h"
#include "common/image/image.h"
#include "formats/cache/writer.h"
#include "pipelines/latents/options.h"

namespace flux::latents {

/// What, besides a picture, decides the bytes of its latents.
struct KeyParameters {
  Profile profile = Profile::kDefault;
  std::array<uint8_t, 3> background{255, 255, 255};
  std::string weights_sha256;  // of the encoder half, 64 hex digits
  std::string precision;       // "f32", "bf16"
  std::string dtype;           // "bf16", "f16", "f32"
  std::string store;           // "mean_logvar", "sample"
  int64_t seed = 0;            // counts with "sample" only
};

/// One distinct sample, and the first image that needs it.
struct Sample {
  Sha256Digest key{}, source_sha256{};
  size_t image = 0;  // index in Resolved::images
  image::Size original;
  image::Placement placement;
  image::Interpolation interpolation = image::Interpolation::kAuto;
  bool flip = false;
  bool mask = false;                // with a loss mask: from the picture's alpha, or
  std::filesystem::path mask_file;  // from another picture, if not empty
  Sha256Digest mask_sha256{};       // of that one

  uint32_t flags() const;  // cache::kSample*
};

struct Scan {
  std::vector<cache::WantedItem> items;  // in the order of the images, without those that failed
  std::vector<Sample> samples;           // distinct
  std::vector<cache::Quarantined>
      quarantined;  // unreadable or not pictures, or without a mask that fits
};

/// Reads pictures and masks that no earlier run has hashed (all with `rehash`), in several threads; decodes
/// none. Animations are left out if `animated` says so. Throws Interrupted; what find_masks() throws.
Scan scan(const dataset::Resolved& resolved,
          const KeyParameters& parameters,
          Animated animated,
          bool rehash);

/// The key of one sample: SHA-256 of the canonical JSON of FORMAT.md section 7, with
/// `interpolation` where it is not automatic.
Sha256Digest sample_key(const Sample& sample, const KeyParameters& parameters);

/// "white" as "#ffffff"; "none" in profile kohya, which drops alpha.
std::string background_text(const KeyParameters& parameters);

}  // namespace flux::latents

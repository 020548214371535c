// common/image/bucket.h - which size an image is trained at.
#pragma once
#include <cstdint>
#include <vector>

#include "common/dataset/profile.h"
#include "common/image/image.h"

namespace flux::image {

struct BucketOptions {
  Size resolution;
  bool enabled = true;  // false: one bucket, the resolution
  int64_t min_side = 256, max_side = 1024, steps = 64;
  bool no_upscale = false;
  Profile profile = Profile::kDefault;
};

/// The buckets of one resolution. Sides are multiples of `steps`; min_side is rounded down to it
/// and max_side up.
///
/// Profile kohya: for each width, the tallest height whose area is not above the resolution's; an
/// image goes to the bucket of its size, else to the one with the nearest width / height
/// (kohya-ss/sd-scripts, library/model_util.py). With no_upscale a smaller image keeps its size,
/// cut to multiples of `steps`. Profile default: for each width, the height whose area is nearest
/// to the resolution's; an image goes to the bucket with the nearest log(width / height), so that
/// portrait and landscape are treated alike. no_upscale as above, but within the limits of the
/// sides.
class Buckets {
 public:
  /// Throws std::invalid_argument: resolution, steps or a limit below 1, min_side above the shorter
  /// side of the resolution, max_side below the longer.
  explicit Buckets(const BucketOptions& options);

  /// In ascending order; empty in profile kohya with no_upscale.
  const std::vector<Size>& list() const { return list_; }
  int64_t min_side() const { return options_.min_side; }
  int64_t max_side() const { return options_.max_side; }

  /// Scale to cover the bucket, then a centre crop.
  /// Throws InputError if no_upscale leaves less than one step of a side.
  Placement place(Size image) const;

 private:
  BucketOptions options_;
  std::vector<Size> list_;
};

}  // namespace flux::image

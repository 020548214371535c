// common/dataset/dataset.h - a dataset file or a folder of images, resolved: subsets, images,
// captions, and the plan.
//
// Two steps, so that each tool pays for what it needs: resolve() lists images (no picture and no
// caption file is opened), read_caption() reads one caption. Both stages that encode resolve the
// same file and so get the same plan and items.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/core/hash.h"
#include "common/dataset/caption.h"
#include "common/dataset/profile.h"

namespace flux::dataset {

/// How images become pixels: the options that only flux-cache-latents reads. Sizes are in pixels.
struct PixelOptions {
  int64_t width = 0, height = 0;  // the resolution: a bucket has about this area
  bool buckets = false;           // false: every image is scaled and cropped to width x height
  int64_t min_side = 256, max_side = 1024, steps = 64;
  bool no_upscale = false;
  /// Empty, lanczos, area, bilinear, linear, bicubic, cubic, nearest or box.
  std::string interpolation;
};

/// One [[datasets.subsets]] with every option resolved (subset, dataset, general, command line,
/// default: first given).
struct Subset {
  int64_t index = 0;                    // over the whole file, from 0: part of an item's identity
  int64_t dataset = 0;                  // index of its [[datasets]]
  std::filesystem::path folder;         // image_dir; empty if only metadata_file is given
  std::filesystem::path metadata_file;  // .json or .jsonl; empty in a DreamBooth subset
  std::filesystem::path mask_folder;    // conditioning_data_dir; empty = none, see find_masks()
  std::string where;  // for messages: "set.toml: [[datasets]] 1: ..."; empty with --images
  std::vector<std::string> caption_extensions;  // tried in order, ".txt"
  std::string class_tokens;                     // caption of images without one; empty = none
  bool has_class_tokens = false;
  int64_t num_repeats = 1;
  bool is_reg = false;
  bool flip_aug = false;
  PixelOptions pixels;
  CaptionOptions captions;
  // Read and kept, refused by refuse_uncacheable():
  bool color_aug = false, random_crop = false, alpha_mask = false, face_crop = false,
       custom_attributes = false;
};

/// One [[datasets]].
struct Dataset {
  int64_t index = 0;
  std::string where;  // for messages: "set.toml: [[datasets]] 1"
  int64_t batch_size = 1;
  double validation_split = 0;  // share of each subset's images; is_reg ones are not split
  int64_t validation_seed = 0;
  double network_multiplier = 1;
};

/// One image of one subset; an image in two subsets is two of these.
struct Image {
  int64_t subset = 0;
  std::string name;            // path relative to the subset's folder, any bytes
  std::filesystem::path file;  // to open
  Sha256Digest item{};         // SHA-256(subset index, name): joins the two caches
  /// Visits an epoch; regularisation images are repeated to the number of the others.
  int64_t repeats = 1;
  bool validation = false;                      // held out; repeats is 1 then
  std::optional<std::string> metadata_caption;  // from metadata_file
};

struct Resolved {
  std::string source;  // for messages: the dataset file, or the folder of --images
  std::vector<Dataset> datasets;
  std::vector<Subset> subsets;  // a subset that repeats an earlier folder of its dataset is left
                                // out (profile kohya)
  std::vector<Image> images;    // by subset, then bytewise by name
  Profile profile = Profile::kDefault;
  std::vector<std::string>
      unused_fallbacks;  // keys that the file gave itself everywhere: they have no effect

  /// The subset with this `index`.
  const Subset& subset(int64_t index) const;
};

/// Values for what a dataset file leaves open: sd-scripts' command line. Keys as in [general], plus
/// batch_size. Values are TOML, as they would stand in the file ("[96, 64]", "\".txt\"").
struct Fallback {
  std::string key, value;
};

/// Reads a dataset file: TOML, or JSON if its name ends in .json. Relative paths in it are taken from
/// `base`; empty = the working folder, as in sd-scripts. Throws InputError naming file and key, with
/// the nearest known name: not TOML, unknown key, wrong type, value out of range, contradictory
/// values, absent folder or metadata file, no image to train on, one folder twice in a dataset
/// (however it is spelled; profile default). Warns once of each key that has no effect. `pixels`
/// false: who reads captions alone does not need a resolution; without one PixelOptions are left as
/// they are.
Resolved resolve_file(const std::filesystem::path& toml,
                      Profile profile,
                      const std::vector<Fallback>& fallbacks = {},
                      const std::filesystem::path& base = {},
                      bool pixels = true);

/// `--images DIR`: one subset of that folder, not its sub-folders; captions in .txt, then .caption;
/// buckets on, steps 16, smallest side 32, largest 4 x the longer side of the resolution, upscaling
/// allowed; batch size 1. Throws InputError: no such folder, no image in it.
Resolved resolve_folder(const std::filesystem::path& folder,
                        int64_t width,
                        int64_t height,
                        Profile profile);

/// The picture that says how much of an image counts in the loss, or why there is none.
struct MaskFile {
  std::filesystem::path file;  // empty: the image's subset has no masks, or `reason` says why
  std::string reason;
};
/// By image of `resolved`: the picture of the same name but for its ending in the subset's mask_folder, in the same
/// sub-folder for images that metadata_file names. Only names are read. Warns of masks that belong to no image of a folder.
/// Throws InputError naming the subset if a folder of masks is not there or cannot be read.
std::vector<MaskFile> find_masks(const Resolved& resolved);

/// The names of the pictures in a folder, not in its sub-folders, sorted. Throws InputError: no such folder, or it may not
/// be read.
std::vector<std::string> list_images(const std::filesystem::path& folder, Profile profile);

/// Throws InputError if an option cannot be honoured by a cache, or is not supported yet, with the
/// option, the reason and what to do.
void refuse_uncacheable(const Resolved& resolved);

/// The caption of an image, before its program runs: metadata, else the first caption file there
/// is, else class tokens; nothing if there is none of them. Throws InputError as read_caption_file
/// does.
std::optional<std::string> read_caption(const Resolved& resolved, const Image& image);

/// The plan that both manifests carry: batch sizes, repeats, regularisation, dropout, flips,
/// validation split. It holds no resolution, bucket, path, caption or encoding option, and nothing
/// of the images.
nlohmann::json plan_json(const Resolved& resolved);
/// SHA-256 of the plan's canonical text: keys sorted, no spaces.
Sha256Digest plan_digest(const nlohmann::json& plan);

/// A plan as the trainer reads it from a manifest.
struct Plan {
  struct Subset {
    int64_t index, dataset, num_repeats;
    bool is_reg, flip_aug;
    double caption_dropout_rate;
    int64_t caption_dropout_every_n_epochs;
  };
  struct Dataset {
    int64_t index, batch_size;
    double validation_split;
    int64_t validation_seed;
  };
  std::vector<Dataset> datasets;
  std::vector<Subset> subsets;
};
/// Throws CacheError if it is not a plan; unknown fields are errors.
Plan parse_plan(const nlohmann::json& plan);

/// Which of a subset's items are held out: those with the lowest SHA-256(seed, item), all but
/// ceil(n * (1 - split)) of them. Does not depend on the order of `items`. resolve() applies it, with the SHA-256 of
/// names for items; the index of a cache has a flag on each item.
std::vector<bool> validation_members(const std::vector<Sha256Digest>& items,
                                     double split,
                                     int64_t seed);

/// Visits an epoch of regularisation items that ask for `num_repeats`, in order of subset and name,
/// so that together they are visited as often as the other images of their dataset, `num_train`
/// times; 0 = not needed. resolve() applies it; the index of a cache has each item's repeats.
std::vector<int64_t> regularisation_repeats(const std::vector<int64_t>& num_repeats,
                                            int64_t num_train);

/// SHA-256 of the index as 8 bytes (little-endian) and the name's bytes.
Sha256Digest item_digest(int64_t subset_index, std::string_view name);

}  // namespace flux::dataset

// formats/cache/schema.h - words, limits and records of the cache format; FORMAT.md is the norm.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "common/core/dtype.h"
#include "common/core/hash.h"

namespace flux::cache {

inline constexpr char kFormat[] = "flux-cache";
inline constexpr int64_t kSchemaVersion = 1;                    // what is written
inline constexpr int64_t kOldestSchema = 1, kNewestSchema = 1;  // what is read

inline constexpr int64_t kMaxSegmentSamples = 128;
inline constexpr int64_t kMaxSegmentBytes = int64_t{128} << 20;  // of compressed frames
inline constexpr int64_t kMaxTensorBytes = int64_t{128} << 20;  // one tensor of one sample, decoded
inline constexpr int64_t kMaxLatentSide = 65535;
inline constexpr int64_t kMaxTextBytes = int64_t{1} << 20;  // one path or caption

enum class Kind : uint8_t { kLatents, kText };
std::string_view kind_name(Kind kind);  // "latents", "text"

/// What the tensors of a segment look like. Latents: dtype and channels (16 = one sample, 32 = mean
/// then log-variance). Text: dtype, T5 length L and width X, CLIP width V. The other kind's fields
/// are 0.
struct Layout {
  Kind kind = Kind::kLatents;
  DType dtype = DType::kBF16;  // kBF16, kF16 or kF32
  int64_t channels = 0;
  int64_t t5_length = 0, t5_width = 0, clip_width = 0;

  bool operator==(const Layout&) const = default;
};

/// The layout that `parameters` ask for: "dtype" ("bf16", "f16", "f32") and, for latents,
/// "channels"; for text, "t5_length", "t5_width", "clip_width". Throws CacheError naming the field
/// that is absent or out of range.
Layout layout_of(Kind kind, const nlohmann::json& parameters);
std::string_view dtype_word(DType dtype);  // "bf16", "f16", "f32"

/// What makes the samples of a cache comparable: everything that decides their bytes, bar the
/// inputs themselves.
struct Recipe {
  Kind kind = Kind::kLatents;
  /// A flat object of strings, numbers and booleans; FORMAT.md section 7 lists the names. layout_of
  /// reads it.
  nlohmann::json parameters = nlohmann::json::object();
  /// Part ("ae", or "t5" and "clip") -> weights_sha256, 64 hex digits.
  nlohmann::json weights = nlohmann::json::object();
  /// Part ("t5", "clip") -> SHA-256 of the tokenizer's files, 64 hex digits; empty for latents.
  nlohmann::json tokenizers = nlohmann::json::object();

  bool operator==(const Recipe&) const = default;
};

/// The layout of a recipe that is well-formed: flat parameters, 64 hex digits for each part. Throws
/// CacheError naming the field and what it holds.
Layout check_recipe(const Recipe& recipe);

/// Who made it; never part of identity.
struct Provenance {
  std::string tool, tool_version, command_line, device;

  bool operator==(const Provenance&) const = default;
};

/// A sample's key: SHA-256 of the canonical JSON (manifest.h) of everything that decides its bytes.
/// FORMAT.md section 7 lists the fields of each kind; never a path, a time, a tool version, a
/// device or a batch size.
Sha256Digest sample_key(const nlohmann::json& fields);

/// The part of a cache that a sample belongs to where a cache is made in `count` parts: its key's
/// first 8 bytes as a big-endian number, modulo `count`.
int64_t shard_of(const Sha256Digest& key, int64_t count);

inline constexpr uint32_t kSampleFlipped = 1;  // latents of the image mirrored left to right
inline constexpr uint32_t kSampleMasked = 2;   // latents with a loss mask: a second tensor
inline constexpr uint32_t kSampleFlags = kSampleFlipped | kSampleMasked;  // all that are known
/// The required feature of segments and caches with masks.
inline constexpr char kMasksFeature[] = "masks";

/// One sample's row in the tables of a segment.
struct SampleInfo {
  Sha256Digest key{};            // SHA-256 of what decides the sample's bytes
  Sha256Digest source_sha256{};  // latents: of the image file's bytes; text: of the caption's bytes
  uint64_t tensor_xxh3 =
      0;  // XXH3-64 of the decoded bytes (text: T5's, then CLIP's); the writer fills it in
  /// Latents: path relative to the subset's folder (informative). Text: the caption as encoded. Any
  /// bytes.
  std::string text;
  uint32_t flags = 0;  // kSampleFlipped, kSampleMasked

  // latents; sizes in pixels but for height and width
  uint32_t height = 0, width = 0;           // rows and columns of the latents: the bucket / 8
  std::array<uint32_t, 2> original_hw{};    // of the decoded image, after EXIF orientation
  std::array<uint32_t, 2> resized_hw{};     // before cropping
  std::array<uint32_t, 2> crop_top_left{};  // of the bucket in the resized image

  // text
  uint32_t t5_tokens = 0,
           t5_lost = 0;  // live tokens with the end token (first in the row); tokens cut off
  uint32_t clip_tokens = 0, clip_lost = 0;

  bool operator==(const SampleInfo&) const = default;
};

/// Bytes of one decoded tensor: `which` 0 = latents or T5, 1 = mask or CLIP. Latents and masks use
/// info's height and width.
int64_t tensor_bytes(const Layout& layout, const SampleInfo& info, int which);
/// Exactly `digits` lower-case hex digits.
bool is_hex(std::string_view text, size_t digits);

/// How many tensors a sample has: 1 for latents, 2 with a mask; 2 for text.
int num_tensors(const Layout& layout, const SampleInfo& info);
/// Of one tensor: the layout's, but f32 for a mask.
DType tensor_dtype(const Layout& layout, int which);
/// The values of a mask, f32: what is wrong with them, or an empty text if all are in [0, 1].
std::string mask_problem(std::span<const std::byte> mask);

/// A sample ready to be stored: its tensors compressed.
struct Record {
  SampleInfo info;
  std::vector<std::vector<std::byte>> frames;  // num_tensors of them
};

/// Compresses a sample's tensors and computes tensor_xxh3. Thread-safe and lock-free, so that
/// several threads can prepare what one writer adds. `tensors`: latents [channels, height, width];
/// or T5 [L, X], CLIP [V]; little-endian. Throws std::invalid_argument for a wrong number of
/// tensors or bytes, or tokens beyond L.
Record prepare(const Layout& layout,
               const SampleInfo& info,
               std::span<const std::span<const std::byte>> tensors);

}  // namespace flux::cache

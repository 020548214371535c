// formats/checkpoint/checkpoint.h - a run folder: RUN/step-000500/{lora.safetensors,
// ema.safetensors, state.safetensors, state.json}.
//
// A checkpoint is made in a folder of a temporary name and renamed when all of it is on the disk,
// so a folder called step-* is whole. state.json says what the run was: a flat record that the
// trainer compares on resuming.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "formats/safetensors/writer.h"

namespace flux::checkpoint {

inline constexpr char kFormat[] = "flux-checkpoint";
inline constexpr int64_t kSchemaVersion =
    1;  // of state.json and state.safetensors: what is written, and all that is read

/// A tensor to be saved; `bytes` must stay until the file is written.
struct Tensor {
  safetensors::TensorSpec spec;
  std::span<const std::byte> bytes;
};

/// "step-000500"; more digits where six are too few.
std::string step_name(int64_t step);
/// Steps of the whole checkpoints in a run folder, ascending; none if the folder is not there.
std::vector<int64_t> steps_in(const std::filesystem::path& run);

/// Removes what a killed run left half-written: checkpoints, and files of the run's folder.
void remove_leftovers(const std::filesystem::path& run);
/// Makes the folder of a new run, without leftovers. One that holds checkpoints already is first
/// renamed to RUN.old-N, with the lowest free N from 1; returns that name. Throws ResourceError if
/// the disk does not let it.
std::optional<std::filesystem::path> start_run(const std::filesystem::path& run);

/// Removes the checkpoints up to `step` but for the newest `keep` of them and those of `needed`. One that cannot be
/// removed is warned of. Call it when the checkpoint of `step` is on the disk.
void remove_older(const std::filesystem::path& run,
                  int64_t step,
                  int64_t keep,
                  const std::set<int64_t>& needed);

/// One checkpoint being written. Without commit() nothing of it stays. Throws ResourceError: the
/// disk is full or not writable.
class Writer {
 public:
  Writer(std::filesystem::path run, int64_t step);
  ~Writer();
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  /// Writes a safetensors file of this name into the checkpoint.
  void add(const std::string& file_name,
           std::span<const Tensor> tensors,
           const safetensors::Metadata& metadata);
  /// The path for a file of this name that the caller writes in full; then added().
  std::filesystem::path path_of(const std::string& file_name) const {
    return temporary_ / file_name;
  }
  void added(const std::string& file_name);
  /// Adds format, schema_version, step, the files' sizes and XXH3-128 and a checksum of all of it to
  /// `state`, writes state.json and gives the folder its name. A checkpoint of the same step makes
  /// room. Returns the folder.
  std::filesystem::path commit(nlohmann::json state);

 private:
  std::filesystem::path run_, temporary_;
  int64_t step_;
  nlohmann::json files_ = nlohmann::json::object();
};

/// A checkpoint found on the disk.
struct Checkpoint {
  std::filesystem::path folder;
  int64_t step = 0;
  nlohmann::json state;
};
/// The newest good one, every byte of it checked; each damaged one that is newer is named in a warning. Nothing if the
/// folder holds no checkpoint. Throws CacheError: all of them are damaged (state.json or another of its files absent or
/// not what it was), naming the newest; the newest is of another schema.
std::optional<Checkpoint> read_latest(const std::filesystem::path& run);

/// That of a step, as its state.json says; the bytes of its other files were checked by another process. Throws CacheError.
Checkpoint read_unchecked(const std::filesystem::path& run, int64_t step);

/// sd-scripts' hashes of a LoRA file, as metadata has them.
struct LoraHashes {
  std::string
      model_hash;  // sshs_model_hash: SHA-256 of all tensor bytes in file order, 64 hex digits
  std::string legacy_hash;  // sshs_legacy_hash: SHA-256 of the 64 KiB at offset 1 MiB, its first 8
                            // hex digits
};
/// Of a file that carries only the `ss_*` entries of `metadata`, so that other metadata can change
/// without them. Source: kohya-ss/sd-scripts, library/sai_model_spec.py.
LoraHashes lora_hashes(std::span<const Tensor> tensors, const safetensors::Metadata& metadata);

}  // namespace flux::checkpoint

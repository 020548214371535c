// pipelines/check/case.h - one reference case: its files, limits and where it runs.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/tensor/fwd.h"
#include "pipelines/check/report.h"

namespace flux::check {

/// A folder with case.json. Files may be missing: what is there is checked.
struct Case {
  std::filesystem::path folder;
  std::string title;  // the folder, for people
  std::string kind;
  nlohmann::json json;    // case.json
  nlohmann::json config;  // config.json, or {}
  c10::Device device{c10::DeviceType::CPU};
  bool bf16 = false;  // judge outputs only, by the bf16 limits
  Report* report = nullptr;

  /// Reads case.json and config.json. Throws InputError: not JSON, or no kind.
  static Case read(const std::filesystem::path& folder);

  bool has(const std::string& file) const;
  /// Names of the files in the folder that begin and end so, sorted.
  std::vector<std::string> files(std::string_view beginning, std::string_view ending) const;
  /// Tensors of a safetensors file of the folder, on the CPU; none if it is not there, so that
  /// nothing of it is checked.
  TensorMap read_tensors(const std::string& file) const;
  /// The file or folder that case.json names under `key`; nothing if it has no such key.
  std::optional<std::filesystem::path> path_of(const char* key) const;
  /// The file that case.json names under `key`, else `fallback` in the folder. Throws InputError if
  /// it is not there.
  std::filesystem::path required(const char* key, const std::string& fallback) const;

  c10::ScalarType dtype() const {
    return bf16 ? c10::ScalarType::BFloat16 : c10::ScalarType::Float;
  }
  at::Tensor on_device(const at::Tensor& tensor) const { return tensor.to(device); }

  /// Limits of case.json: limits.PART, or the top ones for "". Throws InputError if they are not
  /// there.
  Limits limits(std::string_view part = "") const;
  /// limits.PART.NAME. Throws InputError if it is not there.
  double limit(const char* part, const char* name) const;

  /// An output of the networks: by the top limits, or the bf16 ones.
  void output(std::string_view name, const at::Tensor& got, const at::Tensor& golden) const;
  /// An intermediate result, in float32 only.
  void inner(std::string_view name,
             const at::Tensor& got,
             const at::Tensor& golden,
             const Limits& within) const;
  /// The tensor `name` of `vectors` against `got`, however it is kept: as KIND.NAME in full, or as
  /// KIND_samples.NAME and KIND_stats.NAME = [l2 norm, mean, largest absolute value, ...]. In
  /// float32 only. `by_largest`: errors of samples are relative to the largest value of the whole
  /// tensor, since samples may all be small.
  void summary(const TensorMap& vectors,
               const std::string& kind_name,
               const std::string& name,
               const at::Tensor& got,
               const Limits& within,
               bool by_largest) const;
};

/// The folders with case.json that `roots` name: each root a folder, at or below which they are
/// found, sorted, or a case.json itself. Follows symbolic links; each folder is there once. Throws
/// InputError: no such folder, another file, no case below a folder.
std::vector<std::filesystem::path> find_cases(const std::vector<std::string>& roots);

// What runs each kind.
void check_ops(const Case& c);
void check_flux(const Case& c);
void check_vae(const Case& c);
void check_t5(const Case& c);
void check_clip(const Case& c);
void check_lora(const Case& c);
void check_train(const Case& c);
void check_timesteps(const Case& c);
void check_euler(const Case& c);
void check_tokenizers(const Case& c);
void check_buckets(const Case& c);
void check_captions(const Case& c);
void check_images(const Case& c);
void check_resize(const Case& c);
void check_plans(const Case& c);
void check_optim(const Case& c);
void check_hostile_safetensors(const Case& c);
void check_hostile_images(const Case& c);
void check_hostile_captions(const Case& c);
void check_hostile_hdf5(const Case& c);

}  // namespace flux::check

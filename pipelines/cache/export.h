// pipelines/cache/export.h - flux-cache export: a cache as files that everybody's tools read.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "common/core/tool.h"
#include "pipelines/cache/contents.h"

namespace flux::cache {

enum class ExportFormat { kSafetensors, kNpz };

struct ExportOptions {
  std::vector<std::string> folders;  // exactly one
  std::filesystem::path out;
  ExportFormat format = ExportFormat::kSafetensors;
};

void add_flags(ExportOptions& options, Tool& tool);
/// Throws UsageError unless one folder and --out are given.
void check(const ExportOptions& options);

struct ExportReport {
  std::filesystem::path out;
  int64_t num_samples = 0, written = 0, kept = 0;
  int64_t left = 0;  // files of samples that the cache does not hold any more
  std::string line() const;
  nlohmann::json json() const;
};

/// A file KEY.safetensors or KEY.npz a sample, and last index.jsonl, a line an item. Tensors:
/// latents [16, H, W], or mean and logvar; mask [H, W]; t5 [L, X], clip [V], t5_mask [L] (bytes).
/// safetensors has the stored dtype, npz float32. Files that are there and equal are kept, time
/// included; a kill leaves whole files and no index.
///
/// Throws CacheError: the cache is not complete, a sample cannot be read. InputError: other files in
/// `out`. ResourceError: a write fails. Interrupted.
ExportReport export_cache(const Contents& contents, const ExportOptions& options);

}  // namespace flux::cache

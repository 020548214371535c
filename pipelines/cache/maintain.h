// pipelines/cache/maintain.h - flux-cache verify, repair, merge, gc, copy: flags and reports of what
// formats/cache does.
#pragma once
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "common/core/tool.h"
#include "formats/cache/copy.h"
#include "formats/cache/gc.h"
#include "formats/cache/merge.h"
#include "formats/cache/repair.h"
#include "formats/cache/verify.h"

namespace flux::cache {

/// What a verb says: lines for people, safe to print, and the object of --json.
struct Report {
  std::string text;
  nlohmann::json json;
  ExitCode exit_code = ExitCode::kOk;
};

struct VerifyOptions {
  std::vector<std::string> folders;  // exactly one
  bool deep = false;
};
void add_flags(VerifyOptions& options, Tool& tool);
void check(const VerifyOptions& options);  // throws UsageError, as the others do
/// Exit code kDiffers where something is wrong.
Report verify(const VerifyOptions& options);

struct RepairOptions {
  std::vector<std::string> folders;  // exactly one
};
void add_flags(RepairOptions& options, Tool& tool);
void check(const RepairOptions& options);
Report repair(const RepairOptions& options);

struct MergeOptions {
  std::vector<std::string> folders;  // at least one
  std::filesystem::path out;
  bool strict = false;
};
void add_flags(MergeOptions& options, Tool& tool);
void check(const MergeOptions& options);
Report merge(const MergeOptions& options, const Tool& tool);

struct GcOptions {
  std::vector<std::string> folders;  // exactly one
  bool dry_run = false;
};
void add_flags(GcOptions& options, Tool& tool);
void check(const GcOptions& options);
Report gc(const GcOptions& options);

struct CopyOptions {
  std::vector<std::string> folders;  // from, and to unless --out is given
  std::filesystem::path out;
  bool verify = false;
};
void add_flags(CopyOptions& options, Tool& tool);
void check(const CopyOptions& options);
Report copy(const CopyOptions& options);

}  // namespace flux::cache

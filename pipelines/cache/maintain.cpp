#include "pipelines/cache/maintain.h"

#include <fmt/format.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <optional>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "pipelines/cache/contents.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr char kVerifyExample[] = "flux-cache verify cache/latents --deep";
constexpr char kRepairExample[] = "flux-cache repair cache/latents";
constexpr char kMergeExample[] = "flux-cache merge part-0 part-1 --out cache/latents";
constexpr char kGcExample[] = "flux-cache gc cache/latents";
constexpr char kCopyExample[] = "flux-cache copy cache/latents --out /mnt/disk/latents --verify";

// Shows bytes done, and stops on a signal.
std::function<void(int64_t, int64_t)> progress_of(const char* label,
                                                  std::optional<Progress>& progress) {
  return [label, &progress](int64_t done, int64_t total) {
    constexpr int64_t kMegabyte = 1'000'000;
    cancel::check();
    if (!progress) progress.emplace(label, "MB", (total + kMegabyte - 1) / kMegabyte);
    progress->update(done / kMegabyte);
  };
}

std::string size_text(int64_t bytes) { return show_bytes(static_cast<uint64_t>(bytes)); }

}  // namespace

void add_flags(VerifyOptions& options, Tool& tool) {
  tool.about(
      "Checks the checksums of a cache. Exit code 0 if all is right, 1 if something is damaged. "
      "Changes nothing.",
      kVerifyExample);
  tool.arguments(options.folders, "DIR", "cache folder");
  tool.flag("deep", options.deep, "also decode every sample");
}

void check(const VerifyOptions& options) { require_one_folder(options.folders, kVerifyExample); }

Report verify(const VerifyOptions& options) {
  const fs::path folder = options.folders[0];
  std::optional<Progress> progress;
  const auto findings = verify_cache(folder, options.deep, progress_of("verify", progress));
  progress.reset();
  Report out;
  out.json = {{"folder", printable(folder.native())},
              {"deep", options.deep},
              {"ok", findings.empty()},
              {"num_findings", findings.size()},
              {"findings", Json::array()}};
  for (const auto& finding : findings) {
    out.json["findings"].push_back({{"file", printable(finding.file)},
                                    {"sample", printable(finding.sample)},
                                    {"what", printable(finding.what)}});
    out.text += fmt::format("{}{}: {}\n",
                            printable(finding.file),
                            finding.sample.empty() ? "" : ": " + printable(finding.sample),
                            printable(finding.what));
  }
  if (findings.empty()) {
    out.text = show(folder) + ": all checksums are right";
    return out;
  }
  out.text += fmt::format("{}: {}; flux-cache repair drops what is damaged",
                          show(folder),
                          counted(std::ssize(findings), "finding"));
  out.exit_code = ExitCode::kDiffers;
  return out;
}

void add_flags(RepairOptions& options, Tool& tool) {
  tool.about(
      "Drops the damaged samples of a cache and lists them; the next run of the caching tool makes "
      "exactly these again.",
      kRepairExample);
  tool.arguments(options.folders, "DIR", "cache folder");
}

void check(const RepairOptions& options) { require_one_folder(options.folders, kRepairExample); }

Report repair(const RepairOptions& options) {
  const fs::path folder = options.folders[0];
  std::optional<Progress> progress;
  const RepairReport found = repair_cache(folder, progress_of("repair", progress));
  progress.reset();
  Report out;
  out.json = {{"folder", printable(folder.native())},
              {"changed", found.changed},
              {"complete", found.complete},
              {"num_samples", found.num_samples},
              {"recovered", found.recovered},
              {"salvaged", found.salvaged},
              {"removed_segments", found.removed_segments},
              {"unreadable", found.unreadable.empty() ? Json() : Json(printable(found.unreadable))},
              {"num_lost", found.lost.size()},
              {"lost", Json::array()}};
  for (const auto& sample : found.lost) {
    const std::string key = sample.key ? to_hex(*sample.key) : "";
    out.json["lost"].push_back({{"key", sample.key ? Json(key) : Json()},
                                {"file", printable(sample.file)},
                                {"path", printable(sample.path)},
                                {"reason", printable(sample.reason)},
                                {"wanted", sample.wanted}});
    out.text += fmt::format("lost: {} {} ({}): {}\n",
                            key.empty() ? "all of" : key,
                            printable(sample.path),
                            printable(sample.file),
                            printable(sample.reason));
  }
  if (!found.unreadable.empty()) {
    out.text += fmt::format(
        "the manifest is gone, since only the data set tells which items there are: {}\n",
        printable(found.unreadable));
  }
  out.text += fmt::format("{}: {} good, {} lost, {} saved from damaged segments{}; {}",
                          show(folder),
                          counted(found.num_samples, "sample"),
                          found.lost.size(),
                          found.salvaged,
                          found.recovered ? fmt::format(", {} from journals", found.recovered) : "",
                          !found.complete ? "run the caching tool again: it makes what is missing"
                          : found.changed ? "the cache is complete"
                                          : "nothing was damaged");
  return out;
}

void add_flags(MergeOptions& options, Tool& tool) {
  tool.about(
      "Makes one cache of the parts that --shard made on several machines. Parts stay as they are; "
      "segments are linked where both are on one file system.",
      kMergeExample);
  tool.arguments(options.folders, "DIR", "the parts, in any order");
  tool.flag("out", options.out, "DIR", "folder of the whole cache");
  tool.flag("strict",
            options.strict,
            "fail if two parts hold different values of one sample, instead of taking one of them");
}

void check(const MergeOptions& options) {
  if (options.folders.empty())
    throw UsageError("the parts are needed, none is given", kMergeExample);
  if (options.out.empty()) throw UsageError("--out is needed", kMergeExample);
}

Report merge(const MergeOptions& options, const Tool& tool) {
  const std::vector<fs::path> inputs(options.folders.begin(), options.folders.end());
  std::optional<Progress> progress;
  const MergeReport found =
      merge_caches(inputs,
                   options.out,
                   {tool.name(), std::string(tool_version()), tool.command_line(), "cpu"},
                   options.strict,
                   progress_of("merge", progress));
  progress.reset();
  Report out;
  out.json = {{"out", printable(options.out.native())},
              {"changed", found.changed},
              {"num_items", found.num_items},
              {"num_samples", found.num_samples},
              {"num_segments", found.num_segments},
              {"num_quarantined", found.num_quarantined},
              {"linked", found.linked},
              {"copied", found.copied},
              {"already", found.already},
              {"copied_bytes", found.copied_bytes},
              {"duplicates", found.duplicates},
              {"conflicts", found.conflicts},
              {"conflict_keys", Json::array()}};
  for (const auto& key : found.conflict_keys) {
    out.json["conflict_keys"].push_back(printable(key));
    out.text += fmt::format("other values in two parts: {}\n", printable(key));
  }
  out.text += fmt::format(
      "{}: {} of {}{}; segments: {} linked, {} copied, {} there already{}{}",
      show(options.out),
      counted(found.num_samples, "sample"),
      counted(found.num_items, "item"),
      found.num_quarantined ? fmt::format(", {} left out", found.num_quarantined) : "",
      found.linked,
      found.copied,
      found.already,
      found.conflicts
          ? fmt::format("; {} had other values in two parts", counted(found.conflicts, "sample"))
          : "",
      found.changed ? "" : "; nothing changed");
  return out;
}

void add_flags(GcOptions& options, Tool& tool) {
  tool.about(
      "Removes from a cache the samples that no item wants any more. Refuses while a trainer reads "
      "the cache.",
      kGcExample);
  tool.arguments(options.folders, "DIR", "cache folder");
  tool.flag("dry-run", options.dry_run, "say what would be removed, and change nothing");
}

void check(const GcOptions& options) { require_one_folder(options.folders, kGcExample); }

Report gc(const GcOptions& options) {
  const fs::path folder = options.folders[0];
  std::optional<Progress> progress;
  const GcReport found = collect_garbage(folder, options.dry_run, progress_of("gc", progress));
  progress.reset();
  Report out;
  out.json = {{"folder", printable(folder.native())},
              {"dry_run", options.dry_run},
              {"kept_samples", found.kept_samples},
              {"removed_samples", found.removed_samples},
              {"removed_segments", found.removed_segments},
              {"rewritten_segments", found.rewritten_segments},
              {"removed_others", found.removed_others},
              {"bytes_before", found.bytes_before},
              {"bytes_after", found.bytes_after},
              {"removed", Json::array()}};
  for (const auto& name : found.removed) {
    out.json["removed"].push_back(printable(name));
    if (options.dry_run) out.text += fmt::format("would remove {}\n", printable(name));
  }
  out.text += fmt::format("{}: {} kept, {} {}removed; {} gone, {} written anew; {} before, {} {}",
                          show(folder),
                          counted(found.kept_samples, "sample"),
                          found.removed_samples,
                          options.dry_run ? "to be " : "",
                          counted(found.removed_segments, "segment"),
                          found.rewritten_segments,
                          size_text(found.bytes_before),
                          size_text(found.bytes_after),
                          options.dry_run ? "expected afterwards" : "now");
  return out;
}

void add_flags(CopyOptions& options, Tool& tool) {
  tool.about(
      "Copies a whole cache to another disk. Going on after an interruption copies the rest.",
      kCopyExample);
  tool.arguments(options.folders, "DIR", "cache folder; and where to, unless --out says so");
  tool.flag("out", options.out, "DIR", "folder of the copy");
  tool.flag("verify", options.verify, "read the copy back from the disk and compare checksums");
}

void check(const CopyOptions& options) {
  const size_t needed = options.out.empty() ? 2 : 1;
  if (options.folders.size() != needed) {
    const size_t given = options.folders.size() + (2 - needed);
    throw UsageError(fmt::format("a cache and the folder of the copy are needed, {} {} given",
                                 given,
                                 given == 1 ? "is" : "are"),
                     kCopyExample);
  }
}

Report copy(const CopyOptions& options) {
  const fs::path from = options.folders[0];
  const fs::path to = options.out.empty() ? fs::path(options.folders[1]) : options.out;
  std::optional<Progress> progress;
  const CopyReport found = copy_cache(from, to, options.verify, progress_of("copy", progress));
  progress.reset();
  Report out;
  out.json = {{"folder", printable(from.native())},
              {"out", printable(to.native())},
              {"verified", options.verify},
              {"changed", found.changed},
              {"num_samples", found.num_samples},
              {"num_segments", found.num_segments},
              {"copied", found.copied},
              {"already", found.already},
              {"num_bytes", found.num_bytes},
              {"copied_bytes", found.copied_bytes}};
  out.text = fmt::format("{}: {}, {}; segments: {} copied, {} there already{}",
                         show(to),
                         counted(found.num_samples, "sample"),
                         size_text(found.num_bytes),
                         found.copied,
                         found.already,
                         options.verify ? "; read back, all checksums are right" : "");
  return out;
}

}  // namespace flux::cache

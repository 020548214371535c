#include "common/core/memory_limit.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "common/core/text.h"

namespace flux {
namespace {

namespace fs = std::filesystem;

/// Names of the files of a version.
struct Names {
  std::vector<const char*> limits;
  const char* used;
  std::vector<const char*> reclaimable;  // in memory.stat, groups below included
};

const Names kFirst{{"memory.limit_in_bytes"},
                   "memory.usage_in_bytes",
                   {"total_inactive_file ", "total_active_file "}};
// over memory.high a group is made slow rather than ended, which is no better
const Names kSecond{
    {"memory.max", "memory.high"}, "memory.current", {"inactive_file ", "active_file "}};

std::optional<int64_t> left_in(const fs::path& folder, const Names& names) {
  std::optional<int64_t> limit;
  for (const char* name : names.limits)
    if (const auto found = number_in(folder / name))
      limit = std::min(limit.value_or(INT64_MAX), *found);
  const auto used = number_in(folder / names.used);
  if (!limit || !used) return std::nullopt;
  int64_t left = *limit - *used;
  for (const char* key : names.reclaimable)
    left += number_in(folder / "memory.stat", key).value_or(0);
  return std::clamp<int64_t>(left, 0, *limit);
}

/// A mounted hierarchy: which part of it is seen, and where.
struct Mount {
  std::string seen, where;
};

/// Of mountinfo: "36 35 98:0 /seen /where options - type source options". Blanks in paths are \040.
std::optional<Mount> mount_of(const fs::path& mountinfo, bool second) {
  std::ifstream file(mountinfo);
  for (std::string line; std::getline(file, line);) {
    const size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    const auto front = split(std::string_view(line).substr(0, dash), ' ');
    const auto back = split(std::string_view(line).substr(dash + 3), ' ');
    if (front.size() < 5 || back.size() < 3) continue;
    const auto options = split(back[2], ',');
    if (second ? back[0] == "cgroup2"
               : back[0] == "cgroup" && std::ranges::find(options, "memory") != options.end())
      return Mount{front[3], front[4]};
  }
  return std::nullopt;
}

}  // namespace

std::optional<int64_t> number_in(const fs::path& path, std::string_view key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key)) continue;
    const std::string_view rest = trim(std::string_view(line).substr(key.size()));
    int64_t number = 0;
    const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), number);
    if (error == std::errc() && number >= 0) return number;
    return std::nullopt;  // "max"
  }
  return std::nullopt;
}

std::optional<int64_t> memory_left_by_limits(const fs::path& proc, const fs::path& root) {
  std::optional<int64_t> least;
  std::ifstream groups(proc / "cgroup");  // "4:memory:/path" of version 1, "0::/path" of version 2
  for (std::string line; std::getline(groups, line);) {
    const auto fields = split(line, ':');
    if (fields.size() < 3) continue;
    const bool second = fields[0] == "0" && fields[1].empty();
    const auto controllers = split(fields[1], ',');
    if (!second && std::ranges::find(controllers, "memory") == controllers.end()) continue;
    const auto mount = mount_of(proc / "mountinfo", second);
    if (!mount) continue;
    const fs::path top = root / fs::path(mount->where).relative_path();
    std::string path = line.substr(fields[0].size() + fields[1].size() + 2);
    // a container sees its own group as the top
    const std::string seen = mount->seen == "/" ? "" : mount->seen;
    path = path == seen || path.starts_with(seen + "/") ? path.substr(seen.size()) : "";
    fs::path folder = (top / fs::path(path).relative_path()).lexically_normal();
    for (;; folder = folder.parent_path()) {
      if (const auto left = left_in(folder, second ? kSecond : kFirst))
        least = std::min(least.value_or(INT64_MAX), *left);
      if (folder == top || folder == folder.parent_path()) break;
    }
  }
  return least;
}

}  // namespace flux

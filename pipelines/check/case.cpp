#include "pipelines/check/case.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <system_error>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/tensor/weight_file.h"
#include "pipelines/check/lines.h"

namespace flux::check {
namespace fs = std::filesystem;
namespace {

/// Collects the folders with case.json; `seen` holds the real paths visited, against cycles of
/// links.
void find_below(const fs::path& folder, std::set<fs::path>& seen, std::vector<fs::path>& found) {
  std::error_code error;
  const fs::path real = fs::canonical(folder, error);
  if (error || !seen.insert(real).second) return;
  if (fs::is_regular_file(folder / "case.json", error)) found.push_back(folder);
  std::vector<fs::path> below;
  for (fs::directory_iterator it(folder, fs::directory_options::skip_permission_denied, error), end;
       !error && it != end;
       it.increment(error)) {
    std::error_code ignored;
    if (it->is_directory(ignored)) below.push_back(it->path());
  }
  std::sort(below.begin(), below.end());
  for (const fs::path& path : below) find_below(path, seen, found);
}

}  // namespace

Case Case::read(const fs::path& folder) {
  Case c;
  c.folder = folder;
  c.title = show(folder);
  c.json = read_object(folder / "case.json");
  if (!c.json.contains("kind") || !c.json["kind"].is_string()) {
    throw InputError(fmt::format("{}: no kind", show(folder / "case.json")));
  }
  c.kind = c.json["kind"];
  c.config = c.has("config.json") ? read_object(folder / "config.json") : nlohmann::json::object();
  return c;
}

bool Case::has(const std::string& file) const {
  std::error_code error;
  return fs::is_regular_file(folder / file, error);
}

std::vector<std::string> Case::files(std::string_view beginning, std::string_view ending) const {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().native();
    if (name.starts_with(beginning) && name.ends_with(ending) &&
        name.size() >= beginning.size() + ending.size())
      names.push_back(name);
  }
  if (error) throw InputError(fmt::format("{}: {}", title, error.message()));
  std::sort(names.begin(), names.end());
  return names;
}

TensorMap Case::read_tensors(const std::string& file) const {
  return has(file) ? read_weights(folder / file).tensors : TensorMap{};
}

std::optional<fs::path> Case::path_of(const char* key) const {
  if (!json.contains(key)) return std::nullopt;
  if (!json[key].is_string())
    throw InputError(fmt::format("{}: {} is not a path", show(folder / "case.json"), key));
  return (folder / json[key].get<std::string>()).lexically_normal();
}

fs::path Case::required(const char* key, const std::string& fallback) const {
  const fs::path path = path_of(key).value_or(folder / fallback);
  std::error_code error;
  if (!fs::exists(path, error))
    throw InputError(fmt::format("{}: is not there; the case needs it as its {}", show(path), key));
  return path;
}

Limits Case::limits(std::string_view part) const {
  const auto member = [](const nlohmann::json& object, std::string_view name) {
    const auto it = object.is_object() ? object.find(name) : object.end();
    return object.is_object() && it != object.end() ? *it : nlohmann::json();
  };
  const nlohmann::json all = member(json, "limits"),
                       chosen = part.empty() ? all : member(all, part);
  Limits out;
  for (const auto& [name, value] : {std::pair("rel", &out.rel), std::pair("max", &out.max)}) {
    if (const auto limit = member(chosen, name); limit.is_number()) *value = limit.get<double>();
  }
  if (!out.rel && !out.max) {
    throw InputError(fmt::format("{}: no limits{}{} with rel or max",
                                 show(folder / "case.json"),
                                 part.empty() ? "" : ".",
                                 part));
  }
  return out;
}

double Case::limit(const char* part, const char* name) const {
  const auto& all = json.contains("limits") ? json["limits"] : nlohmann::json();
  if (!all.is_object() || !all.contains(part) || !all[part].is_object() ||
      !all[part].contains(name) || !all[part][name].is_number()) {
    throw InputError(fmt::format("{}: no limits.{}.{}", show(folder / "case.json"), part, name));
  }
  return all[part][name].get<double>();
}

void Case::output(std::string_view name, const at::Tensor& got, const at::Tensor& golden) const {
  report->compare(name, got, golden, limits(bf16 ? "bf16" : ""));
}

void Case::inner(std::string_view name,
                 const at::Tensor& got,
                 const at::Tensor& golden,
                 const Limits& within) const {
  if (!bf16) report->compare(name, got, golden, within);
}

void Case::summary(const TensorMap& vectors,
                   const std::string& kind_name,
                   const std::string& name,
                   const at::Tensor& got,
                   const Limits& within,
                   bool by_largest) const {
  if (bf16) return;
  const auto find = [&](const std::string& key) {
    const auto it = vectors.find(key + "." + name);
    return it == vectors.end() ? at::Tensor() : it->second;
  };
  const at::Tensor full = find(kind_name), samples = find(kind_name + "_samples"),
                   stats = find(kind_name + "_stats");
  if (full.defined()) inner(kind_name + "." + name, got, full, within);
  if (samples.defined()) {
    const at::Tensor mine = samples_of(got, samples.numel()).view(samples.sizes());
    Errors errors = errors_of(mine, samples);
    if (by_largest && stats.defined()) {
      const auto difference = (mine.to(at::kDouble) - samples.to(at::kDouble)).abs();
      const double largest = stats[2].item<double>();
      errors = {difference.norm().item<double>() / std::sqrt(static_cast<double>(samples.numel())) /
                    largest,
                difference.max().item<double>() / largest};
    }
    report->judge(kind_name + "_samples." + name, errors, within);
  }
  if (stats.defined()) {
    const auto exact = got.detach().cpu().to(at::kDouble);
    const double norm = exact.norm().item<double>(),
                 rms = norm / std::sqrt(static_cast<double>(std::max<int64_t>(1, exact.numel())));
    const auto golden = stats.to(at::kDouble);
    const auto off = [&](int64_t i, double value, double scale) {
      const double difference = std::abs(golden[i].item<double>() - value);
      return difference == 0 ? 0.0 : difference / scale;
    };
    // a mean may be near zero by chance: it is compared on the scale of the values
    const double of_sums =
        std::max(off(0, norm, golden[0].item<double>()), off(1, exact.mean().item<double>(), rms));
    report->judge(kind_name + "_stats." + name,
                  {of_sums, off(2, exact.abs().max().item<double>(), golden[2].item<double>())},
                  within);
  }
}

std::vector<fs::path> find_cases(const std::vector<std::string>& roots) {
  constexpr const char* kHint = "give folders with reference cases, or a case.json";
  std::set<fs::path> known;  // real paths, so that a case named twice runs once
  std::vector<fs::path> all;
  for (const fs::path root : roots) {
    std::error_code error;
    const auto status = fs::status(root, error);
    if (!fs::exists(status))
      throw InputError(fmt::format("{}: no such file or folder", show(root)), kHint);
    std::vector<fs::path> found;
    if (fs::is_directory(status)) {
      std::set<fs::path> seen;
      find_below(root, seen, found);
      if (found.empty())
        throw InputError(fmt::format("{}: no case.json below this folder", show(root)), kHint);
    } else if (root.filename() == "case.json") {
      found.push_back(root.has_parent_path() ? root.parent_path() : fs::path("."));
    } else {
      throw InputError(fmt::format("{}: a file, not a folder", show(root)), kHint);
    }
    for (fs::path& folder : found) {
      const fs::path real = fs::canonical(folder, error);
      if (error) throw InputError(fmt::format("{}: {}", show(folder), error.message()), kHint);
      if (known.insert(real).second) all.push_back(std::move(folder));
    }
  }
  return all;
}

}  // namespace flux::check

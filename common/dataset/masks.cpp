// Which picture is the loss mask of which image.
#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/dataset/dataset.h"

namespace flux::dataset {
namespace {

namespace fs = std::filesystem;

/// The pictures of one folder by what comes before their endings.
using Stems = std::map<std::string, std::vector<std::string>>;

/// Folders that were looked into, as often as pictures are in them.
class Folders {
 public:
  explicit Folders(Profile profile) : profile_(profile) {}
  const Stems& stems(const fs::path& folder) {
    const auto [found, is_new] = folders_.try_emplace(folder);
    if (is_new)
      for (std::string& name : list_images(folder, profile_))
        found->second[fs::path(name).stem().native()].push_back(std::move(name));
    return found->second;
  }

 private:
  Profile profile_;
  std::map<fs::path, Stems> folders_;
};

void warn_of_surplus(const Subset& subset, const Stems& stems, const std::set<std::string>& used) {
  std::vector<std::string> surplus;
  for (const auto& [stem, names] : stems)
    if (!used.contains(stem)) surplus.push_back(show(names.front()));
  if (!surplus.empty())
    log::warn("{}: {}: {} of no image: {}",
              subset.where,
              show(subset.mask_folder),
              surplus.size() == 1 ? "a mask" : fmt::format("{} masks", surplus.size()),
              join_some(surplus));
}

}  // namespace

std::vector<MaskFile> find_masks(const Resolved& resolved) {
  std::vector<MaskFile> out(resolved.images.size());
  Folders folders(resolved.profile);
  std::map<int64_t, std::set<std::string>> used;  // stems of a subset's folder
  for (const Subset& subset : resolved.subsets) {
    if (subset.mask_folder.empty()) continue;
    try {
      folders.stems(subset.mask_folder);
    } catch (const InputError& error) {
      throw InputError(subset.where + ": conditioning_data_dir " + error.what());
    }
  }
  for (size_t i = 0; i < out.size(); ++i) {
    const Image& image = resolved.images[i];
    const Subset& subset = resolved.subset(image.subset);
    if (subset.mask_folder.empty()) continue;
    const fs::path name =
        fs::path(image.name).is_absolute() ? fs::path(image.name).filename() : fs::path(image.name);
    const fs::path folder =
        name.has_parent_path() ? subset.mask_folder / name.parent_path() : subset.mask_folder;
    const std::string stem = name.stem().native();
    const Stems* stems = nullptr;
    std::error_code error;
    if (fs::is_directory(folder, error)) stems = &folders.stems(folder);
    const auto found = stems ? stems->find(stem) : Stems::const_iterator();
    if (!stems || found == stems->end()) {
      out[i].reason = fmt::format("no mask: {} holds no picture of that name", show(folder));
    } else if (found->second.size() > 1) {
      out[i].reason = fmt::format("two masks: {} and {} in {}",
                                  show(found->second[0]),
                                  show(found->second[1]),
                                  show(folder));
    } else {
      out[i].file = folder / found->second[0];
    }
    if (folder == subset.mask_folder) used[subset.index].insert(stem);
  }
  for (const Subset& subset : resolved.subsets)
    if (!subset.mask_folder.empty() && subset.metadata_file.empty())
      warn_of_surplus(subset, folders.stems(subset.mask_folder), used[subset.index]);
  return out;
}

}  // namespace flux::dataset

// pipelines/train/tags.h - what a saved LoRA says of its data set, in sd-scripts' words.
#pragma once
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "common/data/training_data.h"

namespace flux::train {

/// `ss_dataset_dirs`, `ss_reg_dataset_dirs` (images and repeats of each subset) and `ss_tag_frequency` (how often each tag
/// occurs: what stands between the commas of captions, in small ASCII letters, once an image), as JSON. A cache holds no
/// folder names, so subsets are called subset-0, subset-1, ... in the data set's order. Of captions with random parts
/// the first form counts. Tags are counted until their names take 1 MiB; those that come up later are left out, with a
/// word in the log. Reads the tables of the cache's segments, no tensors. Throws CacheError. Source: kohya-ss/sd-scripts,
/// library/train_util.py (set_tag_frequency) and train_network.py.
std::map<std::string, std::string> dataset_metadata(const std::filesystem::path& text,
                                                    const std::vector<SubsetItems>& subsets);

}  // namespace flux::train

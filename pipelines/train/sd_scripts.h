// pipelines/train/sd_scripts.h - the command line of a FLUX trainer of sd-scripts as a file for --config.
#pragma once
#include <string>
#include <vector>

namespace flux::train {

struct ImportedRun {
  std::string toml;                   // a file for flux-train --config, the rest in comments
  std::vector<std::string> warnings;  // what cannot be honoured, and why
};

/// `arguments` as a shell gives them, with or without "accelerate launch ... flux_train_network.py" before the flags.
/// Reads --config_file. Defaults are sd-scripts' (48d368fa) where they differ from ours. Throws UsageError if a flag is
/// not one of sd-scripts' FLUX trainers, lacks its value, or has a value that flux-train refuses.
ImportedRun import_sd_scripts(const std::vector<std::string>& arguments);

}  // namespace flux::train

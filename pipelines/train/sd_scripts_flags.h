// pipelines/train/sd_scripts_flags.h - every flag of sd-scripts' FLUX trainers, and what becomes of it.
#pragma once
#include <span>
#include <string_view>

namespace flux::train {

enum class SdFate {
  kFlag,     // becomes the flag `ours`
  kLatents,  // goes to flux-cache-latents, as `ours`
  kText,     // goes to flux-cache-text, as `ours`
  kDataset,  // goes into the data set file, under its own name
  kNotNeeded,
  kRefused  // cannot be honoured
};

/// `name` without dashes; of --network_args the keys, as "network_args:train_blocks".
struct SdFlag {
  std::string_view name;
  char values;  // '0' none, '1' one, '*' any number
  SdFate fate;
  std::string_view ours;  // without dashes; empty if it becomes no flag
  std::string_view why;   // of what is not needed or refused; a remark of others
};

/// Source: the parsers of flux_train.py, flux_train_network.py and library/train_util.py, and networks/lora_flux.py,
/// of commit 48d368fa.
std::span<const SdFlag> sd_flags();

}  // namespace flux::train

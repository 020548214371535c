// pipelines/train/metadata.h - what a saved LoRA says of its training, in sd-scripts' words.
#pragma once
#include <map>
#include <string>

#include "pipelines/train/load.h"

namespace flux::train {

/// `ss_*` and `modelspec.*` entries, all strings, without the hashes, and `flux_stages.run`: a JSON object of the options that
/// decide the result, the digests of both caches and the commit of this program. They hold no time: equal training gives equal files. With
/// --no-tags they hold nothing of a caption and no name of a file or folder; without, the name of the model's file and dataset_metadata() too. Source:
/// kohya-ss/sd-scripts, library/sai_model_spec.py; ModelSpec 1.0.1.
std::map<std::string, std::string> lora_metadata(const Session& session);

/// The same for a whole model: format and modelspec.
std::map<std::string, std::string> model_metadata(const Session& session);

/// `metadata` of a file of averaged weights: what the raw ones have, and `flux_stages.ema_decay`.
std::map<std::string, std::string> averaged(std::map<std::string, std::string> metadata,
                                            const Session& session);

}  // namespace flux::train

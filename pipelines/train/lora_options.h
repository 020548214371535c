// pipelines/train/lora_options.h - flags of --method lora: which modules, how fast, and what is left out.
#pragma once
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "common/engine/trainer.h"
#include "pipelines/train/options.h"

namespace flux::train {

void add_lora_flags(Options& options, Tool& tool);
/// --lora-layout and --model-layout: how saved weights are named, which decides nothing else.
void add_layout_flags(Options& options, Tool& tool);
/// Adds the one that is in force.
void add_layouts(const Options& options, nlohmann::json& out);
/// Rules between them. Throws UsageError.
void check_lora(const Options& options, const Tool& tool);
/// Adds those that are in force to deciding_options().
void add_lora_deciding(const Options& options, nlohmann::json& out);
/// Sets what the trainer is told of them.
void set_lora(const Options& options, engine::TrainerOptions& trainer);

/// sd-scripts' network_module: "networks.lora_flux", or "lycoris.kohya" for LoKr and DoRA.
std::string network_module(const Options& options);
/// sd-scripts' network_args, a JSON object of strings, in its words.
std::string network_args(const Options& options);

/// The learning rate of each group when --learning-rate's schedule gives `learning_rate`, by the name of the group: a
/// pattern of --lr-of or "other", with " up" behind it where --loraplus-lr-ratio parts the two matrices. Empty if there is
/// one group.
std::map<std::string, double> group_learning_rates(const Options& options, double learning_rate);

}  // namespace flux::train

#include "pipelines/train/lora_options.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <vector>

#include "common/core/error.h"
#include "common/core/tool.h"
#include "common/models/flux/layout.h"
#include "common/models/lora/layouts.h"

namespace flux::train {
namespace {

using lora::Family;

const Choices<Family> kFamilies{
    {"all", Family::kAll}, {"double", Family::kDouble}, {"single", Family::kSingle}};

const Choices<lora::Algorithm> kAlgorithms{{"lora", lora::Algorithm::kLora},
                                           {"lokr", lora::Algorithm::kLokr}};

const Choices<lora::Layout> kLayouts{{"sd-scripts", lora::Layout::kSdScripts},
                                     {"diffusers", lora::Layout::kDiffusers}};

/// Whether sd-scripts would train it with the network of LyCORIS.
bool uses_lycoris(const Options& o) {
  return o.lora_form.dora || o.lora_form.algorithm != lora::Algorithm::kLora;
}
bool is_lokr(const Options& o) { return o.lora_form.algorithm == lora::Algorithm::kLokr; }

std::string word(Family family) {
  for (const auto& [text, choice] : kFamilies)
    if (choice == family) return text;
  throw std::invalid_argument("a family without a name");
}

void blocks_flag(Tool& tool, const char* name, std::string& value, const char* help) {
  tool.flag(name, "LIST", help, value, [&value](const std::string& text) {
    lora::block_ranges(text);
    value = text;
  });
}

bool trains(const Options& o, Family family) {
  return o.lora.blocks == Family::kAll || o.lora.blocks == family;
}

/// As the user would write it: "img_attn=8,single=4".
std::string ranks_text(const std::map<std::string, int64_t>& ranks) {
  std::vector<std::string> parts;
  for (const auto& [name, rank] : ranks) parts.push_back(fmt::format("{}={}", name, rank));
  return fmt::format("{}", fmt::join(parts, ","));
}

bool has_several_ranks(const Options& o) {
  return !o.lora.ranks_of_types.empty() || !o.lora.ranks.rules().empty();
}

}  // namespace

void add_lora_flags(Options& o, Tool& tool) {
  tool.flag(
      "network-algo",
      o.lora_form.algorithm,
      kAlgorithms,
      "what a LoRA adds to a weight: the product of two matrices of --rank, or (LoKr) a small "
      "matrix times, by "
      "Kronecker, a large one of --rank, whole where the rank is not below half its larger side");
  tool.flag("lokr-factor",
            "N",
            "largest size of LoKr's small matrix; -1: that of the most even split",
            "-1",
            [&o](const std::string& text) { o.lora_form.factor = lora::lokr_factor(text); });
  tool.flag("dora",
            o.lora_form.dora,
            "of the LoRA: rows of adapted weights are scaled to norms, which are trained too");
  tool.flag("train-blocks", o.lora.blocks, kFamilies, "of the LoRA: kinds of blocks");
  blocks_flag(tool,
              "train-double-blocks",
              o.lora.double_blocks,
              "of the LoRA: double blocks, all, none or numbers such as 0,1,8-12");
  blocks_flag(tool,
              "train-single-blocks",
              o.lora.single_blocks,
              "of the LoRA: single blocks, all, none or numbers");
  tool.flag(
      "module-ranks",
      "NAME=R,...",
      "ranks by type, 0 leaves it out: img_attn, txt_attn, img_mlp, txt_mlp, img_mod, txt_mod, "
      "single, single_mod; img_in, time_in, vector_in, guidance_in, txt_in, which are 0",
      "",
      [&o](const std::string& text) { o.lora.ranks_of_types = lora::module_ranks(text); });
  tool.flag("rank-of",
            "REGEX=R,...",
            "ranks by module path (double_blocks.0.img_attn.qkv), 0 leaves it out; the first that "
            "is found counts, before all else",
            "",
            [&o](const std::string& text) { o.lora.ranks = lora::PathRules(text, 0, 4096); });
  tool.flag("lr-of",
            "REGEX=X,...",
            "learning rates by module path, with the schedule of --learning-rate",
            "",
            [&o](const std::string& text) { o.lr_of = lora::PathRules(text, 1e-12, 100); });
  tool.flag("loraplus-lr-ratio",
            o.loraplus_lr_ratio,
            "X",
            "LoRA+: factor of the learning rate of the second matrix (lora_up)",
            1e-6,
            1e6);
  tool.flag("scale-weight-norms",
            o.scale_weight_norms,
            "X",
            "largest norm of a module's alpha / rank * up down, kept by scaling; 0 = off",
            0,
            1e9);
  tool.flag("network-dropout",
            o.network_dropout,
            "P",
            "share of the values between a LoRA's matrices that are left out",
            0,
            0.999);
  tool.flag("rank-dropout",
            o.rank_dropout,
            "P",
            "share of a LoRA's ranks that are left out, for each sample",
            0,
            0.999);
  tool.flag("module-dropout",
            o.module_dropout,
            "P",
            "share of a LoRA's modules that are left out, for each step",
            0,
            0.999);
}

void add_layout_flags(Options& o, Tool& tool) {
  tool.flag("lora-layout",
            o.lora_layout,
            kLayouts,
            "names of the saved LoRA; diffusers (PEFT) has q, k and v apart and alpha in the matrices");
  tool.flag("model-layout",
            o.model_layout,
            dit::model_layouts(),
            "names of the model that --method full saves");
}

void add_layouts(const Options& o, nlohmann::json& out) {
  if (o.method == Method::kLora)
    out["lora-layout"] = lora::layout_name(o.lora_layout);
  else
    for (const auto& [word, layout] : dit::model_layouts())
      if (layout == o.model_layout) out["model-layout"] = word;
}

void check_lora(const Options& o, const Tool& tool) {
  if (o.method == Method::kFull) {
    for (const char* name : {"network-algo",
                             "lokr-factor",
                             "dora",
                             "train-blocks",
                             "train-double-blocks",
                             "train-single-blocks",
                             "module-ranks",
                             "rank-of",
                             "lr-of",
                             "loraplus-lr-ratio",
                             "scale-weight-norms",
                             "network-dropout",
                             "rank-dropout",
                             "module-dropout"})
      if (tool.given(name))
        throw UsageError(fmt::format("--{} has no effect with --method full", name),
                         "leave it out");
  }
  if (is_lokr(o) && o.lora_layout == lora::Layout::kDiffusers)
    throw UsageError("--lora-layout diffusers has no LoKr",
                     "leave it out; flux-lora convert writes LoKr as a LoRA of a larger rank");
  if (is_lokr(o)) {
    // it has no ranks between two matrices, and its second one may not be there
    for (const char* name : {"network-dropout", "rank-dropout", "loraplus-lr-ratio"})
      if (tool.given(name))
        throw UsageError(fmt::format("--{} has no effect with --network-algo lokr", name),
                         "leave it out; --module-dropout and --lr-of do");
  } else if (tool.given("lokr-factor")) {
    throw UsageError("--lokr-factor has no effect with --network-algo lora",
                     "give --network-algo lokr");
  }
  for (const auto& [name, blocks, family] :
       {std::tuple{"train-double-blocks", &o.lora.double_blocks, Family::kDouble},
        {"train-single-blocks", &o.lora.single_blocks, Family::kSingle}})
    if (*blocks != "all" && !trains(o, family))
      throw UsageError(
          fmt::format("--{} has no effect with --train-blocks {}", name, word(o.lora.blocks)),
          "leave one of them out");
  if (!o.lr_of.rules().empty() && o.lr.learning_rate <= 0)
    throw UsageError("--lr-of needs a --learning-rate above 0, whose schedule it follows",
                     "give one");
}

void add_lora_deciding(const Options& o, nlohmann::json& out) {
  // modules have alphas of their own if none is given and ranks differ
  if (has_several_ranks(o)) out["alpha"] = o.alpha;
  if (is_lokr(o)) {
    out["network-algo"] = "lokr";
    out["lokr-factor"] = o.lora_form.factor;
  }
  if (o.lora_form.dora) out["dora"] = true;
  out["train-blocks"] = word(o.lora.blocks);
  if (trains(o, Family::kDouble)) out["train-double-blocks"] = o.lora.double_blocks;
  if (trains(o, Family::kSingle)) out["train-single-blocks"] = o.lora.single_blocks;
  out["module-ranks"] = ranks_text(o.lora.ranks_of_types);
  out["rank-of"] = o.lora.ranks.text();
  out["lr-of"] = o.lr_of.text();
  out["loraplus-lr-ratio"] = o.loraplus_lr_ratio;
  out["scale-weight-norms"] = o.scale_weight_norms;
  out["network-dropout"] = o.network_dropout;
  out["rank-dropout"] = o.rank_dropout;
  out["module-dropout"] = o.module_dropout;
}

void set_lora(const Options& o, engine::TrainerOptions& t) {
  t.selection = o.lora;
  t.form = o.lora_form;
  t.rank = o.rank;
  t.alpha = o.alpha;
  if (!o.lr_of.rules().empty()) t.lr_factors = o.lr_of.scaled(1 / o.lr.learning_rate);
  t.up_lr_factor = o.loraplus_lr_ratio;
  t.max_weight_norm = o.scale_weight_norms;
  t.dropout = {.values = o.network_dropout, .ranks = o.rank_dropout, .modules = o.module_dropout};
}

std::string network_module(const Options& o) {
  return uses_lycoris(o) ? "lycoris.kohya" : "networks.lora_flux";
}

std::string network_args(const Options& o) {
  nlohmann::json out = nlohmann::json::object();
  const lora::Selection& s = o.lora;
  if (uses_lycoris(o)) {
    out["algo"] = is_lokr(o) ? "lokr" : "lora";
    if (is_lokr(o)) out["factor"] = std::to_string(o.lora_form.factor);
    if (o.lora_form.dora) {
      out["dora_wd"] = "True";
      out["wd_on_output"] = "True";
    }
  }
  if (s.blocks != Family::kAll) out["train_blocks"] = word(s.blocks);
  if (s.double_blocks != "all") out["train_double_block_indices"] = s.double_blocks;
  if (s.single_blocks != "all") out["train_single_block_indices"] = s.single_blocks;
  const auto rank_of = [&](const char* type) {
    const auto found = s.ranks_of_types.find(type);
    return found == s.ranks_of_types.end() ? int64_t{0} : found->second;
  };
  std::vector<int64_t> inputs;
  for (const char* type : {"img_in", "time_in", "vector_in", "guidance_in", "txt_in"})
    inputs.push_back(rank_of(type));
  for (const auto& [type, rank] : s.ranks_of_types)
    if (!type.ends_with("_in")) out[type + "_dim"] = std::to_string(rank);
  if (inputs != std::vector<int64_t>(5, 0))
    out["in_dims"] = fmt::format("{}", fmt::join(inputs, ","));
  if (!s.ranks.rules().empty()) out["network_reg_dims"] = s.ranks.text();
  if (!o.lr_of.rules().empty()) out["network_reg_lrs"] = o.lr_of.text();
  if (o.loraplus_lr_ratio != 1)
    out["loraplus_lr_ratio"] = nlohmann::json(o.loraplus_lr_ratio).dump();
  if (o.rank_dropout > 0) out["rank_dropout"] = nlohmann::json(o.rank_dropout).dump();
  if (o.module_dropout > 0) out["module_dropout"] = nlohmann::json(o.module_dropout).dump();
  return out.dump();
}

std::map<std::string, double> group_learning_rates(const Options& o, double learning_rate) {
  std::map<std::string, double> out;
  if (o.method != Method::kLora || (o.lr_of.rules().empty() && o.loraplus_lr_ratio == 1))
    return out;
  const auto add = [&](const std::string& name, double rate) {
    out[name] = rate;
    if (o.loraplus_lr_ratio != 1) out[name + " up"] = rate * o.loraplus_lr_ratio;
  };
  add("other", learning_rate);
  for (const auto& rule : o.lr_of.rules())
    add(rule.pattern, learning_rate * (rule.value / o.lr.learning_rate));
  return out;
}

}  // namespace flux::train

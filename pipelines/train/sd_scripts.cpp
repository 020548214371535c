#include "pipelines/train/sd_scripts.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <sstream>
#include <toml.hpp>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/reason.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "pipelines/train/optimizer.h"
#include "pipelines/train/options.h"
#include "pipelines/train/sd_scripts_flags.h"

namespace flux::train {
namespace {

using Words = std::vector<std::string>;

const SdFlag* find_flag(std::string_view name) {
  for (const SdFlag& flag : sd_flags())
    if (flag.name == name) return &flag;
  return nullptr;
}

UsageError unknown(const std::string& what, std::string_view prefix, const std::string& name) {
  std::vector<std::string> names;
  for (const SdFlag& flag : sd_flags()) {
    const bool is_argument = flag.name.starts_with("network_args:");
    if (is_argument == !prefix.empty()) names.emplace_back(flag.name.substr(prefix.size()));
  }
  const auto near = nearest_name(name, names);
  return UsageError(
      fmt::format(
          "--import-sd-scripts: sd-scripts' FLUX trainers have no {} '{}'", what, printable(name)),
      near ? fmt::format("did you mean {}?", *near)
           : "docs/from-sd-scripts.md lists what they have");
}

/// What is a value though it begins like a flag: -1, -.5.
bool is_value(const std::string& word) {
  return !word.starts_with("-") ||
         (word.size() > 1 && (word[1] == '.' || (word[1] >= '0' && word[1] <= '9')));
}

/// 'x' and "x" as Python's literals have them, True and False, or the text itself.
std::string literal(std::string text) {
  text = std::string(trim(text));
  if (text.size() > 1 && (text[0] == '\'' || text[0] == '"') && text.back() == text[0])
    text = text.substr(1, text.size() - 2);
  if (text == "True") return "true";
  if (text == "False") return "false";
  return text;
}

/// An expression over "lora_unet_double_blocks_0_img_attn_qkv" as one over "double_blocks.0.img_attn.qkv".
std::string path_expression(std::string text) {
  for (size_t at = 0; (at = text.find("lora_unet_", at)) != std::string::npos;) text.erase(at, 10);
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 1 < text.size() && text[i + 1] != '_') {
      out += text.substr(i++, 2);
      continue;
    }
    if (text[i] == '\\') continue;  // before '_', which needs none
    if (text[i] == '[') in_class = true;
    if (text[i] == ']') in_class = false;
    if (text[i] == '_')
      out += in_class ? "._" : "[._]";
    else
      out += text[i];
  }
  return out;
}

class Importer {
 public:
  explicit Importer(const Words& arguments) {
    read(after_launcher(arguments));
    if (given("config_file")) read_file_of_flags(one("config_file"));
  }

  ImportedRun run() {
    for (const auto& [name, words] : given_) {
      const SdFlag& flag = *find_flag(name);
      if (flag.fate == SdFate::kNotNeeded)
        not_needed_.push_back(said(name) + ": " + std::string(flag.why));
      if (flag.fate == SdFate::kRefused && !as_here(name)) refuse(said(name), flag.why);
    }
    input_and_output();
    if (full_)
      full_model();
    else
      network();
    optimizer();
    learning_rate();
    objective();
    validation();
    machine();
    settle();
    return {text(), warnings_};
  }

 private:
  /// A value of a flag that is not here which asks for what is always done.
  bool as_here(const std::string& name) const {
    return (name == "model_type" && one(name) == "flux") ||
           (name == "save_model_as" && one(name) == "safetensors");
  }

  struct Line {
    std::string key, value, comment, source;
    bool is_switch = false;
  };

  bool given(std::string_view name) const { return given_.contains(std::string(name)); }
  std::string one(std::string_view name) const { return given_.at(std::string(name)).at(0); }
  std::string one_or(std::string_view name, std::string otherwise) const {
    return given(name) ? one(name) : otherwise;
  }
  std::string said(const std::string& name) const {
    std::string out = "--" + name;
    for (const std::string& word : given_.at(name)) out += " " + printable(word);
    return out;
  }
  void refuse(const std::string& what, std::string_view why) {
    warnings_.push_back(fmt::format("{}: {}", what, why));
  }

  void set(std::string key, std::string value, std::string comment, std::string source = "") {
    lines_.push_back({std::move(key), std::move(value), std::move(comment), std::move(source)});
  }
  void set_switch(std::string key, const std::string& source) {
    lines_.push_back({std::move(key), "true", said(source), source, true});
  }
  /// The flag of the table as it is; `otherwise`: sd-scripts' default, where ours is another.
  void copy(std::string_view name, const char* otherwise = nullptr) {
    const SdFlag& flag = *find_flag(name);
    if (given(name)) {
      std::string comment = said(std::string(name));
      if (!flag.why.empty()) comment += fmt::format("; {}", flag.why);
      set(std::string(flag.ours), one(name), comment, std::string(name));
    } else if (otherwise) {
      set(std::string(flag.ours),
          otherwise,
          fmt::format("sd-scripts' default of --{}", name),
          std::string(name));
    }
  }

  Words after_launcher(const Words& arguments) {
    size_t start = 0;
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (!arguments[i].ends_with(".py")) continue;
      if (i > 0 && arguments[i - 1].starts_with("--") && start > 0)
        continue;  // a value of the script's own flag
      const std::string script = std::filesystem::path(arguments[i]).filename();
      if (script != "flux_train_network.py" && script != "flux_train.py")
        throw UsageError(fmt::format("--import-sd-scripts: {} is no FLUX trainer of sd-scripts",
                                     show(arguments[i])),
                         "flux_train_network.py and flux_train.py are");
      script_ = script;
      start = i + 1;
      break;
    }
    for (size_t i = 0; i < start; ++i) launcher_ += (i ? " " : "") + printable(arguments[i]);
    for (size_t i = 0; i + 1 < start; ++i) {
      const std::string& word = arguments[i];
      const bool several =
          word == "--num_processes" || word == "--num_machines" || word == "--gpu_ids";
      if (word == "--multi_gpu" || word.ends_with("deepspeed") ||
          (several && arguments[i + 1] != "1" &&
           arguments[i + 1].size() > (word == "--gpu_ids" ? 1 : 0)))
        refuse("accelerate " + printable(word),
               "leave it out, and start several ranks by torchrun (docs/ranks.md)");
    }
    if (start == 0 && !arguments.empty() && is_value(arguments[0]))
      throw UsageError(fmt::format("--import-sd-scripts: '{}' is no flag of sd-scripts",
                                   printable(arguments[0])),
                       "give the whole command, accelerate launch ... flux_train_network.py ..., "
                       "or what follows the script");
    Words rest;
    for (size_t i = start; i < arguments.size(); ++i)
      if (arguments[i] != "\\" && arguments[i] != "^" && arguments[i] != "`" &&
          arguments[i] != "\n")
        rest.push_back(arguments[i]);  // others are ends of lines of a shell that is not this one
    return rest;
  }

  void read(const Words& words) {
    for (size_t i = 0; i < words.size();) {
      const std::string& word = words[i++];
      if (!word.starts_with("--"))
        throw UsageError(fmt::format("--import-sd-scripts: stray '{}'", printable(word)),
                         "quote values that have blanks");
      const auto equals = word.find('=');
      const std::string name = word.substr(2, equals == std::string::npos ? equals : equals - 2);
      const SdFlag* flag = name.find(':') != std::string::npos ? nullptr : find_flag(name);
      if (!flag) throw unknown("flag", "", name);
      Words values;
      if (equals != std::string::npos) values.push_back(word.substr(equals + 1));
      const size_t most = flag->values == '*' ? SIZE_MAX : static_cast<size_t>(flag->values - '0');
      while (values.size() < most && i < words.size() && is_value(words[i]) &&
             equals == std::string::npos)
        values.push_back(words[i++]);
      if (flag->values == '0' && !values.empty())
        throw UsageError(fmt::format("--import-sd-scripts: --{} takes no value", name),
                         "leave the value out");
      if (flag->values == '1' && values.empty())
        throw UsageError(fmt::format("--import-sd-scripts: --{} needs a value", name), "give one");
      given_[name] = values;
    }
  }

  void read_file_of_flags(std::filesystem::path file) {
    if (file.extension() != ".toml") file += ".toml";
    toml::value document;
    try {
      std::istringstream stream(read_file(file, 16 << 20));
      document = toml::parse(stream, file.filename().native());
    } catch (const toml::exception& error) {
      throw UsageError(fmt::format("{}: line {}: not TOML: {}",
                                   show(file),
                                   error.location().line(),
                                   toml_reason(error.what())));
    }
    add_table(document, file);
  }
  void add_table(const toml::value& table, const std::filesystem::path& file) {
    const auto text = [&](const toml::value& value, const std::string& key) -> std::string {
      if (value.is_string()) return value.as_string().str;
      if (value.is_integer()) return std::to_string(value.as_integer());
      if (value.is_floating()) return fmt::format("{}", value.as_floating());
      if (value.is_boolean()) return value.as_boolean() ? "True" : "False";
      throw UsageError(
          fmt::format("{}: {} is neither text nor a number", show(file), printable(key)));
    };
    for (const auto& [key, value] : table.as_table()) {
      if (value.is_table()) {
        add_table(value, file);
        continue;
      }
      const SdFlag* flag = key.find(':') != std::string::npos ? nullptr : find_flag(key);
      if (!flag) throw unknown("key in " + show(file), "", key);
      if (given(key)) continue;  // the command line wins
      if (flag->values == '0') {
        if (!value.is_boolean())
          throw UsageError(fmt::format("{}: {} is neither true nor false", show(file), key));
        if (value.as_boolean()) given_[key] = {};
      } else if (value.is_array()) {
        Words words;
        for (const auto& element : value.as_array()) words.push_back(text(element, key));
        if (flag->values == '1' && words.size() != 1)
          throw UsageError(fmt::format("{}: {} needs one value", show(file), key));
        given_[key] = words;
      } else if (flag->values == '*') {
        std::istringstream stream(text(value, key));
        Words words;
        for (std::string word; stream >> word;) words.push_back(word);
        given_[key] = words;
      } else {
        given_[key] = {text(value, key)};
      }
    }
  }

  void input_and_output() {
    full_ = script_ == "flux_train.py" || (script_.empty() && !given("network_module"));
    set("method", full_ ? "full" : "lora", full_ ? "flux_train.py" : "flux_train_network.py");
    set("latents", "cache/latents", "made by flux-cache-latents, above");
    set("text", "cache/text", "made by flux-cache-text, above");
    if (!given("pretrained_model_name_or_path"))
      throw UsageError("--import-sd-scripts: --pretrained_model_name_or_path is missing",
                       "give the model's file");
    copy("pretrained_model_name_or_path");
    copy("output_dir", "run");
    checkpoints();
    if (given("max_train_epochs")) {
      copy("max_train_epochs");
      if (given("max_train_steps"))
        not_needed_.push_back("--max_train_steps: --max_train_epochs counts, as in sd-scripts");
    } else {
      copy("max_train_steps", "1600");
    }
    copy("gradient_accumulation_steps");
    if (given("seed"))
      copy("seed");
    else
      not_needed_.push_back("--seed is not given: sd-scripts draws one, here it is 0");
    if (given("dataset_config"))
      not_needed_.push_back("--train_batch_size: " + printable(one("dataset_config")) +
                            " has batch_size");
    else
      copy("train_batch_size", "1");
  }

  /// sd-scripts keeps a number of epochs that were saved, and a number of steps of any.
  void checkpoints() {
    const bool by_epochs = given("save_every_n_epochs");
    if (by_epochs)
      set("save-every",
          one("save_every_n_epochs") + "ep",
          said("save_every_n_epochs"),
          "save_every_n_epochs");
    else
      copy("save_every_n_steps");
    if (by_epochs && given("save_every_n_steps"))
      refuse(said("save_every_n_steps"), "checkpoints come by epochs, as is asked for too");
    const std::string last = by_epochs ? "save_last_n_epochs" : "save_last_n_steps";
    const std::string other = by_epochs ? "save_last_n_steps" : "save_last_n_epochs";
    if (given(other)) refuse(said(other), "checkpoints are not saved by what it counts");
    if (!given(last)) return;
    std::string count = one(last);
    if (!by_epochs) {
      if (!given("save_every_n_steps"))
        return refuse(said(last), "has no effect without --save_every_n_steps");
      const int64_t steps = whole(last), every = whole("save_every_n_steps");
      count = std::to_string(steps / every + 1);
    }
    set("keep-last", count, said(last) + "; a number of checkpoints", last);
  }
  int64_t whole(const std::string& name) const {
    const std::string text = one(name);
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < 1)
      throw UsageError(
          fmt::format("--import-sd-scripts: {} is no whole number above 0", said(name)));
    return value;
  }

  void full_model() {
    for (const char* name : {"network_module",
                             "network_dim",
                             "network_alpha",
                             "network_args",
                             "network_dropout",
                             "scale_weight_norms",
                             "unet_lr",
                             "prior_loss_weight",
                             "fp8_base",
                             "fp8_base_unet"})
      if (given(name)) not_needed_.push_back(said(name) + ": no flag of flux_train.py");
    if (one_or("mixed_precision", "no") != "no")
      not_needed_.push_back(
          "weights are rounded stochastically here; weight-mode = \"nearest\" is what sd-scripts "
          "does");
    if (given("save_precision"))
      not_needed_.push_back(said("save_precision") + ": weights are saved as they are trained");
  }

  void network() {
    const std::string module = one_or("network_module", "networks.lora_flux");
    const bool ours = module == "networks.lora_flux", lycoris = module.starts_with("lycoris");
    if (!ours && !lycoris)
      refuse("--network_module " + printable(module), "networks.lora_flux is trained instead");
    copy("network_dim", "4");
    copy("network_alpha", "1");
    for (const char* name : {"network_dropout", "scale_weight_norms", "prior_loss_weight"})
      copy(name);
    const std::string saved = one_or("save_precision", "float");
    set("lora-dtype",
        saved == "fp16"    ? "f16"
        : saved == "float" ? "f32"
                           : saved,
        given("save_precision") ? said("save_precision")
                                : "sd-scripts' default of --save_precision",
        "save_precision");
    for (const char* name : {"fp8_base", "fp8_base_unet"})
      if (given(name)) {
        set("base-precision", "fp8", said(name) + "; scaled, where sd-scripts casts", name);
        break;
      }
    std::string ranks, from;
    for (const std::string& argument : words_of("network_args")) {
      const auto equals = argument.find('=');
      if (equals == std::string::npos)
        throw UsageError(fmt::format("--import-sd-scripts: --network_args: '{}' is not key=value",
                                     printable(argument)),
                         "train_blocks=single, for one");
      const std::string key = argument.substr(0, equals),
                        value = literal(argument.substr(equals + 1));
      const std::string name = "network_args:" + key,
                        said_so = "--network_args " + printable(argument);
      const SdFlag* flag = find_flag(name);
      if (!flag && module == "networks.lora_flux")
        throw unknown("key in --network_args", "network_args:", key);
      if (!flag || flag->fate == SdFate::kRefused) {
        refuse(said_so, flag ? flag->why : "of another network module");
      } else if (flag->fate == SdFate::kNotNeeded) {
        not_needed_.push_back(
            fmt::format("{}{}{}", said_so, flag->why.empty() ? "" : ": ", flag->why));
      } else if (key == "in_dims") {
        Words names{"img_in", "time_in", "vector_in", "guidance_in", "txt_in"};
        const Words values =
            split(value.starts_with("[") ? value.substr(1, value.size() - 2) : value, ',');
        if (values.size() != names.size())
          throw UsageError("--import-sd-scripts: --network_args: in_dims needs five ranks",
                           "I,T,V,G,X");
        for (size_t i = 0; i < names.size(); ++i)
          ranks += fmt::format("{}{}={}", ranks.empty() ? "" : ",", names[i], trim(values[i]));
        from += (from.empty() ? "" : " ") + printable(argument);
      } else if (flag->ours == "module-ranks") {
        ranks +=
            fmt::format("{}{}={}", ranks.empty() ? "" : ",", key.substr(0, key.size() - 4), value);
        from += (from.empty() ? "" : " ") + printable(argument);
      } else if (key == "algo" && value != "lokr") {
        if (value != "lora" && value != "locon") refuse(said_so, "a LoRA is trained instead");
      } else if (key == "dora_wd") {
        if (value == "true") lines_.push_back({"dora", "true", said_so, "network_args", true});
      } else if (key.starts_with("network_reg_")) {
        set(std::string(flag->ours),
            path_expression(value),
            said_so + "; of paths such as double_blocks.0.img_attn.qkv",
            "network_args");
      } else {
        if (std::ranges::any_of(lines_, [&](const Line& line) { return line.key == flag->ours; }))
          continue;
        set(std::string(flag->ours), value, said_so, "network_args");
      }
    }
    if (!ranks.empty()) set("module-ranks", ranks, "--network_args " + from, "network_args");
  }

  Words words_of(const char* name) const { return given(name) ? given_.at(name) : Words(); }

  void optimizer() {
    std::string type = one_or("optimizer_type",
                              given("use_8bit_adam")        ? "AdamW8bit"
                              : given("use_lion_optimizer") ? "Lion"
                                                            : "AdamW");
    if (type.empty()) type = "AdamW";
    std::string low = type;
    std::ranges::transform(low, low.begin(), [](unsigned char c) { return std::tolower(c); });
    const std::map<std::string, std::pair<const char*, const char*>> known{
        {"adamw", {"adamw", ""}},
        {"adamw8bit", {"adamw8bit", ""}},
        {"pagedadamw", {"adamw", "the memory plan streams states that do not fit"}},
        {"pagedadamw32bit", {"adamw", "the memory plan streams states that do not fit"}},
        {"pagedadamw8bit", {"adamw8bit", "the memory plan streams states that do not fit"}},
        {"lion", {"lion", ""}},
        {"lion8bit", {"lion", "its state is not kept in 8 bits"}},
        {"pagedlion8bit", {"lion", "its state is not kept in 8 bits"}},
        {"prodigy", {"prodigy", ""}},
        {"adafactor", {"adafactor", ""}},
        {"sgdnesterov", {"sgd", ""}},
        {"sgdnesterov8bit", {"sgd", "its state is not kept in 8 bits"}},
        {"adamwschedulefree", {"schedulefree", ""}},
        {"schedulefree.adamwschedulefree", {"schedulefree", ""}}};
    const auto found = known.find(low);
    if (found == known.end())
      refuse("--optimizer_type " + printable(type), "it is not here; AdamW trains instead");
    const auto [ours, remark] = found == known.end() ? std::pair{"adamw", ""} : found->second;
    set("optimizer",
        ours,
        "--optimizer_type " + printable(type) + (*remark ? std::string("; ") + remark : ""),
        "optimizer_type");

    std::map<std::string, std::string> own;
    if (low.starts_with("sgdnesterov")) own = {{"momentum", "0.9"}, {"nesterov", "true"}};
    if (low == "adafactor") own = {{"relative_step", "true"}, {"scale_parameter", "true"}};
    for (const std::string& argument : words_of("optimizer_args")) {
      const auto equals = argument.find('=');
      if (equals == std::string::npos)
        throw UsageError(fmt::format("--import-sd-scripts: --optimizer_args: '{}' is not key=value",
                                     printable(argument)),
                         "weight_decay=0.01, for one");
      const std::string key = argument.substr(0, equals);
      std::string value = literal(argument.substr(equals + 1));
      const std::string said_so = "--optimizer_args " + printable(argument);
      if (found == known.end()) {
        refuse(said_so, "of an optimizer that is not here");
        continue;
      }
      if (key == "weight_decay") {
        set("weight-decay", value, said_so, "optimizer_args");
        continue;
      }
      if (key == "decouple" && value == "true") {
        not_needed_.push_back(said_so + ": weight decay is always decoupled");
        continue;
      }
      std::erase_if(
          value, [](char c) { return c == '(' || c == ')' || c == '[' || c == ']' || c == ' '; });
      const Words parts = split(value, ',');
      if (key == "betas" || (key == "eps" && parts.size() > 1)) {
        for (size_t i = 0; i < parts.size(); ++i)
          if (!parts[i].empty())
            own[fmt::format("{}{}", key == "betas" ? "beta" : "eps", i + 1)] = parts[i];
        continue;
      }
      if (value == "None") {
        not_needed_.push_back(said_so + ": the default");
        continue;
      }
      try {
        Options trial;
        choose(trial, ours);
        trial.optimizer_args = key + "=" + value;
        optimizer_options(trial);
        own[key] = value;
      } catch (const UsageError& error) {
        refuse(said_so, first_line(error.what()));
      }
    }
    if (low == "adafactor" && own["relative_step"] == "true")
      not_needed_.push_back("with relative_step Adafactor takes no learning rate and no schedule");
    std::string joined;
    for (const auto& [key, value] : own)
      joined += fmt::format("{}{}={}", joined.empty() ? "" : ",", key, value);
    if (!joined.empty())
      set("optimizer-args", joined, "--optimizer_args, and sd-scripts' defaults", "optimizer_args");

    const bool fused = given("fused_backward_pass") || given("blockwise_fused_optimizers");
    const bool clips = nlohmann::json::accept(one_or("max_grad_norm", "1.0")) &&
                       nlohmann::json::parse(one_or("max_grad_norm", "1.0")) != 0.0;
    if (clips)
      set("clip",
          fused ? "per-parameter" : "global",
          fused ? "clipped in the backward, as there" : "as there",
          "max_grad_norm");
    copy("max_grad_norm");
  }

  static std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

  static void choose(Options& options, const char* optimizer) {
    Tool tool("flux-train", {fmt::format("--optimizer={}", optimizer)});
    add_flags(options, tool);
    tool.parse();
  }

  void learning_rate() {
    if (!full_ && given("unet_lr")) {
      copy("unet_lr");
      if (given("learning_rate"))
        not_needed_.push_back(said("learning_rate") + ": --unet_lr overrules it");
    } else {
      copy("learning_rate", "2e-6");
    }
    const std::string scheduler = one_or("lr_scheduler", "constant");
    if (scheduler.starts_with("adafactor")) {
      refuse(said("lr_scheduler"), "constant: Adafactor with a relative step needs no schedule");
      set("lr-scheduler", "constant", said("lr_scheduler"), "lr_scheduler");
    } else {
      copy("lr_scheduler");
    }
    for (const char* name : {"lr_warmup_steps",
                             "lr_decay_steps",
                             "lr_scheduler_num_cycles",
                             "lr_scheduler_power",
                             "lr_scheduler_timescale",
                             "lr_scheduler_min_lr_ratio"})
      copy(name);
    for (const std::string& argument : words_of("lr_scheduler_args")) {
      if (argument.starts_with("step_rules="))
        set("lr-step-rules",
            literal(argument.substr(11)),
            "--lr_scheduler_args " + printable(argument),
            "lr_scheduler_args");
      else
        refuse("--lr_scheduler_args " + printable(argument), "only step_rules is known here");
    }
  }

  void objective() {
    copy("timestep_sampling", "sigma");
    for (const char* name : {"sigmoid_scale",
                             "discrete_flow_shift",
                             "logit_mean",
                             "logit_std",
                             "mode_scale",
                             "min_timestep",
                             "max_timestep"})
      copy(name);
    const std::string prediction = one_or("model_prediction_type", "sigma_scaled");
    const std::string weighting = one_or("weighting_scheme", "uniform");
    if ((weighting == "sigma_sqrt" || weighting == "cosmap") && prediction != "sigma_scaled")
      not_needed_.push_back(said("weighting_scheme") + ": sd-scripts ignores it with " +
                            printable(prediction));
    else
      copy("weighting_scheme");
    copy("model_prediction_type", "sigma_scaled");
    std::string model = std::filesystem::path(one("pretrained_model_name_or_path")).filename();
    std::ranges::transform(model, model.begin(), [](unsigned char c) { return std::tolower(c); });
    if (model.find("schnell") != std::string::npos)
      not_needed_.push_back("--guidance_scale: schnell has no such input");
    else
      copy("guidance_scale", "3.5");
    for (const char* name :
         {"loss_type", "huber_schedule", "huber_c", "huber_scale", "ip_noise_gamma"})
      copy(name);
    if (given("ip_noise_gamma_random_strength"))
      set_switch("ip-noise-gamma-random-strength", "ip_noise_gamma_random_strength");
    if (given("masked_loss")) set("masked-loss", "on", said("masked_loss"), "masked_loss");
    if (given("no_metadata")) set_switch("no-tags", "no_metadata");
  }

  void validation() {
    const bool split = given("validation_split") && one("validation_split") != "0" &&
                       one("validation_split") != "0.0";
    const bool may_split = !full_ && (split || given("dataset_config"));
    bool any = split && !full_;
    for (const char* name :
         {"validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"}) {
      if (!given(name)) continue;
      if (!may_split)
        not_needed_.push_back(said(name) +
                              (full_ ? ": no flag of flux_train.py"
                                     : ": nothing is held out without --validation_split"));
      any = may_split;
    }
    if (!any) return;
    if (given("validate_every_n_steps")) {
      copy("validate_every_n_steps");
      if (given("validate_every_n_epochs"))
        refuse(said("validate_every_n_epochs"), "it comes by steps, as is asked for too");
    } else if (given("validate_every_n_epochs")) {
      set("validate-every",
          one("validate_every_n_epochs") + "ep",
          said("validate_every_n_epochs"),
          "validate_every_n_epochs");
    } else {
      set("validate-every", "1ep", "sd-scripts' default of --validate_every_n_epochs");
    }
    if (given("max_validation_steps")) {
      int64_t batch = 1;
      if (!given("dataset_config") && given("train_batch_size")) batch = whole("train_batch_size");
      set("validation-samples",
          std::to_string(whole("max_validation_steps") * batch),
          said("max_validation_steps") + "; batches there, samples here",
          "max_validation_steps");
    }
    set("validation-sigmas", "0.2,0.4,0.6,0.8", "sd-scripts' fixed timesteps");
  }

  void machine() {
    const std::string precision = one_or("mixed_precision", "no");
    if (precision == "fp16")
      refuse("--mixed_precision fp16", "bf16 is computed, which needs no scaled loss");
    set("precision",
        precision == "no" ? "f32" : "bf16",
        given("mixed_precision") ? said("mixed_precision")
                                 : "sd-scripts' default of --mixed_precision",
        "mixed_precision");
  }

  /// Drops what has no effect, as flux-train sees it; sd-scripts ignores it in silence.
  void settle() {
    for (;;) {
      Words arguments;
      for (const Line& line : lines_)
        arguments.push_back("--" + line.key + (line.is_switch ? "" : "=" + line.value));
      try {
        Options options;
        Tool trial("flux-train", arguments);
        add_flags(options, trial);
        trial.parse();
        check(options, trial);
        return;
      } catch (const UsageError& error) {
        const std::string what = error.what();
        const auto told = std::ranges::find_if(lines_, [&](const Line& line) {
          return what.starts_with("--" + line.key + " has no effect");
        });
        if (told != lines_.end()) {
          not_needed_.push_back(fmt::format("{}: no effect there either", told->comment));
          lines_.erase(told);
          continue;
        }
        const auto wrong = std::ranges::find_if(lines_, [&](const Line& line) {
          return !line.source.empty() && what.starts_with("--" + line.key + ": ");
        });
        if (wrong == lines_.end()) throw;
        throw UsageError(fmt::format(
            "--import-sd-scripts: --{}: {}", wrong->source, what.substr(wrong->key.size() + 4)));
      }
    }
  }

  /// The command of one caching tool, its flags from the table.
  std::string caching(SdFate fate, const char* tool, const char* out) const {
    std::string line =
        fmt::format("#   {} --dataset {} --profile kohya", tool, printable(data_set()));
    for (const SdFlag& flag : sd_flags()) {
      if (flag.fate != fate || !given(flag.name)) continue;
      std::string value = flag.values == '0' ? "" : one(flag.name);
      if (flag.name == "apply_t5_attn_mask") value = "masked";
      if (flag.name == "resolution") {
        std::ranges::replace(value, ',', 'x');
        std::erase(value, ' ');
        if (value.find('x') == std::string::npos) value += "x" + value;
      }
      line += fmt::format(" --{} {}", flag.ours, printable(value));
    }
    if (fate == SdFate::kLatents && !given("ae")) line += " --ae ae.safetensors";
    if (fate == SdFate::kText) {
      if (!given("t5xxl")) line += " --t5 t5xxl.safetensors";
      if (!given("clip_l")) line += " --clip clip_l.safetensors";
      line += " --t5-tokenizer spiece.model --clip-tokenizer clip";
    }
    return line + " --out " + out + "\n";
  }
  std::string data_set() const { return one_or("dataset_config", "dataset.toml"); }

  /// What the data set file must hold, as the command line of sd-scripts has it.
  std::string data_set_text() const {
    std::string options, of_subsets;  // the second: what cannot stand in [general]
    for (const SdFlag& flag : sd_flags()) {
      const std::string name(flag.name);
      if (flag.fate != SdFate::kDataset || !given(name)) continue;
      if (name == "dataset_config" || name == "train_data_dir" || name == "reg_data_dir" ||
          name == "in_json")
        continue;
      const std::string value = flag.values == '0' ? "true" : one(name);
      const bool plain = flag.values == '0' || nlohmann::json::accept(value);
      const bool of_subset = name == "alpha_mask" || name == "conditioning_data_dir";
      (of_subset ? of_subsets : options) +=
          fmt::format("#     {} = {}\n",
                      name == "dataset_repeats" ? "num_repeats" : name,
                      plain ? value : toml_string(value).value_or("\"\""));
    }
    if (given("dataset_config")) {
      std::string out;
      for (const auto& [where, lines] :
           {std::pair{"in [general]", options}, {"in its subsets", of_subsets}})
        if (!lines.empty())
          out += fmt::format("# {} takes these, {}, where it does not say otherwise:\n{}",
                             printable(one("dataset_config")),
                             where,
                             lines);
      return out;
    }
    std::string out = "# dataset.toml:\n#     [general]\n" + options;
    out += "#     [[datasets]]\n";
    out += fmt::format("#     batch_size = {}\n", printable(one_or("train_batch_size", "1")));
    for (const char* name : {"train_data_dir", "reg_data_dir"}) {
      if (!given(name) || given("in_json")) continue;
      const std::string more =
          name == std::string_view("reg_data_dir") ? "#     is_reg = true\n" : of_subsets;
      std::set<std::pair<std::string, std::string>> folders;  // path, repeats
      std::error_code none;
      for (const auto& entry : std::filesystem::directory_iterator(one(name), none)) {
        const std::string folder = entry.path().filename();
        const auto line = folder.find('_');
        if (entry.is_directory(none) && line != std::string::npos && line > 0 &&
            std::ranges::all_of(folder.substr(0, line),
                                [](char c) { return c >= '0' && c <= '9'; }))
          folders.insert({entry.path().native(), folder.substr(0, line)});
      }
      if (folders.empty()) folders.insert({one(name) + "/N_NAME", "N"});
      for (const auto& [path, repeats] : folders)
        out += fmt::format(
            "#     [[datasets.subsets]]\n#     image_dir = {}\n#     num_repeats = {}\n{}",
            toml_string(path).value_or("\"\""),
            repeats == "N" ? repeats : std::to_string(std::stoll(repeats)),
            more);
    }
    if (given("in_json"))
      out += fmt::format(
          "#     [[datasets.subsets]]\n#     metadata_file = {}\n#     image_dir = {}\n{}",
          toml_string(one("in_json")).value_or("\"\""),
          toml_string(one_or("train_data_dir", ".")).value_or("\"\""),
          of_subsets);
    return out;
  }

  std::string text() const {
    std::string out = fmt::format(
        "# flux-train --config FILE.toml\n# from {}\n#\n# Caches first:\n",
        launcher_.empty() ? (full_ ? "flux_train.py" : "flux_train_network.py") : launcher_);
    out += caching(SdFate::kLatents, "flux-cache-latents", "cache/latents");
    out += caching(SdFate::kText, "flux-cache-text", "cache/text");
    out += data_set_text() + "\n";
    for (const Line& line : lines_) {
      const bool plain = line.is_switch || nlohmann::json::accept(line.value);
      const auto value = plain ? line.value : toml_string(line.value);
      out += value
                 ? fmt::format("{} = {}  # {}\n", line.key, *value, line.comment)
                 : fmt::format("# {}: not UTF-8, which TOML needs  # {}\n", line.key, line.comment);
    }
    if (!warnings_.empty()) out += "\n# Cannot be done here:\n";
    for (const std::string& line : warnings_) out += "#   " + line + "\n";
    if (!not_needed_.empty()) out += "\n# Needs no flag here:\n";
    for (const std::string& line : not_needed_) out += "#   " + line + "\n";
    return out;
  }

  std::map<std::string, Words> given_;  // by name
  std::string script_, launcher_;
  bool full_ = false;
  std::vector<Line> lines_;
  std::vector<std::string> warnings_, not_needed_;
};

}  // namespace

ImportedRun import_sd_scripts(const std::vector<std::string>& arguments) {
  return Importer(arguments).run();
}

}  // namespace flux::train

#include "pipelines/train/validation.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <system_error>

#include "common/core/error.h"
#include "common/core/file.h"
#include "formats/checkpoint/checkpoint.h"

namespace flux::train {
namespace {

namespace fs = std::filesystem;

constexpr char kRecordName[] = "best.json", kLinkName[] = "best";

/// What the state.json of a checkpoint says; nothing if it cannot be read, which resuming would say.
std::optional<Validation> validation_of(const fs::path& run, int64_t step) {
  std::string text;
  try {
    text = read_file(run / checkpoint::step_name(step) / "state.json");
  } catch (const InputError&) {
    return std::nullopt;
  }
  const auto state = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!state.is_object()) return std::nullopt;
  if (auto found = Validation::from_object(state.value("validation", nlohmann::json()));
      found && found->step == step)
    return found;
  return std::nullopt;
}

}  // namespace

nlohmann::json Validation::object() const {
  return {{"step", step},
          {"loss", loss},
          {"sigmas", sigmas},
          {"losses", losses},
          {"samples", samples},
          {"seed", seed},
          {"seconds", seconds}};
}

std::optional<Validation> Validation::from_object(const nlohmann::json& object) try {
  Validation out;
  object.at("step").get_to(out.step);
  object.at("loss").get_to(out.loss);
  object.at("sigmas").get_to(out.sigmas);
  object.at("losses").get_to(out.losses);
  object.at("samples").get_to(out.samples);
  object.at("seed").get_to(out.seed);
  object.at("seconds").get_to(out.seconds);
  if (out.sigmas.size() != out.losses.size()) return std::nullopt;
  return out;
} catch (const nlohmann::json::exception&) {
  return std::nullopt;
}

bool Validation::comparable(const Validation& other) const {
  return sigmas == other.sigmas && samples == other.samples && seed == other.seed;
}

std::vector<std::pair<std::string, double>> Validation::curves() const {
  std::vector<std::pair<std::string, double>> out{{"validation/loss", loss}};
  for (size_t i = 0; i < sigmas.size(); ++i)
    out.emplace_back(fmt::format("validation/sigma_{}", sigmas[i]), losses[i]);
  return out;
}

std::optional<Validation> best_checkpoint(const fs::path& run, int64_t last_step) {
  std::optional<Validation> best;
  const auto steps = checkpoint::steps_in(run);
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    if (*step > last_step) continue;
    const auto found = validation_of(run, *step);
    if (!found || (best && !found->comparable(*best))) continue;
    if (!best || found->loss <= best->loss) best = found;
  }
  return best;
}

void mark_best(const fs::path& run, const std::optional<Validation>& best) {
  std::error_code ignored;
  if (!best) {
    fs::remove(run / kRecordName, ignored);
    if (fs::is_symlink(run / kLinkName, ignored)) fs::remove(run / kLinkName, ignored);
    return;
  }
  const std::string name = checkpoint::step_name(best->step);
  nlohmann::json record = best->object();
  record["checkpoint"] = name;
  write_file_if_changed(run / kRecordName, record.dump(1) + "\n");
  // what is called so and is no link is not ours
  if (fs::exists(fs::symlink_status(run / kLinkName, ignored)) &&
      !fs::is_symlink(run / kLinkName, ignored))
    return;
  const fs::path temporary = run / fmt::format(".{}.{}", kLinkName, random_name());
  std::error_code error;
  fs::create_directory_symlink(name, temporary, error);
  if (!error) fs::rename(temporary, run / kLinkName, error);
  if (error) fs::remove(temporary, ignored);
}

}  // namespace flux::train

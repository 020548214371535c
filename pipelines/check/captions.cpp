// Kind data-captions: what sd-scripts makes of captions, and how many images it holds out.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dataset/caption.h"
#include "common/dataset/dataset.h"
#include "pipelines/check/case.h"
#include "pipelines/check/lines.h"

namespace flux::check {
using Json = nlohmann::json;
namespace {

/// Draws written down beforehand.
class Script : public dataset::Draws {
 public:
  explicit Script(Json draws) : draws_(std::move(draws)) {}
  bool chance(double probability) override {
    return next("random").at("random").get<double>() < probability;
  }
  size_t choice(size_t n) override {
    const auto draw = next("choice");
    if (draw.at("of").get<size_t>() != n)
      throw std::runtime_error(fmt::format("a choice of {}, golden of {}", n, draw["of"].dump()));
    return draw.at("choice");
  }
  std::vector<size_t> shuffle(size_t n) override {
    const auto order = next("shuffle").at("shuffle").get<std::vector<size_t>>();
    if (order.size() != n) throw std::runtime_error(fmt::format("a shuffle of {}", n));
    return order;
  }
  bool used_up() const { return at_ == draws_.size(); }

 private:
  Json next(const char* kind) {
    if (at_ == draws_.size() || !draws_[at_].contains(kind))
      throw std::runtime_error(fmt::format("draws a {} that is not recorded", kind));
    return draws_[at_++];
  }
  Json draws_;
  size_t at_ = 0;
};

dataset::CaptionOptions caption_options(const Json& line) {
  dataset::CaptionOptions o;
  o.prefix = line.value("caption_prefix", ""), o.suffix = line.value("caption_suffix", "");
  o.separator = line.value("caption_separator", ",");
  o.secondary_separator = line.value("secondary_separator", "");
  o.keep_tokens_separator = line.value("keep_tokens_separator", "");
  o.keep_tokens = line.value("keep_tokens", 0);
  o.shuffle = line.value("shuffle_caption", false);
  o.wildcards = line.value("enable_wildcard", false);
  o.tag_dropout_rate = line.value("caption_tag_dropout_rate", 0.0);
  o.dropout_rate = line.value("caption_dropout_rate", 0.0);
  o.dropout_every_n_epochs = line.value("caption_dropout_every_n_epochs", 0);
  o.token_warmup_min = line.value("token_warmup_min", 1);
  o.token_warmup_step = line.value("token_warmup_step", 0.0);
  return o;
}

}  // namespace

void check_captions(const Case& c) {
  if (c.has("captions.jsonl")) {
    Tally tally;
    for_each_line(c, "captions.jsonl", [&](const Json& line) {
      const std::string name = "id " + line.value("id", Json()).dump();
      Script script(line.value("draws", Json::array()));
      const dataset::CaptionTime time{line.value("current_epoch", int64_t{1}),
                                      line.value("current_step", int64_t{0}),
                                      line.value("max_train_steps", int64_t{0})};
      try {
        const auto got = dataset::process_caption(
            line.at("caption").get<std::string>(), caption_options(line), time, script);
        const bool same = got == line.at("result").get<std::string>() && script.used_up();
        tally.add(same, name, script.used_up() ? Json(got).dump() : "draws are left");
      } catch (const std::runtime_error& error) {
        tally.add(false, name, error.what());
      }
    });
    tally.report(*c.report, "captions.jsonl");
  }
  if (!c.has("validation_split.json")) return;
  Tally tally;
  const auto json = read_object(c.folder / "validation_split.json");
  for (const auto& golden : json.at("cases")) {
    std::vector<Sha256Digest> items;
    for (int64_t i = 0; i < golden.at("n"); ++i)
      items.push_back(dataset::item_digest(0, std::to_string(i)));
    const auto members = dataset::validation_members(items, golden.at("split"), 7);
    const auto held_out = std::count(members.begin(), members.end(), true),
               train = std::ssize(members) - held_out;
    // the reference rounds both parts on their own, and then trains on one that it holds out
    const auto rounded =
        std::llrint(static_cast<double>(members.size()) * golden["split"].get<double>());
    const bool disjoint = train + rounded <= std::ssize(members);
    const bool same = train == golden.at("train") &&
                      golden.value("disjoint", disjoint) == disjoint &&
                      golden.at("validation") == (disjoint ? held_out : rounded);
    tally.add(same,
              fmt::format("n {} split {}", golden["n"].dump(), golden["split"].dump()),
              fmt::format("{} and {}", train, held_out));
  }
  tally.report(*c.report, "validation_split.json", "splits");
}

}  // namespace flux::check

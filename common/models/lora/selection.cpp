#include "common/models/lora/selection.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <functional>
#include <memory>
#include <numeric>
#include <regex>
#include <set>
#include <string_view>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/models/flux/names.h"

namespace flux::lora {
namespace {

constexpr double kLargestRank = 4096;

template <class Number>
std::optional<Number> number(std::string_view text) {
  text = trim(text);
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

const std::vector<std::string>& module_types() {
  static const std::vector<std::string> names{"img_attn",
                                              "txt_attn",
                                              "img_mlp",
                                              "txt_mlp",
                                              "img_mod",
                                              "txt_mod",
                                              "single",
                                              "single_mod",
                                              "img_in",
                                              "time_in",
                                              "vector_in",
                                              "guidance_in",
                                              "txt_in"};
  return names;
}

/// Where a layer is: its type, empty for those that sd-scripts never adapts, and its block, -1 outside of them.
struct Place {
  std::string type;
  bool is_double = false;
  int64_t block = -1;
};

Place place_of(const std::string& path) {
  const auto parts = split(path, '.');
  if (parts[0] == "double_blocks") return {parts.at(2), true, *number<int64_t>(parts.at(1))};
  if (parts[0] == "single_blocks")
    return {parts.at(2) == "modulation" ? "single_mod" : "single",
            false,
            *number<int64_t>(parts.at(1))};
  return {std::ranges::count(module_types(), parts[0]) > 0 ? parts[0] : "", false, -1};
}

std::vector<char> chosen_blocks(const std::string& text, int64_t count, const char* flag) {
  const auto ranges = block_ranges(text);
  std::vector<char> chosen(static_cast<size_t>(count), ranges ? 0 : 1);
  if (!ranges) return chosen;
  for (const auto& [first, last] : *ranges) {
    if (last >= count)
      throw UsageError(
          fmt::format("{}: block {} is not there, the model has {}", flag, last, count),
          fmt::format("blocks are numbered from 0 to {}", count - 1));
    std::fill(chosen.begin() + first, chosen.begin() + last + 1, char{1});
  }
  return chosen;
}

}  // namespace

PathRules::PathRules(const std::string& text, double low, double high) : text_(trim(text)) {
  if (text_.empty()) return;
  std::string entry;
  for (const std::string& part : split(text_, ',')) {
    // a comma before the number belongs to the expression
    entry += entry.empty() ? part : "," + part;
    const auto equals = entry.rfind('=');
    const auto value = equals == std::string::npos
                           ? std::nullopt
                           : number<double>(std::string_view(entry).substr(equals + 1));
    if (!value) continue;
    Rule rule{std::string(trim(std::string_view(entry).substr(0, equals))), *value, {}};
    if (!(rule.value >= low && rule.value <= high))
      throw UsageError(
          fmt::format("'{}': {} is not in [{}, {}]", printable(entry), rule.value, low, high));
    try {
      const auto expression = std::make_shared<const std::regex>(rule.pattern);
      rule.matches = [expression](const std::string& path) {
        return std::regex_search(path, *expression);
      };
    } catch (const std::regex_error&) {
      throw UsageError("'" + printable(rule.pattern) + "' is no regular expression");
    }
    if (rule.pattern.empty()) throw UsageError("'" + printable(entry) + "' has no expression");
    rules_.push_back(std::move(rule));
    entry.clear();
  }
  if (!entry.empty())
    throw UsageError("'" + printable(entry) + "' is not REGEX=NUMBER such as img_attn=8");
}

std::optional<size_t> PathRules::find(const std::string& path) const {
  for (size_t i = 0; i < rules_.size(); ++i)
    if (rules_[i].matches(path)) return i;
  return std::nullopt;
}

std::optional<double> PathRules::value(const std::string& path) const {
  const auto found = find(path);
  return found ? std::optional(rules_[*found].value) : std::nullopt;
}

PathRules PathRules::scaled(double factor) const {
  PathRules out = *this;
  for (Rule& rule : out.rules_) rule.value *= factor;
  return out;
}

void PathRules::require_all_used(const std::vector<Target>& targets, const char* flag) const {
  std::set<size_t> used;
  for (const Target& target : targets)
    if (const auto found = find(target.path)) used.insert(*found);
  for (size_t i = 0; i < rules_.size(); ++i)
    if (!used.contains(i))
      throw UsageError(
          fmt::format("{}: '{}' counts for no module", flag, printable(rules_[i].pattern)),
          "expressions are looked for in paths such as double_blocks.0.img_attn.qkv and "
          "single_blocks.3.linear1, the first that is found counts");
}

std::optional<std::vector<std::pair<int64_t, int64_t>>> block_ranges(const std::string& text) {
  if (trim(text) == "all") return std::nullopt;
  std::vector<std::pair<int64_t, int64_t>> out;
  if (trim(text) == "none") return out;
  for (const std::string& part : split(text, ',')) {
    const auto dash = part.find('-');
    const auto first = number<int64_t>(std::string_view(part).substr(0, dash));
    const auto last = dash == std::string::npos
                          ? first
                          : number<int64_t>(std::string_view(part).substr(dash + 1));
    if (!first || !last || *first < 0 || *last < *first)
      throw UsageError("'" + printable(text) + "' is not all, none or blocks such as 0,1,8-12");
    out.emplace_back(*first, *last);
  }
  return out;
}

std::map<std::string, int64_t> module_ranks(const std::string& text) {
  std::map<std::string, int64_t> out;
  if (trim(text).empty()) return out;
  for (const std::string& part : split(text, ',')) {
    const auto equals = part.find('=');
    const std::string name(trim(std::string_view(part).substr(0, equals)));
    if (std::ranges::count(module_types(), name) == 0) {
      const auto nearest = nearest_name(name, module_types());
      throw UsageError("'" + printable(name) + "' is no type of module",
                       nearest ? "did you mean " + *nearest + "?"
                               : fmt::format("they are {}", fmt::join(module_types(), ", ")));
    }
    const auto rank = equals == std::string::npos
                          ? std::nullopt
                          : number<int64_t>(std::string_view(part).substr(equals + 1));
    if (!rank || *rank < 0 || static_cast<double>(*rank) > kLargestRank)
      throw UsageError("'" + printable(part) + "' is not NAME=RANK with a rank in [0, 4096]");
    if (!out.emplace(name, *rank).second) throw UsageError("'" + name + "' is given twice");
  }
  return out;
}

std::vector<Target> all_targets(const dit::Config& config) {
  std::vector<Target> out;
  for (const auto& [name, shape] : dit::tensor_shapes(config))
    if (shape.size() == 2) out.push_back({name.substr(0, name.rfind('.')), shape[1], shape[0]});
  return out;
}

std::vector<Target> default_targets(const dit::Config& config) {
  auto out = all_targets(config);
  std::erase_if(
      out, [](const Target& target) { return target.path.find("_blocks.") == std::string::npos; });
  return out;
}

std::vector<Target> with_rank(std::vector<Target> targets, int64_t rank, double alpha) {
  for (Target& target : targets) {
    target.rank = rank;
    target.alpha = alpha;
  }
  return targets;
}

std::vector<Target> select_targets(const dit::Config& config,
                                   const Selection& s,
                                   int64_t rank,
                                   double alpha) {
  const auto of_double =
      chosen_blocks(s.double_blocks, config.num_double_blocks, "--train-double-blocks");
  const auto of_single =
      chosen_blocks(s.single_blocks, config.num_single_blocks, "--train-single-blocks");
  const auto selected = [&](const Place& place) {
    if (place.block < 0) return true;
    if (s.blocks == (place.is_double ? Family::kSingle : Family::kDouble)) return false;
    return (place.is_double ? of_double : of_single)[static_cast<size_t>(place.block)] != 0;
  };
  std::vector<Target> out, candidates;
  std::set<std::string> used_types;
  for (Target target : all_targets(config)) {
    const Place place = place_of(target.path);
    if (place.type.empty()) continue;
    candidates.push_back(target);
    if (const auto given = s.ranks.value(target.path)) {
      target.rank = static_cast<int64_t>(*given);
    } else if (selected(place)) {
      target.rank = place.block < 0 ? 0 : rank;
      if (const auto found = s.ranks_of_types.find(place.type); found != s.ranks_of_types.end()) {
        used_types.insert(place.type);
        target.rank = found->second;
      }
    }
    if (target.rank == 0) continue;
    target.alpha = alpha > 0 ? alpha : static_cast<double>(target.rank);
    out.push_back(std::move(target));
  }
  s.ranks.require_all_used(candidates, "--rank-of");
  for (const auto& [type, unused] : s.ranks_of_types)
    if (!used_types.contains(type))
      throw UsageError(
          fmt::format("--module-ranks: {} has no effect, no such module is selected", type),
          "leave it out, or select its blocks");
  if (out.empty())
    throw UsageError("the selection leaves no module to train",
                     "see --train-blocks, --train-double-blocks, --train-single-blocks, "
                     "--module-ranks, --rank-of");
  return out;
}

std::pair<int64_t, int64_t> factorized(int64_t size, int64_t factor) {
  if (factor > 0 && size % factor == 0 && size >= factor * factor) return {factor, size / factor};
  if (factor < 0) factor = size;
  int64_t small = 1;
  for (int64_t next = 2; next <= factor && next * next <= size; ++next)
    if (size % next == 0) small = next;
  return {small, size / small};
}

int64_t lokr_factor(const std::string& text) {
  const auto value = number<int64_t>(text);
  if (!value || (*value != -1 && (*value < 2 || *value > 4096)))
    throw UsageError("'" + printable(text) + "' is not -1 or in [2, 4096]");
  return *value;
}

std::vector<PartShape> part_shapes(const Target& target, const Form& form) {
  enum : size_t { kDown, kUp, kMix, kMagnitude };
  const int64_t rank = target.rank;
  std::vector<PartShape> out;
  if (form.algorithm == Algorithm::kLora) {
    out = {{kDown, {rank, target.in}}, {kUp, {target.out, rank}}};
  } else {
    const auto [a, b] = factorized(target.out, form.factor);
    const auto [c, d] = factorized(target.in, form.factor);
    if (2 * rank < std::max(b, d))
      out = {{kDown, {rank, d}}, {kUp, {b, rank}}};
    else
      out = {{kDown, {b, d}}};
    out.push_back({kMix, {a, c}});
  }
  if (form.dora) out.push_back({kMagnitude, {target.out, 1}});
  return out;
}

int64_t num_parameters(const std::vector<Target>& targets, const Form& form) {
  int64_t sum = 0;
  for (const Target& target : targets)
    for (const PartShape& part : part_shapes(target, form))
      sum += std::accumulate(part.shape.begin(), part.shape.end(), int64_t{1}, std::multiplies<>());
  return sum;
}

std::string ranks_text(const std::vector<Target>& targets) {
  if (targets.empty()) return "no rank";
  const auto [low, high] = std::ranges::minmax(targets, {}, &Target::rank);
  return low.rank == high.rank ? fmt::format("rank {}", low.rank)
                               : fmt::format("ranks {} to {}", low.rank, high.rank);
}

}  // namespace flux::lora

#include "common/dataset/caption.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <numeric>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/core/log.h"
#include "common/core/rng.h"
#include "common/core/text.h"

namespace flux::dataset {
namespace {

constexpr uint64_t kMaxCaptionBytes = 16 << 20;
constexpr int64_t kMaxPaths =
    50'000;  // of draws tried before a program counts as having too many outcomes

// What Python's str.isspace accepts, in UTF-8.
constexpr std::string_view kSpaces[] = {
    "\t",           "\n",           "\v",           "\f",           "\r",           " ",
    "\x1C",         "\x1D",         "\x1E",         "\x1F",         "\xC2\x85",     "\xC2\xA0",
    "\xE1\x9A\x80", "\xE2\x80\x80", "\xE2\x80\x81", "\xE2\x80\x82", "\xE2\x80\x83", "\xE2\x80\x84",
    "\xE2\x80\x85", "\xE2\x80\x86", "\xE2\x80\x87", "\xE2\x80\x88", "\xE2\x80\x89", "\xE2\x80\x8A",
    "\xE2\x80\xA8", "\xE2\x80\xA9", "\xE2\x80\xAF", "\xE2\x81\x9F", "\xE3\x80\x80"};

std::vector<std::string> split_by(std::string_view text, std::string_view separator) {
  std::vector<std::string> parts;
  for (size_t at; (at = text.find(separator)) != std::string_view::npos;
       text.remove_prefix(at + separator.size())) {
    parts.emplace_back(text.substr(0, at));
  }
  parts.emplace_back(text);
  return parts;
}

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  for (size_t at; (at = text.find(from)) != std::string_view::npos;
       text.remove_prefix(at + from.size())) {
    out.append(text.substr(0, at)).append(to);
  }
  return out.append(text);
}

// Lines as Python's text files have them.
std::vector<std::string_view> lines_of(std::string_view text) {
  std::vector<std::string_view> lines;
  while (!text.empty()) {
    const size_t end = text.find_first_of("\r\n");
    lines.push_back(text.substr(0, end));
    if (end == std::string_view::npos) break;
    text.remove_prefix(end + (text.substr(end, 2) == "\r\n" ? 2 : 1));
  }
  return lines;
}

// {a|b} becomes a or b; {{ and }} stand for braces. A brace pair with nothing in it stays.
std::string replace_wildcards(std::string text, Draws& draws) {
  std::string open = "⦅",
              close = "⦆";  // for the doubled braces meanwhile, longer than any that the text has
  while (text.find(open) != std::string::npos || text.find(close) != std::string::npos)
    open += "⦅", close += "⦆";
  text = replace_all(replace_all(text, "{{", open), "}}", close);
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t end = text[at] == '{' ? text.find('}', at) : std::string::npos;
    if (end == std::string::npos || end == at + 1) {
      out += text[at++];
      continue;
    }
    const auto choices = split_by(std::string_view(text).substr(at + 1, end - at - 1), "|");
    out += choices[draws.choice(choices.size())];
    at = end + 1;
  }
  return replace_all(replace_all(out, open, "{"), close, "}");
}

// Tags without white space around them; empty ones only if `keep_empty`.
std::vector<std::string> tags_of(std::string_view text,
                                 std::string_view separator,
                                 bool keep_empty) {
  std::vector<std::string> tags;
  for (const auto& part : split_by(text, separator)) {
    const auto tag = strip_unicode(part);
    if (keep_empty || !tag.empty()) tags.emplace_back(tag);
  }
  return tags;
}

std::string process_tags(const std::string& caption,
                         const CaptionOptions& o,
                         const CaptionTime& time,
                         Draws& draws) {
  std::vector<std::string> fixed, tags, last;
  const auto& keep = o.keep_tokens_separator;
  if (const size_t at = keep.empty() ? std::string::npos : caption.find(keep);
      at != std::string::npos) {
    fixed = tags_of(std::string_view(caption).substr(0, at), o.separator, false);
    auto rest = std::string_view(caption).substr(at + keep.size());
    if (const size_t second = rest.find(keep); second != std::string_view::npos) {
      last = tags_of(rest.substr(second + keep.size()), o.separator, false);
      rest = rest.substr(0, second);
    }
    tags = tags_of(rest, o.separator, false);
  } else {
    tags = tags_of(strip_unicode(caption), o.separator, true);
    const auto kept = std::clamp<int64_t>(o.keep_tokens, 0, static_cast<int64_t>(tags.size()));
    fixed.assign(tags.begin(), tags.begin() + kept);
    tags.erase(tags.begin(), tags.begin() + kept);
  }
  double warmup = o.token_warmup_step;
  if (warmup < 1) warmup = std::floor(warmup * static_cast<double>(time.max_steps));
  if (warmup > 0 && static_cast<double>(time.step) < warmup) {
    const double slope =
        (static_cast<double>(tags.size()) - static_cast<double>(o.token_warmup_min)) / warmup;
    const auto count = static_cast<int64_t>(std::floor(static_cast<double>(time.step) * slope)) +
                       o.token_warmup_min;
    tags.resize(
        static_cast<size_t>(std::clamp<int64_t>(count, 0, static_cast<int64_t>(tags.size()))));
  }
  if (o.shuffle) {
    std::vector<std::string> shuffled;
    for (const size_t i : draws.shuffle(tags.size())) shuffled.push_back(tags.at(i));
    tags = std::move(shuffled);
  }
  std::vector<std::string> all = std::move(fixed);
  for (auto& tag : tags) {
    if (o.tag_dropout_rate > 0 && draws.chance(o.tag_dropout_rate)) continue;
    all.push_back(std::move(tag));
  }
  all.insert(all.end(), last.begin(), last.end());
  std::string out;
  for (const auto& tag : all) out += (&tag == all.data() ? "" : ", ") + tag;
  return out;
}

/// Too many combinations of draws to try them all.
struct TooMany {};

/// Walks all combinations of draws, one a run.
class EveryDraw : public Draws {
 public:
  bool chance(double probability) override {
    if (probability >= 1) return true;
    const bool happens = decide(2) == 1;
    weight_ *= happens ? probability : 1 - probability;
    return happens;
  }
  size_t choice(size_t n) override {
    weight_ /= static_cast<double>(n);
    return decide(n);
  }
  std::vector<size_t> shuffle(size_t n) override {
    if (n > 8) throw TooMany{};  // 9! is above kMaxPaths
    std::vector<size_t> order(n), rest(n);
    std::iota(rest.begin(), rest.end(), size_t{0});
    for (auto& i : order) {
      const auto at = rest.begin() + static_cast<std::ptrdiff_t>(choice(rest.size()));
      i = *at;
      rest.erase(at);
    }
    return order;
  }
  double weight() const { return weight_; }
  /// Goes to the next combination; false after the last.
  bool next() {
    while (!path_.empty() && path_.back().value + 1 == path_.back().count) path_.pop_back();
    if (path_.empty()) return false;
    ++path_.back().value;
    at_ = 0, weight_ = 1;
    return true;
  }

 private:
  struct Step {
    size_t value, count;
  };
  size_t decide(size_t n) {
    if (at_ == path_.size()) path_.push_back({0, n});
    return path_[at_++].value;
  }
  std::vector<Step> path_;
  size_t at_ = 0;
  double weight_ = 1;
};

class KeyedDraws : public Draws {
 public:
  explicit KeyedDraws(const RandomStream& stream) : stream_(stream) {}
  bool chance(double probability) override { return stream_.uniform(next_++) < probability; }
  size_t choice(size_t n) override { return stream_.below(next_++, n); }
  std::vector<size_t> shuffle(size_t n) override {
    std::vector<size_t> order(n);
    std::iota(order.begin(), order.end(), size_t{0});
    for (size_t i = n; i > 1; --i) std::swap(order[i - 1], order[choice(i)]);
    return order;
  }

 private:
  RandomStream stream_;
  uint64_t next_ = 0;
};

}  // namespace

std::string_view strip_unicode(std::string_view text) {
  for (bool found = true; found;) {
    found = false;
    for (const auto space : kSpaces) {
      if (text.starts_with(space)) text.remove_prefix(space.size()), found = true;
      if (text.ends_with(space)) text.remove_suffix(space.size()), found = true;
    }
  }
  return text;
}

std::string read_caption_file(const std::filesystem::path& file, bool wildcards, Profile profile) {
  const std::string bytes = read_file(file, kMaxCaptionBytes);
  if (const auto bad = first_invalid_utf8(bytes)) {
    throw InputError(show(file) + ": not UTF-8 at byte " + std::to_string(*bad),
                     "save the caption as UTF-8");
  }
  std::string_view text = bytes;
  if (text.empty()) {
    if (profile == Profile::kKohya) throw InputError(show(file) + ": the caption file is empty");
    log::warn("{}: an empty caption file", show(file));
  }
  if (profile == Profile::kDefault && text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  std::string caption;
  for (const auto line : lines_of(text)) {
    const auto stripped = strip_unicode(line);
    if (stripped.empty() && wildcards) continue;
    if (!caption.empty()) caption += '\n';
    caption += stripped;
    if (!wildcards) break;
  }
  if (caption.empty() && !bytes.empty()) {
    log::warn("{}: an empty caption: {}",
              show(file),
              wildcards ? "its lines are blank" : "its first line is blank");
  }
  return caption;
}

// Source: kohya-ss/sd-scripts, library/train_util.py (process_caption).
std::string process_caption(std::string_view text,
                            const CaptionOptions& o,
                            const CaptionTime& time,
                            Draws& draws) {
  std::string caption(text);
  if (!o.prefix.empty()) caption = o.prefix + " " + caption;
  if (!o.suffix.empty()) caption += " " + o.suffix;
  const bool dropped = o.dropout_rate > 0 && draws.chance(o.dropout_rate);
  if (dropped || (o.dropout_every_n_epochs > 0 && time.epoch % o.dropout_every_n_epochs == 0))
    return {};
  if (o.wildcards) {
    if (caption.find('\n') != std::string::npos) {
      const auto lines = split_by(caption, "\n");
      caption = lines[draws.choice(lines.size())];
    }
    caption = replace_wildcards(std::move(caption), draws);
  } else {
    caption.resize(std::min(caption.find('\n'), caption.size()));
  }
  if (o.shuffle || o.token_warmup_step > 0 || o.tag_dropout_rate > 0)
    caption = process_tags(caption, o, time, draws);
  if (!o.secondary_separator.empty())
    caption = replace_all(caption, o.secondary_separator, o.separator);
  return caption;
}

std::vector<CaptionVariant> caption_variants(std::string_view caption,
                                             const CaptionOptions& options,
                                             int64_t max_variants,
                                             uint64_t seed) {
  CaptionOptions o = options;
  o.dropout_rate = 0, o.dropout_every_n_epochs = 0, o.token_warmup_step = 0;
  const auto limit = static_cast<size_t>(std::max<int64_t>(max_variants, 1));
  std::map<std::string, double> outcomes;
  bool exact = true;
  try {
    EveryDraw draws;
    int64_t paths = 0;
    do {
      if (++paths > kMaxPaths) throw TooMany{};
      const auto text = process_caption(caption, o, {}, draws);
      outcomes[text] += draws.weight();
      if (outcomes.size() > limit) throw TooMany{};
    } while (draws.next());
  } catch (const TooMany&) {
    exact = false;
  }
  if (!exact) {
    outcomes.clear();
    const uint64_t key = xxh3_64(as_bytes(caption));
    for (size_t i = 0; i < limit; ++i) {
      KeyedDraws draws(RandomStream(seed, Purpose::kCaptionProgram, key, i));
      outcomes[process_caption(caption, o, {}, draws)] += 1.0 / static_cast<double>(limit);
    }
  }
  std::vector<CaptionVariant> variants;
  for (auto& [text, weight] : outcomes) variants.push_back({text, weight});
  return variants;
}

}  // namespace flux::dataset

#include "pipelines/text/read.h"

#include <fmt/format.h>

#include <unordered_map>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "common/dataset/dataset.h"
#include "formats/cache/index.h"
#include "pipelines/stage/finish.h"

namespace flux::text {
namespace {

/// Gives each distinct text a number.
class Captions {
 public:
  explicit Captions(std::vector<std::string>& list) : list_(list) {}
  size_t number(const std::string& text) {
    const auto [it, is_new] = numbers_.try_emplace(text, list_.size());
    if (is_new) list_.push_back(text);
    return it->second;
  }

 private:
  std::vector<std::string>& list_;
  std::unordered_map<std::string, size_t> numbers_;
};

// Throws InputError if a text cannot be a caption of the cache.
void require_storable(std::string_view text) {
  if (const auto offset = first_invalid_utf8(text))
    throw InputError(fmt::format("the caption is not UTF-8 at byte {}", *offset));
  if (std::ssize(text) > cache::kMaxTextBytes) {
    throw InputError(fmt::format("the caption has {}, at most {} are possible",
                                 show_bytes(text.size()),
                                 show_bytes(cache::kMaxTextBytes)));
  }
}

bool asks_for_dropout(const dataset::Resolved& resolved) {
  return std::ranges::any_of(resolved.subsets, [](const dataset::Subset& subset) {
    return subset.captions.dropout_rate > 0 || subset.captions.dropout_every_n_epochs > 0;
  });
}

// `without` are the images that have none.
InputError no_caption(const dataset::Resolved& resolved,
                      const std::vector<const dataset::Image*>& without) {
  const dataset::Subset& first = resolved.subset(without.front()->subset);
  std::vector<std::string> names;
  bool one_subset = true;
  for (const dataset::Image* image : without) {
    names.push_back(show(image->name));
    one_subset &= image->subset == first.index;
  }
  const std::string what_to_do =
      !first.metadata_file.empty()
          ? fmt::format("give each a caption or tags in {}", show(first.metadata_file))
          : fmt::format("write NAME{} beside each{}",
                        first.caption_extensions.front(),
                        first.where.empty() ? "" : ", give class_tokens in the dataset file");
  return InputError(fmt::format("{}: {} of {} images {} no caption: {}",
                                one_subset && !first.where.empty() ? first.where : resolved.source,
                                names.size(),
                                resolved.images.size(),
                                names.size() == 1 ? "has" : "have",
                                join_some(names)),
                    what_to_do + ", or use --missing-caption empty");
}

}  // namespace

Wanted read_dataset(const Options& options) {
  const dataset::Resolved resolved = stage::resolve_captions(options.data);
  Wanted wanted;
  wanted.plan = dataset::plan_json(resolved);
  Captions captions(wanted.captions);
  std::vector<const dataset::Image*> without;
  Progress progress("reading", "captions", std::ssize(resolved.images));
  for (size_t i = 0; i < resolved.images.size(); ++i) {
    cancel::check();
    const dataset::Image& image = resolved.images[i];
    const dataset::Subset& subset = resolved.subset(image.subset);
    try {
      auto caption = dataset::read_caption(resolved, image);
      if (!caption && options.missing_caption == MissingCaption::kError) {
        without.push_back(&image);
        continue;
      }
      require_storable(caption.value_or(""));
      Item item{image.item,
                static_cast<uint32_t>(image.subset),
                static_cast<uint32_t>(image.repeats),
                (subset.is_reg ? cache::kItemRegularization : 0u) |
                    (image.validation ? cache::kItemValidation : 0u),
                image.name,
                {}};
      const auto variants =
          dataset::caption_variants(caption.value_or(""),
                                    subset.captions,
                                    options.text_variants.value_or(kDefaultVariants),
                                    static_cast<uint64_t>(options.seed));
      // few draws may be equal by chance
      const bool few = options.text_variants.value_or(kDefaultVariants) < kDefaultVariants;
      wanted.has_random_parts =
          wanted.has_random_parts || variants.size() > 1 ||
          (few &&
           dataset::caption_variants(caption.value_or(""), subset.captions, kDefaultVariants, 0)
                   .size() > 1);
      for (const auto& variant : variants) require_storable(variant.text);
      for (const auto& variant : variants)
        item.uses.push_back({captions.number(variant.text), variant.weight});
      wanted.items.push_back(std::move(item));
    } catch (const InputError& error) {
      wanted.quarantined.push_back(
          stage::leave_out(image.item,
                           static_cast<uint32_t>(image.subset),
                           image.name,
                           stage::reason_of(error.what(), image.file.parent_path())));
    }
    progress.update(static_cast<int64_t>(i) + 1);
  }
  if (!without.empty()) throw no_caption(resolved, without);
  if (asks_for_dropout(resolved)) {
    wanted.items.push_back({sha256("empty caption"),
                            0,
                            1,
                            cache::kItemEmptyCaption,
                            "",
                            {{captions.number(""), 1.0}}});
  }
  return wanted;
}

Wanted read_prompts(const std::filesystem::path& file) {
  constexpr std::string_view kByteOrderMark = "\uFEFF";
  constexpr uint64_t kMaxBytes = uint64_t{1} << 30;
  const std::string bytes = read_file(file, kMaxBytes);
  if (const auto offset = first_invalid_utf8(bytes)) {
    throw InputError(fmt::format("{}: is not UTF-8 at byte {}", show(file), *offset),
                     "save it as UTF-8");
  }
  std::string_view text = bytes;
  if (text.starts_with(kByteOrderMark)) text.remove_prefix(kByteOrderMark.size());
  Wanted wanted;
  Captions captions(wanted.captions);
  for (const std::string& line : split(text, '\n')) {
    const std::string prompt(dataset::strip_unicode(line));
    if (prompt.empty() || prompt.starts_with('#')) continue;
    if (std::ssize(prompt) > cache::kMaxTextBytes) {
      throw InputError(fmt::format("{}: prompt {} has {}, at most {} are possible",
                                   show(file),
                                   wanted.items.size() + 1,
                                   show_bytes(prompt.size()),
                                   show_bytes(cache::kMaxTextBytes)));
    }
    const std::string name = fmt::format("prompt-{:06}", wanted.items.size());
    wanted.items.push_back(
        {dataset::item_digest(0, name), 0, 1, 0, name, {{captions.number(prompt), 1.0}}});
  }
  if (wanted.items.empty()) throw InputError(show(file) + ": has no prompt", "write one a line");
  wanted.plan = {{"kind", "prompts"}, {"num_prompts", std::ssize(wanted.items)}};
  return wanted;
}

}  // namespace flux::text

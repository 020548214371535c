#include "common/data/prompts.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <set>

#include "common/core/error.h"
#include "common/core/hash.h"
#include "common/core/text.h"
#include "common/tensor/tensor.h"
#include "formats/cache/lock.h"
#include "formats/cache/reader.h"

namespace flux {

struct Prompts::State {
  explicit State(const std::filesystem::path& folder)
      : lock(folder), text(folder, cache::Kind::kText) {}
  cache::ReaderLock lock;
  cache::Cache text;
  std::vector<Prompt> hidden;  // the empty caption, which is not of the data set

  const cache::IndexVariant& variant(const Prompt& prompt) const {
    return text.index().variants(prompt.number).front();
  }
};

Prompts::Prompts(const std::filesystem::path& folder) : state_(std::make_unique<State>(folder)) {
  const cache::Index& index = state_->text.index();
  const auto& shard = manifest().shard;
  if (shard.count != 1)
    throw CacheError(
        fmt::format("{}: is part {} of {} of a cache", show(folder), shard.index, shard.count),
        "flux-cache merge puts the parts together");
  std::set<Sha256Digest> seen;
  for (int64_t i = 0; i < index.num_items(); ++i) {
    if (!seen.insert(index.variants(i).front().key).second) continue;
    Prompt prompt{{}, i};
    const cache::SampleInfo info = state_->text.info(state_->variant(prompt));
    prompt.text = info.text;
    prompt.id = xxh3_64(as_bytes(info.text));
    const bool empty = (index.item(i).flags & cache::kItemEmptyCaption) != 0;
    (empty ? state_->hidden : prompts_).push_back(std::move(prompt));
  }
}

Prompts::~Prompts() = default;

const std::filesystem::path& Prompts::folder() const { return state_->text.folder(); }
const cache::Manifest& Prompts::manifest() const { return state_->text.manifest(); }
int64_t Prompts::t5_length() const { return state_->text.layout().t5_length; }
at::ScalarType Prompts::type() const { return *scalar_type(state_->text.layout().dtype); }
bool Prompts::masked() const {
  return manifest().recipe.parameters.value("pad_policy", "") == "masked";
}

PromptEmbedding Prompts::load(const Prompt& prompt) const {
  const cache::Layout& layout = state_->text.layout();
  PromptEmbedding out;
  out.prompt = at::empty({1, layout.t5_length, layout.t5_width}, type());
  out.pooled = at::empty({1, layout.clip_width}, type());
  const auto bytes = [](const at::Tensor& tensor) {
    return std::span(static_cast<std::byte*>(tensor.mutable_data_ptr()), tensor.nbytes());
  };
  const std::span<std::byte> tensors[] = {bytes(out.prompt), bytes(out.pooled)};
  const cache::SampleInfo info = state_->text.read_into(state_->variant(prompt), tensors);
  if (masked()) {
    // padding that is not attended to is left out: the same picture, in less time
    out.prompt = out.prompt.narrow(1, 0, std::max<int64_t>(info.t5_tokens, 1)).clone();
    out.mask = at::ones({1, out.prompt.size(1)}, at::kBool);
  }
  return out;
}

Prompt Prompts::find(const std::string& text_or_number, const char* flag) const {
  for (const std::vector<Prompt>* list :
       {&prompts_, static_cast<const std::vector<Prompt>*>(&state_->hidden)})
    for (const Prompt& prompt : *list)
      if (prompt.text == text_or_number) return prompt;
  int64_t number = -1;
  const char* const end = text_or_number.data() + text_or_number.size();
  const auto parsed = std::from_chars(text_or_number.data(), end, number);
  if (parsed.ec == std::errc() && parsed.ptr == end)
    for (const Prompt& prompt : prompts_)
      if (prompt.number == number) return prompt;
  std::vector<std::string> some;
  for (const Prompt& prompt : prompts_)
    some.push_back(fmt::format("{} \"{}\"", prompt.number, printable(shortened(prompt.text, 40))));
  throw UsageError(fmt::format("{}: {} has no prompt \"{}\"; it has {}",
                               flag,
                               show(folder()),
                               printable(shortened(text_or_number, 80)),
                               join_some(some)),
                   "give the text of one of its prompts, or its number; add a line to the prompts "
                   "file and run flux-cache-text again");
}

void Prompts::require_fit(const std::filesystem::path& model,
                          int64_t prompt_dim,
                          int64_t pooled_dim,
                          bool guidance) const {
  const cache::Layout& layout = state_->text.layout();
  std::vector<std::string> lines;
  const auto require = [&](const char* field, int64_t found, int64_t wanted) {
    if (found == wanted) return;
    lines.push_back(fmt::format("{}: parameters.{} is {}, the model {} takes {}",
                                show(folder()),
                                field,
                                found,
                                show(model),
                                wanted));
  };
  require("t5_width", layout.t5_width, prompt_dim);
  require("clip_width", layout.clip_width, pooled_dim);
  const bool widths_fit = lines.empty();
  if (guidance || layout.t5_length != 256) require("t5_length", layout.t5_length, 512);
  if (!lines.empty())
    throw CacheError(
        fmt::format("{}", fmt::join(lines, "\n  ")),
        widths_fit ? "run flux-cache-text with --t5-length 512; only schnell was trained with 256"
                   : "make the text cache with the encoders that belong to this model");
}

}  // namespace flux

#include "pipelines/stage/reproduce.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <random>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/log.h"
#include "common/core/text.h"
#include "common/tensor/tensor.h"

namespace flux::stage {
namespace {

// Another machine sums in another order. In float32 that moves a value by less than one step of
// the stored bf16 (2^-8 of it), so a sample by less than that; in bf16 it moves what is computed by
// such steps, layer after layer: the nets' own error against float64 is up to 0.01 there.
constexpr double kBoundF32 = 0.004, kBoundBF16 = 0.04;

at::Tensor values_of(const std::vector<std::byte>& bytes, DType dtype) {
  const auto size = static_cast<int64_t>(bytes.size()) * 8 / dtype_bits(dtype);
  return at::from_blob(const_cast<std::byte*>(bytes.data()), {size}, *scalar_type(dtype))
      .to(at::kDouble);
}

}  // namespace

Reproduction::Reproduction(const std::filesystem::path& folder,
                           const cache::Recipe& recipe,
                           const cache::Shard& shard)
    : cache_(folder, recipe.kind) {
  const auto& found = cache_.manifest().recipe;
  const auto require = [&](const char* what, const auto& there, const auto& now) {
    cache::require_equal(what,
                         there,
                         show(folder),
                         now,
                         "this run",
                         "--reproduce needs the flags and files that the cache was made with");
  };
  require("parameters", found.parameters, recipe.parameters);
  require("weights", found.weights, recipe.weights);
  require("tokenizers", found.tokenizers, recipe.tokenizers);
  const auto& part = cache_.manifest().shard;
  if (part.count > 1 && shard.count == 1) {
    log::warn(
        "{}: is part {}/{} of a cache: only samples of this part are encoded again (--shard {}/{} "
        "says so)",
        show(folder),
        part.index,
        part.count,
        part.index,
        part.count);
  } else if (part != shard) {
    throw CacheError(
        fmt::format(
            "{}: is {}, this run is for part {}/{}",
            show(folder),
            part.count == 1 ? "a whole cache" : fmt::format("part {}/{}", part.index, part.count),
            shard.index,
            shard.count),
        part.count == 1 ? "leave --shard out"
                        : fmt::format("--shard {}/{}", part.index, part.count));
  }
  for (const auto& variant : cache_.index().variants()) {
    if (variant.segment != cache::kOtherShard) variants_.emplace(variant.key, variant);
  }
  drift_.bound = recipe.parameters.value("precision", "") == "bf16" ? kBoundBF16 : kBoundF32;
}

std::vector<Sha256Digest> Reproduction::choose(const std::vector<Sha256Digest>& wanted,
                                               int64_t count) const {
  const auto& part = cache_.manifest().shard;
  std::vector<Sha256Digest> known;
  size_t num_wanted = 0;
  for (const auto& key : wanted) {
    num_wanted += cache::shard_of(key, part.count) == part.index;
    if (variants_.contains(key)) known.push_back(key);
  }
  if (known.size() < num_wanted) {
    const size_t bad = cache_.manifest().quarantined.size();
    log::warn("{} of {} samples that the data set needs are not in the cache: {}",
              num_wanted - known.size(),
              num_wanted,
              bad == 0
                  ? "it has changed"
                  : fmt::format("it has changed, or they are of the bad items left out ({})", bad));
  }
  std::vector<Sha256Digest> chosen;
  std::sample(known.begin(),
              known.end(),
              std::back_inserter(chosen),
              count,
              std::mt19937_64(std::random_device{}()));
  std::sort(chosen.begin(), chosen.end());
  log::info("encoding {} of {} samples again", chosen.size(), known.size());
  return chosen;
}

void Reproduction::add(EncodedSample sample) {
  const auto stored = cache_.read(variants_.at(sample.info.key));
  ++drift_.num_samples;
  if (stored.tensors == sample.tensors) {
    ++drift_.num_equal;
    for (const auto& tensor : stored.tensors) {
      num_values_ += static_cast<int64_t>(tensor.size()) * 8 / dtype_bits(cache_.layout().dtype);
    }
    return;
  }
  double relative = 0;
  for (size_t i = 0; i < stored.tensors.size(); ++i) {
    const bool is_mask = cache_.layout().kind == cache::Kind::kLatents && i == 1;
    const DType dtype = is_mask ? DType::kF32 : cache_.layout().dtype;
    const auto before = values_of(stored.tensors[i], dtype);
    const auto difference = (values_of(sample.tensors.at(i), dtype) - before).abs();
    drift_.max_absolute = std::max(drift_.max_absolute, difference.max().item<double>());
    sum_absolute_ += difference.sum().item<double>();
    num_values_ += difference.numel();
    const double norm = before.norm().item<double>(), off = difference.norm().item<double>();
    relative = std::max(relative, norm > 0 ? off / norm : off);
  }
  if (relative > drift_.max_relative) {
    drift_.max_relative = relative;
    drift_.worst = sample.info.text;
  }
}

void Reproduction::stop_if_asked() { cancel::check(); }

Drift Reproduction::drift(const std::vector<Failure>& failures) const {
  Drift out = drift_;
  out.num_failed = static_cast<int64_t>(failures.size());
  constexpr size_t kShownBytes = 80;
  for (const auto& failure : failures) {
    log::error("{}: cannot be encoded again: {}",
               shortened(printable(failure.info.text), kShownBytes),
               failure.reason);
  }
  out.mean_absolute = num_values_ > 0 ? sum_absolute_ / static_cast<double>(num_values_) : 0;
  return out;
}

std::string Drift::line() const {
  std::string out = fmt::format("{}: {} of {} samples are equal bit for bit",
                                within() ? "reproduced" : "not reproduced",
                                num_equal,
                                num_samples);
  if (num_equal < num_samples) {
    out += fmt::format("; drift: largest {:.3g}, mean {:.3g}, relative {:.3g} (bound {:.3g}) in {}",
                       max_absolute,
                       mean_absolute,
                       max_relative,
                       bound,
                       show(worst));
  }
  if (num_failed > 0) out += fmt::format("; {} could not be encoded", num_failed);
  return out;
}

nlohmann::json Drift::json() const {
  return {{"samples", num_samples},
          {"equal", num_equal},
          {"failed", num_failed},
          {"max_absolute", max_absolute},
          {"mean_absolute", mean_absolute},
          {"max_relative", max_relative},
          {"bound", bound},
          {"within", within()},
          {"worst", printable(worst)}};
}

}  // namespace flux::stage

#include "pipelines/cache/diff.h"

#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/progress.h"
#include "common/core/text.h"
#include "pipelines/cache/decode.h"

namespace flux::cache {
namespace {

using Json = nlohmann::json;

constexpr size_t kNumExamples = 5, kShownName = 80;

void note(Differing& differing, const std::string& id, std::string name) {
  if (++differing.count <= static_cast<int64_t>(kNumExamples))
    differing.examples.push_back({id, std::move(name)});
}

void compare_fields(const Contents& a, const Contents& b, Difference& out) {
  const auto compare = [&](const char* what, const Json& x, const Json& y) {
    for (auto& line : differences(what, x, show(out.a), y, show(out.b)))
      out.fields.push_back(std::move(line));
  };
  compare("kind", std::string(kind_name(*a.kind)), std::string(kind_name(*b.kind)));
  compare("complete", a.complete, b.complete);
  compare("parameters", a.header.recipe.parameters, b.header.recipe.parameters);
  compare("weights", a.header.recipe.weights, b.header.recipe.weights);
  compare("tokenizers", a.header.recipe.tokenizers, b.header.recipe.tokenizers);
  if (!a.manifest || !b.manifest) return;
  compare("plan", a.manifest->plan, b.manifest->plan);
  compare("plan_digest", a.manifest->plan_digest, b.manifest->plan_digest);
  compare("shard",
          Json{{"index", a.manifest->shard.index}, {"count", a.manifest->shard.count}},
          Json{{"index", b.manifest->shard.index}, {"count", b.manifest->shard.count}});
  const auto left_out = [](const Manifest& manifest) {
    Json items = Json::object();
    for (const auto& item : manifest.quarantined) items[to_hex(item.item)] = printable(item.path);
    return items;
  };
  compare("quarantined", left_out(*a.manifest), left_out(*b.manifest));
}

void compare_values(const std::vector<NamedTensor>& a,
                    const std::vector<NamedTensor>& b,
                    Difference& out) {
  for (size_t t = 0; t < std::min(a.size(), b.size()); ++t) {
    const auto x = as_floats(a[t]), y = as_floats(b[t]);
    for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
      if (std::isfinite(x[i]) && std::isfinite(y[i])) {
        out.max_abs_difference =
            std::max(out.max_abs_difference,
                     std::fabs(static_cast<double>(x[i]) - static_cast<double>(y[i])));
      } else {
        out.num_not_finite += std::memcmp(&x[i], &y[i], sizeof x[i]) != 0;
      }
    }
  }
}

void compare_samples(const Contents& a, const Contents& b, Difference& out) {
  std::map<Sha256Digest, const ListedSample*> in_b;
  for (const auto& sample : b.samples) in_b[sample.info.key] = &sample;
  std::vector<std::pair<const ListedSample*, const ListedSample*>> changed;
  for (const auto& sample : a.samples) {
    const auto other = in_b.find(sample.info.key);
    if (other == in_b.end()) {
      note(out.samples_only_a, to_hex(sample.info.key), sample_label(sample, *a.kind));
      continue;
    }
    if (other->second->info.tensor_xxh3 == sample.info.tensor_xxh3) {
      ++out.num_samples_equal;
    } else {
      note(out.samples_changed, to_hex(sample.info.key), sample_label(sample, *a.kind));
      changed.emplace_back(&sample, other->second);
    }
    in_b.erase(other);
  }
  for (const auto& sample : b.samples) {  // in the order of b's items
    if (in_b.contains(sample.info.key))
      note(out.samples_only_b, to_hex(sample.info.key), sample_label(sample, *b.kind));
  }
  if (changed.empty()) return;
  Segments segments_a(a.folder), segments_b(b.folder);
  Progress progress("compare", "samples", static_cast<int64_t>(changed.size()));
  int64_t done = 0;
  for (const auto& [x, y] : changed) {
    cancel::check();
    compare_values(decode(segments_a, *x), decode(segments_b, *y), out);
    progress.update(++done);
  }
}

// Everything about an item but where its samples lie.
bool same_item(const Index& a, int64_t i, const Index& b, int64_t k) {
  const IndexItem &x = a.item(i), &y = b.item(k);
  return x.subset == y.subset && x.repeats == y.repeats && x.flags == y.flags &&
         a.path(i) == b.path(k) &&
         std::ranges::equal(a.variants(i), b.variants(k), [](const auto& v, const auto& w) {
           return v.key == w.key && v.weight == w.weight && v.flags == w.flags;
         });
}

void compare_items(const Index& a, const Index& b, Difference& out) {
  const auto name = [](const Index& index, int64_t i) {
    return index.item(i).flags & kItemEmptyCaption ? std::string("the empty caption")
                                                   : std::string(index.path(i));
  };
  std::map<Sha256Digest, int64_t> in_b;
  for (int64_t k = 0; k < b.num_items(); ++k) in_b[b.item(k).item] = k;
  for (int64_t i = 0; i < a.num_items(); ++i) {
    const std::string id = to_hex(a.item(i).item);
    const auto other = in_b.find(a.item(i).item);
    if (other == in_b.end()) {
      note(out.items_only_a, id, name(a, i));
      continue;
    }
    if (same_item(a, i, b, other->second))
      ++out.num_items_equal;
    else
      note(out.items_changed, id, name(a, i));
    in_b.erase(other);
  }
  for (int64_t k = 0; k < b.num_items(); ++k) {
    if (in_b.contains(b.item(k).item)) note(out.items_only_b, to_hex(b.item(k).item), name(b, k));
  }
}

Json differing_json(const Differing& differing) {
  Json out{{"count", differing.count}, {"examples", Json::array()}};
  for (const auto& example : differing.examples)
    out["examples"].push_back({{"id", example.id}, {"name", printable(example.name)}});
  return out;
}

void append(std::string& out, const Differing& differing, const std::string& title) {
  if (differing.count == 0) return;
  out += fmt::format("{}: {}\n", title, differing.count);
  for (const auto& example : differing.examples) {
    out += fmt::format(
        "  {}  {}\n", example.id.substr(0, 16), printable(shortened(example.name, kShownName)));
  }
  const auto more = differing.count - static_cast<int64_t>(differing.examples.size());
  if (more > 0) out += fmt::format("  and {} more\n", more);
}

}  // namespace

void add_flags(DiffOptions& options, Tool& tool) {
  tool.about(
      "Says in what two caches differ: parameters, weights, dataset, samples, items. Exit code 0 "
      "if "
      "they are equal, 1 if not. Changes nothing.",
      "flux-cache diff cache/latents other/latents");
  tool.arguments(options.folders, "DIR", "the two cache folders");
}

void check(const DiffOptions& options) {
  if (options.folders.size() != 2)
    throw UsageError(fmt::format("two folders are needed, {} {} given",
                                 options.folders.size(),
                                 options.folders.size() == 1 ? "is" : "are"),
                     "flux-cache diff cache/latents other/latents");
}

bool Difference::equal() const {
  return fields.empty() &&
         samples_only_a.count + samples_only_b.count + samples_changed.count == 0 &&
         items_only_a.count + items_only_b.count + items_changed.count == 0;
}

Difference diff(const Contents& a, const Contents& b) {
  require_readable(a);
  require_readable(b);
  Difference out;
  out.a = a.folder, out.b = b.folder;
  compare_fields(a, b, out);
  compare_samples(a, b, out);
  if (a.index && b.index) compare_items(*a.index, *b.index, out);
  return out;
}

Json diff_json(const Difference& d) {
  Json changed = differing_json(d.samples_changed);
  changed["max_abs_difference"] = d.max_abs_difference;
  changed["num_not_finite"] = d.num_not_finite;
  return {{"equal", d.equal()},
          {"a", printable(d.a.native())},
          {"b", printable(d.b.native())},
          {"fields", d.fields},
          {"samples",
           {{"num_equal", d.num_samples_equal},
            {"only_a", differing_json(d.samples_only_a)},
            {"only_b", differing_json(d.samples_only_b)},
            {"changed", changed}}},
          {"items",
           {{"num_equal", d.num_items_equal},
            {"only_a", differing_json(d.items_only_a)},
            {"only_b", differing_json(d.items_only_b)},
            {"changed", differing_json(d.items_changed)}}}};
}

std::string diff_text(const Difference& d) {
  if (d.equal()) {
    return fmt::format("{} and {}: equal, {} and {}",
                       show(d.a),
                       show(d.b),
                       counted(d.num_samples_equal, "sample"),
                       counted(d.num_items_equal, "item"));
  }
  std::string out = fmt::format("{} and {}: differ\n", show(d.a), show(d.b));
  for (const auto& field : d.fields) out += printable(field) + "\n";
  append(out, d.samples_only_a, "samples only in " + show(d.a));
  append(out, d.samples_only_b, "samples only in " + show(d.b));
  append(out, d.samples_changed, "samples of other values");
  if (d.samples_changed.count > 0) {
    out += fmt::format("  the largest difference of two values is {:.6g}{}\n",
                       d.max_abs_difference,
                       d.num_not_finite
                           ? fmt::format("; {} values are infinite or no number in one of the two",
                                         d.num_not_finite)
                           : "");
  }
  append(out, d.items_only_a, "items only in " + show(d.a));
  append(out, d.items_only_b, "items only in " + show(d.b));
  append(out, d.items_changed, "items with other samples, weights or repeats");
  out += fmt::format("equal: {} and {}",
                     counted(d.num_samples_equal, "sample"),
                     counted(d.num_items_equal, "item"));
  return out;
}

}  // namespace flux::cache

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <stdexcept>

#include "common/core/error.h"
#include "common/dataset/dataset.h"

namespace flux::dataset {
namespace {

using Json = nlohmann::json;

// Reads the members of one object and refuses all others.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) throw CacheError("the plan: " + where_ + " is not an object");
  }
  template <class T>
  T get(const char* name, bool (Json::*is_type)() const noexcept) {
    const auto found = object_.find(name);
    if (found == object_.end() || !((*found).*is_type)()) {
      throw CacheError("the plan: " + where_ + "." + name + " is absent or of another type");
    }
    seen_.insert(name);
    return found->get<T>();
  }
  int64_t integer(const char* name) { return get<int64_t>(name, &Json::is_number_integer); }
  double number(const char* name) { return get<double>(name, &Json::is_number); }
  bool boolean(const char* name) { return get<bool>(name, &Json::is_boolean); }
  const Json& array(const char* name) {
    const auto found = object_.find(name);
    if (found == object_.end() || !found->is_array())
      throw CacheError("the plan: " + where_ + "." + name + " is no list");
    seen_.insert(name);
    return *found;
  }
  void finish() const {
    for (const auto& [name, value] : object_.items()) {
      if (!seen_.contains(name)) throw CacheError("the plan: unknown field " + where_ + "." + name);
    }
  }

 private:
  const Json& object_;
  std::string where_;
  std::set<std::string> seen_;
};

}  // namespace

nlohmann::json plan_json(const Resolved& resolved) {
  Json plan{{"datasets", Json::array()}, {"subsets", Json::array()}};
  for (const auto& d : resolved.datasets) {
    plan["datasets"].push_back({{"batch_size", d.batch_size},
                                {"index", d.index},
                                {"validation_seed", d.validation_seed},
                                {"validation_split", d.validation_split}});
  }
  for (const auto& s : resolved.subsets) {
    plan["subsets"].push_back(
        {{"caption_dropout_every_n_epochs", s.captions.dropout_every_n_epochs},
         {"caption_dropout_rate", s.captions.dropout_rate},
         {"dataset", s.dataset},
         {"flip_aug", s.flip_aug},
         {"index", s.index},
         {"is_reg", s.is_reg},
         {"num_repeats", s.num_repeats}});
  }
  return plan;
}

Sha256Digest plan_digest(const nlohmann::json& plan) { return sha256(plan.dump()); }

Plan parse_plan(const nlohmann::json& json) {
  Plan plan;
  Fields top(json, "plan");
  for (const auto& d : top.array("datasets")) {
    Fields f(d, "datasets");
    plan.datasets.push_back({f.integer("index"),
                             f.integer("batch_size"),
                             f.number("validation_split"),
                             f.integer("validation_seed")});
    f.finish();
  }
  for (const auto& s : top.array("subsets")) {
    Fields f(s, "subsets");
    plan.subsets.push_back({f.integer("index"),
                            f.integer("dataset"),
                            f.integer("num_repeats"),
                            f.boolean("is_reg"),
                            f.boolean("flip_aug"),
                            f.number("caption_dropout_rate"),
                            f.integer("caption_dropout_every_n_epochs")});
    f.finish();
  }
  top.finish();
  return plan;
}

std::vector<bool> validation_members(const std::vector<Sha256Digest>& items,
                                     double split,
                                     int64_t seed) {
  const auto n = static_cast<double>(items.size());
  const auto num_train = std::min(items.size(), static_cast<size_t>(std::ceil(n * (1 - split))));
  std::vector<std::pair<Sha256Digest, size_t>> order;
  for (size_t i = 0; i < items.size(); ++i) {
    order.emplace_back(
        Sha256().add("validation").add_u64(static_cast<uint64_t>(seed)).add(items[i]).digest(), i);
  }
  std::sort(order.begin(), order.end());
  std::vector<bool> members(items.size(), false);
  for (size_t k = 0; k < items.size() - num_train; ++k) members[order[k].second] = true;
  return members;
}

// Source: kohya-ss/sd-scripts, library/train_util.py (is_reg).
std::vector<int64_t> regularisation_repeats(const std::vector<int64_t>& num_repeats,
                                            int64_t num_train) {
  std::vector<int64_t> repeats(num_repeats.size(), 0);
  int64_t visits = 0;
  for (size_t i = 0; i < repeats.size() && visits < num_train; ++i)
    visits += repeats[i] = num_repeats[i];
  if (visits >= num_train || repeats.empty()) return repeats;
  const int64_t missing = num_train - visits, n = static_cast<int64_t>(repeats.size());
  for (int64_t i = 0; i < n; ++i)
    repeats[static_cast<size_t>(i)] += missing / n + (i < missing % n ? 1 : 0);
  return repeats;
}

Sha256Digest item_digest(int64_t subset_index, std::string_view name) {
  return Sha256().add_u64(static_cast<uint64_t>(subset_index)).add(name).digest();
}

}  // namespace flux::dataset

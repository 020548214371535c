// common/models/lora/selection.h - which layers of the transformer get an adapter, and of which rank. No LibTorch.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/models/flux/config.h"

namespace flux::lora {

/// A Linear that can be adapted, by its BFL module path ("double_blocks.0.img_attn.qkv").
struct Target {
  std::string path;
  int64_t in = 0, out = 0;
  int64_t rank = 0;  // of its adapter
  double alpha = 0;
};

enum class Algorithm { kLora, kLokr };

/// What adapters are made of.
struct Form {
  Algorithm algorithm = Algorithm::kLora;
  int64_t factor =
      -1;  // LoKr: the largest size of the small matrix; -1: that of the most even split
  bool dora = false;
};

/// `size` as small * large of LoKr with small <= factor: as even as can be, and with factor * large where that is whole and
/// factor the smaller one. Source: KohakuBlueleaf/LyCORIS, functional/general.py, factorization.
std::pair<int64_t, int64_t> factorized(int64_t size, int64_t factor);

/// LoKr's factor, -1 or from 2 to 4096. Throws UsageError.
int64_t lokr_factor(const std::string& text);

/// A tensor of an adapter: its place in kAdapterParts, and its shape.
struct PartShape {
  size_t part = 0;
  std::vector<int64_t> shape;
};
/// Those that an adapter of `target` has, in that order. LoKr's large matrix is whole where the rank is not below half of
/// its larger side, as in LyCORIS.
std::vector<PartShape> part_shapes(const Target& target, const Form& form);

/// Numbers by module path: "REGEX=NUMBER,...", each a regular expression (ECMAScript) that is looked for anywhere in the
/// path. The first that is found counts.
class PathRules {
 public:
  struct Rule {
    std::string pattern;
    double value = 0;
    std::function<bool(const std::string& path)> matches;
  };
  PathRules() = default;
  /// An empty text has no rules. An expression may hold commas. Throws UsageError for what is no rule, or a value outside
  /// of [low, high].
  PathRules(const std::string& text, double low, double high);

  const std::string& text() const { return text_; }
  const std::vector<Rule>& rules() const { return rules_; }
  /// The index of the rule that counts for `path`.
  std::optional<size_t> find(const std::string& path) const;
  /// The value of that rule.
  std::optional<double> value(const std::string& path) const;
  /// The same rules with their values times `factor`.
  PathRules scaled(double factor) const;
  /// Throws UsageError, naming `flag`, for a rule that counts for no target.
  void require_all_used(const std::vector<Target>& targets, const char* flag) const;

 private:
  std::string text_;
  std::vector<Rule> rules_;
};

enum class Family { kAll, kDouble, kSingle };

/// "0,1,8-12": first and last of each range; "none" is empty, "all" is nothing. Throws UsageError.
std::optional<std::vector<std::pair<int64_t, int64_t>>> block_ranges(const std::string& text);

/// "img_attn=8,txt_mlp=0" by name of a module type; in a block img_attn, txt_attn, img_mlp, txt_mlp, img_mod, txt_mod,
/// single, single_mod, before them img_in, time_in, vector_in, guidance_in, txt_in. Throws UsageError, naming the nearest
/// name.
std::map<std::string, int64_t> module_ranks(const std::string& text);

/// What sd-scripts' train_blocks, train_*_block_indices, *_dim, in_dims and network_reg_dims say.
struct Selection {
  Family blocks = Family::kAll;
  std::string double_blocks = "all", single_blocks = "all";  // see block_ranges()
  std::map<std::string, int64_t> ranks_of_types{};           // see module_ranks(); 0: left out
  PathRules ranks{};                                         // 0: left out; before all else
};

/// The Linears that sd-scripts adapts by default: all of the blocks, modulations included (304 for
/// FLUX.1-dev), without ranks. Source: kohya-ss/sd-scripts, networks/lora_flux.py.
std::vector<Target> default_targets(const dit::Config& config);
/// All Linears of the transformer, without ranks.
std::vector<Target> all_targets(const dit::Config& config);
/// The same targets with these.
std::vector<Target> with_rank(std::vector<Target> targets, int64_t rank, double alpha);

/// The selected Linears in the order of the model. Blocks have `rank` and layers before them none, where the selection says
/// nothing else. `alpha` 0: each module's rank; else that of all, whatever their rank, as in sd-scripts. Throws UsageError
/// for a block that the model does not have, for a selection that leaves nothing, and for a part of it that is without
/// effect.
std::vector<Target> select_targets(const dit::Config& config,
                                   const Selection& selection,
                                   int64_t rank,
                                   double alpha);

/// Trained numbers of their adapters.
int64_t num_parameters(const std::vector<Target>& targets, const Form& form = {});
/// "rank 16" or "ranks 4 to 32".
std::string ranks_text(const std::vector<Target>& targets);

}  // namespace flux::lora

// Which modules are adapted, by the words of sd-scripts.
#include "common/models/lora/selection.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "common/core/error.h"
#include "common/models/lora/lora.h"

namespace flux::lora {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::vector<Target> select(const Selection& selection, double alpha = 0, bool guidance = true) {
  dit::Config dev;
  dev.guidance = guidance;
  return select_targets(dev, selection, 16, alpha);
}

std::string refusal(const std::function<void()>& work) {
  try {
    work();
  } catch (const UsageError& error) {
    return error.what();
  }
  return "no error";
}

const Target* find(const std::vector<Target>& targets, const std::string& path) {
  for (const Target& target : targets)
    if (target.path == path) return &target;
  return nullptr;
}

TEST(Selection, AllBlocksOfOneRankByDefault) {
  const auto targets = select({});
  EXPECT_EQ(targets.size(), 304u);
  EXPECT_EQ(num_parameters(targets), 4'786'176 * 16);  // as sd-scripts counts them
  EXPECT_EQ(ranks_text(targets), "rank 16");
  for (const Target& target : targets) EXPECT_EQ(target.alpha, 16);
}

TEST(Selection, KindsAndNumbersOfBlocks) {
  EXPECT_EQ(select({.blocks = Family::kDouble}).size(), 190u);
  EXPECT_EQ(select({.blocks = Family::kSingle}).size(), 114u);
  const auto some = select({.double_blocks = "0,1, 8-12", .single_blocks = "none"});
  EXPECT_EQ(some.size(), 70u);
  EXPECT_TRUE(find(some, "double_blocks.12.txt_mlp.2"));
  EXPECT_FALSE(find(some, "double_blocks.2.txt_mlp.2"));
  // the other kind stays as it is
  EXPECT_EQ(select({.single_blocks = "37"}).size(), 193u);
}

TEST(Selection, RanksByTypeKeepAlphaAsItIs) {
  const auto targets =
      select({.ranks_of_types = module_ranks("img_attn=8,txt_mlp=0, single=4,single_mod=2,img_in=6,"
                                             "time_in=3")},
             5);
  EXPECT_EQ(targets.size(), 304u - 38 + 1 + 2);
  const auto rank = [&](const char* path) {
    const Target* target = find(targets, path);
    return target ? target->rank : 0;
  };
  EXPECT_EQ(rank("double_blocks.3.img_attn.qkv"), 8);
  EXPECT_EQ(rank("double_blocks.3.img_attn.proj"), 8);
  EXPECT_EQ(rank("double_blocks.3.txt_attn.qkv"), 16);
  EXPECT_EQ(rank("double_blocks.3.txt_mlp.0"), 0);
  EXPECT_EQ(rank("double_blocks.3.img_mod.lin"), 16);
  EXPECT_EQ(rank("single_blocks.3.linear1"), 4);
  EXPECT_EQ(rank("single_blocks.3.linear2"), 4);
  EXPECT_EQ(rank("single_blocks.3.modulation.lin"), 2);
  EXPECT_EQ(rank("img_in"), 6);
  EXPECT_EQ(rank("time_in.in_layer"), 3);
  EXPECT_EQ(rank("time_in.out_layer"), 3);
  EXPECT_EQ(rank("txt_in"), 0);
  for (const Target& target : targets) EXPECT_EQ(target.alpha, 5);
  // none given: alpha is each module's rank
  for (const Target& target : select({.ranks_of_types = module_ranks("single=4")}))
    EXPECT_EQ(target.alpha, static_cast<double>(target.rank));
  EXPECT_EQ(ranks_text(targets), "ranks 2 to 16");
}

TEST(Selection, RanksByPathComeBeforeAllElseTheFirstCounts) {
  const PathRules rules("blocks.[03]{1,1}.*qkv=2,qkv=32,txt_in=1,linear2=0", 0, 4096);
  const auto targets =
      select({.double_blocks = "none", .ranks_of_types = {{"single_mod", 3}}, .ranks = rules});
  EXPECT_EQ(find(targets, "double_blocks.3.img_attn.qkv")->rank, 2);
  EXPECT_EQ(find(targets, "double_blocks.4.img_attn.qkv")->rank, 32);
  EXPECT_FALSE(find(targets, "double_blocks.4.img_attn.proj"));
  EXPECT_EQ(find(targets, "txt_in")->rank, 1);
  EXPECT_FALSE(find(targets, "single_blocks.0.linear2"));
  EXPECT_EQ(find(targets, "single_blocks.0.modulation.lin")->rank, 3);
}

TEST(Selection, RefusesWhatIsNotThereAndWhatHasNoEffect) {
  EXPECT_THAT(refusal([] { module_ranks("img_atn=8"); }),
              AllOf(HasSubstr("img_atn"), HasSubstr("did you mean img_attn?")));
  EXPECT_THAT(refusal([] { module_ranks("img_attn"); }), HasSubstr("img_attn"));
  EXPECT_THAT(refusal([] { module_ranks("img_attn=5000"); }), HasSubstr("4096"));
  EXPECT_THAT(refusal([] { module_ranks("single=1,single=2"); }), HasSubstr("twice"));
  for (const char* text : {"1-", "x", "3-1", "-1", "", "1,,2"})
    EXPECT_THAT(refusal([&] { block_ranges(text); }), HasSubstr("0,1,8-12")) << text;
  EXPECT_THAT(refusal([] { select({.double_blocks = "3,19"}); }),
              AllOf(HasSubstr("block 19"), HasSubstr("19"), HasSubstr("--train-double-blocks")));
  EXPECT_THAT(refusal([] { select({.double_blocks = "none", .single_blocks = "none"}); }),
              HasSubstr("leaves no module"));
  EXPECT_THAT(refusal([] {
                select({.blocks = Family::kSingle, .ranks_of_types = {{"txt_mlp", 8}}});
              }),
              HasSubstr("txt_mlp has no effect"));
  EXPECT_THAT(refusal([] {
                select({.ranks_of_types = {{"guidance_in", 8}}}, 0, false);
              }),
              HasSubstr("guidance_in has no effect"));
  EXPECT_THAT(refusal([] { select({.ranks = PathRules("linear3=4", 0, 4096)}); }),
              AllOf(HasSubstr("--rank-of"), HasSubstr("linear3")));
  // one that is always too late
  EXPECT_THAT(refusal([] { select({.ranks = PathRules("linear=4,linear1=8", 0, 4096)}); }),
              HasSubstr("'linear1'"));
  EXPECT_THAT(refusal([] { PathRules("qkv", 0, 1); }), HasSubstr("qkv"));
  EXPECT_THAT(refusal([] { PathRules("(qkv=1", 0, 1); }), HasSubstr("regular expression"));
  EXPECT_THAT(refusal([] { PathRules("qkv=2", 0, 1); }), HasSubstr("[0, 1]"));
  EXPECT_THAT(refusal([] { PathRules("=1", 0, 1); }), HasSubstr("no expression"));
}

TEST(LimitNorm, ScalesBothMatricesToTheNormAndLeavesSmallerOnes) {
  at::manual_seed(1);
  for (const double factor : {0.5, 2.0}) {
    const Module module{"m", at::randn({4, 30}).mul_(factor), at::randn({20, 4}), 3};
    const auto down = module.down.clone(), up = module.up.clone();
    const double norm = (up.mm(down) * (3.0 / 4)).norm().item<double>();
    limit_norm(module, norm * 1.001);
    EXPECT_TRUE(at::equal(module.down, down) && at::equal(module.up, up));
    limit_norm(module, norm / 4);
    EXPECT_TRUE(at::allclose(module.down, down / 2, 1e-5));
    EXPECT_TRUE(at::allclose(module.up, up / 2, 1e-5));
    EXPECT_NEAR(
        (module.up.mm(module.down) * (3.0 / 4)).norm().item<double>() / (norm / 4), 1, 1e-5);
  }
  const Module zero{"m", at::randn({4, 30}), at::zeros({20, 4}), 3};
  limit_norm(zero, 1);
  EXPECT_TRUE(zero.down.isfinite().all().item<bool>());
}

}  // namespace
}  // namespace flux::lora

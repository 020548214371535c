#include "common/models/flux/names.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

namespace flux::dit {
namespace {

TEST(Names, CountsOfThePublishedModels) {  // black-forest-labs/flux, model.py
  Config dev;
  EXPECT_EQ(tensor_shapes(dev).size(), 780u);
  EXPECT_EQ(diffusers_layout(dev).size(), 1160u);
  EXPECT_EQ(dev.num_parameters(), 11'901'408'320);
  Config schnell;
  schnell.guidance = false;
  EXPECT_EQ(tensor_shapes(schnell).size(), 776u);
  EXPECT_EQ(diffusers_layout(schnell).size(), 1156u);
  EXPECT_EQ(schnell.num_parameters(), 11'891'178'560);
}

TEST(Names, TheDiffusersLayoutCoversEveryRowOnce) {
  const Config config;
  std::map<std::string, int64_t> rows;
  std::set<std::string> names;
  for (const auto& tensor : diffusers_layout(config)) {
    EXPECT_TRUE(names.insert(tensor.name).second) << tensor.name;
    EXPECT_EQ(tensor.first_row, rows[tensor.bfl]) << tensor.name;
    rows[tensor.bfl] += tensor.num_rows();
  }
  for (const auto& [name, shape] : tensor_shapes(config)) EXPECT_EQ(rows[name], shape[0]) << name;
  EXPECT_EQ(rows.size(), tensor_shapes(config).size());
}

TEST(Config, DescribesItself) {
  EXPECT_EQ(Config().describe(), "FLUX transformer, 19 + 38 blocks, hidden 3072, with guidance");
}

}  // namespace
}  // namespace flux::dit

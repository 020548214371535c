#include "common/models/flux/layout.h"

#include <gtest/gtest.h>

#include <map>
#include <string>

#include "tests/support/tiny_flux.h"

namespace flux::dit {
namespace {

using Pieces = std::map<std::string, at::Tensor>;

/// Every tensor of a layout, put together from parts of `size` elements of the BFL tensors.
Pieces from_parts(const FileTensors& files, const TensorMap& model, int64_t size) {
  Pieces out;
  for (const auto& [bfl, tensor] : model) {
    for (const auto& piece : files.pieces(bfl))
      out[piece.name] = at::full(piece.shape, -7, tensor.scalar_type());
    const at::Tensor flat = tensor.reshape({-1});
    for (int64_t at = 0; at < flat.numel(); at += size)
      files.split_part(bfl,
                       flat.narrow(0, at, std::min(size, flat.numel() - at)),
                       at,
                       [&](const std::string& name, int64_t first, const at::Tensor& elements) {
                         out.at(name).view({-1}).narrow(0, first, elements.numel()).copy_(elements);
                       });
  }
  return out;
}

TEST(FileTensors, PartsMakeTheSameTensorsAsTheWhole) {
  const Config config = test::tiny_flux_config();
  const TensorMap model = test::tiny_flux(config, 5);
  for (const ModelLayout layout : {ModelLayout::kBfl, ModelLayout::kDiffusers}) {
    const FileTensors files(config, layout);
    Pieces whole;
    for (const auto& [bfl, tensor] : model)
      files.split(bfl, tensor, [&](const std::string& name, const at::Tensor& piece) {
        whole[name] = piece.clone();
      });
    for (const int64_t size : {1000, 16384, 1 << 20}) {
      SCOPED_TRACE(testing::Message() << "parts of " << size);
      const Pieces parts = from_parts(files, model, size);
      ASSERT_EQ(parts.size(), whole.size());
      for (const auto& [name, tensor] : whole)
        EXPECT_TRUE(at::equal(parts.at(name), tensor)) << name;
    }
  }
}

TEST(FileTensors, APartIsWrittenOnce) {
  const Config config = test::tiny_flux_config();
  const FileTensors files(config, ModelLayout::kDiffusers);
  int64_t written = 0, num_elements = 0;
  for (const auto& [name, tensor] : test::tiny_flux(config, 5)) {
    num_elements += tensor.numel();
    for (int64_t at = 0; at < tensor.numel(); at += 777)
      files.split_part(
          name,
          tensor.reshape({-1}).narrow(0, at, std::min<int64_t>(777, tensor.numel() - at)),
          at,
          [&](const std::string&, int64_t, const at::Tensor& elements) {
            written += elements.numel();
          });
  }
  EXPECT_EQ(written, num_elements);
}

}  // namespace
}  // namespace flux::dit

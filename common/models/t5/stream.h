// common/models/t5/stream.h - a T5 encoder whose layers are read from its file, one after the other.
//
//   const File file(path);
//   const Encoder encoder = file.load_outer(at::kBFloat16, device);
//   LayerStream layers(file, at::kBFloat16, device);
//   layers.each([&](int64_t, const Layer& layer) { for (Batch& b : batches) encoder.run_layer(layer, b, scratch); });
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "common/engine/ring.h"
#include "common/engine/tensor_file.h"
#include "common/models/t5/t5.h"

namespace flux::t5 {

/// A weight file of T5, of which nothing is in memory.
class File {
 public:
  /// Reads the headers. Throws what TensorFile, take_net and canonical() throw.
  explicit File(const std::filesystem::path& path,
                engine::FileAccess access = engine::kDefaultFileAccess);

  const Config& config() const { return config_; }
  /// As remembered_weights_sha256(stamps, "t5", canonical), read by pread.
  Sha256Digest weights_sha256(bool rehash) const;

  /// The encoder without layers: the token table on the host, the rest on `device`.
  Encoder load_outer(at::ScalarType dtype, at::Device device) const;
  /// With its layers. Converts tensor by tensor.
  Encoder load(at::ScalarType dtype, at::Device device) const;

  const engine::TensorFile& tensors() const { return *file_; }
  const engine::StoredTensor& stored(const std::string& name) const { return stored_.at(name); }
  /// Bytes of all tensors in memory, the linear layers in `dtype`.
  int64_t bytes(at::ScalarType dtype) const;
  /// Of what load_outer() has.
  int64_t outer_bytes() const;

 private:
  at::Tensor read(const std::string& name, at::ScalarType dtype) const;
  at::ScalarType table_type() const;

  std::shared_ptr<const engine::TensorFile> file_;
  std::map<std::string, engine::StoredTensor> stored_;  // by canonical name
  Config config_;
};

/// The layers as records that pass through a ring of two.
class LayerStream {
 public:
  /// `file` must outlive it. Throws as Ring does.
  LayerStream(const File& file, at::ScalarType dtype, at::Device device);
  ~LayerStream();

  /// Calls `work` with the layers in order, each while it is there.
  void each(const std::function<void(int64_t index, const Layer& layer)>& work);
  engine::RingCounts counts() const { return ring_.counts(); }

  /// Memory of the ring, and of reading.
  static int64_t ring_bytes(const File& file, at::ScalarType dtype);
  static int64_t staging_bytes(const File& file, at::ScalarType dtype, at::Device device);

 private:
  engine::RecordLayout layout_;
  int64_t num_layers_;
  engine::Ring ring_;
};

}  // namespace flux::t5

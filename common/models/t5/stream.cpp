#include "common/models/t5/stream.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>

#include <array>
#include <numeric>
#include <utility>
#include <vector>

#include "common/tensor/tensor.h"

namespace flux::t5 {
namespace {

/// A tensor of a layer: its name behind "encoder.block.N.", where it belongs, and whether it is a matrix.
struct Part {
  const char* name;
  at::Tensor Layer::*tensor;
  bool linear;
};
constexpr std::array<Part, 9> kParts{{
    {"layer.0.layer_norm.weight", &Layer::norm1, false},
    {"layer.0.SelfAttention.q.weight", &Layer::q, true},
    {"layer.0.SelfAttention.k.weight", &Layer::k, true},
    {"layer.0.SelfAttention.v.weight", &Layer::v, true},
    {"layer.0.SelfAttention.o.weight", &Layer::o, true},
    {"layer.1.layer_norm.weight", &Layer::norm2, false},
    {"layer.1.DenseReluDense.wi_0.weight", &Layer::wi_0, true},
    {"layer.1.DenseReluDense.wi_1.weight", &Layer::wi_1, true},
    {"layer.1.DenseReluDense.wo.weight", &Layer::wo, true},
}};

std::string name_of(int64_t layer, const Part& part) {
  return fmt::format("encoder.block.{}.{}", layer, part.name);
}

constexpr const char* kShared = "shared.weight";
constexpr const char* kBias =
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
constexpr const char* kFinalNorm = "encoder.final_layer_norm.weight";

/// Norms are float32 in memory.
at::ScalarType type_of(const Part& part, at::ScalarType dtype) {
  return part.linear ? dtype : at::kFloat;
}

engine::RecordLayout layer_layout(const File& file, at::ScalarType dtype) {
  engine::RecordLayout layout;
  for (const Part& part : kParts)
    layout.add(part.name, file.stored(name_of(0, part)).shape, type_of(part, dtype));
  return layout;
}

/// Record i is layer i.
class LayerStore final : public engine::RecordStore {
 public:
  LayerStore(const File& file, at::ScalarType dtype)
      : file_(file), layout_(layer_layout(file, dtype)) {}

  int64_t num_records() const override { return file_.config().num_layers; }
  int64_t record_bytes(int64_t) const override { return layout_.bytes(); }
  using RecordStore::read;
  void read(int64_t index, int64_t offset, std::span<std::byte> to) const override {
    check_range(index, offset, to.size());
    const engine::RecordPart part{offset, offset + static_cast<int64_t>(to.size()), to.data()};
    int64_t end = 0;
    for (size_t i = 0; i < kParts.size(); ++i) {
      const engine::Slice& slice = layout_.slices()[i];
      part.clear(end, slice.offset);
      file_.tensors().read_slice(file_.stored(name_of(index, kParts[i])), slice, part);
      end = slice.end();
    }
    part.clear(end, layout_.bytes());
  }
  void prefetch(int64_t index) const override {
    for (const Part& part : kParts) file_.tensors().prefetch(file_.stored(name_of(index, part)));
  }
  int64_t staging_bytes() const override {
    int64_t most = 0;
    for (int64_t i = 0; i < num_records(); ++i)
      for (size_t k = 0; k < kParts.size(); ++k)
        most = std::max(most,
                        engine::TensorFile::conversion_bytes(file_.stored(name_of(i, kParts[k])),
                                                             layout_.slices()[k].dtype));
    return most + file_.tensors().staging_bytes();
  }

 private:
  const File& file_;
  engine::RecordLayout layout_;
};

std::vector<int64_t> in_order(int64_t count) {
  std::vector<int64_t> all(static_cast<size_t>(count));
  std::iota(all.begin(), all.end(), 0);
  return all;
}

/// A signal ends a wait: what is finished is in the cache, and a pass is not kept.
engine::RingOptions ring_options() { return {.interruptible = true}; }

}  // namespace

File::File(const std::filesystem::path& path, engine::FileAccess access)
    : file_(std::make_shared<engine::TensorFile>(path, access)) {
  const NetTensors net = take_net(file_->contents(), NetKind::kT5);
  const TensorMap tensors = canonical(net);
  config_ = Config::from_weights(tensors, net.path);
  for (const auto& [name, tensor] : tensors) stored_[name] = file_->stored(tensor);
}

Sha256Digest File::weights_sha256(bool rehash) const {
  return file_->weights_sha256("t5", stored_, rehash);
}

at::ScalarType File::table_type() const {
  const auto type = stored(kShared).dtype;
  return type == at::kFloat8_e4m3fn ? at::kBFloat16 : type;  // exact, and rows can be selected
}

at::Tensor File::read(const std::string& name, at::ScalarType dtype) const {
  const engine::StoredTensor& tensor = stored(name);
  at::Tensor out = at::empty(tensor.shape, dtype);
  file_->read_values(tensor, 0, out.numel(), dtype, static_cast<std::byte*>(out.data_ptr()));
  return out;
}

Encoder File::load_outer(at::ScalarType dtype, at::Device device) const {
  const c10::InferenceMode no_grad;
  Encoder e;
  e.config = config_;
  e.dtype = dtype;
  e.device = device;
  e.shared = read(kShared, table_type());
  e.position_bias = read(kBias, at::kFloat).to(device);
  e.final_norm = read(kFinalNorm, at::kFloat).to(device);
  return e;
}

Encoder File::load(at::ScalarType dtype, at::Device device) const {
  const c10::InferenceMode no_grad;
  Encoder e = load_outer(dtype, device);
  e.shared = e.shared.to(device);
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    Layer layer;
    for (const Part& part : kParts)
      layer.*part.tensor = read(name_of(i, part), type_of(part, dtype)).to(device);
    e.layers.push_back(std::move(layer));
  }
  return e;
}

int64_t File::outer_bytes() const {
  const auto numel = [&](const char* name) {
    int64_t values = 1;
    for (const int64_t length : stored(name).shape) values *= length;
    return values;
  };
  return numel(kShared) * static_cast<int64_t>(c10::elementSize(table_type())) +
         4 * (numel(kBias) + numel(kFinalNorm));
}

int64_t File::bytes(at::ScalarType dtype) const {
  return outer_bytes() + config_.num_layers * layer_layout(*this, dtype).bytes();
}

LayerStream::LayerStream(const File& file, at::ScalarType dtype, at::Device device)
    : layout_(layer_layout(file, dtype)),
      num_layers_(file.config().num_layers),
      ring_(std::make_shared<LayerStore>(file, dtype),
            device,
            in_order(num_layers_),
            ring_options()) {}

LayerStream::~LayerStream() = default;

void LayerStream::each(const std::function<void(int64_t, const Layer&)>& work) {
  const c10::InferenceMode no_grad;
  for (int64_t i = 0; i < num_layers_; ++i) {
    engine::Lease lease = ring_.acquire();
    if (lease.index != i) {  // an earlier call ended early
      ring_.release(std::move(lease), false);
      ring_.set_schedule(in_order(num_layers_));
      lease = ring_.acquire();
    }
    Layer layer;
    for (size_t k = 0; k < kParts.size(); ++k)
      layer.*kParts[k].tensor = layout_.view(lease.record, k);
    try {
      work(i, layer);
    } catch (...) {
      ring_.release(std::move(lease), false);
      throw;
    }
    ring_.release(std::move(lease), false);
  }
}

int64_t LayerStream::ring_bytes(const File& file, at::ScalarType dtype) {
  return layer_layout(file, dtype).bytes() * std::min<int64_t>(2, file.config().num_layers);
}

int64_t LayerStream::staging_bytes(const File& file, at::ScalarType dtype, at::Device device) {
  return engine::Ring::staging_bytes(LayerStore(file, dtype), device, ring_options());
}

}  // namespace flux::t5

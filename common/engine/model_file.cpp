#include "common/engine/model_file.h"

#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/text.h"
#include "common/models/flux/load.h"
#include "common/models/weights/weights.h"
#include "common/tensor/tensor.h"
#include "common/tensor/weight_file.h"
#include "formats/safetensors/reader.h"

namespace flux::engine {
namespace {

namespace fs = std::filesystem;

// Values converted or quantised at a time: float32 from the file, bfloat16, codes and scales are
// 1.8 MiB. A multiple of kQuantBlock.
constexpr int64_t kChunkValues = int64_t{1} << 18;
constexpr int64_t kHashBytes = int64_t{4} << 20;

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

/// A range of a file.
struct Piece {
  size_t file = 0;
  int64_t offset = 0, bytes = 0;
};

/// A tensor as stored, under its canonical name.
struct Stored {
  c10::ScalarType dtype{};
  std::vector<int64_t> shape;
  std::vector<Piece> pieces;  // its bytes, in their order

  int64_t bytes() const {
    int64_t total = 0;
    for (const Piece& piece : pieces) total += piece.bytes;
    return total;
  }
};

/// Stand-ins for the tensors of a file: dtype, shape and an address that says which bytes of the
/// mapping are meant. Nobody reads through it.
at::Tensor stand_in(std::span<const std::byte> bytes,
                    c10::ScalarType dtype,
                    std::span<const int64_t> shape) {
  return at::from_blob(const_cast<std::byte*>(bytes.data()),
                       at::IntArrayRef(shape.data(), shape.size()),
                       at::TensorOptions(dtype));
}

/// The files of a set, by the addresses of their mappings.
class Files {
 public:
  Files(const safetensors::FileSet& set, FileAccess wanted) {
    int64_t total = 0;
    for (const auto& file : set.files) total += static_cast<int64_t>(file->stamp().size_bytes);
    const FileAccess access = choose_access(wanted, total);
    for (const auto& file : set.files) {
      const FileStamp& stamp = file->stamp();
      uint64_t data_bytes = 0;
      for (const auto& tensor : file->tensors()) data_bytes = std::max(data_bytes, tensor.end);
      const uint64_t header_bytes = stamp.size_bytes - data_bytes;
      for (const auto& tensor : file->tensors())
        if (!tensor.bytes.empty())
          places_[tensor.bytes.data()] = {files_.size(),
                                          static_cast<int64_t>(header_bytes + tensor.begin),
                                          static_cast<int64_t>(tensor.bytes.size())};
      files_.push_back(open_file(stamp, access));
    }
  }

  Piece place(const at::Tensor& stand_in) const {
    return places_.at(static_cast<const std::byte*>(stand_in.const_data_ptr()));
  }
  const RecordFile& file(size_t index) const { return *files_[index]; }
  int64_t staging_bytes() const {
    int64_t most = 0;
    for (const auto& file : files_) most = std::max(most, file->staging_bytes());
    return most;
  }

 private:
  static std::unique_ptr<RecordFile> open_file(const FileStamp& stamp, FileAccess access) {
    const auto reason = [](int number) { return std::generic_category().message(number); };
    const int fd = open(stamp.path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0)
      throw InputError(fmt::format("{}: cannot be opened: {}", show(stamp.path), reason(errno)));
    auto file = std::make_unique<RecordFile>(
        fd, access, [path = stamp.path, reason](const std::string& what, int number) {
          return std::make_exception_ptr(InputError(
              fmt::format("{}: {}{}", show(path), what, number == 0 ? "" : ": " + reason(number)),
              number == 0 ? "it was changed while it was in use" : "check the disk"));
        });
    struct stat now {};
    if (fstat(fd, &now) != 0 || now.st_dev != stamp.device || now.st_ino != stamp.inode ||
        static_cast<uint64_t>(now.st_size) != stamp.size_bytes)
      throw InputError(show(stamp.path) + ": changed while it was opened", "try again");
    return file;
  }

  std::vector<std::unique_ptr<RecordFile>> files_;
  std::map<const std::byte*, Piece> places_;
};

/// A slice of a record, or codes and scales that are made together.
struct Source {
  const Stored* stored = nullptr;
  Slice slice;
  std::optional<Slice> scales;  // quantised while it is read: `slice` holds the codes
  const Stored* stored_scales = nullptr;

  int64_t end() const { return scales ? scales->end() : slice.end(); }
};

struct Range {
  int64_t begin = 0, end = 0;
  bool empty() const { return begin >= end; }
};
Range overlap(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

/// Part of a record in memory.
struct Target {
  Range range;  // in the record
  std::byte* data = nullptr;
  std::byte* at(int64_t offset) const { return data + (offset - range.begin); }
  /// Copies what of [offset, offset + bytes.size()) belongs here.
  void put(int64_t offset, std::span<const std::byte> bytes) const {
    const Range both = overlap(range, {offset, offset + static_cast<int64_t>(bytes.size())});
    if (!both.empty())
      std::memcpy(at(both.begin),
                  bytes.data() + (both.begin - offset),
                  static_cast<size_t>(both.end - both.begin));
  }
};

}  // namespace

struct ModelFile::Impl {
  ModelFileOptions options;
  fs::path path;
  std::vector<FileStamp> stamps;
  std::map<std::string, std::string> metadata;
  std::optional<QuantFormat> quant, stored_quant;
  dit::Config config;
  std::unique_ptr<Files> files;
  std::map<std::string, Stored> tensors;  // by canonical name; stored scales by scale_name()
  std::vector<RecordLayout> layouts;
  std::vector<std::vector<Source>> sources;  // by record, in the order of their slices

  Impl(const fs::path& where, const ModelFileOptions& how) : options(how), path(where) {
    const safetensors::FileSet set = safetensors::open_set(path);
    WeightFile file{path, {}, {}, set.metadata};
    for (const auto& one : set.files) {
      file.stamps.push_back(one->stamp());
      for (const auto& tensor : one->tensors()) {
        const auto dtype = scalar_type(tensor.dtype);
        if (!dtype)
          throw InputError(fmt::format("{}: tensor '{}' has dtype {}, which is not supported",
                                       show(one->path()),
                                       printable(tensor.name),
                                       dtype_name(tensor.dtype)),
                           "use weights in BF16, F16, F32 or plain F8_E4M3");
        file.tensors.emplace(tensor.name, stand_in(tensor.bytes, *dtype, tensor.shape));
      }
    }
    files = std::make_unique<Files>(set, options.access);
    stamps = file.stamps;
    metadata = file.metadata;
    find_stored_quant(file);
    const NetTensors net = take_net(file, NetKind::kFlux);
    config = dit::read_config(net);
    for (const auto& [name, parts] : dit::canonical_parts(net, config)) {
      if (tensors.contains(name)) continue;  // quantised
      add_stored(name, parts);
    }
    for (int64_t i = 0; i < config.num_double_blocks + config.num_single_blocks; ++i) add_record(i);
  }

  /// Takes quantised weights out of the file: in their place are matrices of the logical shape, for
  /// the checks that follow.
  void find_stored_quant(WeightFile& file) {
    stored_quant = stored_quant_format(metadata, path);
    if (options.quant && stored_quant && *options.quant != *stored_quant)
      throw InputError(fmt::format("{}: is quantised to {}, asked for is {}",
                                   show(path),
                                   quant_format_name(*stored_quant),
                                   quant_format_name(*options.quant)),
                       "give the file that it was made of, or ask for what it is");
    quant = stored_quant ? stored_quant : options.quant;
    if (!stored_quant) return;
    std::vector<std::string> names;
    for (const auto& [name, tensor] : file.tensors)
      if (is_quantized_name(name)) names.push_back(name);
    for (const std::string& name : names) {
      const QuantizedWeight weight = stored_weight(file.tensors, name, *stored_quant, path);
      for (const auto& [key, tensor] :
           {std::pair(name, weight.codes), std::pair(scale_name(name), weight.scales)})
        tensors[key] = {tensor.scalar_type(), tensor.sizes().vec(), {files->place(tensor)}};
      file.tensors.erase(scale_name(name));
      const std::array shape{weight.out(), weight.in()};
      file.tensors[name] = stand_in({}, at::kBFloat16, shape);
    }
  }

  void add_stored(const std::string& name, const std::vector<dit::CanonicalPart>& parts) {
    Stored stored{parts[0].tensor.scalar_type(), parts[0].tensor.sizes().vec(), {}};
    stored.shape[0] = 0;
    for (const auto& [tensor, swap] : parts) {
      stored.shape[0] += tensor.size(0);
      if (tensor.numel() == 0) continue;
      const Piece whole = files->place(tensor);
      if (swap) {
        // chunk(2) gives the first the larger half
        const int64_t row_bytes = whole.bytes / tensor.size(0);
        const int64_t first = (tensor.size(0) + 1) / 2 * row_bytes;
        stored.pieces.push_back({whole.file, whole.offset + first, whole.bytes - first});
        stored.pieces.push_back({whole.file, whole.offset, first});
      } else {
        stored.pieces.push_back(whole);
      }
    }
    tensors[name] = std::move(stored);
  }

  void add_record(int64_t index) {
    const std::string prefix = block_prefix(config, index);
    const RecordLayout layout = block_layout(config, index, options.dtype, quant);
    std::vector<Source> list;
    for (size_t i = 0; i < layout.slices().size(); ++i) {
      const Slice& slice = layout.slices()[i];
      Source source{&tensors.at(prefix + slice.name), slice, std::nullopt, nullptr};
      if (quant && is_quantized_name(prefix + slice.name)) {
        source.scales = layout.slices().at(++i);
        if (stored_quant) source.stored_scales = &tensors.at(prefix + source.scales->name);
      }
      list.push_back(std::move(source));
    }
    layouts.push_back(layout);
    sources.push_back(std::move(list));
  }

  // --- reading

  /// Bytes [begin, begin + to.size()) of a tensor as stored.
  void read_stored(const Stored& stored, int64_t begin, std::span<std::byte> to) const {
    for (const Piece& piece : stored.pieces) {
      if (to.empty()) return;
      if (begin >= piece.bytes) {
        begin -= piece.bytes;
        continue;
      }
      const auto take = std::min(static_cast<int64_t>(to.size()), piece.bytes - begin);
      files->file(piece.file).read(piece.offset + begin, to.first(static_cast<size_t>(take)));
      to = to.subspan(static_cast<size_t>(take));
      begin = 0;
    }
  }

  /// Values [first, first + count) in `dtype`, to memory aligned for it.
  void read_values(const Stored& stored,
                   int64_t first,
                   int64_t count,
                   c10::ScalarType dtype,
                   std::byte* to) const {
    const auto from_size = static_cast<int64_t>(c10::elementSize(stored.dtype)),
               to_size = static_cast<int64_t>(c10::elementSize(dtype));
    if (stored.dtype == dtype)
      return read_stored(stored, first * from_size, {to, static_cast<size_t>(count * to_size)});
    const HostMemory chunk(std::min(count, kChunkValues) * from_size, MemoryCause::kRing);
    for (int64_t done = 0; done < count;) {
      const int64_t take = std::min(count - done, kChunkValues);
      read_stored(stored,
                  (first + done) * from_size,
                  {chunk.data(), static_cast<size_t>(take * from_size)});
      at::from_blob(to + done * to_size, {take}, at::TensorOptions(dtype))
          .copy_(at::from_blob(chunk.data(), {take}, at::TensorOptions(stored.dtype)));
      done += take;
    }
  }

  /// Part of a slice, whose edges lie between values.
  void read_slice(const Stored& stored, const Slice& slice, const Target& target) const {
    const Range part = overlap(target.range, {slice.offset, slice.end()});
    if (part.empty()) return;
    const auto size = static_cast<int64_t>(c10::elementSize(slice.dtype));
    read_values(stored,
                (part.begin - slice.offset) / size,
                (part.end - part.begin) / size,
                slice.dtype,
                target.at(part.begin));
  }

  /// Quantises what the target wants of codes and scales. Units are blocks, or whole rows where
  /// blocks end with a row that is no multiple of them.
  void read_quantised(const Source& source, const Target& target) const {
    const Slice &codes = source.slice, &scales = *source.scales;
    const int64_t out = source.stored->shape[0], in = source.stored->shape[1];
    const bool by_row = *quant == QuantFormat::kFp8 && in % kQuantBlock != 0;
    const int64_t unit = by_row ? in : kQuantBlock, units = round_up(out * in, unit) / unit;
    const auto layout = quantized_layout(*quant, 1, unit);  // of one unit
    const auto units_of = [&](const Slice& slice, int64_t unit_bytes) -> Range {
      const Range part = overlap(target.range, {slice.offset, slice.end()});
      if (part.empty()) return {};
      return {(part.begin - slice.offset) / unit_bytes,
              std::min(units, round_up(part.end - slice.offset, unit_bytes) / unit_bytes)};
    };
    const Range of_codes = units_of(codes, layout.codes_bytes),
                of_scales = units_of(scales, layout.scales_bytes);
    // one pass over both if they touch
    std::vector<Range> passes;
    if (!of_codes.empty() && !of_scales.empty() &&
        std::max(of_codes.begin, of_scales.begin) <= std::min(of_codes.end, of_scales.end)) {
      passes = {{std::min(of_codes.begin, of_scales.begin), std::max(of_codes.end, of_scales.end)}};
    } else {
      passes = {of_codes, of_scales};
    }
    const int64_t step = std::max<int64_t>(1, kChunkValues / unit);
    for (const Range& pass : passes) {
      if (pass.empty()) continue;
      const int64_t most = std::min(step, pass.end - pass.begin) * unit;
      const HostMemory values(2 * most, MemoryCause::kRing);
      const HostMemory results(round_up(most, 64) + most / kQuantBlock * 4 + step * 4 + 64,
                               MemoryCause::kRing);
      for (int64_t first = pass.begin; first < pass.end; first += step) {
        const int64_t begin = first * unit,
                      count = std::min({step * unit, pass.end * unit - begin, out * in - begin});
        read_values(*source.stored, begin, count, at::kBFloat16, values.data());
        const int64_t rows = by_row ? count / in : 1;
        const auto part = quantized_layout(*quant, rows, count / rows);
        const auto view = [](std::byte* data, const auto& shape, c10::ScalarType dtype) {
          return at::from_blob(data, shape, at::TensorOptions(dtype));
        };
        std::byte* scale_data = results.data() + round_up(part.codes_bytes, 64);
        quantize_into(view(values.data(), std::array{rows, count / rows}, at::kBFloat16),
                      {*quant,
                       view(results.data(), part.codes_shape, part.codes_type),
                       view(scale_data, part.scales_shape, at::kFloat)});
        target.put(codes.offset + first * layout.codes_bytes,
                   {results.data(), static_cast<size_t>(part.codes_bytes)});
        target.put(scales.offset + first * layout.scales_bytes,
                   {scale_data, static_cast<size_t>(part.scales_bytes)});
      }
    }
  }

  void read(int64_t index, const Target& target) const {
    int64_t end = 0;  // of what came before
    const auto clear = [&](int64_t from, int64_t to) {
      const Range gap = overlap(target.range, {from, to});
      if (!gap.empty())
        std::memset(target.at(gap.begin), 0, static_cast<size_t>(gap.end - gap.begin));
    };
    for (const Source& source : sources[static_cast<size_t>(index)]) {
      clear(end, source.slice.offset);
      if (source.scales) clear(source.slice.end(), source.scales->offset);
      end = source.end();
      if (overlap(target.range, {source.slice.offset, end}).empty()) continue;
      if (!source.scales) {
        read_slice(*source.stored, source.slice, target);
      } else if (source.stored_scales) {
        read_slice(*source.stored, source.slice, target);
        read_slice(*source.stored_scales, *source.scales, target);
      } else {
        read_quantised(source, target);
      }
    }
    clear(end, layouts[static_cast<size_t>(index)].bytes());
  }
};

ModelFile::ModelFile(const fs::path& path, const ModelFileOptions& options)
    : impl_(std::make_unique<const Impl>(path, options)) {}
ModelFile::~ModelFile() = default;

const dit::Config& ModelFile::config() const { return impl_->config; }
const fs::path& ModelFile::path() const { return impl_->path; }
const std::vector<FileStamp>& ModelFile::stamps() const { return impl_->stamps; }
const std::map<std::string, std::string>& ModelFile::metadata() const { return impl_->metadata; }
std::optional<QuantFormat> ModelFile::quant() const { return impl_->quant; }
const RecordLayout& ModelFile::layout(int64_t index) const {
  return impl_->layouts.at(static_cast<size_t>(index));
}

int64_t ModelFile::num_records() const { return std::ssize(impl_->layouts); }
int64_t ModelFile::record_bytes(int64_t index) const { return layout(index).bytes(); }

void ModelFile::read(int64_t index, int64_t offset, std::span<std::byte> to) const {
  check_range(index, offset, to.size());
  impl_->read(index, {{offset, offset + static_cast<int64_t>(to.size())}, to.data()});
}

void ModelFile::prefetch(int64_t index) const {
  for (const Source& source : impl_->sources.at(static_cast<size_t>(index)))
    for (const Stored* stored : {source.stored, source.stored_scales})
      if (stored)
        for (const Piece& piece : stored->pieces)
          impl_->files->file(piece.file).prefetch(piece.offset, piece.bytes);
}

std::vector<std::pair<int64_t, int64_t>> ModelFile::parts(int64_t index, int64_t max_bytes) const {
  if (!impl_->quant || impl_->stored_quant) return RecordStore::parts(index, max_bytes);
  // codes and scales that are made together stay together
  std::vector<std::pair<int64_t, int64_t>> parts;
  int64_t begin = 0, end = 0;
  const auto& sources = impl_->sources.at(static_cast<size_t>(index));
  for (size_t i = 0; i < sources.size(); ++i) {
    const int64_t next = i + 1 < sources.size() ? sources[i + 1].slice.offset : record_bytes(index);
    if (end > begin && next - begin > max_bytes) {
      parts.emplace_back(begin, end - begin);
      begin = end;
    }
    end = next;
  }
  parts.emplace_back(begin, end - begin);
  return parts;
}

int64_t ModelFile::staging_bytes() const {
  int64_t most = 0;
  for (const auto& record : impl_->sources)
    for (const Source& source : record) {
      const bool quantises = source.scales && !source.stored_scales;
      const auto wanted = quantises ? at::kBFloat16 : source.slice.dtype;
      int64_t bytes_per_value = 0;
      if (source.stored->dtype != wanted && !source.stored_scales)
        bytes_per_value += static_cast<int64_t>(c10::elementSize(source.stored->dtype));
      if (quantises) bytes_per_value += 4;  // bfloat16, codes, scales
      int64_t values = 1;
      for (const int64_t length : source.stored->shape) values *= length;
      most = std::max(most, std::min(values, kChunkValues) * bytes_per_value);
    }
  // a chunk of a page or less is a page
  return round_up(most, kRecordAlignment) + impl_->files->staging_bytes();
}

void ModelFile::read_tensor(const std::string& name, const at::Tensor& to) const {
  const auto it = impl_->tensors.find(name);
  if (it == impl_->tensors.end())
    throw std::invalid_argument(fmt::format("{}: no tensor {}", show(path()), name));
  const Stored& stored = it->second;
  if (impl_->stored_quant && is_quantized_name(name))
    throw std::invalid_argument(fmt::format("{}: {} is quantised", show(path()), name));
  if (!to.device().is_cpu() || !to.is_contiguous() || !to.sizes().equals(stored.shape))
    throw std::invalid_argument(fmt::format("{}: {} has shape {}, a tensor of {} was given",
                                            show(path()),
                                            name,
                                            shape_text(stored.shape),
                                            shape_text(to)));
  if (to.numel() > 0)
    impl_->read_values(
        stored, 0, to.numel(), to.scalar_type(), static_cast<std::byte*>(to.data_ptr()));
}

Sha256Digest ModelFile::weights_sha256(bool rehash) const {
  return remembered_weights_sha256(
      stamps(),
      "flux",
      [&] {
        std::map<std::string, TensorStream> streams;
        for (const auto& [name, stored] : impl_->tensors)
          streams[name] = {
              dtype_of(stored.dtype), stored.shape, [&stored = stored, this](Sha256& hash) {
                const int64_t total = stored.bytes();
                const HostMemory chunk(std::min(total, kHashBytes), MemoryCause::kOther);
                for (int64_t done = 0; done < total; done += kHashBytes) {
                  cancel::check();
                  const auto take = static_cast<size_t>(std::min(kHashBytes, total - done));
                  impl_->read_stored(stored, done, {chunk.data(), take});
                  hash.add(std::span<const std::byte>(chunk.data(), take));
                }
              }};
        return flux::weights_sha256(streams);
      },
      rehash);
}

}  // namespace flux::engine

#include "common/engine/tensor_file.h"

#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/text.h"
#include "common/engine/record_store.h"
#include "common/tensor/tensor.h"
#include "formats/safetensors/reader.h"

namespace flux::engine {
namespace {

constexpr int64_t kHashBytes = int64_t{4} << 20;

int64_t size_of(c10::ScalarType dtype) { return static_cast<int64_t>(c10::elementSize(dtype)); }

std::unique_ptr<RecordFile> open_file(const FileStamp& stamp, FileAccess access) {
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

}  // namespace

int64_t StoredTensor::bytes() const {
  int64_t total = 0;
  for (const Piece& piece : pieces) total += piece.bytes;
  return total;
}

std::pair<int64_t, int64_t> RecordPart::overlap(int64_t from, int64_t to) const {
  return {std::max(begin, from), std::min(end, to)};
}

void RecordPart::put(int64_t offset, std::span<const std::byte> bytes) const {
  const auto [from, to] = overlap(offset, offset + static_cast<int64_t>(bytes.size()));
  if (from < to)
    std::memcpy(at(from), bytes.data() + (from - offset), static_cast<size_t>(to - from));
}

void RecordPart::clear(int64_t from, int64_t to) const {
  const auto [first, last] = overlap(from, to);
  if (first < last) std::memset(at(first), 0, static_cast<size_t>(last - first));
}

TensorFile::TensorFile(const std::filesystem::path& path, FileAccess wanted) {
  const safetensors::FileSet set = safetensors::open_set(path);
  contents_ = {path, {}, {}, set.metadata};
  int64_t total = 0;
  for (const auto& file : set.files) total += static_cast<int64_t>(file->stamp().size_bytes);
  const FileAccess access = choose_access(wanted, total);
  for (const auto& file : set.files) {
    const FileStamp& stamp = file->stamp();
    contents_.stamps.push_back(stamp);
    uint64_t data_bytes = 0;
    for (const auto& tensor : file->tensors()) data_bytes = std::max(data_bytes, tensor.end);
    const uint64_t header_bytes = stamp.size_bytes - data_bytes;
    for (const auto& tensor : file->tensors()) {
      const auto dtype = scalar_type(tensor.dtype);
      if (!dtype)
        throw InputError(fmt::format("{}: tensor '{}' has dtype {}, which is not supported",
                                     show(file->path()),
                                     printable(tensor.name),
                                     dtype_name(tensor.dtype)),
                         "use weights in BF16, F16, F32 or plain F8_E4M3");
      contents_.tensors.emplace(
          tensor.name,
          at::from_blob(const_cast<std::byte*>(tensor.bytes.data()),
                        at::IntArrayRef(tensor.shape.data(), tensor.shape.size()),
                        at::TensorOptions(*dtype)));
      if (!tensor.bytes.empty())
        places_[tensor.bytes.data()] = {files_.size(),
                                        static_cast<int64_t>(header_bytes + tensor.begin),
                                        static_cast<int64_t>(tensor.bytes.size())};
    }
    files_.push_back(open_file(stamp, access));
  }
}

TensorFile::~TensorFile() = default;

Piece TensorFile::place(const at::Tensor& stand_in) const {
  return places_.at(static_cast<const std::byte*>(stand_in.const_data_ptr()));
}

StoredTensor TensorFile::stored(const at::Tensor& stand_in) const {
  StoredTensor out{stand_in.scalar_type(), stand_in.sizes().vec(), {}};
  if (stand_in.numel() > 0) out.pieces.push_back(place(stand_in));
  return out;
}

void TensorFile::read_bytes(const StoredTensor& tensor,
                            int64_t begin,
                            std::span<std::byte> to) const {
  for (const Piece& piece : tensor.pieces) {
    if (to.empty()) return;
    if (begin >= piece.bytes) {
      begin -= piece.bytes;
      continue;
    }
    const auto take = std::min(static_cast<int64_t>(to.size()), piece.bytes - begin);
    files_[piece.file]->read(piece.offset + begin, to.first(static_cast<size_t>(take)));
    to = to.subspan(static_cast<size_t>(take));
    begin = 0;
  }
}

void TensorFile::read_values(const StoredTensor& tensor,
                             int64_t first,
                             int64_t count,
                             c10::ScalarType dtype,
                             std::byte* to) const {
  const int64_t from_size = size_of(tensor.dtype), to_size = size_of(dtype);
  if (tensor.dtype == dtype)
    return read_bytes(tensor, first * from_size, {to, static_cast<size_t>(count * to_size)});
  const HostMemory chunk(std::min(count, kChunkValues) * from_size, MemoryCause::kRing);
  for (int64_t done = 0; done < count;) {
    const int64_t take = std::min(count - done, kChunkValues);
    read_bytes(
        tensor, (first + done) * from_size, {chunk.data(), static_cast<size_t>(take * from_size)});
    at::from_blob(to + done * to_size, {take}, at::TensorOptions(dtype))
        .copy_(at::from_blob(chunk.data(), {take}, at::TensorOptions(tensor.dtype)));
    done += take;
  }
}

void TensorFile::read_slice(const StoredTensor& tensor,
                            const Slice& slice,
                            const RecordPart& part) const {
  const auto [from, to] = part.overlap(slice.offset, slice.end());
  if (from >= to) return;
  const int64_t size = size_of(slice.dtype);
  read_values(tensor, (from - slice.offset) / size, (to - from) / size, slice.dtype, part.at(from));
}

void TensorFile::prefetch(const StoredTensor& tensor) const {
  for (const Piece& piece : tensor.pieces) files_[piece.file]->prefetch(piece.offset, piece.bytes);
}

int64_t TensorFile::conversion_bytes(const StoredTensor& tensor, c10::ScalarType dtype) {
  if (tensor.dtype == dtype) return 0;
  int64_t values = 1;
  for (const int64_t length : tensor.shape) values *= length;
  return std::min(values, kChunkValues) * size_of(tensor.dtype);
}

int64_t TensorFile::staging_bytes() const {
  int64_t most = 0;
  for (const auto& file : files_) most = std::max(most, file->staging_bytes());
  return most;
}

Sha256Digest TensorFile::weights_sha256(std::string_view net,
                                        const std::map<std::string, StoredTensor>& tensors,
                                        bool rehash) const {
  const auto compute = [&] {
    std::map<std::string, TensorStream> streams;
    for (const auto& [name, tensor] : tensors)
      streams[name] = {
          dtype_of(tensor.dtype), tensor.shape, [&tensor = tensor, this](Sha256& hash) {
            const int64_t total = tensor.bytes();
            const HostMemory chunk(std::min(total, kHashBytes), MemoryCause::kOther);
            for (int64_t done = 0; done < total; done += kHashBytes) {
              cancel::check();
              const auto take = static_cast<size_t>(std::min(kHashBytes, total - done));
              read_bytes(tensor, done, {chunk.data(), take});
              hash.add(std::span<const std::byte>(chunk.data(), take));
            }
          }};
    return flux::weights_sha256(streams);
  };
  return remembered_weights_sha256(contents_.stamps, net, compute, rehash);
}

}  // namespace flux::engine

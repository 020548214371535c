#include "pipelines/cache/npz.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <zip.h>

#include <cstring>
#include <memory>

#include "common/core/error.h"

namespace flux::cache {
namespace {

std::string npy_bytes(const NamedTensor& tensor) {
  const bool bytes = tensor.dtype == DType::kU8;
  std::string header = fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}{}), }}",
                                   bytes ? "|u1" : "<f4",
                                   fmt::join(tensor.shape, ", "),
                                   tensor.shape.size() == 1 ? "," : "");
  constexpr size_t kPrefix = 10, kAlignment = 64;  // what comes before the header; of the data
  header.append(kAlignment - 1 - (kPrefix + header.size()) % kAlignment, ' ');
  header += '\n';
  std::string out("\x93NUMPY\x01\x00", 8);
  out += static_cast<char>(header.size() & 0xFF);
  out += static_cast<char>(header.size() >> 8);
  out += header;
  if (bytes) {
    out.append(reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size());
  } else {
    const auto values = as_floats(tensor);
    out.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  }
  return out;
}

struct CloseZip {
  void operator()(zip_t* archive) const { zip_discard(archive); }
};
struct FreeSource {
  void operator()(zip_source_t* source) const { zip_source_free(source); }
};

[[noreturn]] void fail(const char* what, const char* why) {
  throw ResourceError(fmt::format("an npz archive cannot be made: {}: {}", what, why),
                      "close other programs: memory does not suffice");
}

}  // namespace

std::string npz_bytes(const std::vector<NamedTensor>& tensors) {
  zip_error_t error;
  zip_error_init(&error);
  const std::unique_ptr<zip_source_t, FreeSource> whole(
      zip_source_buffer_create(nullptr, 0, 0, &error));
  if (!whole) fail("buffer", zip_error_strerror(&error));
  std::unique_ptr<zip_t, CloseZip> archive(zip_open_from_source(whole.get(), ZIP_TRUNCATE, &error));
  if (!archive) fail("archive", zip_error_strerror(&error));
  zip_source_keep(whole.get());  // the archive gives one reference back, `whole` the other
  std::vector<std::string> arrays;
  for (const auto& tensor : tensors) arrays.push_back(npy_bytes(tensor));
  for (size_t i = 0; i < tensors.size(); ++i) {
    std::unique_ptr<zip_source_t, FreeSource> entry(
        zip_source_buffer(archive.get(), arrays[i].data(), arrays[i].size(), 0));
    const std::string name = tensors[i].name + ".npy";
    const auto index =
        entry ? zip_file_add(archive.get(), name.c_str(), entry.get(), ZIP_FL_ENC_UTF_8) : -1;
    if (index < 0) fail(name.c_str(), zip_strerror(archive.get()));
    static_cast<void>(entry.release());  // the archive has it
    const auto at = static_cast<zip_uint64_t>(index);
    constexpr zip_uint16_t kNoTime = 0, kFirstDay = (1 << 5) | 1;  // 1980-01-01
    if (zip_set_file_compression(archive.get(), at, ZIP_CM_STORE, 0) != 0 ||
        zip_file_set_dostime(archive.get(), at, kNoTime, kFirstDay, 0) != 0) {
      fail(name.c_str(), zip_strerror(archive.get()));
    }
  }
  if (zip_close(archive.get()) != 0) fail("archive", zip_strerror(archive.get()));
  static_cast<void>(archive.release());
  zip_stat_t stat;
  if (zip_source_stat(whole.get(), &stat) != 0 || zip_source_open(whole.get()) != 0)
    fail("buffer", zip_error_strerror(zip_source_error(whole.get())));
  std::string out(stat.size, '\0');
  const auto read = zip_source_read(whole.get(), out.data(), out.size());
  zip_source_close(whole.get());
  if (read != static_cast<zip_int64_t>(out.size())) fail("buffer", "cut short");
  return out;
}

}  // namespace flux::cache

#include "formats/cache/hdf5_file.h"

#include <fmt/format.h>
#include <hdf5.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "common/core/error.h"
#include "common/core/text.h"
#include "common/core/tool.h"
#include "formats/cache/codec.h"
#include "formats/cache/files.h"
#include "formats/cache/superblock.h"

namespace flux::cache {
namespace {

constexpr H5Z_filter_t kZstdFilter = 32015;   // registered with The HDF Group
constexpr size_t kMaxAttributeBytes = 60000;  // an attribute in an object header is below 64 KiB
constexpr int64_t kMinFrameBytes =
    10;  // magic, header with content size, an empty block, checksum: no frame is shorter

const bool kVersionLine = [] {
  return add_version_line(
      fmt::format("HDF5 {}.{}.{} (cache schema 1)", H5_VERS_MAJOR, H5_VERS_MINOR, H5_VERS_RELEASE));
}();

// The filter's name must be known for a dataset to be made with it. Chunks are written ready-made,
// so that it never runs.
size_t never_filter(unsigned, size_t, const unsigned*, size_t, size_t*, void**) { return 0; }

// Held during every call into HDF5. Printing of error stacks is a setting of each thread.
class Lock {
 public:
  Lock() : guard_(mutex()) {
    static const bool ready = [] {
      H5open();
      H5PLset_loading_state(0);          // no code from plugin folders
      H5Lunregister(H5L_TYPE_EXTERNAL);  // no other files
      static const H5Z_class2_t zstd = {
          H5Z_CLASS_T_VERS, kZstdFilter, 1, 1, "zstd", nullptr, nullptr, never_filter};
      return H5Zregister(&zstd) >= 0;
    }();
    if (!ready) throw std::runtime_error("HDF5 cannot be initialised");
    thread_local const bool silent = H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr) >= 0;
    (void)silent;
  }

 private:
  static std::recursive_mutex& mutex() {
    static std::recursive_mutex one;
    return one;
  }
  std::lock_guard<std::recursive_mutex> guard_;
};

// An identifier of HDF5 and how it is closed.
class Handle {
 public:
  Handle() = default;
  Handle(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(id_, other.id_);
    std::swap(close_, other.close_);
    return *this;
  }
  ~Handle() {
    if (id_ >= 0) {
      const Lock lock;
      close_(id_);
    }
  }
  operator hid_t() const { return id_; }
  bool ok() const { return id_ >= 0; }
  hid_t release() { return std::exchange(id_, -1); }

 private:
  hid_t id_ = -1;
  herr_t (*close_)(hid_t) = nullptr;
};

Handle plist(hid_t kind) { return {H5Pcreate(kind), H5Pclose}; }

// The file type of an element. bfloat16 is the custom float that HDF5 2.0 predefines and that h5py
// shows as exact float32.
Handle file_type(Element element) {
  const auto copy = [](hid_t from) { return Handle(H5Tcopy(from), H5Tclose); };
  switch (element) {
    case Element::kU8:
      return copy(H5T_STD_U8LE);
    case Element::kU32:
      return copy(H5T_STD_U32LE);
    case Element::kU64:
      return copy(H5T_STD_U64LE);
    case Element::kF64:
      return copy(H5T_IEEE_F64LE);
    case Element::kF32:
      return copy(H5T_IEEE_F32LE);
    case Element::kBF16:
    case Element::kF16:
      break;
  }
  // HDF5 1.10 has no predefined 2-byte float: sign 1 bit, exponent, mantissa, as IEEE 754 and
  // bfloat16 lay them out
  Handle type = copy(H5T_IEEE_F32LE);
  const size_t mantissa = element == Element::kBF16 ? 7 : 10, exponent = 15 - mantissa;
  H5Tset_fields(type, 15, mantissa, exponent, 0, mantissa);
  H5Tset_ebias(type, element == Element::kBF16 ? 127 : 15);
  H5Tset_precision(type, 16);
  H5Tset_size(type, 2);
  return type;
}

Handle text_type(size_t bytes) {
  Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  H5Tset_size(type, std::max<size_t>(bytes, 1));
  H5Tset_strpad(type, H5T_STR_NULLPAD);
  H5Tset_cset(type, H5T_CSET_UTF8);
  return type;
}

}  // namespace

int64_t element_bytes(Element element) {
  switch (element) {
    case Element::kU8:
      return 1;
    case Element::kBF16:
    case Element::kF16:
      return 2;
    case Element::kU32:
    case Element::kF32:
      return 4;
    case Element::kU64:
    case Element::kF64:
      return 8;
  }
  return 0;
}

int64_t table_chunk_rows(int64_t rows, int64_t row_bytes) {
  return std::min(rows, std::max<int64_t>(1, (int64_t{1} << 20) / row_bytes));
}

// ----------------------------------------------------------------------------------------------------------
// writing

struct Hdf5Image::State {
  // The core driver's memory, through callbacks that keep it when the file is closed.
  // H5Fget_file_image is no substitute: HDF5 1.10.8 clears the status flags there without renewing
  // the superblock's checksum.
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
  } buffer;
  Handle file;

  ~State() {
    file = Handle();
    std::free(buffer.data);
  }
};

namespace {

void require(bool holds, const char* call) {
  if (!holds) throw std::runtime_error(fmt::format("HDF5: {} failed", call));
}

}  // namespace

Hdf5Image::Hdf5Image() : state_(std::make_unique<State>()) {
  using Buffer = State::Buffer;
  const Lock lock;
  H5FD_file_image_callbacks_t callbacks = {
      [](size_t size, H5FD_file_image_op_t, void* user) -> void* {
        auto* buffer = static_cast<Buffer*>(user);
        buffer->size = size;
        return buffer->data = std::malloc(size);
      },
      [](void* to, const void* from, size_t size, H5FD_file_image_op_t, void*) -> void* {
        return std::memcpy(to, from, size);
      },
      [](void* old, size_t size, H5FD_file_image_op_t, void* user) -> void* {
        auto* buffer = static_cast<Buffer*>(user);
        void* grown = std::realloc(old, size);
        if (grown) *buffer = {grown, size};
        return grown;
      },
      [](void*, H5FD_file_image_op_t, void*) -> herr_t { return 0; },  // kept: the buffer is ours
      [](void* user) -> void* { return user; },
      [](void*) -> herr_t { return 0; },
      &state_->buffer};
  const Handle access = plist(H5P_FILE_ACCESS), create = plist(H5P_FILE_CREATE);
  require(H5Pset_fapl_core(access, size_t{1} << 20, false) >= 0, "H5Pset_fapl_core");
  require(H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110) >= 0,
          "H5Pset_libver_bounds");
  require(H5Pset_file_image_callbacks(access, &callbacks) >= 0, "H5Pset_file_image_callbacks");
  // links and attributes stay in the root's header: no heaps and trees, so less to parse and to get
  // wrong
  require(H5Pset_link_phase_change(create, 1000, 0) >= 0, "H5Pset_link_phase_change");
  require(H5Pset_attr_phase_change(create, 1000, 0) >= 0, "H5Pset_attr_phase_change");
  require(H5Pset_obj_track_times(create, false) >= 0, "H5Pset_obj_track_times");
  state_->file = Handle(H5Fcreate("in-memory.h5", H5F_ACC_EXCL, create, access), H5Fclose);
  require(state_->file.ok(), "H5Fcreate");
}

Hdf5Image::~Hdf5Image() = default;

void Hdf5Image::attribute(const std::string& name, std::string_view text) {
  if (text.size() > kMaxAttributeBytes) {
    throw std::invalid_argument(fmt::format(
        "attribute '{}' has {} bytes, at most {} fit", name, text.size(), kMaxAttributeBytes));
  }
  const Lock lock;
  const Handle type = text_type(text.size()), space(H5Screate(H5S_SCALAR), H5Sclose);
  const Handle made(H5Acreate2(state_->file, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT),
                    H5Aclose);
  const std::string padded = text.empty() ? std::string(1, '\0') : std::string(text);
  require(made.ok() && H5Awrite(made, type, padded.data()) >= 0, "writing an attribute");
}

void Hdf5Image::attribute(const std::string& name, int64_t value) {
  const Lock lock;
  const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  const Handle made(
      H5Acreate2(state_->file, name.c_str(), H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT),
      H5Aclose);
  require(made.ok() && H5Awrite(made, H5T_NATIVE_INT64, &value) >= 0, "writing an attribute");
}

namespace {

void write_chunks(hid_t file,
                  const std::string& name,
                  Element element,
                  std::span<const int64_t> shape,
                  int64_t chunk_rows,
                  std::span<const std::span<const std::byte>> frames) {
  std::vector<hsize_t> dims(shape.begin(), shape.end()), chunk = dims;
  chunk[0] = static_cast<hsize_t>(chunk_rows);
  const auto rank = static_cast<int>(dims.size());
  const Handle type = file_type(element), create = plist(H5P_DATASET_CREATE);
  const Handle space(H5Screate_simple(rank, dims.data(), nullptr), H5Sclose);
  const unsigned level = 1;
  require(space.ok() && H5Pset_chunk(create, rank, chunk.data()) >= 0, "H5Pset_chunk");
  require(element_bytes(element) == 1 || H5Pset_shuffle(create) >= 0, "H5Pset_shuffle");
  require(H5Pset_filter(create, kZstdFilter, 0, 1, &level) >= 0, "H5Pset_filter");
  require(H5Pset_fill_time(create, H5D_FILL_TIME_NEVER) >= 0, "H5Pset_fill_time");
  require(H5Pset_obj_track_times(create, false) >= 0, "H5Pset_obj_track_times");
  const Handle dataset(
      H5Dcreate2(file, name.c_str(), type, space, H5P_DEFAULT, create, H5P_DEFAULT), H5Dclose);
  require(dataset.ok(), "H5Dcreate2");
  std::vector<hsize_t> offset(dims.size(), 0);
  for (const auto& frame : frames) {
    require(H5Dwrite_chunk(dataset, H5P_DEFAULT, 0, offset.data(), frame.size(), frame.data()) >= 0,
            "H5Dwrite_chunk");
    offset[0] += chunk[0];
  }
}

}  // namespace

void Hdf5Image::table(const std::string& name,
                      Element element,
                      int64_t rows,
                      int64_t columns,
                      std::span<const std::byte> data) {
  const int64_t row_bytes = std::max<int64_t>(columns, 1) * element_bytes(element);
  if (rows < 1 || data.size() != static_cast<size_t>(rows * row_bytes)) {
    throw std::invalid_argument(
        fmt::format("table '{}': {} bytes for {} rows of {}", name, data.size(), rows, row_bytes));
  }
  const int64_t chunk_rows = table_chunk_rows(rows, row_bytes);
  const auto chunk_bytes = static_cast<size_t>(chunk_rows * row_bytes);
  std::vector<std::vector<std::byte>> encoded;
  for (size_t begin = 0; begin < data.size(); begin += chunk_bytes) {
    const auto part = data.subspan(begin, std::min(chunk_bytes, data.size() - begin));
    std::vector<std::byte> whole(part.begin(), part.end());
    whole.resize(chunk_bytes);  // HDF5's last chunk is as large as the others
    encoded.push_back(encode_frame(whole, element_bytes(element)));
  }
  const std::vector<std::span<const std::byte>> frames(encoded.begin(), encoded.end());
  std::vector<int64_t> shape{rows};
  if (columns > 0) shape.push_back(columns);
  const Lock lock;
  write_chunks(state_->file, name, element, shape, chunk_rows, frames);
}

void Hdf5Image::frames(const std::string& name,
                       Element element,
                       std::span<const int64_t> shape,
                       std::span<const std::span<const std::byte>> frames) {
  const Lock lock;
  write_chunks(state_->file, name, element, shape, 1, frames);
}

std::vector<std::byte> Hdf5Image::finish() {
  const Lock lock;
  require(H5Fclose(state_->file.release()) >= 0, "H5Fclose");
  // the driver's buffer grows in steps; the superblock says where the file ends
  uint64_t end = 0;
  require(state_->buffer.data && state_->buffer.size >= kSuperblockBytes, "the core driver");
  const auto* bytes = static_cast<const std::byte*>(state_->buffer.data);
  std::memcpy(&end, bytes + 28, sizeof end);
  require(end <= state_->buffer.size, "the core driver");
  const std::string wrong = check_superblock({bytes, kSuperblockBytes}, end);
  if (!wrong.empty()) throw std::runtime_error("HDF5: the file built " + wrong);
  return {bytes, bytes + end};
}

// ----------------------------------------------------------------------------------------------------------
// reading

struct Hdf5File::State {
  Handle file;
};

class Hdf5File::Frames {
 public:
  std::string name;
  int64_t rows = 0;
  size_t rank = 0;
  Handle dataset;
};

void Hdf5File::refuse(const std::string& text, const std::string& hint) const {
  throw CacheError(fmt::format("{}: {}", show(path_), text), hint);
}

Hdf5File::Hdf5File(const std::filesystem::path& path)
    : path_(path), state_(std::make_unique<State>()) {
  check_superblock(path);
  const Lock lock;
  const Handle access = plist(H5P_FILE_ACCESS);
  H5Pset_fapl_sec2(access);
  H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
#if H5_VERSION_GE(1, 10, 7)
  H5Pset_file_locking(
      access, false, true);  // files never change, and some file systems have no locks
#endif
  state_->file = Handle(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access), H5Fclose);
  const hid_t file = state_->file;
  if (file < 0) {
    refuse_unreadable(path);  // too many open files by now
    refuse("HDF5 cannot open it: its metadata are damaged");
  }

  H5G_info_t group{};
  H5O_info_t object{};
  if (H5Gget_info(file, &group) < 0 || H5Oget_info2(file, &object, H5O_INFO_NUM_ATTRS) < 0) {
    refuse("its root group cannot be read");
  }
  if (group.nlinks > 1000)
    refuse(fmt::format("has {} objects, a cache file has at most 1000", group.nlinks));
  if (object.num_attrs > 100)
    refuse(fmt::format("has {} root attributes, a cache file has at most 100", object.num_attrs));

  const auto odd = [&](std::string text) {
    if (oddity_.empty()) oddity_ = std::move(text);
  };
  for (hsize_t i = 0; i < object.num_attrs; ++i) {
    const Handle attribute(
        H5Aopen_by_idx(file, ".", H5_INDEX_NAME, H5_ITER_INC, i, H5P_DEFAULT, H5P_DEFAULT),
        H5Aclose);
    std::string name(257, '\0');
    const ssize_t length = attribute.ok() ? H5Aget_name(attribute, name.size(), name.data()) : -1;
    if (length < 1 || length > 256) refuse("has a root attribute that cannot be read");
    name.resize(static_cast<size_t>(length));
    if (name.starts_with("x_")) continue;  // extensions that any reader may ignore
    const Handle type(H5Aget_type(attribute), H5Tclose), space(H5Aget_space(attribute), H5Sclose);
    const H5T_class_t kind = H5Tget_class(type);
    const size_t size = H5Tget_size(type);
    if (kind == H5T_VLEN || H5Tis_variable_str(type) > 0) {
      odd(fmt::format("root attribute '{}' has variable length", printable(name)));
    } else if (H5Sget_simple_extent_type(space) != H5S_SCALAR) {
      odd(fmt::format("root attribute '{}' is not one value", printable(name)));
    } else if (kind == H5T_STRING && size >= 1 && size <= kMaxAttributeBytes) {
      std::string text(size, '\0');
      if (H5Aread(attribute, type, text.data()) < 0)
        refuse(fmt::format("root attribute '{}' cannot be read", printable(name)));
      text.resize(text.find_last_not_of('\0') + 1);
      attributes_[name] = text;
    } else if (kind == H5T_INTEGER && H5Tequal(type, H5T_STD_I64LE) > 0) {
      int64_t value = 0;
      if (H5Aread(attribute, H5T_NATIVE_INT64, &value) < 0) {
        refuse(fmt::format("root attribute '{}' cannot be read", printable(name)));
      }
      attributes_[name] = value;
    } else {
      odd(fmt::format("root attribute '{}' is neither a text nor a 64-bit integer",
                      printable(name)));
    }
  }

  for (hsize_t i = 0; i < group.nlinks; ++i) {
    std::string name(257, '\0');
    const ssize_t length = H5Lget_name_by_idx(
        file, ".", H5_INDEX_NAME, H5_ITER_INC, i, name.data(), name.size(), H5P_DEFAULT);
    H5L_info_t link{};
    if (length < 1 || length > 256 ||
        H5Lget_info_by_idx(file, ".", H5_INDEX_NAME, H5_ITER_INC, i, &link, H5P_DEFAULT) < 0) {
      refuse("has a link that cannot be read");
    }
    name.resize(static_cast<size_t>(length));
    if (link.type != H5L_TYPE_HARD) {
      odd(fmt::format("'{}' is {}",
                      printable(name),
                      link.type == H5L_TYPE_SOFT       ? "a soft link"
                      : link.type == H5L_TYPE_EXTERNAL ? "a link into another file"
                                                       : "a link of unknown type"));
    } else if (H5Oget_info_by_name2(file, name.c_str(), &object, H5O_INFO_BASIC, H5P_DEFAULT) < 0) {
      refuse(fmt::format("object '{}' cannot be read", printable(name)));
    } else if (object.type != H5O_TYPE_DATASET) {
      odd(fmt::format("'{}' is {}, not a dataset",
                      printable(name),
                      object.type == H5O_TYPE_GROUP ? "a group" : "a named type"));
    } else {
      datasets_.push_back(std::move(name));
    }
  }
}

void Hdf5File::refuse_oddities() const {
  if (!oddity_.empty()) refuse(oddity_);
}

Hdf5File::~Hdf5File() = default;

const std::string& Hdf5File::text_attribute(const std::string& name) const {
  const auto found = attributes_.find(name);
  if (found == attributes_.end()) refuse(fmt::format("root attribute '{}' is absent", name));
  const auto* text = std::get_if<std::string>(&found->second);
  if (!text) refuse(fmt::format("root attribute '{}' is a number, expected a text", name));
  return *text;
}

int64_t Hdf5File::number_attribute(const std::string& name) const {
  const auto found = attributes_.find(name);
  if (found == attributes_.end()) refuse(fmt::format("root attribute '{}' is absent", name));
  const auto* number = std::get_if<int64_t>(&found->second);
  if (!number) refuse(fmt::format("root attribute '{}' is a text, expected a number", name));
  return *number;
}

namespace {

struct OpenDataset {
  Handle handle;
  std::vector<hsize_t> shape, chunk;
};

// Opens a dataset whose storage is as FORMAT.md section 2 says; shape and chunk are still to be
// compared.
OpenDataset open_dataset(
    const Hdf5File& owner, hid_t file, const std::string& name, Element element, size_t rank) {
  const auto& names = owner.datasets();
  if (std::find(names.begin(), names.end(), name) == names.end())
    owner.refuse(fmt::format("dataset '{}' is absent", name));
  const auto refuse = [&](const std::string& text) {
    owner.refuse(fmt::format("dataset '{}' {}", name, text));
  };

  OpenDataset out;
  out.handle = Handle(H5Dopen2(file, name.c_str(), H5P_DEFAULT), H5Dclose);
  if (!out.handle.ok()) refuse("cannot be opened");
  const Handle type(H5Dget_type(out.handle), H5Tclose), space(H5Dget_space(out.handle), H5Sclose);
  const Handle create(H5Dget_create_plist(out.handle), H5Pclose);
  if (!type.ok() || !space.ok() || !create.ok()) refuse("cannot be read");

  if (H5Tdetect_class(type, H5T_VLEN) > 0 || H5Tis_variable_str(type) > 0)
    refuse("has values of variable length");
  if (H5Tequal(type, file_type(element)) <= 0) {
    refuse(fmt::format("has another element type ({} bytes) than expected ({} bytes)",
                       H5Tget_size(type),
                       element_bytes(element)));
  }
  const H5D_layout_t layout = H5Pget_layout(create);
  if (layout == H5D_VIRTUAL) refuse("is a virtual dataset: its values are in other files");
  if (H5Pget_external_count(create) != 0)
    refuse("has external storage: its values are in another file");
  if (layout != H5D_CHUNKED) refuse("is not stored in chunks");

  const int found_rank = H5Sget_simple_extent_ndims(space);
  if (H5Sget_simple_extent_type(space) != H5S_SIMPLE || found_rank != static_cast<int>(rank)) {
    refuse(fmt::format("has {} dimensions, expected {}", found_rank, rank));
  }
  std::vector<hsize_t> largest(rank);
  out.shape.resize(rank);
  out.chunk.resize(rank);
  H5Sget_simple_extent_dims(space, out.shape.data(), largest.data());
  if (largest != out.shape) refuse("can grow, a published file never does");
  if (H5Pget_chunk(create, found_rank, out.chunk.data()) != found_rank)
    refuse("has chunks of another rank");

  std::vector<H5Z_filter_t> filters;
  const int num_filters = H5Pget_nfilters(create);
  for (int i = 0; i < num_filters; ++i) {
    unsigned flags = 0, values[4] = {}, config = 0;
    size_t count = 4;
    filters.push_back(H5Pget_filter2(
        create, static_cast<unsigned>(i), &flags, &count, values, 0, nullptr, &config));
  }
  std::vector<H5Z_filter_t> expected{kZstdFilter};
  if (element_bytes(element) > 1) expected.insert(expected.begin(), H5Z_FILTER_SHUFFLE);
  if (filters != expected) {
    refuse(fmt::format("has the filters [{}], expected [{}]",
                       fmt::join(filters, ", "),
                       fmt::join(expected, ", ")));
  }
  return out;
}

// Into `buffer`, which grows where it must; returns the chunk's bytes in it.
std::span<const std::byte> read_chunk(const Hdf5File& owner,
                                      hid_t dataset,
                                      const std::string& name,
                                      size_t rank,
                                      int64_t row,
                                      int64_t max_bytes,
                                      std::vector<std::byte>& buffer) {
  const auto refuse = [&](const std::string& text) {
    owner.refuse(fmt::format("dataset '{}' row {} {}", name, row, text));
  };
  std::vector<hsize_t> offset(rank, 0);
  offset[0] = static_cast<hsize_t>(row);
  const Lock lock;
  hsize_t stored = 0;  // H5Dread_chunk does not know how large the buffer is
  if (H5Dget_chunk_storage_size(dataset, offset.data(), &stored) < 0 || stored == 0)
    refuse("is not stored");
  if (stored > static_cast<hsize_t>(max_bytes)) {
    refuse(fmt::format("takes {} bytes compressed, at most {} are possible", stored, max_bytes));
  }
  if (buffer.size() < stored) buffer.resize(stored);
  uint32_t mask = 0;
  if (H5Dread_chunk(dataset, H5P_DEFAULT, offset.data(), &mask, buffer.data()) < 0)
    refuse("cannot be read");
  if (mask != 0) refuse(fmt::format("was stored without filters (mask {})", mask));
  return std::span(buffer).first(stored);
}

// No frame of so many bytes is larger (ZSTD_compressBound is below this).
int64_t frame_bound(int64_t bytes) { return bytes + bytes / 128 + 512; }

}  // namespace

std::vector<std::byte> Hdf5File::table(const std::string& name,
                                       Element element,
                                       int64_t rows,
                                       int64_t columns,
                                       int64_t max_rows) const {
  const size_t rank = columns > 0 ? 2 : 1;
  const int64_t row_bytes = std::max<int64_t>(columns, 1) * element_bytes(element);
  Lock lock;
  const OpenDataset dataset = open_dataset(*this, state_->file, name, element, rank);
  const auto found = static_cast<int64_t>(std::min<hsize_t>(dataset.shape[0], INT64_MAX));
  if (rank == 2 && dataset.shape[1] != static_cast<hsize_t>(columns)) {
    refuse(
        fmt::format("dataset '{}' has {} columns, expected {}", name, dataset.shape[1], columns));
  }
  if (rows >= 0 && found != rows)
    refuse(fmt::format("dataset '{}' has {} rows, expected {}", name, found, rows));
  if (found < 1 || found > max_rows || found > INT64_MAX / row_bytes) {
    refuse(fmt::format("dataset '{}' has {} rows, expected 1 to {}", name, found, max_rows));
  }
  const int64_t chunk_rows = table_chunk_rows(found, row_bytes);
  std::vector<hsize_t> chunk = dataset.shape;
  chunk[0] = static_cast<hsize_t>(chunk_rows);
  if (dataset.chunk != chunk) {
    refuse(fmt::format("dataset '{}' has chunks of [{}], expected [{}]",
                       name,
                       fmt::join(dataset.chunk, ", "),
                       fmt::join(chunk, ", ")));
  }
  // before memory is taken: so many chunks must fit into the file
  const int64_t num_chunks = (found + chunk_rows - 1) / chunk_rows;
  hsize_t file_bytes = 0;
  H5Fget_filesize(state_->file, &file_bytes);
  if (static_cast<hsize_t>(num_chunks) > file_bytes / kMinFrameBytes) {
    refuse(fmt::format("dataset '{}' has {} chunks, more than a file of {} bytes can hold",
                       name,
                       num_chunks,
                       file_bytes));
  }
  const int64_t chunk_bytes = chunk_rows * row_bytes;
  std::vector<std::byte> out(static_cast<size_t>(num_chunks * chunk_bytes));
  std::vector<std::byte> buffer;
  for (int64_t i = 0; i < num_chunks; ++i) {
    const auto frame = read_chunk(
        *this, dataset.handle, name, rank, i * chunk_rows, frame_bound(chunk_bytes), buffer);
    const auto part = std::span(out).subspan(static_cast<size_t>(i * chunk_bytes),
                                             static_cast<size_t>(chunk_bytes));
    const std::string wrong = decode_frame(frame, element_bytes(element), part);
    if (!wrong.empty()) refuse(fmt::format("dataset '{}' row {} {}", name, i * chunk_rows, wrong));
  }
  out.resize(static_cast<size_t>(found * row_bytes));
  return out;
}

std::shared_ptr<Hdf5File::Frames> Hdf5File::open_frames(const std::string& name,
                                                        Element element,
                                                        std::span<const int64_t> shape) const {
  const Lock lock;
  OpenDataset dataset = open_dataset(*this, state_->file, name, element, shape.size());
  std::vector<hsize_t> expected(shape.begin(), shape.end());
  if (dataset.shape != expected) {
    refuse(fmt::format("dataset '{}' has shape [{}], expected [{}]",
                       name,
                       fmt::join(dataset.shape, ", "),
                       fmt::join(expected, ", ")));
  }
  expected[0] = 1;
  if (dataset.chunk != expected) {
    refuse(fmt::format("dataset '{}' has chunks of [{}], expected [{}]",
                       name,
                       fmt::join(dataset.chunk, ", "),
                       fmt::join(expected, ", ")));
  }
  auto out = std::make_shared<Frames>();
  out->name = name;
  out->rows = shape[0];
  out->rank = shape.size();
  out->dataset = std::move(dataset.handle);
  return out;
}

std::span<const std::byte> Hdf5File::frame(const Frames& frames,
                                           int64_t row,
                                           int64_t bytes,
                                           std::vector<std::byte>& buffer) const {
  if (row < 0 || row >= frames.rows)
    throw std::invalid_argument(fmt::format("row {} of {}", row, frames.rows));
  return read_chunk(
      *this, frames.dataset, frames.name, frames.rank, row, frame_bound(bytes), buffer);
}

}  // namespace flux::cache

// tests/support/h5zstd_plugin.cpp - libh5zstd.so: HDF5 filter 32015 for programs that are not ours,
// as hdf5plugin has it. Debian 12 packages no such plugin; with HDF5_PLUGIN_PATH its h5py reads our
// caches through this one.
#include <H5PLextern.h>
#include <zstd.h>

#include <cstdlib>

namespace {

size_t decode(
    unsigned flags, size_t, const unsigned*, size_t num_bytes, size_t* capacity, void** buffer) {
  if ((flags & H5Z_FLAG_REVERSE) == 0) return 0;  // for reading alone
  const auto size = ZSTD_getFrameContentSize(*buffer, num_bytes);
  if (size == ZSTD_CONTENTSIZE_ERROR || size == ZSTD_CONTENTSIZE_UNKNOWN || size > (1u << 30))
    return 0;
  void* out = std::malloc(size + 1);
  if (out == nullptr || ZSTD_decompress(out, size, *buffer, num_bytes) != size) {
    std::free(out);
    return 0;
  }
  std::free(*buffer);
  *buffer = out;
  *capacity = size + 1;
  return size;
}

const H5Z_class2_t kFilter = {H5Z_CLASS_T_VERS, 32015, 0, 1, "zstd", nullptr, nullptr, decode};

}  // namespace

extern "C" H5PL_type_t H5PLget_plugin_type() { return H5PL_TYPE_FILTER; }
extern "C" const void* H5PLget_plugin_info() { return &kFilter; }

// Files that are not ours, or not quite: each refused by name, none followed, none crashes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hdf5.h>

#include <fstream>
#include <functional>

#include "common/core/error.h"
#include "common/core/file.h"
#include "formats/cache/codec.h"
#include "formats/cache/segment_reader.h"
#include "formats/cache/segment_writer.h"
#include "formats/cache/superblock.h"
#include "tests/support/cache_samples.h"
#include "tests/support/temporary_folder.h"

namespace flux::cache {
namespace {

namespace fs = std::filesystem;

std::vector<std::byte> good_segment(Kind kind) {
  const Recipe recipe = test::recipe(kind);
  const Layout layout = layout_of(kind, recipe.parameters);
  std::vector<Record> records;
  for (uint64_t i = 0; i < 5; ++i) {
    const auto data = test::sample(layout, i);
    records.push_back(prepare(layout, data.info, data.spans()));
  }
  return encode_segment({recipe, test::provenance(), "2026-01-01T00:00:00Z"}, records);
}

void write_bytes(const fs::path& path, std::span<const std::byte> bytes) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
}

std::string refusal(const fs::path& path) {
  try {
    const Segment segment(path);
    for (int64_t i = 0; i < segment.num_samples(); ++i) segment.read(i);
  } catch (const CacheError& error) {
    return error.what();
  }
  return "accepted";
}

// ---- a good text segment, changed with HDF5 itself, so that only the one rule is broken

using Change = std::function<void(hid_t file)>;

void text_attribute(hid_t file, const char* name, const std::string& text) {
  H5Adelete(file, name);
  const hid_t type = H5Tcopy(H5T_C_S1);
  H5Tset_size(type, text.size());
  H5Tset_strpad(type, H5T_STR_NULLPAD);
  const hid_t space = H5Screate(H5S_SCALAR),
              made = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
  H5Awrite(made, type, text.data());
  H5Aclose(made), H5Sclose(space), H5Tclose(type);
}

void number_attribute(hid_t file, const char* name, int64_t value) {
  H5Adelete(file, name);
  const hid_t space = H5Screate(H5S_SCALAR),
              made = H5Acreate2(file, name, H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT);
  H5Awrite(made, H5T_NATIVE_INT64, &value);
  H5Aclose(made), H5Sclose(space);
}

// Replaces /samples_flags (u32 [5]).
void replace_flags(hid_t file,
                   std::vector<hsize_t> dims,
                   hid_t type,
                   const std::function<void(hid_t plist)>& set,
                   const char* name = "samples_flags") {
  H5Ldelete(file, name, H5P_DEFAULT);
  const hid_t space = H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr),
              plist = H5Pcreate(H5P_DATASET_CREATE);
  set(plist);
  H5Dclose(H5Dcreate2(file, name, type, space, H5P_DEFAULT, plist, H5P_DEFAULT));
  H5Pclose(plist), H5Sclose(space);
}

void ours(hid_t plist, const std::vector<hsize_t>& chunk) {
  const unsigned level = 1;
  H5Pset_chunk(plist, static_cast<int>(chunk.size()), chunk.data());
  H5Pset_shuffle(plist);
  H5Pset_filter(plist, 32015, 0, 1, &level);
}

void write_chunk(hid_t file, const char* name, uint32_t mask, std::span<const std::byte> bytes) {
  const hid_t dataset = H5Dopen2(file, name, H5P_DEFAULT);
  const hsize_t offset[4] = {};
  H5Dwrite_chunk(dataset, H5P_DEFAULT, mask, offset, bytes.size(), bytes.data());
  H5Dclose(dataset);
}

struct Case {
  const char* name;
  Change change;
  const char* says;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

class HostileSegment : public testing::TestWithParam<Case> {};

TEST_P(HostileSegment, IsRefusedByName) {
  const test::TemporaryFolder folder;
  const fs::path path = folder / "segment.h5";
  write_bytes(path, good_segment(Kind::kText));
  ASSERT_EQ(refusal(path), "accepted");
  const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110);
  const hid_t file = H5Fopen(path.c_str(), H5F_ACC_RDWR, access);
  ASSERT_GE(file, 0);
  GetParam().change(file);
  ASSERT_GE(H5Fclose(file), 0);
  H5Pclose(access);
  EXPECT_THAT(refusal(path), testing::HasSubstr(GetParam().says));
}

const std::vector<std::byte> kZeros(20, std::byte{0});

INSTANTIATE_TEST_SUITE_P(
    Features,
    HostileSegment,
    testing::Values(
        Case{"Unchanged", [](hid_t) {}, "accepted"},
        Case{"IgnoredExtension", [](hid_t f) { text_attribute(f, "x_note", "hello"); }, "accepted"},
        Case{"OtherFormat",
             [](hid_t f) { text_attribute(f, "format", "another"); },
             "is not a file of a cache"},
        Case{"NewerSchema",
             [](hid_t f) { number_attribute(f, "schema_version", 7); },
             "schema 7, this build reads 1 to 1\n  written by cache_test 0.0.0\n  hint: "},
        Case{"RequiredFeature",
             [](hid_t f) { text_attribute(f, "required_features", "loss-mask"); },
             "needs the feature 'loss-mask', which this build does not know"},
        Case{"OptionalFeature",
             [](hid_t f) { text_attribute(f, "optional_features", "smell"); },
             "accepted"},
        Case{"UnknownAttribute",
             [](hid_t f) { text_attribute(f, "extra", "1"); },
             "unknown root attribute 'extra'"},
        Case{"AbsentAttribute",
             [](hid_t f) { H5Adelete(f, "parameters"); },
             "root attribute 'parameters' is absent"},
        Case{"VariableLengthAttribute",
             [](hid_t f) {
               const hid_t type = H5Tcopy(H5T_C_S1);
               H5Tset_size(type, H5T_VARIABLE);
               const char* text = "from the global heap";
               const hid_t space = H5Screate(H5S_SCALAR),
                           made = H5Acreate2(f, "note", type, space, H5P_DEFAULT, H5P_DEFAULT);
               H5Awrite(made, type, &text);
               H5Aclose(made), H5Sclose(space), H5Tclose(type);
             },
             "root attribute 'note' has variable length"},
        Case{"SoftLink",
             [](hid_t f) { H5Lcreate_soft("/t5", f, "extra", H5P_DEFAULT, H5P_DEFAULT); },
             "'extra' is a soft link"},
        Case{"ExternalLink",
             [](hid_t f) {
               // the reader unregistered external links in this process; a class of their number
               // makes one all the same
               static const H5L_class_t dummy = {
                   H5L_LINK_CLASS_T_VERS,
                   H5L_TYPE_EXTERNAL,
                   "dummy",
                   nullptr,
                   nullptr,
                   nullptr,
                   [](const char*, hid_t, const void*, size_t, hid_t, hid_t) -> hid_t {
                     return -1;
                   },
                   nullptr,
                   nullptr};
               H5Lregister(&dummy);
               H5Lcreate_ud(f,
                            "extra",
                            H5L_TYPE_EXTERNAL,
                            "\0/etc/hostname\0/x",
                            17,
                            H5P_DEFAULT,
                            H5P_DEFAULT);
             },
             "'extra' is a link into another file"},
        Case{"Group",
             [](hid_t f) {
               H5Gclose(H5Gcreate2(f, "extra", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
             },
             "'extra' is a group, not a dataset"},
        Case{"NamedType",
             [](hid_t f) {
               const hid_t type = H5Tcopy(H5T_STD_U32LE);
               H5Tcommit2(f, "extra", type, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
               H5Tclose(type);
             },
             "'extra' is a named type, not a dataset"},
        Case{"LinkToTheRoot",
             [](hid_t f) { H5Lcreate_hard(f, "/", f, "extra", H5P_DEFAULT, H5P_DEFAULT); },
             "'extra' is a group, not a dataset"},
        Case{"ExtraDataset",
             [](hid_t f) {
               replace_flags(
                   f, {5}, H5T_STD_U32LE, [](hid_t p) { ours(p, {5}); }, "extra");
             },
             "has 14 datasets, 13 belong to it"},
        Case{"AbsentDataset",
             [](hid_t f) { H5Ldelete(f, "samples_key", H5P_DEFAULT); },
             "dataset 'samples_key' is absent"},
        Case{"ExternalStorage",
             [](hid_t f) {
               replace_flags(f, {5}, H5T_STD_U32LE, [](hid_t p) {
                 H5Pset_external(p, "/etc/hostname", 0, 20);
               });
             },
             "dataset 'samples_flags' has external storage"},
        Case{"VirtualDataset",
             [](hid_t f) {
               replace_flags(f, {5}, H5T_STD_U32LE, [](hid_t p) {
                 const hsize_t five = 5;
                 const hid_t space = H5Screate_simple(1, &five, nullptr);
                 H5Pset_virtual(p, space, "/other.h5", "x", space);
                 H5Sclose(space);
               });
             },
             "dataset 'samples_flags' is a virtual dataset"},
        Case{"Contiguous",
             [](hid_t f) { replace_flags(f, {5}, H5T_STD_U32LE, [](hid_t) {}); },
             "is not stored in chunks"},
        Case{"WrongType",
             [](hid_t f) { replace_flags(f, {5}, H5T_IEEE_F32LE, [](hid_t p) { ours(p, {5}); }); },
             "dataset 'samples_flags' has another element type"},
        Case{"VariableLengthData",
             [](hid_t f) {
               const hid_t type = H5Tvlen_create(H5T_STD_U32LE);
               replace_flags(f, {5}, type, [](hid_t) {});
               H5Tclose(type);
             },
             "dataset 'samples_flags' has values of variable length"},
        Case{"WrongRank",
             [](hid_t f) {
               replace_flags(f, {5, 1}, H5T_STD_U32LE, [](hid_t p) { ours(p, {5, 1}); });
             },
             "dataset 'samples_flags' has 2 dimensions, expected 1"},
        Case{"WrongRows",
             [](hid_t f) { replace_flags(f, {6}, H5T_STD_U32LE, [](hid_t p) { ours(p, {6}); }); },
             "dataset 'samples_flags' has 6 rows, expected 5"},
        Case{"WrongChunks",
             [](hid_t f) { replace_flags(f, {5}, H5T_STD_U32LE, [](hid_t p) { ours(p, {2}); }); },
             "dataset 'samples_flags' has chunks of [2], expected [5]"},
        Case{"HugeShape",
             [](hid_t f) {
               replace_flags(
                   f,
                   {hsize_t{1} << 59},
                   H5T_STD_U8LE,
                   [](hid_t p) {
                     const unsigned level = 1;
                     const hsize_t chunk = 1u << 20;
                     H5Pset_chunk(p, 1, &chunk);
                     H5Pset_filter(p, 32015, 0, 1, &level);
                   },
                   "samples_caption_bytes");
             },
             "dataset 'samples_caption_bytes' has 576460752303423488 rows"},
        Case{"OtherFilter",
             [](hid_t f) {
               replace_flags(f, {5}, H5T_STD_U32LE, [](hid_t p) {
                 const hsize_t five = 5;
                 H5Pset_chunk(p, 1, &five);
                 H5Pset_deflate(p, 1);
               });
             },
             "dataset 'samples_flags' has the filters [1], expected [2, 32015]"},
        Case{"UnknownFilter",
             [](hid_t f) {
               replace_flags(f, {5}, H5T_STD_U32LE, [](hid_t p) {
                 const hsize_t five = 5;
                 H5Pset_chunk(p, 1, &five);
                 H5Pset_filter(p, 32099, H5Z_FLAG_OPTIONAL, 0, nullptr);
               });
             },
             "dataset 'samples_flags' has the filters [32099], expected [2, 32015]"},
        Case{"NothingStored",
             [](hid_t f) { replace_flags(f, {5}, H5T_STD_U32LE, [](hid_t p) { ours(p, {5}); }); },
             "dataset 'samples_flags' row 0 is not stored"},
        Case{"Unfiltered",
             [](hid_t f) { write_chunk(f, "samples_flags", 3, kZeros); },
             "was stored without filters (mask 3)"},
        Case{"NotAFrame",
             [](hid_t f) { write_chunk(f, "samples_flags", 0, kZeros); },
             "is not a zstd frame"},
        Case{
            "OtherContentSize",
            [](hid_t f) { write_chunk(f, "clip", 0, encode_frame(std::vector<std::byte>(99), 1)); },
            "sample 0 tensor 1 decodes to 99 bytes, expected 16"},
        Case{"HugeContentSize",
             [](hid_t f) {
               // RFC 8878: magic, descriptor, and a content size of one byte; then of eight
               auto frame = encode_frame(std::vector<std::byte>(16), 2);
               ASSERT_EQ(frame[4], std::byte{0x24});
               frame[4] = std::byte{0xe4};
               frame.insert(frame.begin() + 5, 7, std::byte{0});
               const uint64_t content = uint64_t{1} << 60;
               std::memcpy(frame.data() + 5, &content, sizeof content);
               write_chunk(f, "clip", 0, frame);
             },
             "sample 0 tensor 1 decodes to 1152921504606846976 bytes, expected 16"},
        Case{"TwoFrames",
             [](hid_t f) {
               auto frame = encode_frame(std::vector<std::byte>(16), 2);
               const auto copy = frame;
               frame.insert(frame.end(), copy.begin(), copy.end());
               write_chunk(f, "clip", 0, frame);
             },
             "bytes after its zstd frame"},
        Case{
            "OtherBytes",
            [](hid_t f) { write_chunk(f, "clip", 0, encode_frame(std::vector<std::byte>(16), 2)); },
            "sample 0 is damaged: XXH3"}),
    [](const auto& tested) { return tested.param.name; });

TEST(Superblock, RefusesWhatIsNotAClosedFileOfThisForm) {
  const auto good = good_segment(Kind::kLatents);
  const auto says = [&](const std::function<void(std::vector<std::byte>&)>& change,
                        bool renew_checksum = true) {
    auto bytes = good;
    change(bytes);
    if (renew_checksum && bytes.size() >= 48) {
      const uint32_t sum = lookup3(std::span(bytes).first(44));
      std::memcpy(bytes.data() + 44, &sum, sizeof sum);
    }
    return check_superblock(std::span(bytes).first(std::min<size_t>(bytes.size(), 48)),
                            bytes.size());
  };
  EXPECT_EQ(says([](auto&) {}, false), "");
  EXPECT_THAT(says([](auto& b) { b.clear(); }), testing::HasSubstr("is empty"));
  EXPECT_THAT(says([](auto& b) { b.resize(20); }), testing::HasSubstr("cut off"));
  EXPECT_THAT(says([](auto& b) { b[0] = {}; }), testing::HasSubstr("not an HDF5 file"));
  EXPECT_THAT(says([](auto& b) { b.insert(b.begin(), 512, std::byte{0}); }, false),
              testing::HasSubstr("user block"));
  EXPECT_THAT(says([](auto& b) { b[8] = std::byte{2}; }),
              testing::HasSubstr("superblock version 2, a cache has 3"));
  EXPECT_THAT(says([](auto& b) { b[9] = std::byte{4}; }),
              testing::HasSubstr("offsets and lengths of 4 and 8"));
  EXPECT_THAT(says([](auto& b) { b[11] = std::byte{1}; }), testing::HasSubstr("not closed"));
  EXPECT_THAT(says([](auto& b) { b[12] = std::byte{8}; }),
              testing::HasSubstr("user block of 8 bytes"));
  EXPECT_THAT(says([](auto& b) { b[20] = std::byte{8}; }), testing::HasSubstr("extension"));
  EXPECT_THAT(says([](auto& b) { b.push_back({}); }), testing::HasSubstr("its superblock says"));
  EXPECT_THAT(says([](auto& b) { b.pop_back(); }), testing::HasSubstr("its superblock says"));
  EXPECT_THAT(says([](auto& b) { b[43] = std::byte{1}; }),
              testing::HasSubstr("root group outside"));
  EXPECT_THAT(says([](auto& b) { b[40] = std::byte{1}; }, false), testing::HasSubstr("checksum"));
}

TEST(Superblock, RefusesWhatIsNotAFile) {
  const test::TemporaryFolder folder;
  EXPECT_THAT(refusal(folder / "absent.h5"), testing::HasSubstr("No such file"));
  EXPECT_THAT(refusal(folder.path()), testing::HasSubstr("not a regular file"));
}

}  // namespace
}  // namespace flux::cache

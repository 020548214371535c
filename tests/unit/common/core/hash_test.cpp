#include "common/core/hash.h"

#include <gtest/gtest.h>

#include <stdexcept>

#include "tests/support/temporary_folder.h"

namespace flux {
namespace {

TEST(Sha256, MatchesTheStandardsExamples) {  // golden: FIPS 180-4
  EXPECT_EQ(to_hex(sha256("abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(to_hex(sha256("")), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  const test::TemporaryFolder folder;
  EXPECT_EQ(sha256_file(folder.write("a", "abc")), sha256("abc"));
}

TEST(Sha256, FieldsDoNotRunTogether) {
  EXPECT_NE(Sha256().add_field("ab").add_field("c").digest(),
            Sha256().add_field("a").add_field("bc").digest());
}

TEST(Xxh3, MatchesXxhsum) {  // golden: xxhsum 0.8.1 -H3 and -H2 of "abc"
  EXPECT_EQ(xxh3_64(as_bytes("abc")), 0x78af5f94892f3950ull);
  EXPECT_EQ(xxh3_128_hex(as_bytes("abc")), "06b05ab6733a618578af5f94892f3950");
}

TEST(DigestFromHex, TakesBackWhatToHexGives) {
  const Sha256Digest digest = sha256("x");
  EXPECT_EQ(digest_from_hex(to_hex(digest)), digest);
  EXPECT_THROW(digest_from_hex("12"), std::invalid_argument);
  EXPECT_THROW(digest_from_hex(std::string(64, 'g')), std::invalid_argument);
}

}  // namespace
}  // namespace flux

// tests/support/unprivileged.h - a test that root runs, too, learns what permissions forbid.
#pragma once
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

namespace flux::test {

/// While it lives the process may do what everybody may, and owns `folder`.
class Unprivileged {
 public:
  explicit Unprivileged(const std::filesystem::path& folder) {
    if (geteuid() != 0) return;
    give(folder, kNobody);
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder))
      give(entry.path(), kNobody);
    is_root_ = seteuid(kNobody) == 0;
  }
  ~Unprivileged() {
    if (is_root_) {
      EXPECT_EQ(seteuid(0), 0);
    }
  }

 private:
  static constexpr uid_t kNobody = 65534;
  static void give(const std::filesystem::path& path, uid_t owner) {
    EXPECT_EQ(lchown(path.c_str(), owner, static_cast<gid_t>(-1)), 0);
  }
  bool is_root_ = false;
};

}  // namespace flux::test

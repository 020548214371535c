// tests/support/shared_data.h - large reference data that is not part of the tree: $FLUX_SHARED, or
// ../shared beside it.
#pragma once
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>

namespace flux::test {

/// The path of `name` ("golden/data") in the reference data; empty if it is not there.
inline std::filesystem::path shared_data(const std::string& name) {
  const char* given = std::getenv("FLUX_SHARED");
  const auto root = given != nullptr ? std::filesystem::path(given)
                                     : std::filesystem::path(FLUX_SOURCE_DIR) / "../shared";
  std::error_code ignored;
  const auto path = root / name;
  return std::filesystem::exists(path, ignored) ? path : std::filesystem::path();
}

}  // namespace flux::test

/// Declares the path `variable`, or skips the test by name.
#define FLUX_SHARED_DATA_OR_SKIP(variable, name)       \
  const auto variable = flux::test::shared_data(name); \
  if (variable.empty()) GTEST_SKIP() << "no ../shared/" << (name)

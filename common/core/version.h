// common/core/version.h - the project's version, and the commit it was built from.
#pragma once

namespace flux {

inline constexpr char kVersion[] = "0.1.0";
/// Full hash of the commit built, "+" at its end where the tree had changes; "unknown" outside a
/// git checkout.
const char* commit();

}  // namespace flux

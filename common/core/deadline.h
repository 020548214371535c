// common/core/deadline.h - a moment from which on a program stops as if it were asked to.
#pragma once
#include <optional>

namespace flux::cancel {

/// From so many seconds after the start of the process on (process_seconds()), requested() says kTerminate. That is no
/// signal: the first one that comes afterwards does not end the process. Nothing: never, which is the default.
void set_deadline(std::optional<double> seconds);

}  // namespace flux::cancel

// pipelines/latents/ordered.h - work done ahead in threads, taken in order.
#pragma once
#include "common/core/ordered.h"

namespace flux::latents {
using flux::Ordered;
}

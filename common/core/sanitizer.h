// common/core/sanitizer.h - whether this build has the address sanitizer, whose shadow memory no limit
// on address space leaves room for.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#define FLUX_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#define FLUX_ADDRESS_SANITIZER __has_feature(address_sanitizer)
#else
#define FLUX_ADDRESS_SANITIZER 0
#endif

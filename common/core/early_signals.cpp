// Linked into each tool by flux_tool(): loading LibTorch's initialisers takes a few tenths of a
// second before main(), in which a signal has to end the process as it does later.
#include "common/core/cancel.h"
#include "common/core/sanitizer.h"

#if !FLUX_ADDRESS_SANITIZER && \
    !defined(__SANITIZE_THREAD__)  // they are not ready for calls this early

namespace {

// The loader calls it after it has mapped and linked everything, before any library's initialiser.
[[gnu::section(".preinit_array"), gnu::used]] void (*const g_install)() = flux::cancel::install;

}  // namespace

#endif

// For LD_PRELOAD: a signal that comes while the shared libraries initialise themselves.
#include <csignal>

[[gnu::constructor]] static void come_early() { std::raise(SIGINT); }

#include "common/dist/meeting.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>
#include <vector>

#include "common/core/cancel.h"
#include "common/core/error.h"
#include "common/core/file.h"
#include "common/core/hash.h"
#include "common/core/log.h"
#include "common/core/text.h"

namespace flux::dist {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using StorePointer = c10::intrusive_ptr<c10d::Store>;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr milliseconds kSlice{500};  // between looks at signals
constexpr milliseconds kLook{20};    // between looks for a key
constexpr milliseconds kCome{50};    // between looks for ranks
constexpr seconds kAlive{1};         // between signs of life of ranks that wait for others
constexpr seconds kConnectLimit{3};  // to one of several addresses
constexpr const char* kLoopback = "127.0.0.1";

/// A file descriptor that is closed.
struct Socket {
  explicit Socket(int descriptor) : fd(descriptor) {}
  ~Socket() {
    if (fd >= 0) close(fd);
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  int fd;
};

struct AddressList {
  addrinfo* first = nullptr;
  ~AddressList() {
    if (first) freeaddrinfo(first);
  }
};

std::string numeric(const sockaddr* address, socklen_t length) {
  char name[NI_MAXHOST] = {};
  return getnameinfo(address, length, name, sizeof name, nullptr, 0, NI_NUMERICHOST) == 0
             ? std::string(name)
             : std::string();
}

/// This machine's address on the way to `host`; empty if there is no way.
std::string address_towards(const std::string& host, int64_t port) {
  addrinfo wanted{};
  wanted.ai_socktype = SOCK_DGRAM;
  AddressList list;
  if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &wanted, &list.first) != 0) return {};
  for (const addrinfo* a = list.first; a; a = a->ai_next) {
    const Socket socket(::socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol));
    sockaddr_storage mine{};
    socklen_t length = sizeof mine;
    // nothing is sent: the kernel only picks a route
    if (socket.fd >= 0 && connect(socket.fd, a->ai_addr, a->ai_addrlen) == 0 &&
        getsockname(socket.fd, reinterpret_cast<sockaddr*>(&mine), &length) == 0)
      return numeric(reinterpret_cast<const sockaddr*>(&mine), length);
  }
  return {};
}

/// Whether somebody listens there.
bool answers(const std::string& host, int64_t port) {
  addrinfo wanted{};
  wanted.ai_socktype = SOCK_STREAM;
  AddressList list;
  if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &wanted, &list.first) != 0)
    return false;
  for (const addrinfo* a = list.first; a; a = a->ai_next) {
    const Socket socket(
        ::socket(a->ai_family, a->ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, a->ai_protocol));
    if (socket.fd < 0) continue;
    if (connect(socket.fd, a->ai_addr, a->ai_addrlen) == 0) return true;
    if (errno != EINPROGRESS) continue;
    pollfd ready{socket.fd, POLLOUT, 0};
    int error = 0;
    socklen_t length = sizeof error;
    if (poll(&ready, 1, static_cast<int>(milliseconds(kConnectLimit).count())) == 1 &&
        getsockopt(socket.fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0)
      return true;
  }
  return false;
}

/// Of this machine, those that others may reach before those that only it does.
std::vector<std::string> own_addresses() {
  std::vector<std::string> out;
  ifaddrs* first = nullptr;
  if (getifaddrs(&first) == 0) {
    for (const int family : {AF_INET, AF_INET6})
      for (const ifaddrs* a = first; a; a = a->ifa_next) {
        if (!a->ifa_addr || a->ifa_addr->sa_family != family) continue;
        if ((a->ifa_flags & IFF_LOOPBACK) || !(a->ifa_flags & IFF_UP)) continue;
        const auto length =
            static_cast<socklen_t>(family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6));
        const std::string name = numeric(a->ifa_addr, length);
        if (!name.empty() && name.find('%') == std::string::npos)
          out.push_back(name);  // no link-local ones
      }
    freeifaddrs(first);
  }
  out.push_back(kLoopback);
  return out;
}

bool only_here(const std::string& address) {
  return address.starts_with("127.") || address == "::1";
}

StorePointer open_store(const std::string& host, int64_t port, bool is_server, milliseconds limit) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(port);
  options.isServer = is_server;
  options.waitWorkers = false;
  options.timeout = limit;
  options.useLibUV = false;  // not in every build
  return c10::make_intrusive<c10d::TCPStore>(host, options);
}

/// Nothing within the limit: nullopt. Throws what LibTorch throws: the store is gone.
std::optional<std::string> get_within(c10d::Store& store,
                                      const std::string& key,
                                      milliseconds limit) {
  // looked for and not waited for: a wait that times out is a warning of LibTorch on stderr
  const auto end = Clock::now() + limit;
  while (!store.check({key})) {
    if (Clock::now() >= end) return std::nullopt;
    std::this_thread::sleep_for(kLook);
  }
  return store.get_to_str(key);
}

/// Calls `attempt` until it returns something. Nothing: patience ran out.
template <typename Attempt>
auto until(Clock::time_point end,
           milliseconds between,
           const std::function<void()>& answered,
           const Attempt& attempt) -> decltype(attempt()) {
  for (;;) {
    cancel::check();
    answered();
    if (auto result = attempt()) return result;
    if (Clock::now() >= end) return {};
    std::this_thread::sleep_for(between);
  }
}

[[noreturn]] void fail_to_meet(const std::string& what, const Launch& launch) {
  throw ResourceError(fmt::format("rank {} of {}: {}", launch.rank, launch.world, what),
                      "start all ranks within --dist-start-timeout, on machines that reach each "
                      "other; --dist-store HOST:PORT names the place");
}

struct Place {
  StorePointer store;
  std::string host;
  int64_t port = 0;
};

Place keep_store(const Launch& launch, const fs::path& address_file, seconds patience) {
  Place place;
  try {
    place.host = launch.host.empty() ? kLoopback : launch.host;
    // by an address that stays when the network goes
    place.store = open_store(kLoopback, launch.port, true, patience);
    place.port = static_cast<const c10d::TCPStore&>(*place.store).getPort();
  } catch (const std::exception& error) {
    fail_to_meet(fmt::format("cannot keep a store at {}:{}: {}",
                             place.host,
                             launch.port,
                             printable(split(error.what(), '\n')[0])),
                 launch);
  }
  if (!launch.host.empty()) {
    if (!answers(launch.host, place.port))
      fail_to_meet(
          fmt::format("keeps a store at port {}, and {} does not answer there: is it this machine?",
                      place.port,
                      printable(launch.host)),
          launch);
    return place;
  }
  const std::string number = random_name();
  place.store->set("number", number);
  const nlohmann::json written = {
      {"port", place.port}, {"addresses", own_addresses()}, {"number", number}};
  write_file_atomic(address_file, written.dump() + "\n");
  return place;
}

std::optional<Place> try_written(const fs::path& address_file,
                                 const std::function<void()>& answered) {
  // NFS remembers for up to a minute that a name was not there, or of which file it was, until the folder is opened
  std::error_code ignored;
  const fs::directory_iterator look(address_file.parent_path(), ignored);
  std::string text;
  try {
    text = read_file(address_file, 1 << 16);
  } catch (const InputError&) {
    return std::nullopt;  // not there yet
  }
  const auto written = nlohmann::json::parse(text, nullptr, false);
  try {
    const auto port = written.at("port").get<int64_t>();
    for (const auto& address : written.at("addresses").get<std::vector<std::string>>()) {
      answered();
      if (!answers(address, port)) continue;
      auto store = open_store(address, port, false, kConnectLimit);
      // another machine of the same private address, or another program at an old port
      if (get_within(*store, "number", kConnectLimit) == written.at("number").get<std::string>())
        return Place{std::move(store), address, port};
    }
  } catch (const std::exception&) {
    // half a file, or no store
  }
  return std::nullopt;
}

Place find_store(const Launch& launch,
                 const fs::path& address_file,
                 seconds patience,
                 const std::function<void()>& answered) {
  const auto end = Clock::now() + patience;
  const auto place = until(end, kSlice, answered, [&]() -> std::optional<Place> {
    if (launch.host.empty()) return try_written(address_file, answered);
    if (!answers(launch.host, launch.port)) return std::nullopt;
    try {
      return Place{open_store(launch.host, launch.port, false, patience), launch.host, launch.port};
    } catch (const std::exception&) {
      return std::nullopt;  // ended meanwhile
    }
  });
  if (place) return *place;
  fail_to_meet(
      launch.host.empty()
          ? fmt::format("rank 0 has not written its address to {} within {} s",
                        show(address_file),
                        patience.count())
          : fmt::format(
                "{}:{} has not answered within {} s", launch.host, launch.port, patience.count()),
      launch);
}

/// Others do not reach this machine by loopback: the address on the way to the first of them that has another.
std::string seen_by_others(c10d::Store& store, const Launch& launch, const Place& place) {
  std::string mine = address_towards(place.host, place.port);
  if (!only_here(mine)) return mine;
  for (int64_t rank = 0; rank < launch.world; ++rank) {
    const std::string its = store.get_to_str(fmt::format("there/{}", rank));
    if (its.empty() || only_here(its)) continue;
    const std::string towards = address_towards(its, place.port);
    if (!towards.empty() && !only_here(towards)) return towards;
  }
  return mine;
}

StorePointer keys_of(const StorePointer& store, const std::string& prefix) {
  return c10::make_intrusive<c10d::PrefixStore>(prefix, store);
}

struct Patience {
  Clock::time_point end;
  seconds in_all, silence;
  const std::function<void()>& answered;
};

// torchrun starts ranks again at the same store, while ranks of the attempt before may still be there on other machines,
// where its count of restarts is another. So rank 0 gives each attempt a name, the others ask for it by a name of their
// own, and what stands in the store from before answers nobody.

/// Rank 0: tells ranks the name, until all have come to it.
std::string lead(const StorePointer& store,
                 const Launch& launch,
                 const std::string& address,
                 const fs::path& address_file,
                 const Patience& patience) {
  const std::string name = random_name();
  const auto attempt = keys_of(store, name);
  std::vector<std::string> asked(static_cast<size_t>(launch.world));
  std::vector<int64_t> missing;
  std::map<int64_t, std::pair<int64_t, int64_t>> alive;  // by rank: signs of life, looks since
  auto looked = Clock::now();
  std::optional<int64_t> silent;
  attempt->set("there/0", address);
  const bool ended = until(patience.end, kCome, patience.answered, [&] {
    missing.clear();
    const bool look = Clock::now() - looked >= kAlive;
    if (look) looked = Clock::now();
    for (int64_t rank = 1; rank < launch.world; ++rank) {
      const std::string ask = fmt::format("ask/{}", rank);
      std::string& last = asked[static_cast<size_t>(rank)];
      if (store->check({ask})) {
        if (const std::string who = store->get_to_str(ask); who != last) {
          store->set("answer/" + who, name);
          last = who;
        }
      }
      if (!attempt->check({fmt::format("there/{}", rank)})) {
        missing.push_back(rank);
      } else if (look) {
        auto& [signs, looks] = alive[rank];
        const int64_t now = attempt->add(fmt::format("waits/{}", rank), 0);
        looks = now == signs ? looks + 1 : 0;
        signs = now;
        if (looks * kAlive >= patience.silence) silent = rank;
      }
    }
    return missing.empty() || silent;
  });
  std::string verdict;
  if (!ended)
    verdict = fmt::format(
        "rank {} did not come within {} s", fmt::join(missing, ", "), patience.in_all.count());
  else if (!missing.empty())
    verdict = fmt::format(
        "rank {} came and has given no sign of life for {} s: it was killed, hangs, or cannot be "
        "reached",
        *silent,
        patience.silence.count());
  std::error_code ignored;
  if (launch.host.empty()) fs::remove(address_file, ignored);
  attempt->set("all", verdict);
  if (verdict.empty()) return name;
  std::this_thread::sleep_for(2 * kSlice);  // the others read it here
  fail_to_meet(verdict, launch);
}

/// The others: come to the attempt of the rank 0 that answered last.
std::string follow(const StorePointer& store,
                   const Launch& launch,
                   const std::string& address,
                   const Patience& patience) {
  const std::string who = random_name(), answer = "answer/" + who;
  std::string name;
  StorePointer attempt;
  auto said = Clock::now();
  store->set(fmt::format("ask/{}", launch.rank), who);
  const bool all = until(patience.end + seconds(10), kCome, patience.answered, [&] {
    if (!store->check({answer})) return false;
    if (const std::string now = store->get_to_str(answer); now != name) {
      name = now;
      attempt = keys_of(store, name);
      attempt->set(fmt::format("there/{}", launch.rank), address);
    }
    if (Clock::now() - said >= kAlive) {
      attempt->add(fmt::format("waits/{}", launch.rank), 1);
      said = Clock::now();
    }
    return attempt->check({"all"});
  });
  if (!all) fail_to_meet("rank 0 says nothing", launch);
  const std::string verdict = attempt->get_to_str("all");
  if (!verdict.empty()) fail_to_meet(verdict, launch);
  return name;
}

}  // namespace

Meeting meet(const Launch& launch,
             const fs::path& address_file,
             seconds patience,
             const std::function<void()>& answered,
             seconds silence) {
  const auto end = Clock::now() + patience;
  const bool keeps = launch.rank == 0 && !launch.hosted;
  const Place place = keeps ? keep_store(launch, address_file, patience)
                            : find_store(launch, address_file, patience, answered);
  try {
    const std::string job = "flux-stages/" + launch.job;
    const auto store = keys_of(place.store, job);
    const Patience limits{end, patience, silence, answered};
    const std::string address = address_towards(place.host, place.port);
    const std::string attempt = launch.rank == 0
                                    ? lead(store, launch, address, address_file, limits)
                                    : follow(store, launch, address, limits);
    Meeting meeting{
        keys_of(store, attempt), keys_of(place.store->clone(), job + "/" + attempt), {}};
    meeting.address = seen_by_others(*meeting.store, launch, place);
    return meeting;
  } catch (const c10::Error& error) {
    const std::string keeper =
        launch.hosted ? fmt::format("torchrun's agent at {}:{}", printable(place.host), place.port)
                      : "rank 0";
    fail_to_meet(fmt::format("{} was killed, ended or cannot be reached while ranks came: {}",
                             keeper,
                             printable(split(error.what(), '\n')[0])),
                 launch);
  }
}

void break_silent_connections(seconds limit) {
  const auto milliseconds_limit = static_cast<unsigned>(milliseconds(limit).count());
  const int on = 1, quiet = std::max(1, static_cast<int>(limit.count() / 3)), probes = 3;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator("/proc/self/fd", ignored)) {
    const auto fd = static_cast<int>(std::strtol(entry.path().filename().c_str(), nullptr, 10));
    sockaddr_storage peer{};
    socklen_t length = sizeof peer;
    // of what is no TCP connection either call fails
    if (getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) != 0 ||
        setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &milliseconds_limit, sizeof(unsigned)) != 0)
      continue;
    // where nothing is sent the kernel asks whether the other side is there
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &quiet, sizeof quiet);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &quiet, sizeof quiet);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
  }
}

}  // namespace flux::dist

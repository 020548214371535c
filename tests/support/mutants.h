// tests/support/mutants.h - damaged copies of a file, judged in processes that may crash or hang.
#pragma once
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include "common/core/file.h"
#include "common/core/rng.h"
#include "common/core/sanitizer.h"

namespace flux::test {

/// How many random mutants: 1000, or what the environment says in FLUX_MUTANTS (scripts/torture).
/// Then every byte position is cut off at once, else a position in 61.
inline int64_t num_mutants() {
  const char* text = std::getenv("FLUX_MUTANTS");
  return text ? std::max<int64_t>(1, std::atoll(text)) : 1000;
}
inline uint64_t mutant_seed() {
  const char* text = std::getenv("FLUX_MUTANT_SEED");
  return text ? static_cast<uint64_t>(std::atoll(text)) : 11;
}

/// Mutant number `i`: a bit flipped, bytes overwritten, zeroed or cut off, a number changed by one.
inline std::string mutant(std::string bytes, uint64_t i) {
  const RandomStream random(mutant_seed(), Purpose::kShuffle, i);
  const auto place = static_cast<size_t>(random.below(0, bytes.size()));
  const auto length = std::min<size_t>(bytes.size() - place, 1 + random.below(1, 64));
  switch (i % 8) {
    default:
      bytes[place] = static_cast<char>(bytes[place] ^ (1 << random.below(2, 8)));
      break;
    case 4:
      bytes[place] = static_cast<char>(bytes[place] + (random.below(2, 2) ? 1 : -1));
      break;
    case 5:
      for (size_t k = 0; k < length; ++k) bytes[place + k] = static_cast<char>(random.bits(3 + k));
      break;
    case 6:
      for (size_t k = 0; k < length; ++k) bytes[place + k] = 0;
      break;
    case 7:
      bytes.resize(place);
      break;
  }
  return bytes;
}

enum class Verdict : char { kRefused = 'r', kIdentical = 'i', kOther = 'o', kWrong = 'w' };

struct Verdicts {
  int64_t refused = 0, identical = 0, other = 0;
  int64_t all() const { return refused + identical + other; }
};

/// Calls judge(i) for i = 0 to count - 1 in a child process with limits on memory and a minute of
/// time each. kWrong, an exception, a crash and a hang are test failures that name `i`.
inline Verdicts judge_each(int64_t count, const std::function<Verdict(int64_t)>& judge) {
  Verdicts out;
  int failures = 0;
  for (int64_t next = 0; next < count && failures < 10;) {
    int ends[2];
    if (pipe(ends) != 0) throw std::runtime_error("no pipe");
    const pid_t child = fork();
    if (child == 0) {
      close(ends[0]);
      const rlimit no_core{0, 0};
      setrlimit(RLIMIT_CORE, &no_core);
#if !FLUX_ADDRESS_SANITIZER  // its shadow is terabytes
      const rlimit memory{rlim_t{4} << 30, rlim_t{4} << 30};
      setrlimit(RLIMIT_AS, &memory);
#endif
      for (int64_t i = next; i < count; ++i) {
        alarm(60);  // slow machines are no hang
        char verdict = static_cast<char>(Verdict::kWrong);
        try {
          verdict = static_cast<char>(judge(i));
        } catch (const std::exception& error) {
          std::fprintf(stderr, "mutant %lld: %s\n", static_cast<long long>(i), error.what());
        }
        if (write(ends[1], &verdict, 1) != 1) _exit(2);
      }
      _exit(0);
    }
    close(ends[1]);
    char verdict;
    while (read(ends[0], &verdict, 1) == 1) {
      switch (Verdict{verdict}) {
        case Verdict::kRefused:
          ++out.refused;
          break;
        case Verdict::kIdentical:
          ++out.identical;
          break;
        case Verdict::kOther:
          ++out.other;
          break;
        case Verdict::kWrong:
          ADD_FAILURE() << "mutant " << next << " of seed " << mutant_seed()
                        << " is neither refused nor right";
          ++failures;
      }
      ++next;
    }
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) break;
    ADD_FAILURE() << "mutant " << next << " of seed " << mutant_seed()
                  << (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM ? " hangs"
                                                                         : " ends the process: ")
                  << status;
    ++failures;
    ++next;
  }
  return out;
}

/// Writing over a file would flush it to the disk on some file systems, a thousand times.
inline void write_anew(const std::filesystem::path& file, const std::string& bytes) {
  std::filesystem::remove(file);
  std::ofstream(file, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

/// Judges random mutants of `file`, and the file cut off at many positions. `judge` reads the file
/// under its name, whose content is the original's again at the end.
inline Verdicts judge_mutants(
    const std::filesystem::path& file,
    const std::function<Verdict()>& judge,
    const std::function<std::string(std::string, uint64_t)>& mutate = mutant) {
  const std::string good = read_file(file);
  const auto count = num_mutants();
  const Verdicts random = judge_each(count, [&](int64_t i) {
    write_anew(file, mutate(good, static_cast<uint64_t>(i)));
    return judge();
  });
  const int64_t step = std::getenv("FLUX_MUTANTS") ? 1 : 61;
  const auto size = static_cast<int64_t>(good.size());
  SCOPED_TRACE(testing::Message() << "cut off at mutant x " << step << " bytes");
  const Verdicts cut = judge_each((size + step - 1) / step, [&](int64_t i) {
    write_anew(file, good.substr(0, static_cast<size_t>(i * step)));
    return judge();
  });
  write_anew(file, good);
  EXPECT_EQ(judge(), Verdict::kIdentical);
  std::printf(
      "%lld mutants: %lld refused, %lld identical, %lld other; %lld cut off: %lld refused\n",
      static_cast<long long>(random.all()),
      static_cast<long long>(random.refused),
      static_cast<long long>(random.identical),
      static_cast<long long>(random.other),
      static_cast<long long>(cut.all()),
      static_cast<long long>(cut.refused));
  return random;
}

}  // namespace flux::test

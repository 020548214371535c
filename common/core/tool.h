// common/core/tool.h - what every program shares: flags, --config, --help, --version, the summary
// line, exit codes.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/core/error.h"

namespace flux {

/// Named values of an enum, first the default: {{"auto", Device::kAuto}, ...}.
template <class E>
using Choices = std::vector<std::pair<std::string, E>>;

/// The command line of one program. Values come from the variable's initialiser, then --config
/// FILE.toml (keys are the flags' names; '_' and '-' are the same there; "arguments" is what are no flags), then the
/// command line. Unknown keys are errors in both.
class Tool {
 public:
  Tool(std::string name, std::vector<std::string> arguments);
  ~Tool();
  Tool(const Tool&) = delete;
  Tool& operator=(const Tool&) = delete;

  const std::string& name() const;
  /// The arguments as given, quoted for a shell: for provenance.
  std::string command_line() const;

  /// For --help: one sentence, and one command to copy.
  void about(std::string_view sentence, std::string_view example);
  /// Flags registered after this are listed under `title` in --help.
  void group(std::string_view title);

  // A flag writes into `value` when it is given. `metavar` stands for its value in --help ("FILE");
  // `help` says unit or range. The default shown is what `value` holds now.
  void flag(std::string_view name, bool& value, std::string_view help);
  void flag(std::string_view name,
            std::string& value,
            std::string_view metavar,
            std::string_view help);
  void flag(std::string_view name,
            std::filesystem::path& value,
            std::string_view metavar,
            std::string_view help);
  void flag(std::string_view name,
            std::vector<std::string>& values,
            std::string_view metavar,
            std::string_view help);
  /// Whole numbers in [low, high]; a value outside is a UsageError that names the range.
  void flag(std::string_view name,
            int64_t& value,
            std::string_view metavar,
            std::string_view help,
            int64_t low = 0,
            int64_t high = INT64_MAX);
  void flag(std::string_view name,
            std::optional<int64_t>& value,
            std::string_view metavar,
            std::string_view help,
            int64_t low = 0,
            int64_t high = INT64_MAX);
  /// Numbers in [low, high], never NaN or infinite.
  void flag(std::string_view name,
            double& value,
            std::string_view metavar,
            std::string_view help,
            double low,
            double high);
  void flag(std::string_view name,
            std::optional<double>& value,
            std::string_view metavar,
            std::string_view help,
            double low,
            double high);
  /// One of the named values; the list is shown as a|b|c.
  template <class E>
  void flag(std::string_view name, E& value, const Choices<E>& choices, std::string_view help);
  /// The same of a value that may be left out: help shows `otherwise`, what happens then.
  template <class E>
  void flag(std::string_view name,
            std::optional<E>& value,
            const Choices<E>& choices,
            std::string_view help,
            std::string_view otherwise);
  /// A size of memory or disk such as 800MB or 8GiB; `otherwise`: what happens if it is not given, and `value` stays.
  void bytes_flag(std::string_view name,
                  int64_t& value,
                  std::string_view help,
                  std::string_view otherwise = "");
  /// Anything else: `set` parses and throws UsageError (its message is shown after the flag's
  /// name).
  void flag(std::string_view name,
            std::string_view metavar,
            std::string_view help,
            std::string_view default_text,
            std::function<void(const std::string&)> set);
  /// The same with a value that may be left out: "--plan" is "--plan=IMPLICIT".
  void flag_or(std::string_view name,
               std::string_view metavar,
               std::string_view implicit,
               std::string_view help,
               std::function<void(const std::string&)> set);
  /// Everything after it belongs to it, also what looks like a flag: "--import-sd-scripts ARGS...".
  void rest_flag(std::string_view name,
                 std::vector<std::string>& values,
                 std::string_view metavar,
                 std::string_view help);
  /// Arguments that are not flags. Without this call, one is a UsageError.
  void arguments(std::vector<std::string>& values, std::string_view metavar, std::string_view help);
  /// For --print-config: checks the options (UsageError) and returns, by flag name, the value of each that takes
  /// effect. Without it --print-config shows defaults as comments.
  void resolved(std::function<nlohmann::json()> values);

  /// Reads --config and the command line. False: --help, --version or --print-config was answered, and there is
  /// nothing to do.
  bool parse();
  /// Whether the user gave the flag, in the file or on the command line. After parse().
  bool given(std::string_view name) const;

  /// The result: `line` on stdout, or with --json the object, on one line. After a signal (`code`)
  /// the work is not done: then the line goes to the log, and no object is printed.
  void summary(std::string_view line,
               const nlohmann::json& object,
               ExitCode code = ExitCode::kOk) const;
  /// With --json given; for tools whose output is a report.
  bool json() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Runs `body` with signals handled and exceptions turned into one message and an exit code.
int run_tool(const char* name, int argc, char** argv, const std::function<ExitCode(Tool&)>& body);

/// One verb of a program that has several: "flux-model info FILE".
struct Verb {
  std::string name, sentence;
  std::function<ExitCode(Tool&)> body;
};
int run_tool(const char* name,
             int argc,
             char** argv,
             std::string_view about,
             const std::vector<Verb>& verbs);

/// Text as a TOML string. Nothing if it is not UTF-8, which cannot stand in TOML.
std::optional<std::string> toml_string(const std::string& text);

/// "flux-stages 0.1.0 (commit ...)" and the versions of the libraries linked in. Parts that use
/// LibTorch or HDF5 add theirs through add_version_line at static initialisation.
std::string version_text(std::string_view program);
std::string_view tool_version();
bool add_version_line(std::string line);

/// "a|b|c".
template <class E>
std::string choice_names(const Choices<E>& choices) {
  std::string names;
  for (const auto& choice : choices) names += (names.empty() ? "" : "|") + choice.first;
  return names;
}

[[noreturn]] void refuse_choice(const std::string& text, const std::string& names);

/// The value of a word. Throws UsageError that names all words.
template <class E>
E choice_of(const Choices<E>& choices, const std::string& text) {
  for (const auto& [known, choice] : choices)
    if (known == text) return choice;
  refuse_choice(text, choice_names(choices));
}

template <class E>
void Tool::flag(std::string_view name, E& value, const Choices<E>& choices, std::string_view help) {
  std::string current;
  for (const auto& [text, choice] : choices)
    if (choice == value) current = text;
  flag(name, choice_names(choices), help, current, [&value, choices](const std::string& text) {
    value = choice_of(choices, text);
  });
}

template <class E>
void Tool::flag(std::string_view name,
                std::optional<E>& value,
                const Choices<E>& choices,
                std::string_view help,
                std::string_view otherwise) {
  flag(name, choice_names(choices), help, otherwise, [&value, choices](const std::string& text) {
    value = choice_of(choices, text);
  });
}

}  // namespace flux

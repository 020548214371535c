#include "common/core/tool.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/program_options.hpp>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>
#include <nlohmann/json.hpp>
#include <set>
#include <toml.hpp>

#include "common/core/cancel.h"
#include "common/core/file.h"
#include "common/core/log.h"
#include "common/core/lost_file.h"
#include "common/core/reason.h"
#include "common/core/text.h"
#include "common/core/tool_pages.h"
#include "common/core/version.h"

namespace flux {
namespace po = boost::program_options;
namespace {

/// What was given of a flag, as on a command line, and where.
struct Given {
  std::vector<std::string> texts;
  std::string from;
};

/// What a file may not hold: it speaks of the command line itself.
bool only_typed(const Flag& flag) {
  return flag.name == "config" || flag.name == "help" || flag.name == "version" ||
         flag.name == "print-config";
}

std::string normal_key(std::string key) {
  std::replace(key.begin(), key.end(), '_', '-');
  return key;
}

template <class T>
T parse_number(const std::string& text, T low, T high, const char* kind) {
  T value{};
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error == std::errc::result_out_of_range ||
      (error == std::errc{} && stop == end && (value < low || value > high))) {
    throw UsageError(
        fmt::format("{} is out of range, {} to {} is allowed", printable(text), low, high));
  }
  if (error != std::errc{} || stop != end)
    throw UsageError(fmt::format("'{}' is not {}", printable(text), kind));
  if constexpr (std::is_floating_point_v<T>) {
    if (!std::isfinite(value))
      throw UsageError(fmt::format("'{}' is not {}", printable(text), kind));
  }
  return value;
}

std::string shell_quoted(const std::string& text) {
  constexpr std::string_view kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./=:,+@%";
  if (!text.empty() && text.find_first_not_of(kPlain) == std::string::npos) return text;
  std::string out = "'";
  for (const char c : text) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

std::vector<std::string>& version_lines() {
  static std::vector<std::string> lines;
  return lines;
}

}  // namespace

struct Tool::State : ToolTable {
  std::string current_group;
  std::vector<std::string> arguments;
  std::vector<std::string>* positional = nullptr;
  std::map<std::string, Given> given;
  std::vector<std::string>* rest = nullptr;
  std::function<nlohmann::json()> resolved;
  bool json = false, help = false, version = false, print = false;
  std::filesystem::path config;
  std::string log_level = "info";

  std::vector<std::string> names() const {
    std::vector<std::string> out;
    for (const Flag& flag : flags) out.push_back(flag.name);
    return out;
  }
  const Flag* find(std::string_view wanted) const {
    for (const Flag& flag : flags) {
      if (flag.name == wanted) return &flag;
    }
    return nullptr;
  }
  UsageError unknown(const std::string& what, const std::string& key) const {
    const auto near = nearest_name(key, names());
    return UsageError(fmt::format("unknown {} '{}'", what, printable(key)),
                      near ? fmt::format("did you mean --{}? --help lists all flags", *near)
                           : "--help lists all flags");
  }
  void apply(const Flag& flag, const std::string& text, const std::string& from) {
    try {
      flag.set(text);
    } catch (const UsageError& error) {
      throw UsageError(fmt::format("--{}: {}", flag.name, error.what()));
    }
    Given& known = given[flag.name];
    known.texts.push_back(text);
    known.from = from;
  }
  void read_config();
  void print_config() const;
};

// One value of a TOML file as it would stand on a command line.
static std::string toml_text(const toml::value& value,
                             const std::string& key,
                             const std::filesystem::path& file) {
  if (value.is_boolean()) return value.as_boolean() ? "true" : "false";
  if (value.is_integer()) return std::to_string(value.as_integer());
  if (value.is_floating()) return fmt::format("{}", value.as_floating());
  if (value.is_string()) return value.as_string().str;
  throw UsageError(
      fmt::format("{}: {} must be a string, a number or true/false", show(file), printable(key)));
}

void Tool::State::read_config() {
  toml::value document;
  const std::string text = read_file(config, 16 << 20);
  try {
    std::istringstream stream(text);
    document = toml::parse(stream, config.filename().native());
  } catch (const toml::exception& error) {
    throw UsageError(fmt::format("{}: line {}: not TOML: {}",
                                 show(config),
                                 error.location().line(),
                                 toml_reason(error.what())));
  } catch (const std::exception& error) {
    throw UsageError(fmt::format("{}: not TOML: {}", show(config), toml_reason(error.what())));
  }
  const std::string from = show(config);
  std::set<std::string> seen;
  for (const auto& [key, value] : document.as_table()) {
    const std::string wanted = normal_key(key);
    if (!seen.insert(wanted).second)
      throw UsageError(
          fmt::format("{}: {} is given twice, with '-' and with '_'", from, printable(key)),
          "give it once");
    if (wanted == "arguments" && positional && value.is_array()) {
      if (!positional->empty()) continue;  // the command line wins
      for (const auto& element : value.as_array())
        positional->push_back(toml_text(element, key, config));
      continue;
    }
    const Flag* flag = find(wanted);
    if (!flag && value.is_table())
      throw UsageError(
          fmt::format(
              "{}: the section [{}]: options stand in no section here", from, printable(key)),
          "write them at the top of the file: learning-rate = 0.0001");
    if (!flag) throw unknown("key in " + from, key);
    if (only_typed(*flag) || wanted == rest_name)
      throw UsageError(
          fmt::format("{}: {} belongs on the command line, not in this file", from, printable(key)),
          "remove it from the file");
    if (given.contains(wanted)) continue;  // the command line wins
    if (value.is_array() && flag->is_list) {
      for (const auto& element : value.as_array())
        apply(*flag, toml_text(element, key, config), from);
    } else {
      apply(*flag, toml_text(value, key, config), from);
    }
  }
}

// One value as it stands in TOML; nothing if it cannot.
static std::optional<std::string> toml_value(const Flag& flag, const std::string& text) {
  if (flag.is_switch) return text;
  if (flag.is_number && nlohmann::json::accept(text))
    return text;  // 007 is a number on a command line only
  return toml_string(text);
}

void Tool::State::print_config() const {
  const nlohmann::json values = resolved ? resolved() : nlohmann::json::object();
  std::string out = fmt::format("# {} --config FILE.toml\n", name);
  std::string shown_group = "-";
  const auto line =
      [&](const std::string& key, const std::vector<std::optional<std::string>>& texts, bool list) {
        std::string joined;
        for (const auto& text : texts) {
          if (!text) return fmt::format("# {}: given, but not UTF-8, which TOML needs", key);
          joined += (joined.empty() ? "" : ", ") + *text;
        }
        return fmt::format("{} = {}", key, list ? "[" + joined + "]" : joined);
      };
  if (positional && !positional->empty()) {
    std::vector<std::optional<std::string>> texts;
    for (const std::string& text : *positional) texts.push_back(toml_string(text));
    out += line("arguments", texts, true) + "\n";
  }
  for (const Flag& flag : flags) {
    if (only_typed(flag) || flag.name == rest_name) continue;
    if (flag.group != shown_group)
      out += fmt::format("\n# {}\n", flag.group.empty() ? "flags" : flag.group);
    shown_group = flag.group;
    if (const auto known = given.find(flag.name); known != given.end()) {
      std::vector<std::optional<std::string>> texts;
      for (const std::string& text : known->second.texts) texts.push_back(toml_value(flag, text));
      out += fmt::format("{}  # {}\n", line(flag.name, texts, flag.is_list), known->second.from);
    } else if (values.contains(flag.name)) {
      const nlohmann::json& value = values[flag.name];
      const auto text = value.is_string() ? toml_string(value.get<std::string>()) : value.dump();
      out += fmt::format("{}  # default\n", line(flag.name, {text}, false));
    } else if (flag.is_switch) {
      out += fmt::format("# {} = false\n", flag.name);
    } else {
      out += fmt::format(
          "# {}: {}\n", flag.name, flag.default_text.empty() ? "not given" : flag.default_text);
    }
  }
  std::fputs(out.c_str(), stdout);
}

std::optional<std::string> toml_string(const std::string& text) {
  if (first_invalid_utf8(text)) return std::nullopt;
  std::string out;
  for (const char c : nlohmann::json(text).dump())
    out += c == '\x7f' ? std::string("\\u007F") : std::string(1, c);
  return out;
}

void refuse_choice(const std::string& text, const std::string& names) {
  throw UsageError("'" + printable(text) + "' is not one of " + names);
}

Tool::Tool(std::string name, std::vector<std::string> arguments)
    : state_(std::make_unique<State>()) {
  state_->name = std::move(name);
  state_->arguments = std::move(arguments);
}
Tool::~Tool() = default;

const std::string& Tool::name() const { return state_->name; }

std::string Tool::command_line() const {
  std::string out = state_->name;
  for (const std::string& argument : state_->arguments) out += " " + shell_quoted(argument);
  return out;
}

void Tool::about(std::string_view sentence, std::string_view example) {
  state_->sentence = sentence;
  state_->example = example;
}
void Tool::group(std::string_view title) { state_->current_group = title; }

void Tool::flag(std::string_view name,
                std::string_view metavar,
                std::string_view help,
                std::string_view default_text,
                std::function<void(const std::string&)> set) {
  if (state_->find(name))
    throw std::invalid_argument(fmt::format("flag --{} registered twice", name));
  state_->flags.push_back({std::string(name),
                           std::string(metavar),
                           std::string(help),
                           std::string(default_text),
                           state_->current_group,
                           false,
                           false,
                           std::move(set)});
}

void Tool::bytes_flag(std::string_view name,
                      int64_t& value,
                      std::string_view help,
                      std::string_view otherwise) {
  flag(name, "SIZE", help, otherwise, [&value](const std::string& text) {
    const auto bytes = parse_bytes(text);
    if (!bytes || *bytes <= 0)
      throw UsageError("'" + printable(text) + "' is not a size such as 500MB or 20GiB");
    value = *bytes;
  });
}

void Tool::flag_or(std::string_view name,
                   std::string_view metavar,
                   std::string_view implicit,
                   std::string_view help,
                   std::function<void(const std::string&)> set) {
  flag(name, metavar, help, "", std::move(set));
  state_->flags.back().implicit = implicit;
}

void Tool::flag(std::string_view name, bool& value, std::string_view help) {
  flag(name, "", help, "", [&value](const std::string& text) {
    if (text != "true" && text != "false")
      throw UsageError(fmt::format("'{}' is not true or false", printable(text)));
    value = text == "true";
  });
  state_->flags.back().is_switch = true;
}

void Tool::flag(std::string_view name,
                std::string& value,
                std::string_view metavar,
                std::string_view help) {
  flag(name, metavar, help, value, [&value](const std::string& text) { value = text; });
}

void Tool::flag(std::string_view name,
                std::filesystem::path& value,
                std::string_view metavar,
                std::string_view help) {
  flag(name, metavar, help, value.native(), [&value](const std::string& text) {
    if (text.empty()) throw UsageError("the path is empty");
    if (text.find('\0') != std::string::npos) throw UsageError("the path holds a zero byte");
    value = text;
  });
}

void Tool::flag(std::string_view name,
                std::vector<std::string>& values,
                std::string_view metavar,
                std::string_view help) {
  flag(name, metavar, help, "", [&values](const std::string& text) { values.push_back(text); });
  state_->flags.back().is_list = true;
}

void Tool::flag(std::string_view name,
                int64_t& value,
                std::string_view metavar,
                std::string_view help,
                int64_t low,
                int64_t high) {
  flag(name, metavar, help, std::to_string(value), [&value, low, high](const std::string& text) {
    value = parse_number<int64_t>(text, low, high, "a whole number");
  });
  state_->flags.back().is_number = true;
}

void Tool::flag(std::string_view name,
                std::optional<int64_t>& value,
                std::string_view metavar,
                std::string_view help,
                int64_t low,
                int64_t high) {
  flag(name,
       metavar,
       help,
       value ? std::to_string(*value) : "",
       [&value, low, high](const std::string& text) {
         value = parse_number<int64_t>(text, low, high, "a whole number");
       });
  state_->flags.back().is_number = true;
}

void Tool::flag(std::string_view name,
                double& value,
                std::string_view metavar,
                std::string_view help,
                double low,
                double high) {
  flag(name, metavar, help, fmt::format("{}", value), [&value, low, high](const std::string& text) {
    value = parse_number<double>(text, low, high, "a number");
  });
  state_->flags.back().is_number = true;
}

void Tool::flag(std::string_view name,
                std::optional<double>& value,
                std::string_view metavar,
                std::string_view help,
                double low,
                double high) {
  flag(name,
       metavar,
       help,
       value ? fmt::format("{}", *value) : "",
       [&value, low, high](const std::string& text) {
         value = parse_number<double>(text, low, high, "a number");
       });
  state_->flags.back().is_number = true;
}

void Tool::rest_flag(std::string_view name,
                     std::vector<std::string>& values,
                     std::string_view metavar,
                     std::string_view help) {
  flag(name, values, metavar, help);
  state_->rest_name = name;
  state_->rest = &values;
}

void Tool::resolved(std::function<nlohmann::json()> values) {
  state_->resolved = std::move(values);
}

void Tool::arguments(std::vector<std::string>& values,
                     std::string_view metavar,
                     std::string_view help) {
  state_->positional = &values;
  state_->positional_metavar = metavar;
  state_->positional_help = help;
}

bool Tool::parse() {
  group("common");
  flag("config", state_->config, "FILE.toml", "read flags from this file; the command line wins");
  flag("print-config", state_->print, "print all options as a file for --config, and exit");
  flag("json", state_->json, "print the summary as one JSON object");
  flag("log-level",
       state_->log_level,
       Choices<std::string>{
           {"info", "info"}, {"debug", "debug"}, {"warn", "warn"}, {"error", "error"}},
       "least important messages to show on stderr");
  flag("version", state_->version, "print versions and exit");
  flag("help",
       state_->help,
       fmt::format("print this and exit; --help={}: in another form", tool_page_forms()));

  if (state_->rest) {
    auto& arguments = state_->arguments;
    const auto at = std::ranges::find(arguments, "--" + state_->rest_name);
    if (at != arguments.end()) {
      state_->rest->assign(at + 1, arguments.end());
      state_->given[state_->rest_name] = {*state_->rest, "command line"};
      arguments.erase(at, arguments.end());
    }
  }
  // whatever else is on the line, even if it is wrong: help is what its writer needs
  const auto asks_for = [&](std::string_view word) {
    return std::ranges::find(state_->arguments, word) != state_->arguments.end();
  };
  for (const std::string& argument : state_->arguments) {
    if (const auto form = asked_form(argument)) {
      std::fputs(tool_page(*state_, *form).c_str(), stdout);
      return false;
    }
  }
  if (asks_for("--version")) {
    std::fputs(version_text(state_->name).c_str(), stdout);
    return false;
  }

  po::options_description described;
  for (const Flag& flag : state_->flags) {
    if (flag.is_switch) {
      described.add_options()(flag.name.c_str(),
                              po::value<std::string>()->zero_tokens()->implicit_value("true"));
    } else if (!flag.implicit.empty()) {
      described.add_options()(
          flag.name.c_str(),
          po::value<std::vector<std::string>>()->implicit_value({flag.implicit}, flag.implicit));
    } else {
      described.add_options()(flag.name.c_str(),
                              po::value<std::vector<std::string>>()->composing());
    }
  }
  using Style = po::command_line_style::style_t;
  const std::string kTyped = "command line";
  constexpr int kStyle = Style::allow_long | Style::long_allow_adjacent | Style::long_allow_next;
  std::vector<po::option> options;
  try {
    options = po::command_line_parser(state_->arguments)
                  .options(described)
                  .style(kStyle)
                  .allow_unregistered()
                  .run()
                  .options;
  } catch (const po::error& error) {
    throw UsageError(printable(error.what()), "--help lists all flags");
  }
  for (const po::option& option : options) {
    if (option.unregistered) {
      const std::string& token = option.original_tokens.at(0);
      throw state_->unknown("flag",
                            token.substr(std::min(token.find_first_not_of('-'), token.size())));
    }
    if (option.string_key.empty()) {
      const std::string& text = option.value.at(0);
      if (!state_->positional || (text.size() > 1 && text[0] == '-')) {
        if (text.starts_with("-")) throw state_->unknown("flag", text.substr(1));
        throw UsageError(fmt::format("unexpected argument '{}'", printable(text)),
                         "--help lists all flags");
      }
      state_->positional->push_back(text);
      continue;
    }
    const Flag& flag = *state_->find(option.string_key);
    if (state_->given.contains(flag.name) && !flag.is_list) {
      throw UsageError(fmt::format("--{} is given twice", flag.name), "give it once");
    }
    if (flag.is_switch) {
      state_->apply(flag, "true", kTyped);
    } else {
      if (option.value.empty() && !flag.implicit.empty())
        state_->apply(flag, flag.implicit, kTyped);
      for (const std::string& text : option.value) state_->apply(flag, text, kTyped);
    }
  }
  if (!state_->config.empty()) state_->read_config();
  const std::map<std::string, log::Level> levels{{"debug", log::Level::kDebug},
                                                 {"info", log::Level::kInfo},
                                                 {"warn", log::Level::kWarn},
                                                 {"error", log::Level::kError}};
  log::start(state_->name, levels.at(state_->log_level));
  if (!state_->print) return true;
  state_->print_config();
  return false;
}

bool Tool::given(std::string_view name) const { return state_->given.contains(std::string(name)); }

bool Tool::json() const { return state_->json; }

void Tool::summary(std::string_view line, const nlohmann::json& object, ExitCode code) const {
  if (static_cast<int>(code) > 128) return log::info("{}", line);
  const std::string text =
      state_->json ? object.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)
                   : printable(line);
  std::puts(text.c_str());
}

std::string_view tool_version() { return kVersion; }

bool add_version_line(std::string line) {
  version_lines().push_back(std::move(line));
  return true;
}

std::string version_text(std::string_view program) {
  std::string out = fmt::format("{} {} (flux-stages, commit {})\n", program, kVersion, commit());
  std::vector<std::string> lines = version_lines();
  std::sort(lines.begin(), lines.end());
  for (const std::string& line : lines) out += line + "\n";
  return out;
}

namespace {

int guarded(Tool& tool, const std::function<ExitCode(Tool&)>& body) {
  const auto report = [&](const char* what) { log::error("{}", what); };
  try {
    const ExitCode code = body(tool);
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
      throw ResourceError("stdout cannot be written",
                          "give it a file or program that takes what is written");
    return static_cast<int>(code);
  } catch (const UsageError& error) {
    const std::string what = error.what();
    const bool advises = what.find("\n  hint: ") != std::string::npos;
    report((what + (advises ? "" : "\n  hint: --help lists all flags and their values")).c_str());
    return static_cast<int>(error.exit_code());
  } catch (const Error& error) {
    report(error.what());
    return static_cast<int>(error.exit_code());
  } catch (const std::bad_alloc&) {
    report(
        "out of memory\n  hint: use a smaller batch or resolution, or a machine with more memory");
    return static_cast<int>(ExitCode::kResource);
  } catch (const std::exception& error) {
    report(fmt::format("internal error: {}\n  hint: this is a bug in {}; please report it with the "
                       "command line",
                       error.what(),
                       tool.name())
               .c_str());
    return static_cast<int>(ExitCode::kBug);
  }
}

}  // namespace

int run_tool(const char* name, int argc, char** argv, const std::function<ExitCode(Tool&)>& body) {
  cancel::install();
  log::start(name, log::Level::kInfo);
  report_lost_mappings(name);
  Tool tool(name, std::vector<std::string>(argv + std::min(argc, 1), argv + argc));
  return guarded(tool, body);
}

int run_tool(const char* name,
             int argc,
             char** argv,
             std::string_view about,
             const std::vector<Verb>& verbs) {
  cancel::install();
  log::start(name, log::Level::kInfo);
  report_lost_mappings(name);
  const std::string word = argc > 1 ? argv[1] : "";
  if (word == "--version") {
    std::fputs(version_text(name).c_str(), stdout);
    return 0;
  }
  if (const auto form = asked_form(word)) {
    std::vector<VerbNames> known;
    for (const Verb& verb : verbs) known.push_back({verb.name, verb.sentence});
    std::fputs(verbs_page_head(name, about, known, *form).c_str(), stdout);
    int code = 0;
    if (!form->empty()) {
      for (const Verb& verb : verbs) {
        Tool tool(fmt::format("{} {}", name, verb.name), {word});
        code = std::max(code, guarded(tool, verb.body));
      }
    }
    if (*form == "man") Tool("", {word}).parse();
    std::fputs(verbs_page_tail(name, known, *form).c_str(), stdout);
    return code;
  }
  for (const Verb& verb : verbs) {
    if (verb.name == word) {
      Tool tool(std::string(name) + " " + word, std::vector<std::string>(argv + 2, argv + argc));
      return guarded(tool, verb.body);
    }
  }
  std::vector<std::string> names;
  for (const Verb& verb : verbs) names.push_back(verb.name);
  const auto near = word.empty() ? std::nullopt : nearest_name(word, names);
  log::error("{}\n  hint: {}the verbs are {}",
             word.empty() ? std::string("no verb given")
                          : fmt::format("unknown verb '{}'", printable(word)),
             near ? fmt::format("did you mean {}? ", *near) : std::string(),
             join_some(names, names.size()));
  return static_cast<int>(ExitCode::kUsage);
}

}  // namespace flux

#include "common/core/tool_pages.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>

#include "common/core/tool.h"

namespace flux {
namespace {

// ---- --help

std::string help_text(const ToolTable& t) {
  const bool has_arguments = !t.positional_metavar.empty();
  std::string out = fmt::format("{} - {}\n\nusage: {} [flags]{}\n",
                                t.name,
                                t.sentence,
                                t.name,
                                has_arguments ? " " + t.positional_metavar : "");
  if (has_arguments) out += fmt::format("  {}  {}\n", t.positional_metavar, t.positional_help);
  std::string shown_group = "-";
  for (const Flag& flag : t.flags) {
    if (flag.group != shown_group)
      out += fmt::format("\n{}:\n", flag.group.empty() ? "flags" : flag.group);
    shown_group = flag.group;
    std::string head = "  " + flag.head();
    if (head.size() < 30) {
      head.resize(32, ' ');
    } else {
      head += "\n" + std::string(32, ' ');
    }
    out += head + flag.help;
    if (!flag.is_switch && !flag.default_text.empty())
      out += fmt::format(" (default: {})", flag.default_text);
    out += '\n';
  }
  if (!t.example.empty()) out += fmt::format("\nexample:\n  {}\n", t.example);
  return out;
}

// ---- --help=markdown

// What a table of Markdown would take for its own.
std::string cell(const std::string& text) {
  std::string out;
  for (const char c : text) out += c == '|' ? std::string("\\|") : std::string(1, c);
  return out;
}

std::string markdown_text(const ToolTable& t) {
  std::string out = fmt::format("## {}\n\n{}\n\n", t.name, t.sentence);
  if (!t.positional_metavar.empty())
    out += fmt::format("`{} [flags] {}`: {}\n\n", t.name, t.positional_metavar, t.positional_help);
  std::string shown_group = "-";
  for (const Flag& flag : t.flags) {
    if (flag.group != shown_group)
      out += fmt::format("{}**{}**\n\n| option | default | |\n|---|---|---|\n",
                         shown_group == "-" ? "" : "\n",
                         flag.group.empty() ? "flags" : flag.group);
    shown_group = flag.group;
    out += fmt::format("| `{}` | {} | {} |\n",
                       cell(flag.head()),
                       flag.is_switch ? "off" : cell(flag.default_text),
                       cell(flag.help));
  }
  if (!t.example.empty()) out += fmt::format("\n    {}\n", t.example);
  return out + "\n";
}

// ---- --help=man: roff, with the macros of man(7)

std::string roff(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '\\') {
      out += "\\e";
    } else if (c == '-') {
      out += "\\-";
    } else {
      out += c;
    }
  }
  // a line that starts with a dot or an apostrophe would be a macro
  return out.starts_with('.') || out.starts_with('\'') ? "\\&" + out : out;
}

bool is_verb(const ToolTable& t) { return t.name.find(' ') != std::string::npos; }

std::string upper(std::string text) {
  for (char& c : text) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return text;
}

// man-pages(7) wants a date; this one is of the page's form and not of the day it was made, so that builds are equal
std::string man_head(const std::string& name, std::string_view sentence) {
  std::string text(sentence);
  while (text.ends_with('.')) text.pop_back();
  if (!text.empty() && text.size() > 1 && !std::isupper(static_cast<unsigned char>(text[1])))
    text[0] = static_cast<char>(std::tolower(static_cast<unsigned char>(text[0])));
  return fmt::format(
      ".TH {} 1 2026-11-26 \"flux-stages {}\" \"User Commands\"\n.SH NAME\n{} \\- {}\n",
      roff(upper(name)),
      roff(tool_version()),
      roff(name),
      roff(text));
}

constexpr std::string_view kManExit =
    ".SH EXIT STATUS\n"
    ".TP\n0\ndone\n"
    ".TP\n1\na bug in the program; of programs that compare: compared, and it differs\n"
    ".TP\n2\nunknown, missing, malformed or contradictory flags\n"
    ".TP\n3\na file of yours is absent, unreadable, or of the wrong kind or shape\n"
    ".TP\n4\na cache or checkpoint is absent, damaged, newer, incomplete, or made with other "
    "weights\n"
    ".TP\n5\nmemory, disk or GPU ran out or is not there\n"
    ".TP\n6\nfinished, but more items failed than was allowed\n"
    ".TP\n129, 130, 143\nstopped by SIGHUP, SIGINT or SIGTERM after a clean save\n";

std::string man_flags(const ToolTable& t, bool of_common_group) {
  std::string out, shown_group = "-";
  for (const Flag& flag : t.flags) {
    if ((flag.group == "common") != of_common_group) continue;
    if (flag.group != shown_group && !flag.group.empty() && !of_common_group)
      out += fmt::format(".SS {}\n", roff(flag.group));
    shown_group = flag.group;
    out += fmt::format(".TP\n.B {}\n", roff(flag.head()));
    out += roff(flag.help);
    if (!flag.is_switch && !flag.default_text.empty())
      out += fmt::format(" (default: {})", roff(flag.default_text));
    out += '\n';
  }
  return out;
}

std::string man_synopsis(const ToolTable& t) {
  std::string out = fmt::format(".B {}\n[\\fIflags\\fR]", roff(t.name));
  if (!t.positional_metavar.empty()) out += fmt::format(" \\fI{}\\fR", roff(t.positional_metavar));
  return out + "\n";
}

std::string man_text(const ToolTable& t) {
  // the options that all programs share, at the end of a program with verbs
  if (t.name.empty()) return ".SH COMMON OPTIONS\n" + man_flags(t, true);
  std::string out;
  if (is_verb(t)) {
    out =
        fmt::format(".SH {}\n", roff(upper(t.name.substr(t.name.find(' ') + 1)))) + man_synopsis(t);
    out += fmt::format(".PP\n{}\n", roff(t.sentence));
  } else {
    out = man_head(t.name, t.sentence) + ".SH SYNOPSIS\n" + man_synopsis(t) + ".SH DESCRIPTION\n";
    out += fmt::format("{}\n", roff(t.sentence));
  }
  if (!t.positional_metavar.empty())
    out += fmt::format(".TP\n.I {}\n{}\n", roff(t.positional_metavar), roff(t.positional_help));
  if (!is_verb(t)) out += ".SH OPTIONS\n";
  out += man_flags(t, false);
  if (!is_verb(t)) out += ".SS common\n" + man_flags(t, true);
  if (!t.example.empty())
    out += fmt::format(
        "{}\n.EX\n{}\n.EE\n", is_verb(t) ? ".PP\nExample:\n.PP" : ".SH EXAMPLE", roff(t.example));
  if (!is_verb(t)) out += kManExit;
  return out;
}

// ---- --help=bash

std::string function_name(std::string name) {
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return "_" + name;
}

// The words of "lora|full", empty if the metavar is not such a list.
std::string words_of(const std::string& metavar) {
  if (metavar.find('|') == std::string::npos) return "";
  std::string out, word;
  for (const char c : metavar + "|") {
    if (c != '|') {
      if (std::isupper(static_cast<unsigned char>(c))) return "";  // "N|Nep" names kinds of values
      word += c;
      continue;
    }
    if (!word.starts_with('#')) out += (out.empty() ? "" : " ") + word;
    word.clear();
  }
  return out;
}

// of the words given, those that start as the one at the cursor
constexpr std::string_view kBashHead =
    "_flux_words() { COMPREPLY=($(compgen -W \"$1\" -- \"$cur\")); }\n";

bool is_path(const std::string& metavar) {
  return metavar.starts_with("DIR") || metavar.starts_with("FILE");
}

// A function that completes one word after the program's name, or after its verb's.
std::string bash_text(const ToolTable& t) {
  std::string flags, paths, free, cases;
  for (const Flag& flag : t.flags) {
    const std::string option = "--" + flag.name;
    flags += (flags.empty() ? "" : " ") + option;
    if (flag.is_switch || flag.name == t.rest_name) continue;
    const std::string words = words_of(flag.metavar);
    if (words.empty()) {
      std::string& list = is_path(flag.metavar) ? paths : free;
      list += (list.empty() ? "" : "|") + option;
    } else if (flag.implicit.empty()) {
      cases += fmt::format("    {}) _flux_words '{}'; return ;;\n", option, words);
    } else {  // a value that may be left out stands behind '=' only
      cases += fmt::format(
          "    {}) if [[ $joined ]]; then _flux_words '{}'; return; fi ;;\n", option, words);
    }
  }
  std::string out = is_verb(t) ? "" : std::string(kBashHead);
  out += fmt::format("{}() {{\n", function_name(t.name));
  out += "  local cur=${COMP_WORDS[COMP_CWORD]} flag=${COMP_WORDS[COMP_CWORD-1]} joined=\n";
  out += "  if [[ $cur == = ]]; then cur= joined=1; fi\n";
  out += "  if [[ $flag == = ]]; then flag=${COMP_WORDS[COMP_CWORD-2]} joined=1; fi\n";
  if (!t.rest_name.empty())
    out += fmt::format(
        "  if [[ \" ${{COMP_WORDS[*]:0:COMP_CWORD}} \" == *' --{} '* ]]; then compopt -o default; "
        "return; fi\n",
        t.rest_name);
  out += "  case $flag in\n" + cases;
  if (!paths.empty()) out += fmt::format("    {}) compopt -o default; return ;;\n", paths);
  if (!free.empty()) out += fmt::format("    {}) return ;;\n", free);
  out += "  esac\n";
  if (t.positional_metavar.empty()) {
    out += fmt::format("  _flux_words '{}'\n", flags);
  } else {
    out += fmt::format(
        "  if [[ $cur == -* ]]; then _flux_words '{}'; else compopt -o default; fi\n", flags);
  }
  out += "}\n";
  if (!is_verb(t)) out += fmt::format("complete -F {} {}\n", function_name(t.name), t.name);
  return out;
}

}  // namespace

std::string Flag::head() const {
  std::string out = "--" + name;
  if (!implicit.empty()) return out + "[=" + metavar + "]";
  return is_switch ? out : out + " " + metavar;
}

std::string_view tool_page_forms() { return "markdown|man|bash"; }

std::optional<std::string> asked_form(std::string_view argument) {
  if (argument == "--help") return "";
  for (const std::string_view form : {"markdown", "man", "bash"})
    if (argument.starts_with("--help=") && argument.substr(7) == form) return std::string(form);
  return std::nullopt;
}

std::string tool_page(const ToolTable& table, std::string_view form) {
  if (form == "markdown") return markdown_text(table);
  if (form == "man") return man_text(table);
  return form == "bash" ? bash_text(table) : help_text(table);
}

std::string verbs_page_head(const std::string& name,
                            std::string_view sentence,
                            const std::vector<VerbNames>& verbs,
                            std::string_view form) {
  if (form == "markdown") return fmt::format("# {}\n\n{}\n\n", name, sentence);
  if (form == "bash") return std::string(kBashHead);
  if (form == "man") {
    std::string out = man_head(name, sentence);
    out += fmt::format(
        ".SH SYNOPSIS\n.B {}\n\\fIVERB\\fR [\\fIflags\\fR]\n.SH DESCRIPTION\n"
        "Does one of these, each with options of its own:\n",
        roff(name));
    for (const VerbNames& verb : verbs)
      out += fmt::format(".TP\n.B {}\n{}\n", roff(verb.name), roff(verb.sentence));
    return out;
  }
  std::string out =
      fmt::format("{} - {}\n\nusage: {} VERB [flags]\n\nverbs:\n", name, sentence, name);
  for (const VerbNames& verb : verbs) out += fmt::format("  {:<12} {}\n", verb.name, verb.sentence);
  return out + fmt::format("\nexample:\n  {} {} --help\n", name, verbs.front().name);
}

std::string verbs_page_tail(const std::string& name,
                            const std::vector<VerbNames>& verbs,
                            std::string_view form) {
  if (form == "man") return std::string(kManExit);
  if (form != "bash") return "";
  std::string words, cases;
  for (const VerbNames& verb : verbs) {
    words += verb.name + " ";
    cases += fmt::format("    {}) {} ;;\n", verb.name, function_name(name + " " + verb.name));
  }
  const std::string function = function_name(name);
  return fmt::format(
      "{}() {{\n"
      "  if ((COMP_CWORD == 1)); then\n"
      "    local cur=${{COMP_WORDS[1]}}\n"
      "    _flux_words '{}--help --version'\n"
      "    return\n"
      "  fi\n"
      "  case ${{COMP_WORDS[1]}} in\n{}  esac\n}}\n"
      "complete -F {} {}\n",
      function,
      words,
      cases,
      function,
      name);
}

}  // namespace flux

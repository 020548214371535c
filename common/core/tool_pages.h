// common/core/tool_pages.h - the table of a program's options, and what is written from it: --help, a page of the reference
// (Markdown), a man page, and what bash completes.
#pragma once
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace flux {

/// One option. `set` takes a value as text; `implicit` is the value of the flag alone, empty: it needs one.
struct Flag {
  std::string name, metavar, help, default_text, group;
  bool is_switch = false, is_list = false;
  std::function<void(const std::string&)> set;
  std::string implicit{};
  bool is_number = false;

  /// "--plan[=table|json]".
  std::string head() const;
};

/// What a program, or one verb of it ("flux-cache inspect"), says of itself.
struct ToolTable {
  std::string name, sentence, example;
  std::vector<Flag> flags;
  std::string positional_metavar, positional_help;  // empty: no arguments but flags
  std::string rest_name;                            // the flag to which all after it belongs
};

/// A form of the table: "" is --help; "markdown", "man" (roff, man(7)) and "bash" (a completion script) are --help=FORM.
/// Of a verb, man and bash give the part that stands inside its program's.
std::string tool_page(const ToolTable& table, std::string_view form);
/// The forms but the first: "markdown|man|bash".
std::string_view tool_page_forms();
/// What an argument asks for: "man" of "--help=man", "" of "--help", nothing of all else.
std::optional<std::string> asked_form(std::string_view argument);

/// What stands before and after the verbs' parts of a program that has some: `verbs` are names and sentences.
struct VerbNames {
  std::string name, sentence;
};
std::string verbs_page_head(const std::string& name,
                            std::string_view sentence,
                            const std::vector<VerbNames>& verbs,
                            std::string_view form);
std::string verbs_page_tail(const std::string& name,
                            const std::vector<VerbNames>& verbs,
                            std::string_view form);

}  // namespace flux

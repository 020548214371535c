#include "common/core/tool.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "common/core/text.h"
#include "tests/support/temporary_folder.h"

namespace flux {
namespace {

enum class Dtype { kBf16, kF32 };

struct Options {
  std::string model = "none";
  int64_t steps = 5;
  double rate = 0.5;
  bool fast = false;
  Dtype dtype = Dtype::kBf16;
  std::optional<Dtype> kept;
  std::filesystem::path out;
  std::vector<std::string> many, arguments, import;
  int64_t bytes = 0;
};

struct Parsed {
  Options options;
  bool go_on = false;
};

Parsed parse(std::vector<std::string> arguments, std::vector<std::string>* given = nullptr) {
  Parsed parsed;
  Tool tool("flux-test", arguments);
  tool.about("a program for tests", "flux-test --steps 3");
  Options& o = parsed.options;
  tool.flag("model", o.model, "NAME", "a name");
  tool.flag("max-steps", o.steps, "N", "how many", 1, 100);
  tool.flag("rate", o.rate, "X", "how fast", 0.0, 1.0);
  tool.flag("fast", o.fast, "be fast");
  tool.flag(
      "dtype", o.dtype, Choices<Dtype>{{"bf16", Dtype::kBf16}, {"f32", Dtype::kF32}}, "kept as");
  tool.flag("kept",
            o.kept,
            Choices<Dtype>{{"bf16", Dtype::kBf16}, {"f32", Dtype::kF32}},
            "stored as",
            "as the model");
  tool.flag("out", o.out, "DIR", "where to");
  tool.flag("many", o.many, "X", "several");
  tool.bytes_flag("size", o.bytes, "how large");
  tool.rest_flag("import", o.import, "ARGS...", "all that follows");
  if (std::ranges::find(arguments, "stray") == arguments.end())
    tool.arguments(o.arguments, "X...", "more");
  parsed.go_on = tool.parse();
  if (given) {
    for (const char* name : {"model", "max-steps", "rate", "fast"}) {
      if (tool.given(name)) given->push_back(name);
    }
  }
  return parsed;
}

std::string usage_error(std::vector<std::string> arguments) {
  try {
    parse(std::move(arguments));
  } catch (const UsageError& error) {
    return error.what();
  }
  return "no error";
}

TEST(Tool, WritesFlagsIntoTheStruct) {
  std::vector<std::string> given;
  const auto [o, go_on] = parse({"--model=a b",
                                 "--max-steps",
                                 "7",
                                 "--rate",
                                 "1e-3",
                                 "--fast",
                                 "--dtype",
                                 "f32",
                                 "--out",
                                 "x y",
                                 "--many",
                                 "1",
                                 "--many",
                                 "2"},
                                &given);
  EXPECT_TRUE(go_on);
  EXPECT_EQ(o.model, "a b");
  EXPECT_EQ(o.steps, 7);
  EXPECT_EQ(o.rate, 1e-3);
  EXPECT_TRUE(o.fast);
  EXPECT_EQ(o.dtype, Dtype::kF32);
  EXPECT_EQ(o.out, "x y");
  EXPECT_EQ(o.many, (std::vector<std::string>{"1", "2"}));
  EXPECT_EQ(given, (std::vector<std::string>{"model", "max-steps", "rate", "fast"}));
}

TEST(Tool, TakesNegativeValues) {  // a value that starts with '-' is a value, out of range here
  EXPECT_NE(usage_error({"--max-steps", "-3"}).find("-3 is out of range, 1 to 100"),
            std::string::npos);
}

TEST(Tool, TakesAChoiceThatMayBeLeftOut) {
  EXPECT_EQ(parse({}).options.kept, std::nullopt);
  EXPECT_EQ(parse({"--kept", "f32"}).options.kept, Dtype::kF32);
  EXPECT_EQ(usage_error({"--kept", "f\x1b"}), "--kept: 'f\\x1b' is not one of bf16|f32");
  testing::internal::CaptureStdout();
  EXPECT_FALSE(parse({"--help"}).go_on);
  EXPECT_NE(testing::internal::GetCapturedStdout().find("as the model"), std::string::npos);
}

TEST(Tool, RefusesWhatItDoesNotKnow) {
  EXPECT_EQ(usage_error({"--max-setps", "3"}),
            "unknown flag 'max-setps'\n  hint: did you mean --max-steps? --help lists all flags");
  EXPECT_EQ(usage_error({"--max", "3"}).substr(0, 18), "unknown flag 'max'");  // no abbreviations
  EXPECT_EQ(usage_error({"stray"}).substr(0, 27), "unexpected argument 'stray'");
}

TEST(Tool, RefusesMalformedValues) {
  EXPECT_EQ(usage_error({"--max-steps", "3x"}), "--max-steps: '3x' is not a whole number");
  EXPECT_EQ(usage_error({"--max-steps", "101"}),
            "--max-steps: 101 is out of range, 1 to 100 is allowed");
  EXPECT_EQ(usage_error({"--max-steps", "99999999999999999999"}).substr(0, 44),
            "--max-steps: 99999999999999999999 is out of ");
  EXPECT_EQ(usage_error({"--rate", "nan"}), "--rate: 'nan' is not a number");
  EXPECT_EQ(usage_error({"--dtype", "f16"}), "--dtype: 'f16' is not one of bf16|f32");
  EXPECT_EQ(usage_error({"--model", "a", "--model", "b"}),
            "--model is given twice\n  hint: give it once");
  EXPECT_NE(usage_error({"--model"}).find("model"), std::string::npos);
}

TEST(Tool, ReadsAConfigFileBelowTheCommandLine) {
  const test::TemporaryFolder folder;
  const auto file =
      folder.write("a.toml", "max_steps = 9\nrate = 1\nfast = true\nmany = ['a', 'b']\n");
  const auto o = parse({"--config", file.string(), "--max-steps", "3"}).options;
  EXPECT_EQ(o.steps, 3);
  EXPECT_EQ(o.rate, 1.0);
  EXPECT_TRUE(o.fast);
  EXPECT_EQ(o.many.size(), 2u);
}

TEST(Tool, RefusesABadConfigFile) {
  const test::TemporaryFolder folder;
  const auto error = [&](const char* text) {
    return usage_error({"--config", folder.write("a.toml", text).string()});
  };
  EXPECT_NE(error("max_setps = 1").find("unknown key in"), std::string::npos);
  EXPECT_NE(error("max_setps = 1").find("did you mean --max-steps?"), std::string::npos);
  EXPECT_NE(error("\nmax_steps = ").find("line 2: not TOML: missing value"), std::string::npos);
  EXPECT_EQ(error("max_steps = ").find("toml::"), std::string::npos);
  EXPECT_NE(error("max_steps = [1]").find("must be a string, a number or true/false"),
            std::string::npos);
  EXPECT_NE(error("max_steps = 1.5").find("'1.5' is not a whole number"), std::string::npos);
}

TEST(Tool, HelpsWhateverElseIsOnTheLine) {
  testing::internal::CaptureStdout();
  EXPECT_FALSE(parse({"--max-setps", "3", "--help"}).go_on);
  EXPECT_NE(testing::internal::GetCapturedStdout().find("--max-steps"), std::string::npos);
  const test::TemporaryFolder folder;
  for (const char* key : {"help", "version", "config", "print-config", "print_config", "import"}) {
    const auto file = folder.write("a.toml", std::string(key) + " = true\n");
    EXPECT_NE(usage_error({"--config", file.string()}).find("belongs on the command line"),
              std::string::npos);
  }
}

TEST(Tool, RefusesSectionsAndKeysGivenTwiceInAConfigFile) {
  const test::TemporaryFolder folder;
  const auto error = [&](const char* text) {
    return usage_error({"--config", folder.write("a.toml", text).string()});
  };
  EXPECT_NE(error("[training]\nrate = 1").find("the section [training]"), std::string::npos);
  EXPECT_NE(error("[rate]\nx = 1").find("must be a string"), std::string::npos);
  EXPECT_NE(error("max-steps = 1\nmax_steps = 2").find("given twice, with '-' and with '_'"),
            std::string::npos);
}

std::string printed(std::vector<std::string> arguments) {
  testing::internal::CaptureStdout();
  const bool go_on = parse(std::move(arguments)).go_on;
  const std::string out = testing::internal::GetCapturedStdout();
  EXPECT_FALSE(go_on);
  return out;
}

TEST(Tool, PrintsAConfigThatReadsBackToTheSameRun) {
  const test::TemporaryFolder folder;
  const std::vector<std::string> given{"--model",
                                       "a \"b\" \\ # \n\x01\x7f é",
                                       "--max-steps",
                                       "007",
                                       "--rate",
                                       "0.125",
                                       "--fast",
                                       "--dtype",
                                       "f32",
                                       "--many",
                                       "x, \"y\"",
                                       "--many",
                                       "",
                                       "--size",
                                       "1.5GiB",
                                       "--out",
                                       "it's",
                                       "one",
                                       "two three"};
  auto asked = given;
  asked.push_back("--print-config");
  const std::string file = printed(asked);
  EXPECT_NE(file.find("rate = 0.125  # command line\n"), std::string::npos) << file;
  EXPECT_NE(file.find("fast = true  # command line\n"), std::string::npos) << file;
  EXPECT_NE(file.find("# kept: as the model\n"), std::string::npos) << file;
  EXPECT_EQ(file.find("print-config"), std::string::npos) << file;
  const auto path = folder.write("run.toml", file);
  const Options o = parse({"--config", path.string()}).options, as_given = parse(given).options;
  EXPECT_EQ(o.model, as_given.model);
  EXPECT_EQ(o.steps, 7);
  EXPECT_EQ(o.rate, 0.125);
  EXPECT_TRUE(o.fast);
  EXPECT_EQ(o.dtype, Dtype::kF32);
  EXPECT_EQ(o.many, as_given.many);
  EXPECT_EQ(o.out, as_given.out);
  EXPECT_EQ(o.bytes, int64_t{3} << 29);
  EXPECT_EQ(o.arguments, (std::vector<std::string>{"one", "two three"}));
  // printed again it is the same but for where values came from
  const auto without_origin = [](std::string text, const std::string& origin) {
    for (size_t at = 0; (at = text.find("  # " + origin, at)) != std::string::npos;)
      text.erase(at, origin.size() + 4);
    return text;
  };
  EXPECT_EQ(without_origin(printed({"--config", path.string(), "--print-config"}), show(path)),
            without_origin(file, "command line"));
}

TEST(Tool, PrintsResolvedDefaultsThatTakeEffect) {
  Tool tool("t", {"--print-config", "--a", "2"});
  int64_t a = 1, b = 1, c = 1;
  tool.flag("a", a, "N", "");
  tool.flag("b", b, "N", "");
  tool.flag("c", c, "N", "");
  tool.resolved([&] { return nlohmann::json{{"a", a}, {"b", 5}}; });
  testing::internal::CaptureStdout();
  EXPECT_FALSE(tool.parse());
  const std::string out = testing::internal::GetCapturedStdout();
  EXPECT_NE(out.find("a = 2  # command line\nb = 5  # default\n# c: 1\n"), std::string::npos)
      << out;
}

TEST(Tool, SaysWhatTomlCannotHold) {
  EXPECT_NE(printed({"--print-config", "--model", "\xff"}).find("# model: given, but not UTF-8"),
            std::string::npos);
}

TEST(Tool, HelpsInMarkdown) {
  const std::string out = printed({"--help=markdown"});
  EXPECT_NE(out.find("| `--dtype bf16\\|f32` | bf16 | kept as |\n"), std::string::npos) << out;
  EXPECT_NE(out.find("| `--fast` | off | be fast |\n"), std::string::npos) << out;
}

TEST(Tool, TheRestBelongsToARestFlag) {
  const auto o = parse({"--max-steps", "3", "--import", "--rate", "--help", "x"}).options;
  EXPECT_EQ(o.steps, 3);
  EXPECT_EQ(o.import, (std::vector<std::string>{"--rate", "--help", "x"}));
}

TEST(Tool, PrintsNoResultAfterASignal) {
  Tool tool("t", {"--json"});
  ASSERT_TRUE(tool.parse());
  const auto printed = [&](ExitCode code) {
    testing::internal::CaptureStdout();
    tool.summary("line", {{"a", 1}}, code);
    return testing::internal::GetCapturedStdout();
  };
  EXPECT_EQ(printed(ExitCode::kOk), "{\"a\":1}\n");
  EXPECT_EQ(printed(ExitCode::kTooManyFailed), "{\"a\":1}\n");
  EXPECT_EQ(printed(ExitCode::kTerminate), "");
}

TEST(Tool, QuotesItsCommandLine) {
  const Tool tool("t", {"--out", "it's", "--x=1"});
  EXPECT_EQ(tool.command_line(), "t --out 'it'\\''s' --x=1");
}

TEST(RunTool, EveryUsageErrorHasAHint) {
  const auto said = [](const UsageError& error) {
    char name[] = "t";
    char* argv[] = {name, nullptr};
    testing::internal::CaptureStderr();
    run_tool("t", 1, argv, [&](Tool&) -> ExitCode { throw error; });
    return testing::internal::GetCapturedStderr();
  };
  EXPECT_EQ(said(UsageError("x")),
            "t: error: x\n  hint: --help lists all flags and their values\n");
  EXPECT_EQ(said(UsageError("x", "y")), "t: error: x\n  hint: y\n");
}

TEST(RunTool, TurnsExceptionsIntoExitCodes) {
  const auto run = [](const std::function<ExitCode(Tool&)>& body) {
    char name[] = "t";
    char* argv[] = {name, nullptr};
    return run_tool("t", 1, argv, body);
  };
  EXPECT_EQ(run([](Tool&) { return ExitCode::kOk; }), 0);
  EXPECT_EQ(run([](Tool&) -> ExitCode { throw UsageError("x"); }), 2);
  EXPECT_EQ(run([](Tool&) -> ExitCode { throw InputError("x"); }), 3);
  EXPECT_EQ(run([](Tool&) -> ExitCode { throw CacheError("x"); }), 4);
  EXPECT_EQ(run([](Tool&) -> ExitCode { throw ResourceError("x"); }), 5);
  EXPECT_EQ(run([](Tool&) -> ExitCode { throw Interrupted(ExitCode::kInterrupt); }), 130);
  EXPECT_EQ(run([](Tool&) -> ExitCode { throw std::bad_alloc(); }), 5);
  EXPECT_EQ(run([](Tool&) -> ExitCode { throw std::runtime_error("x"); }), 1);
}

}  // namespace
}  // namespace flux

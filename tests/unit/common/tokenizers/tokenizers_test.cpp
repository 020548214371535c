#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <thread>

#include "common/core/error.h"
#include "common/core/file.h"
#include "common/tokenizers/tiny.h"
#include "tests/support/shared_data.h"
#include "tests/support/temporary_folder.h"
#include "tests/unit/common/tokenizers/tokenizer_vectors.h"

namespace flux {
namespace {

using test::tiny_vectors;
using testing::ElementsAre;
using testing::HasSubstr;
using tokenizers::ClipTokenizer;
using tokenizers::T5Tokenizer;

T5Tokenizer tiny_t5() { return T5Tokenizer::load(tiny_vectors() / "vocabularies/t5/spiece.model"); }
ClipTokenizer tiny_clip() { return ClipTokenizer::load(tiny_vectors() / "vocabularies/clip"); }

std::string error_of(const std::function<void()>& act) {
  try {
    act();
  } catch (const InputError& e) {
    return e.what();
  }
  return "no InputError";
}

TEST(Tokenizers, EqualTheReferenceOnTinyVocabularies) {  // golden
  test::expect_equal_ids(tiny_vectors(), tiny_t5(), tiny_clip());
}

TEST(Tokenizers, EqualTheReferenceFromTokenizerJson) {  // golden
  test::expect_equal_ids(tiny_vectors(),
                         T5Tokenizer::load(tiny_vectors() / "t5-tokenizer.json"),
                         ClipTokenizer::load(tiny_vectors() / "clip-tokenizer.json"));
}

TEST(Tokenizers, EqualTheReferenceOnRealVocabularies) {  // golden, 2,628 strings
  FLUX_SHARED_DATA_OR_SKIP(vectors, "golden/tokenizers");
  FLUX_SHARED_DATA_OR_SKIP(vocabularies, "tokenizers");
  test::expect_equal_ids(
      vectors, T5Tokenizer::load(vocabularies / "t5"), ClipTokenizer::load(vocabularies / "clip"));
}

TEST(Tokenizers, EqualTheReferenceOnRealTokenizerJson) {  // golden, 2,628 strings
  FLUX_SHARED_DATA_OR_SKIP(vectors, "golden/tokenizers");
  FLUX_SHARED_DATA_OR_SKIP(vocabularies, "tokenizers");
  test::expect_equal_ids(vectors,
                         T5Tokenizer::load(vocabularies / "t5/tokenizer.json"),
                         ClipTokenizer::load(vocabularies / "clip/tokenizer.json"));
}

void expect_refused_with_offset(const std::filesystem::path& file) {
  const auto t5 = tiny_t5();
  const auto clip = tiny_clip();
  const auto rows = test::json_lines(file);
  ASSERT_GT(rows.size(), 50u);
  for (const auto& row : rows) {
    SCOPED_TRACE(row.dump(-1, ' ', true));
    const auto hex = row["hex"].get<std::string>();
    std::string bytes;
    for (size_t i = 0; i < hex.size(); i += 2)
      bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
    const std::string wanted =
        "at offset " + std::to_string(row["first_bad_byte"].get<int64_t>()) + "\n";
    EXPECT_THAT(error_of([&] { t5.encode(bytes); }), HasSubstr(wanted));
    EXPECT_THAT(error_of([&] { clip.encode(bytes); }), HasSubstr(wanted));
  }
}

TEST(Tokenizers, RefuseInvalidUtf8NamingTheFirstBadByte) {
  expect_refused_with_offset(tiny_vectors() / "invalid_utf8.jsonl");
}

TEST(Tokenizers, RefuseTheSharedInvalidUtf8) {
  FLUX_SHARED_DATA_OR_SKIP(vectors, "golden/tokenizers");
  expect_refused_with_offset(vectors / "invalid_utf8.jsonl");
}

TEST(T5Tokenizer, NamesItsSpecialIds) {
  const auto t5 = tiny_t5();
  EXPECT_EQ(t5.pad_id(), 0);
  EXPECT_EQ(t5.eos_id(), 1);
  EXPECT_EQ(t5.unk_id(), 2);
  EXPECT_THAT(t5.encode(""), ElementsAre(1));
  EXPECT_THAT(t5.encode("<extra_id_0>"), ElementsAre(t5.vocab_size() - 1, 1));
}

TEST(T5Tokenizer, GivesASpecialForItsFullWidthSpelling) {  // as the reference does: control pieces
                                                           // are in its lattice
  EXPECT_THAT(tiny_t5().encode("\uFF1C\uFF0F\uFF53\uFF1E"), ElementsAre(3, 1, 1));
}

TEST(T5Tokenizer, TruncationCountsLostTokens) {
  const auto t5 = tiny_t5();
  const std::vector<int32_t> ids = {10, 11, 12, 13, 1};
  const auto cut = t5.padded(ids, 3);
  EXPECT_THAT(cut.ids, ElementsAre(10, 11, 1));
  EXPECT_EQ(cut.num_live_tokens, 3);
  EXPECT_EQ(cut.num_lost_tokens, 2);
  const auto filled = t5.padded(ids, 7);
  EXPECT_THAT(filled.ids, ElementsAre(10, 11, 12, 13, 1, 0, 0));
  EXPECT_EQ(filled.num_live_tokens, 5);
  EXPECT_EQ(filled.num_lost_tokens, 0);
}

TEST(ClipTokenizer, PadsWithEos) {
  const auto clip = tiny_clip();
  EXPECT_EQ(clip.eos_id(), clip.vocab_size() - 1);
  EXPECT_EQ(clip.bos_id(), clip.vocab_size() - 2);
  EXPECT_THAT(clip.padded(clip.encode(""), 4).ids,
              ElementsAre(clip.bos_id(), clip.eos_id(), clip.eos_id(), clip.eos_id()));
}

TEST(Tokenizers, IdentityFollowsTheFileBytes) {
  test::TemporaryFolder folder;
  tokenizers::write_tiny_tokenizers(folder.path());
  EXPECT_EQ(T5Tokenizer::load(folder / "t5").sha256(), tiny_t5().sha256());
  EXPECT_EQ(ClipTokenizer::load(folder / "clip").sha256(), tiny_clip().sha256());
  EXPECT_EQ(to_hex(tiny_t5().sha256()),
            to_hex(sha256_file(tiny_vectors() / "vocabularies/t5/spiece.model")));
  folder.write("clip/merges.txt", tokenizers::tiny_clip_merges() + "\n");
  EXPECT_NE(ClipTokenizer::load(folder / "clip").sha256(), tiny_clip().sha256());
}

TEST(TinyTokenizers, AreTheCommittedBytes) {  // the same on every machine
  EXPECT_EQ(tokenizers::tiny_t5_model(),
            read_file(tiny_vectors() / "vocabularies/t5/spiece.model"));
  EXPECT_EQ(tokenizers::tiny_clip_vocab(),
            read_file(tiny_vectors() / "vocabularies/clip/vocab.json"));
  EXPECT_EQ(tokenizers::tiny_clip_merges(),
            read_file(tiny_vectors() / "vocabularies/clip/merges.txt"));
}

TEST(Tokenizers, AreReadFromSeveralThreads) {
  const auto t5 = tiny_t5();
  const auto clip = tiny_clip();
  const std::string text = "a photo of the cafe\u0301 \u2014 \u00bd\u0301 dog";
  const auto t5_ids = t5.encode(text), clip_ids = clip.encode(text);
  std::vector<std::jthread> threads;
  for (int n = 0; n < 4; ++n) {
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) {
        EXPECT_EQ(t5.encode(text), t5_ids);
        EXPECT_EQ(clip.encode(text), clip_ids);
      }
    });
  }
}

// Times are about what one core takes unoptimised times several; a quadratic path takes minutes.
TEST(Tokenizers, TakeNoQuadraticTime) {
  const auto t5 = tiny_t5();
  const auto clip = tiny_clip();
  const auto repeat = [](std::string_view part, size_t bytes) {
    std::string out;
    while (out.size() < bytes) out += part;
    return out;
  };
  const std::vector<std::pair<const char*, std::string>> texts = {
      {"one word", repeat("the", 1 << 20)},
      {"one letter", repeat("l", 1 << 20)},
      {"spaces", repeat(" ", 1 << 20)},
      {"specials", repeat("</s>", 1 << 20)},
      {"marks in the wrong order", "a" + repeat("\u0301\u0323", 1 << 20)},
      {"marks that decompose", "a" + repeat("\u0f73", 1 << 20)},
      {"flags", repeat("\U0001F1FA", 1 << 20)},
      {"joined emoji", repeat("\U0001F468\u200D", 1 << 20)},
      {"open specials", repeat("<|endoftext", 1 << 20)}};
  for (const auto& [name, text] : texts) {
    const auto start = std::chrono::steady_clock::now();
    t5.encode(text);
    clip.encode(text);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20)) << name;
  }
}

TEST(Tokenizers, SortLongRunsOfMarksLikeShortOnes) {  // property: the normal form does not depend
                                                      // on the run's length
  const auto clip = tiny_clip();
  std::string forward = "a", sorted = "a";
  for (int i = 0; i < 100; ++i) forward += "\u0301\u0323";
  for (int i = 0; i < 100; ++i) sorted += "\u0323";
  for (int i = 0; i < 100; ++i) sorted += "\u0301";
  EXPECT_EQ(clip.encode(forward), clip.encode(sorted));
}

TEST(Tokenizers, NameTheFileAndTheReason) {
  test::TemporaryFolder folder;
  const auto t5_error = [&](const std::filesystem::path& path) {
    return error_of([&] { T5Tokenizer::load(path); });
  };
  const auto clip_error = [&](const std::filesystem::path& path) {
    return error_of([&] { ClipTokenizer::load(path); });
  };
  EXPECT_THAT(t5_error(folder / "absent.model"), HasSubstr("absent.model"));
  EXPECT_THAT(t5_error(folder.path()), HasSubstr("has no spiece.model or tokenizer.json"));
  EXPECT_THAT(clip_error(folder.path()), HasSubstr("has no vocab.json or tokenizer.json"));
  EXPECT_THAT(t5_error(folder.write("empty.model", "")),
              HasSubstr("empty.model: not a SentencePiece model"));
  EXPECT_THAT(t5_error(folder.write("text.model", "hello world, no model\n")),
              HasSubstr("not a SentencePiece model"));
  EXPECT_THAT(t5_error(folder.write("cut.model", tokenizers::tiny_t5_model().substr(0, 3000))),
              HasSubstr("cut short near byte"));
  EXPECT_THAT(t5_error(tiny_vectors() / "clip-tokenizer.json"),
              HasSubstr("type 'BPE', T5's is Unigram"));
  EXPECT_THAT(clip_error(tiny_vectors() / "t5-tokenizer.json"), HasSubstr("not CLIP's byte pairs"));
  std::filesystem::create_directory(folder / "clip");
  folder.write("clip/vocab.json", tokenizers::tiny_clip_vocab());
  EXPECT_THAT(clip_error(folder / "clip"), HasSubstr("merges.txt"));
  folder.write("clip/merges.txt", "#version: 0.2\nt h\none two three\n");
  EXPECT_THAT(clip_error(folder / "clip"), HasSubstr("line 3 of merges.txt is not two symbols"));
  folder.write("clip/merges.txt", "#version: 0.2\nx q\n");
  EXPECT_THAT(clip_error(folder / "clip"),
              HasSubstr("needs 'xq', which the vocabulary does not have"));
  folder.write("clip/vocab.json", "{\"a\": 0}");
  EXPECT_THAT(clip_error(folder / "clip"), HasSubstr("the vocabulary has no <|startoftext|>"));
}

// Loads `bytes` with one to four random changes: anything but an InputError or a working tokenizer
// fails the test.
template <class Load>
void mutate(const std::string& bytes, uint32_t seed, const Load& load) {
  std::mt19937 random(seed);
  const auto below = [&](size_t n) {
    return std::uniform_int_distribution<size_t>(0, n - 1)(random);
  };
  std::string bad = bytes;
  for (size_t change = 0, changes = 1 + below(4); change < changes && !bad.empty(); ++change) {
    const size_t at = below(bad.size());
    switch (below(4)) {
      case 0:
        bad[at] = static_cast<char>(below(256));
        break;
      case 1:
        bad.resize(at);
        break;
      case 2:
        bad.erase(at, 1 + below(16));
        break;
      default:
        bad.insert(at, bad.substr(below(bad.size()), 1 + below(16)));
        break;
    }
  }
  try {
    load(bad);
  } catch (const InputError&) {
  }
}

TEST(Tokenizers, SurviveMutatedVocabularies) {  // fuzz, in small
  const std::string text =
      "a photo\u2026 of <pad> the e\u0301 \uFF21\uFF22 \U0001F600 dog's \u00bd\u0301";
  const std::string t5_model = tokenizers::tiny_t5_model(), vocab = tokenizers::tiny_clip_vocab(),
                    merges = tokenizers::tiny_clip_merges();
  const auto t5_json = read_file(tiny_vectors() / "t5-tokenizer.json"),
             clip_json = read_file(tiny_vectors() / "clip-tokenizer.json");
  const auto t5 = [&](const std::string& bad) { T5Tokenizer::parse(bad, "bad").encode(text); };
  for (uint32_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    EXPECT_NO_THROW(mutate(t5_model, seed, t5));
    EXPECT_NO_THROW(mutate(t5_json, seed, t5));
    EXPECT_NO_THROW(mutate(clip_json, seed, [&](const auto& bad) {
      ClipTokenizer::parse_json(bad, "bad").encode(text);
    }));
    EXPECT_NO_THROW(mutate(vocab, seed, [&](const auto& bad) {
      ClipTokenizer::parse(bad, merges, "bad").encode(text);
    }));
    EXPECT_NO_THROW(mutate(merges, seed, [&](const auto& bad) {
      ClipTokenizer::parse(vocab, bad, "bad").encode(text);
    }));
  }
}

}  // namespace
}  // namespace flux

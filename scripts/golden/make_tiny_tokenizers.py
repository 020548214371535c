#!/usr/bin/env python3
"""Makes tests/golden/tokenizers-tiny: ids of the HF fast tokenizers on the project's own small vocabularies.

    python3 -m venv VENV && VENV/bin/pip install transformers==4.54.1 tokenizers==0.21.4 sentencepiece==0.2.1 protobuf
    VENV/bin/python scripts/golden/make_tiny_tokenizers.py tests/golden/tokenizers-tiny

The vocabularies in that folder must be there already (tiny.h writes them). The strings are made here, from a fixed seed.
"""
import hashlib
import json
import random
import struct
import sys
from pathlib import Path

from transformers import CLIPTokenizerFast, T5TokenizerFast

WORDS = ("a the of and in with photo picture red green blue circle square striped dots small large cat dog forest river sky "
         "sunset zebra quixotic standing 1024 3.5 it's don't they'll I'm Hello WORLD").split()
SPECIALS = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_42>", "<extra_id_99>", "<extra_id_100>", "<|endoftext|>",
            "<|ENDOFTEXT|>", "<|startoftext|>", "<|endoftext|", "</ s>", "\uff1c\uff0f\uff53\uff1e"]
EDGE = ["", " ", "  ", "\n", "a", " a", "a ", "a\n", "a\r\nb", "a\tb", "\t\ta  b\u3000 c", "----", "......", "!!!!!!!!", "'s 'S 'ss",
        "llllll", "e\u0301 e\u0301\u0323 u\u0308", "\u00bd\u0301 \u00bd\u0897", "\u2581a\u2581\u2581b", "\ufeffa photo",
        "x\u0000y\u0007z\u007f", "\u0130stanbul \u039f\u0394\u039f\u03a3 \u017fhort", "\ufb01ne \ufb02ow \u2122 \u2026",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1fa\U0001f1f8\U0001f1fa", "\u1112\u1161\u11ab \ud55c",
        "\u0928\u092e\u0938\u094d\u0924\u0947", "a\u0f73\u0f71\u0344b", "\u1c89\ua7dc\U00010d50", "1\u00b2\u2163\u0661\u096a"]
POOLS = [range(0x20, 0x7F), range(0xA0, 0x250), range(0x300, 0x370), range(0x370, 0x530), range(0x900, 0xA00), range(0x1100, 0x1200),
         range(0x2000, 0x2C00), range(0xF900, 0xFB50), range(0xFE30, 0xFFEF), range(0x1F1E6, 0x1F200), range(0x1F3F0, 0x1F650),
         [0, 1, 9, 10, 13, 32, 32, 0x85, 0xA0, 0x2581, 0x200B, 0x200D, 0x3000, 0xFE0F, 0xFEFF]]
BAD_BYTES = [b"\x80", b"\xc0\x80", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf0\x8f\xbf\xbf", b"\xff", b"\xe2\x28\xa1"]


def strings(rng):
    for text in EDGE:
        yield "edge", text
    for n in (74, 75, 76, 77, 254, 255, 256, 257, 510, 511, 512, 513, 900):
        yield "length", " ".join(["a"] * n)
    for special in SPECIALS:
        yield "special", special
        yield "special", f"a {special} cat{special}{special} dog "
    for _ in range(120):
        yield "caption", " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 40))) + rng.choice(["", ".", "!", "\n"])
    for _ in range(200):
        pools = rng.sample(POOLS, rng.randint(1, 3))
        parts = [rng.choice(WORDS + SPECIALS) if rng.random() < 0.15 else chr(rng.choice(rng.choice(pools)))
                 for _ in range(rng.randint(1, 24))]
        yield "hostile", "".join(parts)


def padded(ids, length, eos, pad):
    cut = ids if len(ids) <= length else ids[: length - 1] + [eos]
    return cut + [pad] * (length - len(cut))


def short_hash(ids):
    return hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest()[:16]


def main(folder):
    t5 = T5TokenizerFast.from_pretrained(folder / "vocabularies/t5")
    clip = CLIPTokenizerFast.from_pretrained(folder / "vocabularies/clip")
    t5.backend_tokenizer.save(str(folder / "t5-tokenizer.json"))
    clip.backend_tokenizer.save(str(folder / "clip-tokenizer.json"))
    rng = random.Random(1)
    tokens, whole = [], []
    for number, (cat, text) in enumerate(strings(rng)):
        t5_ids, clip_ids = t5(text).input_ids, clip(text).input_ids
        forms = {"t5_512": padded(t5_ids, 512, 1, 0), "t5_256": padded(t5_ids, 256, 1, 0),
                 "clip_77": padded(clip_ids, 77, clip.eos_token_id, clip.eos_token_id)}
        for length in (512, 256):
            assert t5(text, max_length=length, truncation=True, padding="max_length").input_ids == forms[f"t5_{length}"]
        assert clip(text, max_length=77, truncation=True, padding="max_length").input_ids == forms["clip_77"]
        tokens.append({"id": number, "cat": cat, "text": text, "t5": t5_ids, "clip": clip_ids,
                       **{name: short_hash(ids) for name, ids in forms.items()},
                       "t5_len": [min(len(t5_ids), 512), min(len(t5_ids), 256)]})
        if cat == "length" or number % 40 == 0:
            whole.append({"id": number, "text": text, **forms})
    bad = []
    for number in range(60):
        raw = "".join(rng.choice(WORDS) + " " for _ in range(rng.randint(0, 4))).encode() + "\u00e9\U0001f600".encode() * rng.randint(0, 1)
        raw += rng.choice(BAD_BYTES) + b"tail" * rng.randint(0, 1)
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            bad.append({"id": len(bad), "hex": raw.hex(), "first_bad_byte": error.start})
    for name, rows in (("tokens.jsonl", tokens), ("padded.jsonl", whole), ("invalid_utf8.jsonl", bad)):
        (folder / name).write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    (folder / "case.json").write_text(json.dumps({"kind": "tokenizers", "vocabularies": "vocabularies", "limits": "exact"}, indent=1) + "\n")
    print(len(tokens), "strings,", len(whole), "padded,", len(bad), "invalid")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

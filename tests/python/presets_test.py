"""Every file in presets/ fits its budgets: presets_test.py BIN_DIR SOURCE_DIR. Exits 77 where no full-size file can be.

The model is a file of full geometry whose values are a hole, since a plan reads names and shapes only.
"""
import json
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time
import unittest

BIN, SOURCE = (pathlib.Path(a) for a in sys.argv[1:3])
sys.path.insert(0, str(SOURCE / "tests/bench"))
import sparse_flux  # noqa: E402

GIB = 2**30


def plan(model, *args):
    run = subprocess.run([BIN / "flux-train", "--plan=json", "--model", model, "--resolution", "1024x1024", *args],
                         capture_output=True, text=True, timeout=60)
    return run.returncode, json.loads(run.stdout) if run.stdout else run.stderr


class Presets(unittest.TestCase):
    def test_there_is_one_for_each_card_and_method(self):
        names = {p.stem for p in (SOURCE / "presets").glob("*.toml")}
        self.assertEqual(names, {f"{m}-{c}gb" for m in ("lora", "full") for c in (8, 12, 16, 24, 48, 80)})

    def test_each_fits_its_card(self):
        for preset in sorted((SOURCE / "presets").glob("*.toml")):
            with self.subTest(preset.name):
                code, found = plan(MODEL, "--config", preset)
                self.assertEqual(code, 0, found)
                self.assertTrue(found["fits"])
                card = int(re.search(r"(\d+)gb", preset.stem)[1])
                # a card of 24 GB has nearly 24 GiB
                self.assertLess(found["peak_bytes"], 0.95 * card * GIB)
                self.assertEqual(found["peak_bytes"], sum(found["causes"].values()))

    def test_docs_print_each_plan(self):
        docs = (SOURCE / "docs/memory.md").read_text()
        for preset in sorted((SOURCE / "presets").glob("*.toml")):
            with self.subTest(preset.name):
                run = subprocess.run([BIN / "flux-train", "--plan", "--model", MODEL, "--resolution", "1024x1024",
                                      "--config", preset], capture_output=True, text=True, timeout=60)
                self.assertIn(f"presets/{preset.name}", docs)
                settings = run.stdout.strip().splitlines()[-1].split("  (")[0]
                printed = docs.split(f"presets/{preset.name}\n", 1)[1].split("\n```\n", 1)[0]
                self.assertIn(settings, printed)

    def test_the_smallest_settings_are_small(self):
        # without the context; docs/memory.md has the table
        small = ["--device", "cuda", "--precision", "bf16", "--resident-blocks", "0", "--keep-graphs", "0",
                 "--block-inputs", "host", "--device-memory", "6GiB", "--host-memory", "128GiB"]
        for gib, args in ((3.5, ["--method", "lora"]),
                          (3.0, ["--method", "lora", "--base-precision", "fp8"]),
                          (2.6, ["--method", "lora", "--stream-adapters"]),
                          (2.0, ["--method", "lora", "--base-precision", "fp8", "--stream-adapters"]),
                          (4.2, ["--method", "full", "--optimizer", "adamw8bit"])):
            with self.subTest(args):
                code, found = plan(MODEL, *small, *args)
                self.assertEqual(code, 0, found)
                self.assertLess(found["peak_bytes"] - found["causes"]["fixed"], gib * GIB)

    def test_it_is_quick_and_small(self):
        for method in ("lora", "full"):
            start = time.time()
            code, found = plan(MODEL, "--method", method, "--host-memory", "40GiB")
            self.assertEqual(code, 0, found)
            self.assertLess(time.time() - start, 15)  # 3 s on an idle machine
        # of all that ran so far
        self.assertLess(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, 500e6)


with tempfile.TemporaryDirectory() as folder:
    MODEL = pathlib.Path(folder) / "flux.safetensors"
    try:
        sparse_flux.write(MODEL)
    except OSError as error:
        print(f"skipped presets: no file of full size can be made here: {error}")
        sys.exit(77)
    unittest.main(argv=sys.argv[:1])

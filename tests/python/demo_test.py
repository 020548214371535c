"""The demo keeps its word: demo_test.py BIN [--count N]. The base draws what it is asked for, a LoRA from twelve pictures teaches it a
new word, and the pixels say so. The suite counts 12 pictures each; --count 50 is the long form (2 minutes on two cores)."""
import argparse
import itertools
import json
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "demo"))
import result
import shapes

OPTIONS = None


class Pixels(unittest.TestCase):
    """The rules that count tell drawn pictures apart, and what is not clear is not called anything."""

    def test_every_drawn_picture_is_recognised(self):
        for picture in itertools.islice(shapes.random_pictures(11, tuple(shapes.SHAPES)), 180):
            seen = shapes.recognise(shapes.draw(picture, 64, 64))
            self.assertEqual((seen.colour, seen.shape, seen.ground), picture[:3])

    def test_empty_and_unclear_pictures_have_no_shape(self):
        plain = [bytes(shapes.GROUNDS["pink"]) * 64] * 64
        self.assertEqual(shapes.recognise(plain)[:3], (None, None, "pink"))
        half = [bytes(shapes.COLOURS["red"]) * 20 + bytes(shapes.GROUNDS["white"]) * 44] * 64
        self.assertIsNone(shapes.recognise(half).shape)
        green_ground = [bytes(shapes.COLOURS["green"]) * 64] * 64
        self.assertIsNone(shapes.recognise(green_ground).ground)

    def test_png_files_are_read_as_they_were_drawn(self):
        picture = next(shapes.random_pictures(3))
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "a.png"
            path.write_bytes(shapes.png(shapes.draw(picture, 64, 48)))
            self.assertEqual(shapes.read_png(path), shapes.draw(picture, 64, 48))

    def test_another_colour_shape_or_ground_is_not_counted(self):
        with tempfile.TemporaryDirectory() as folder:
            work = pathlib.Path(folder)
            picture = shapes.Picture("red", "circle", "white", (0, 0), 1)
            (work / "prompts.txt").write_text("a red circle on a white background\na blue square on a white background\n")
            for number in (0, 1):
                (work / f"x-000{number}-00.png").write_bytes(shapes.png(shapes.draw(picture, 64, 64)))
            self.assertEqual(result.count(work / "prompts.txt", work),
                             {"pictures": 2, "colour": 1, "shape": 1, "ground": 2, "all": 1})
            self.assertEqual(result.count(work / "prompts.txt", work, "ring")["shape"], 0)


class Models(unittest.TestCase):
    def test_they_are_small_and_whole(self):
        sizes = {path.name: path.stat().st_size for path in (ROOT / "demo/models").glob("*.safetensors")}
        self.assertEqual(sorted(sizes), ["ae.safetensors", "clip.safetensors", "flux.safetensors", "t5.safetensors"])
        self.assertLess(sizes["ae.safetensors"], 3_000_000)
        self.assertLess(sizes["ae.safetensors"] + sizes["flux.safetensors"], 16_000_000)

    def test_the_text_stack_is_that_of_flux_model_tiny(self):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([OPTIONS.bin / "flux-model", "tiny", "--out", folder, "--seed", "1"], check=True, capture_output=True)
            for name in ("t5.safetensors", "clip.safetensors", "tokenizers/t5/spiece.model", "tokenizers/clip/vocab.json",
                         "tokenizers/clip/merges.txt"):
                self.assertEqual((ROOT / "demo/models" / name).read_bytes(), (pathlib.Path(folder) / name).read_bytes(), name)


class Demo(unittest.TestCase):
    def test_a_new_word_is_learned(self):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([ROOT / "demo/teach", OPTIONS.bin, folder, str(OPTIONS.count)], text=True, capture_output=True)
            self.assertEqual(done.returncode, 0, done.stdout[-2000:] + done.stderr[-4000:])
            work = pathlib.Path(folder)
            found = json.loads((work / "result.json").read_text())
            print(json.dumps(found), flush=True)
            for name in found:
                self.assertEqual(found[name]["pictures"], OPTIONS.count)
            self.assertGreaterEqual(found["base"]["all"], 0.8 * OPTIONS.count)
            self.assertLessEqual(found["before"]["shape"], 0.1 * OPTIONS.count)
            self.assertGreaterEqual(found["after"]["shape"], 0.8 * OPTIONS.count)
            self.check_report((work / "run/report.html").read_text())
            width, height = struct.unpack(">II", (work / "picture.png").read_bytes()[16:24])
            self.assertEqual((width, height), (8 * 68 + 4, 3 * 68 + 4))

    def check_report(self, page):
        """Curves, and a row of pictures for the base and for every sampled step, each under its prompt."""
        self.assertIn("<svg", page)
        table = re.search(r'<table class="samples">(.*?)</table>', page, re.S).group(1)
        self.assertEqual(len(re.findall(r"<th>an? \w+ zorp on a \w+ background</th>", table)), 8)
        rows = re.findall(r'<tr><td class="n">(\d+)</td>(.*?)</tr>', table, re.S)
        self.assertEqual([int(step) for step, _ in rows], [200, 150, 100, 50, 0])
        shown = [re.findall(r'src="data:image/jpeg;base64,([^"]+)"', row) for _, row in rows]
        self.assertEqual([len(row) for row in shown], [8] * 5)
        self.assertEqual(len({picture for row in shown for picture in row}), 40)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bin", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=12)
    OPTIONS = parser.parse_args()
    unittest.main(argv=sys.argv[:1])

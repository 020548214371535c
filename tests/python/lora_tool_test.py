"""flux-lora, and the conversions of flux-model: lora_tool_test.py BIN_DIR FIXTURES SOURCE_DIR

Every reference LoRA in every layout and back, merged into models and into one, extracted, resized and compared.
"""
import array
import hashlib
import json
import math
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import unittest

BIN, FIXTURES, SOURCE = (pathlib.Path(argument).resolve() for argument in sys.argv[1:4])
GOLDEN = SOURCE / "tests/golden/models"
LORAS = [GOLDEN / f"lora/{name}.safetensors" for name in ("kohya", "peft", "peft_metadata", "peft_as_kohya")]
KOHYA, PEFT = LORAS[0], LORAS[1]
MODEL = GOLDEN / "flux/weights_bfl.safetensors"
LAYOUTS = ("sd-scripts", "diffusers", "mixture", "onetrainer", "comfyui", "bfl-control", "fal")


def header(path):
    with open(path, "rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def tensors(path):
    data = pathlib.Path(path).read_bytes()
    size = 8 + struct.unpack("<Q", data[:8])[0]
    return {name: (about["dtype"], about["shape"], hashlib.sha256(data[size:][slice(*about["data_offsets"])]).hexdigest())
            for name, about in header(path).items() if name != "__metadata__"}


def write(path, floats):
    """A safetensors file of float32: name -> (shape, values)."""
    entries, data = {}, b""
    for name, (shape, values) in floats.items():
        raw = array.array("f", values).tobytes()
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def floats(path, name):
    """Shape and values of a float32 or bfloat16 tensor."""
    data = pathlib.Path(path).read_bytes()
    about = header(path)[name]
    raw = data[8 + struct.unpack("<Q", data[:8])[0]:][slice(*about["data_offsets"])]
    if about["dtype"] == "BF16":
        raw = b"".join(b"\0\0" + raw[i:i + 2] for i in range(0, len(raw), 2))
    return about["shape"], array.array("f", raw)


class Case(unittest.TestCase):
    def setUp(self):
        place = tempfile.TemporaryDirectory(prefix="flux-lora-")
        self.addCleanup(place.cleanup)
        self.folder = pathlib.Path(place.name)

    def run_tool(self, tool, *arguments, code=0):
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
        done = subprocess.run([BIN / tool.split()[0], *tool.split()[1:], *map(str, arguments)], cwd=self.folder, env=environment,
                              capture_output=True, text=True, timeout=300)
        self.assertEqual(done.returncode, code, f"{tool} {arguments}: {done.stdout}{done.stderr}")
        return done

    def report(self, tool, *arguments, code=0):
        out = self.run_tool(tool, *arguments, "--json", code=code).stdout
        self.assertEqual(out.count("\n"), 1, out)
        return json.loads(out)

    def convert(self, file, layout, *more):
        out = self.folder / f"{pathlib.Path(file).stem}-{layout}.safetensors"
        self.run_tool("flux-lora convert", file, "--to", layout, "--out", out, *more)
        return out

    def same(self, a, b, tolerance=1e-6, *more):
        return self.report("flux-lora check", a, b, "--tolerance", tolerance, *more)["largest_relative"]


class Conversions(Case):
    def test_every_lora_in_every_layout_and_back(self):
        for file in LORAS:
            layout = self.report("flux-lora info", file)["files"][0]["layout"]
            # layouts_test.cpp does all of them
            for other in LAYOUTS if file in (KOHYA, PEFT) else ("sd-scripts", "diffusers", "comfyui"):
                with self.subTest(file=file.name, other=other):
                    there = self.convert(file, other)
                    if file == KOHYA:
                        self.same(file, there)
                    self.same(file, self.convert(there, layout))

    def test_to_the_bit(self):
        # what both layouts can say
        self.assertEqual(tensors(self.convert(PEFT, "sd-scripts")), tensors(LORAS[3]))
        for other in LAYOUTS:
            with self.subTest(other=other):
                self.assertEqual(tensors(self.convert(self.convert(PEFT, other), "diffusers")), tensors(PEFT))
        self.assertEqual(tensors(self.convert(self.convert(KOHYA, "comfyui"), "kohya")), tensors(KOHYA))

    def test_dtype_and_metadata(self):
        out = self.convert(KOHYA, "peft", "--dtype", "f16")
        self.assertEqual({about["dtype"] for name, about in header(out).items() if name != "__metadata__"}, {"F16"})
        with_metadata = self.convert(LORAS[2], "sd-scripts")
        metadata = header(with_metadata)["__metadata__"]
        self.assertNotIn("lora_adapter_metadata", metadata)  # its scale is in alpha now
        self.assertEqual(len(metadata["sshs_model_hash"]), 64)
        self.same(LORAS[2], with_metadata)

    def test_refusals(self):
        out = self.folder / "out.safetensors"
        said = self.run_tool("flux-lora convert", KOHYA, "--to", "xlabs", "--out", out, code=3).stderr
        self.assertIn("LoRA module", said)
        self.assertFalse(out.exists())
        self.run_tool("flux-lora convert", MODEL, "--to", "diffusers", "--out", out, code=3)
        self.run_tool("flux-lora convert", KOHYA, "--out", out, code=2)
        out.write_text("mine")
        self.run_tool("flux-lora convert", KOHYA, "--to", "diffusers", "--out", out, code=2)
        self.assertEqual(out.read_text(), "mine")
        made = self.convert(KOHYA, "diffusers")
        self.run_tool("flux-lora convert", made, "--to", "fal", "--out", made, code=2)
        self.run_tool("flux-lora convert", KOHYA, "--to", "diffusers", "--out", made)  # replaces what it made
        self.assertEqual([path.name for path in self.folder.glob("*") if path.name.startswith(".") or "tmp" in path.name], [])


class Info(Case):
    def test_tells_targets_ranks_norms_and_metadata(self):
        about = self.report("flux-lora info", KOHYA, PEFT)["files"]
        self.assertEqual([file["targets"] for file in about], [29, 31])
        self.assertEqual(about[0]["ranks"], {"4": 29})
        module = about[0]["modules"][0]
        self.assertEqual((module["kind"], module["rank"], module["alpha"], module["scale"]), ("lora", 4, 2.0, 0.5))
        self.assertGreater(module["norm"], 0)
        text = self.run_tool("flux-lora info", KOHYA).stdout
        for word in ("sd-scripts", "double_blocks.*.img_attn.qkv", "rank 4 x 29", "metadata", "BF16"):
            self.assertIn(word, text)


class Check(Case):
    def test_finds_differences(self):
        report = self.report("flux-lora check", KOHYA, PEFT, code=1)
        self.assertFalse(report["equal"])
        self.assertGreater(report["largest_relative"], 0.5)
        self.assertTrue([layer for layer in report["layers"] if layer["only"] == "second"])
        said = self.run_tool("flux-lora check", KOHYA, f"{KOHYA}:1.001", code=1).stdout
        self.assertIn("different", said)
        self.assertIn("e-0", said)
        self.assertLess(self.same(KOHYA, f"{KOHYA}:1.001", 0.01), 0.0011)
        self.assertEqual(self.same(KOHYA, KOHYA, 0), 0)
        self.run_tool("flux-lora check", KOHYA, code=2)
        self.run_tool("flux-lora check", KOHYA, "nowhere", code=3)


class Merge(Case):
    def test_into_a_base_and_out_again(self):
        merged, lora = self.folder / "merged.safetensors", self.folder / "lora.safetensors"
        report = self.report("flux-lora merge", KOHYA, "--base", MODEL, "--dtype", "f32", "--out", merged)
        self.assertEqual(report["changed"], 29)
        self.report("flux-lora extract", "--base", MODEL, "--tuned", merged, "--rank", "4", "--dtype", "f32", "--out", lora)
        # what is left is the float32 of merged weights
        self.assertLess(self.same(KOHYA, lora, 1e-4), 1e-4)
        # a rank that is too small says so
        small = self.report("flux-lora extract", "--base", MODEL, "--tuned", merged, "--rank", "1", "--out", self.folder / "small.safetensors")
        self.assertGreater(small["largest_relative_error"], 0.1)
        by_share = self.report("flux-lora extract", "--base", MODEL, "--tuned", merged, "--sv-frobenius", "0.999", "--out",
                               self.folder / "share.safetensors")
        self.assertLessEqual(by_share["ranks"][1], 4)
        self.run_tool("flux-lora extract", "--base", MODEL, "--tuned", MODEL, "--out", self.folder / "none.safetensors", code=3)

    def test_layouts_of_the_base_and_of_the_lora_change_nothing(self):
        hashes = set()
        diffusers = self.folder / "diffusers"
        self.run_tool("flux-model convert", "--in", MODEL, "--out", diffusers, "--layout", "diffusers", "--shard-size", "1MB")
        for number, (base, lora, more) in enumerate([(MODEL, PEFT, []), (diffusers, PEFT, []), (MODEL, LORAS[3], ["--model-layout", "diffusers"]),
                                                     (diffusers, LORAS[3], ["--shard-size", "2MB"])]):
            out = self.folder / f"{number}"
            path = self.report("flux-lora merge", f"{lora}:0.5", KOHYA, "--base", base, "--out", out, *more)["file"]
            hashes.add(self.report("flux-model info", path)["nets"][0]["weights_sha256"])
        self.assertEqual(len(hashes), 1)
        self.assertTrue((self.folder / "1/config.json").exists())

    def test_into_one_lora(self):
        out = self.folder / "out.safetensors"
        report = self.report("flux-lora merge", f"{KOHYA}:0.75", f"{KOHYA}:0.25", "--out", out)
        self.assertEqual(report["ranks"], [8, 8])
        self.same(KOHYA, out)
        # of rank 4 it is the same, to the bfloat16 of nothing: --dtype auto is float32 here
        report = self.report("flux-lora merge", f"{KOHYA}:0.75", f"{KOHYA}:0.25", "--rank", "4", "--out", out)
        self.assertEqual(report["ranks"], [4, 4])
        self.assertLess(report["largest_relative_error"], 1e-6)
        self.same(KOHYA, out)
        # the sum is what a base with both has
        mixed = self.folder / "mixed.safetensors"
        self.run_tool("flux-lora merge", f"{KOHYA}:-0.5", f"{PEFT}:2", "--to", "sd-scripts", "--out", mixed)
        a, b = self.folder / "a.safetensors", self.folder / "b.safetensors"
        self.run_tool("flux-lora merge", f"{KOHYA}:-0.5", f"{PEFT}:2", "--base", MODEL, "--dtype", "f32", "--out", a)
        self.run_tool("flux-lora merge", mixed, "--base", MODEL, "--dtype", "f32", "--out", b)
        self.run_tool("flux-lora extract", "--base", a, "--tuned", b, "--out", self.folder / "difference.safetensors", "--dtype", "f32")
        norm = self.report("flux-lora info", self.folder / "difference.safetensors")["files"][0]["norm"]
        self.assertLess(norm, 1e-5 * self.report("flux-lora info", mixed)["files"][0]["norm"])

    def test_control_lora_widens_the_base(self):
        draw = random.Random(1)
        values = {name: [draw.gauss(0, 1) for _ in range(math.prod(shape))] for name, shape in {
            "img_in.lora_A.weight": [2, 128], "img_in.lora_B.weight": [128, 2], "img_in.lora_B.bias": [128],
            "double_blocks.0.img_attn.norm.query_norm.scale": [128]}.items()}
        control = write(self.folder / "control.safetensors", {
            "img_in.lora_A.weight": ([2, 128], values["img_in.lora_A.weight"]),
            "img_in.lora_B.weight": ([128, 2], values["img_in.lora_B.weight"]),
            "img_in.lora_B.bias": ([128], values["img_in.lora_B.bias"]),
            "double_blocks.0.img_attn.norm.query_norm.scale": ([128], values["double_blocks.0.img_attn.norm.query_norm.scale"])})
        for layout in ("comfyui", "diffusers"):
            self.same(control, self.convert(control, layout))
        out = self.folder / "out.safetensors"
        self.run_tool("flux-lora merge", f"{control}:0.5", "--base", MODEL, "--dtype", "f32", "--out", out)
        shape, merged = floats(out, "img_in.weight")
        before = floats(MODEL, "img_in.weight")[1]
        self.assertEqual(shape, [128, 128])
        for row, column in ((0, 0), (3, 60), (7, 64), (127, 127)):
            delta = sum(values["img_in.lora_B.weight"][2 * row + r] * values["img_in.lora_A.weight"][128 * r + column] for r in range(2))
            wanted = (before[64 * row + column] if column < 64 else 0) + 0.5 * delta
            self.assertAlmostEqual(merged[128 * row + column], wanted, places=5)
        bias, norm = (floats(out, name)[1] for name in ("img_in.bias", "double_blocks.0.img_attn.norm.query_norm.scale"))
        self.assertAlmostEqual(bias[5], floats(MODEL, "img_in.bias")[1][5] + 0.5 * values["img_in.lora_B.bias"][5], places=5)
        old = floats(MODEL, "double_blocks.0.img_attn.norm.query_norm.scale")[1][5]
        self.assertAlmostEqual(norm[5], old + 0.5 * (values["double_blocks.0.img_attn.norm.query_norm.scale"][5] - old), places=5)

    def test_dora_is_added_by_rows(self):
        draw = random.Random(2)
        name = "lora_unet_double_blocks_0_img_attn_proj."
        values = {"lora_down.weight": [draw.gauss(0, 1) for _ in range(256)], "lora_up.weight": [draw.gauss(0, 0.1) for _ in range(256)],
                  "alpha": [1.0], "dora_scale": [draw.uniform(0.5, 2) for _ in range(128)]}
        shapes = {"lora_down.weight": [2, 128], "lora_up.weight": [128, 2], "alpha": [], "dora_scale": [128, 1]}
        dora = write(self.folder / "dora.safetensors", {name + part: (shapes[part], values[part]) for part in values})
        out = self.folder / "out.safetensors"
        self.run_tool("flux-lora merge", f"{dora}:0.5", f"{KOHYA}:2", "--base", MODEL, "--dtype", "f32", "--out", out)
        weight = "double_blocks.0.img_attn.proj.weight"
        before, merged = floats(MODEL, weight)[1], floats(out, weight)[1]
        down, up = floats(KOHYA, name + "lora_down.weight")[1], floats(KOHYA, name + "lora_up.weight")[1]
        for row in (0, 77):
            alone = [before[128 * row + c] + 0.5 * sum(values["lora_up.weight"][2 * row + r] * values["lora_down.weight"][128 * r + c]
                                                      for r in range(2)) for c in range(128)]
            factor = values["dora_scale"][row] / math.sqrt(sum(value * value for value in alone))
            for c in (0, 100):
                other = sum(up[4 * row + r] * down[128 * r + c] for r in range(4)) * 0.5  # alpha 2, rank 4
                wanted = before[128 * row + c] + 0.5 * (alone[c] * factor - before[128 * row + c]) + 2 * other
                self.assertAlmostEqual(merged[128 * row + c], wanted, places=5)
        self.run_tool("flux-lora merge", dora, KOHYA, "--out", self.folder / "sum.safetensors", code=3)
        self.same(dora, self.convert(dora, "diffusers"), 1e-6, "--base", MODEL)

    def test_refusals(self):
        out = self.folder / "out.safetensors"
        self.run_tool("flux-lora merge", KOHYA, "--base", FIXTURES / "models/flux.safetensors", "--out", out, code=3)
        self.run_tool("flux-lora merge", KOHYA, "--base", MODEL, "--rank", "4", "--out", out, code=2)
        self.run_tool("flux-lora merge", KOHYA, "--shard-size", "1MB", "--out", out, code=2)
        self.run_tool("flux-lora merge", f"{KOHYA}:nan", "--out", out, code=2)
        self.run_tool("flux-model convert", "--in", MODEL, "--quantize", "fp8", "--out", self.folder / "fp8.safetensors")
        self.run_tool("flux-lora merge", KOHYA, "--base", self.folder / "fp8.safetensors", "--out", out, code=3)
        self.assertFalse(out.exists())


class Resize(Case):
    def test_by_rank_and_by_threshold(self):
        out = self.folder / "out.safetensors"
        report = self.report("flux-lora resize", KOHYA, "--rank", "8", "--out", out)
        self.assertEqual((report["ranks"], report["largest_relative_error"]), ([4, 4], 0))
        self.assertEqual(tensors(out), tensors(KOHYA))
        report = self.report("flux-lora resize", KOHYA, "--rank", "2", "--out", out)
        self.assertEqual(report["ranks"], [2, 2])
        self.assertEqual(header(out)["__metadata__"]["ss_network_dim"], "2")
        # the error that was said is the one there is: the effect of a random input differs by about as much
        found = self.same(KOHYA, out, 1)
        self.assertGreater(found, 0.3 * report["largest_relative_error"])
        self.assertLess(found, 2 * report["largest_relative_error"])
        for flag, value in (("--sv-ratio", "1.2"), ("--sv-frobenius", "0.8"), ("--sv-cumulative", "0.7")):
            with self.subTest(flag=flag):
                report = self.report("flux-lora resize", KOHYA, flag, value, "--out", out)
                self.assertLess(report["ranks"][0], 4)
        self.assertEqual(self.report("flux-lora resize", PEFT, "--rank", "1", "--out", out)["layout"], "diffusers")
        self.run_tool("flux-lora resize", KOHYA, "--out", out, code=2)
        self.run_tool("flux-lora resize", KOHYA, "--sv-ratio", "2", "--sv-frobenius", "0.9", "--out", out, code=2)


class Models(Case):
    def hash_of(self, path):
        return self.report("flux-model info", path)["nets"][0]["weights_sha256"]

    def test_layouts_and_shards_have_one_hash(self):
        one = self.hash_of(MODEL)
        folder, single, shards, back = (self.folder / name for name in ("d", "d.safetensors", "s.safetensors", "back.safetensors"))
        report = self.report("flux-model convert", "--in", MODEL, "--layout", "diffusers", "--shard-size", "1MB", "--out", folder)
        self.assertGreater(report["files"], 2)
        index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
        self.assertEqual(index["metadata"]["total_size"], sum(
            about["data_offsets"][1] - about["data_offsets"][0] for file in set(index["weight_map"].values())
            for name, about in header(folder / file).items() if name != "__metadata__"))
        config = json.loads((folder / "config.json").read_text())
        self.assertEqual((config["num_layers"], config["num_single_layers"], config["attention_head_dim"]), (2, 3, 128))
        self.run_tool("flux-model convert", "--in", folder, "--out", single)
        self.assertIn("transformer_blocks.0.attn.to_q.weight", header(single))
        self.run_tool("flux-model convert", "--in", MODEL, "--shard-size", "500kB", "--out", shards)
        self.run_tool("flux-model convert", "--in", folder, "--layout", "bfl", "--out", back)
        for path in (folder, single, self.folder / "s.safetensors.index.json", back):
            self.assertEqual(self.hash_of(path), one, path)
        self.assertEqual(tensors(back), tensors(MODEL))
        # as the reference program splits it
        split = tensors(single)
        for entry in json.loads((GOLDEN / "flux/layout.json").read_text()):
            self.assertEqual(split[entry["diffusers"]][2], entry["sha256"], entry["diffusers"])

    def test_dtypes_and_quantised(self):
        wide, narrow, f8, plain = (self.folder / f"{name}.safetensors" for name in ("f32", "bf16", "f8", "plain"))
        self.run_tool("flux-model convert", "--in", MODEL, "--dtype", "f32", "--out", wide)
        self.run_tool("flux-model convert", "--in", wide, "--dtype", "bf16", "--out", narrow)
        self.assertEqual(self.hash_of(narrow), self.hash_of(MODEL))
        self.run_tool("flux-model convert", "--in", MODEL, "--dtype", "fp8", "--out", f8)
        self.assertEqual({about["dtype"] for name, about in header(f8).items() if name != "__metadata__"}, {"F8_E4M3"})
        for kind in ("fp8", "nf4"):
            quantised, again = self.folder / f"q-{kind}.safetensors", self.folder / f"again-{kind}"
            self.run_tool("flux-model convert", "--in", MODEL, "--quantize", kind, "--out", quantised)
            # shards of it are it
            path = self.report("flux-model convert", "--in", quantised, "--shard-size", "500kB", "--out", again)["file"]
            self.assertEqual(self.hash_of(path), self.hash_of(quantised))
            # a plain model of it quantises to the same codes
            self.run_tool("flux-model convert", "--in", quantised, "--dtype", "f32", "--layout", "diffusers", "--out", plain)
            self.assertEqual(self.report("flux-model info", plain)["nets"][0]["layout"], "diffusers")
            plain.unlink()
            self.run_tool("flux-model convert", "--in", quantised, "--layout", "diffusers", "--out", plain, code=2)
        self.run_tool("flux-model convert", "--in", MODEL, "--quantize", "fp8", "--dtype", "bf16", "--out", plain, code=2)

    def test_other_nets(self):
        for net in ("ae", "t5", "clip"):
            file = FIXTURES / f"models/{net}.safetensors"
            out = self.folder / net
            # CLIP is known by the config.json beside it
            path = self.report("flux-model convert", "--in", file, "--shard-size", "500kB", "--out", out)["file"]
            if (file.parent / "config.json").exists() and net == "clip":
                (out / "config.json").write_bytes((file.parent / "config.json").read_bytes())
            self.assertEqual(self.hash_of(path), self.hash_of(file), net)
            self.run_tool("flux-model convert", "--in", file, "--quantize", "fp8", "--out", self.folder / "x.safetensors", code=2)
        ae = FIXTURES / "models/ae.safetensors"
        folder, back = self.folder / "vae", self.folder / "back.safetensors"
        self.run_tool("flux-model convert", "--in", ae, "--layout", "diffusers", "--out", folder)
        names = header(folder / "diffusion_pytorch_model.safetensors")
        self.assertIn("decoder.up_blocks.0.resnets.0.conv1.weight", names)
        self.assertEqual(len(names["encoder.mid_block.attentions.0.to_q.weight"]["shape"]), 2)
        self.assertEqual(self.hash_of(folder), self.hash_of(ae))
        self.run_tool("flux-model convert", "--in", folder, "--layout", "bfl", "--out", back)
        self.assertEqual(tensors(back), tensors(ae))
        self.run_tool("flux-model convert", "--in", FIXTURES / "models/t5.safetensors", "--layout", "bfl", "--out", back, code=2)

    def test_keeps_what_is_not_its_own(self):
        folder = self.folder / "weights"
        folder.mkdir()
        (folder / "other.safetensors").write_bytes(MODEL.read_bytes())
        said = self.run_tool("flux-model convert", "--in", MODEL, "--layout", "diffusers", "--out", folder, code=2).stderr
        self.assertIn("other.safetensors", said)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])

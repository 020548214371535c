"""Options whose effect takes more than two command lines to see: data sets of their own, damage, a killed run, or a memo of wrong hashes.

Each function takes a Lab and raises AssertionError where the option does nothing.
"""
import contextlib
import ctypes
import ctypes.util
import json
import os
import pathlib
import re
import signal
import socket
import struct
import subprocess
import time
import zlib


class Lab:
    """An empty folder with a home of its own, and the programs."""

    def __init__(self, bin_dir, fixtures, folder):
        self.bin, self.fixtures, self.models, self.folder = bin_dir, fixtures, fixtures / "models", folder
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "OMP_NUM_THREADS": "1", "LC_ALL": "C"}

    def start(self, tool, *arguments, **more):
        words = tool.split()
        return subprocess.Popen([self.bin / words[0], *words[1:], *map(str, arguments)], cwd=self.folder, env={**self.environment, **more},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, tool, *arguments, code=0, **more):
        """Exit code, stdout and stderr; `code` None: any will do."""
        child = self.start(tool, *arguments, **more)
        child.stdout_text, child.stderr_text = child.communicate(timeout=240)
        assert code is None or child.returncode == code, \
            f"{tool} {' '.join(map(str, arguments))}: exit {child.returncode}, not {code}: {child.stderr_text[-600:]}"
        return child

    def report(self, tool, *arguments, code=0, **more):
        return json.loads(self.run(tool, *arguments, "--json", code=code, **more).stdout_text)

    def json(self, path):
        return json.loads((self.folder / path).read_text())

    # what the caching tools and the trainer need besides what a scene is about

    def latents(self, *arguments, images=None, **more):
        return self.report("flux-cache-latents", *(["--images", images] if images else []), "--ae", self.models / "ae.safetensors", *arguments,
                           **more)

    def text(self, *arguments, images=None, **more):
        return self.report("flux-cache-text", *(["--images", images] if images else []), "--t5", self.models / "t5.safetensors", "--clip",
                           self.models / "clip.safetensors", *arguments, **more)

    def train(self, *arguments, latents=None, text=None, **more):
        return self.run("flux-train", "--latents", latents or self.fixtures / "latents", "--text", text or self.fixtures / "text", "--model",
                        self.models / "flux.safetensors", "--rank", "4", "--learning-rate", "0.001", "--seed", "3", *arguments, **more)

    def samples(self, cache):
        """What each sample of a cache is: caption or path, and the hash of its numbers."""
        about = json.loads(self.run("flux-cache inspect", cache, "--samples", "--json").stdout_text)
        return sorted(json.dumps(sample, sort_keys=True) for sample in about["samples"])

    def losses(self, run):
        return [json.loads(line)["loss"] for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]

    def pictures(self, folder, count, width=64, height=64, alpha=None, captions=True):
        """PNG files of stripes; `alpha` is a function of x that gives 0 to 255."""
        folder = self.folder / folder
        folder.mkdir()
        for i in range(count):
            rows = b""
            for y in range(height):
                row = b"".join(bytes([(x * 3 + i * 40) % 256, y * 3 % 256, 90]) + (bytes([alpha(x)]) if alpha else b"") for x in range(width))
                rows += b"\0" + row
            png(folder / f"{i}.png", width, height, 6 if alpha else 2, rows)
            if captions:
                (folder / f"{i}.txt").write_text(f"stripes {i}")
        return folder


def png(path, width, height, colour, rows):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)) +
                     chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def gif(path, frames, side=32):
    """An animation of plain frames: codes of 3 bits, the table emptied before it grows."""
    out = b"GIF89a" + struct.pack("<HHBBB", side, side, 0b10000001, 0, 0) + bytes(range(0, 12 * 20, 20))
    for k in range(frames):
        bits = [code for _ in range(side * side // 2) for code in (4, k, k)] + [5]
        number = sum(code << (3 * i) for i, code in enumerate(bits))
        data = number.to_bytes((3 * len(bits) + 7) // 8, "little")
        out += b"\x21\xf9\x04\0\x0a\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02"
        for i in range(0, len(data), 255):
            out += bytes([len(data[i:i + 255])]) + data[i:i + 255]
        out += b"\0"
    path.write_bytes(out + b";")


WRONG = "ab" * 32  # a hash that nothing has


def xxh3(data, bits):
    """As the programs write it in hex, of 64 or 128 bits, by Debian's libxxhash, which they link too."""
    class Hash(ctypes.Structure):
        _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]
    library = ctypes.CDLL(ctypes.util.find_library("xxhash") or "libxxhash.so.0")
    function = getattr(library, f"XXH3_{bits}bits")
    function.restype, function.argtypes = Hash if bits == 128 else ctypes.c_uint64, [ctypes.c_char_p, ctypes.c_size_t]
    found = function(data, len(data))
    return f"{found.high:016x}{found.low:016x}" if bits == 128 else f"{found:016x}"


def remember_wrong_hashes(lab):
    """What the programs remember of weight files, made wrong: it shows where it is believed."""
    memo = lab.home / ".cache/flux-stages/hashes.json"
    about = json.loads(memo.read_text())
    assert about["entries"], about
    for key, entry in about["entries"].items():
        entry.update(sha256=WRONG, check=xxh3(f"{key} {WRONG}".encode(), 64))
    memo.write_text(json.dumps(about))


def settled(lab):
    """The models, old enough to be remembered."""
    newest = max(path.stat().st_ctime for path in lab.models.glob("*.safetensors"))
    time.sleep(max(0, 1.5 - (time.time() - newest)))


# ---- flux-train

def train_import(lab):
    said = lab.run("flux-train", "--import-sd-scripts", "flux_train_network.py", "--pretrained_model_name_or_path",
                   "model.safetensors", "--network_module", "networks.lora_flux", "--max_train_steps", "7", "--network_dim", "5").stdout_text
    assert "max-steps = 7" in said and "rank = 5" in said, said


def train_resume(lab):
    lab.train("--out", "run", "--max-steps", "2")
    before = lab.losses("run")
    lab.train("--out", "run", "--max-steps", "3", code=2)
    lab.train("--out", "run", "--max-steps", "3", "--resume")
    assert lab.losses("run")[:2] == before and len(lab.losses("run")) == 3


def train_allow_change(lab):
    lab.train("--out", "run", "--max-steps", "1")
    change = ["--out", "run", "--max-steps", "2", "--resume", "--guidance", "2"]
    assert lab.train(*change, code=None).returncode != 0
    lab.train(*change, "--allow-change", "guidance")


def train_reproduce(lab):
    data = (lab.models / "flux.safetensors").read_bytes()
    (lab.folder / "nan.safetensors").write_bytes(data[:-4] + b"\xc0\x7f\xc0\x7f")  # in bfloat16 and in float32
    lab.run("flux-train", "--latents", lab.fixtures / "latents", "--text", lab.fixtures / "text", "--model", "nan.safetensors", "--max-steps", "9",
            "--out", "run", code=3)
    step, = (lab.folder / "run").glob("not-finite-*.safetensors")
    found = json.loads(lab.run("flux-train", "--config", "run/run.toml", "--reproduce", step, "--json").stdout_text)
    assert found["reproduced"], found


def train_replace(lab):
    lab.train("--out", "run", "--max-steps", "2")
    assert lab.train("--out", "run", "--max-steps", "1", code=None).returncode != 0
    lab.train("--out", "run", "--max-steps", "1", "--replace")
    assert len(lab.losses("run")) == 1 and len(lab.losses("run.old-1")) == 2


def train_max_epochs(lab):
    # 4 batches an epoch
    lab.train("--out", "epochs", "--max-epochs", "2", "--gradient-accumulation", "3")
    lab.train("--out", "steps", "--max-steps", "3", "--gradient-accumulation", "3")
    assert lab.losses("epochs") == lab.losses("steps")
    lab.train("--out", "more", "--max-epochs", "1", "--lr-scheduler", "cosine")
    assert len(lab.losses("more")) == 4
    told = (lab.folder / "more/run.toml").read_text()
    assert "max-epochs = 1" in told and "\nmax-steps" not in told, told
    lab.train("--out", "on", "--max-epochs", "1")
    lab.train("--out", "on", "--max-epochs", "2", "--resume")
    assert len(lab.losses("on")) == 8
    lab.train("--out", "both", "--max-epochs", "1", "--max-steps", "2", code=2)


def train_no_tags(lab):
    folder = lab.pictures("secret-place", 2)
    (folder / "0.txt").write_text("Zebra on a Bicycle, hidden words")
    (folder / "1.txt").write_text("hidden words, a zebra")
    model = lab.folder / "model-of-mine.safetensors"
    model.write_bytes((lab.models / "flux.safetensors").read_bytes())
    lab.latents("--resolution", "64x64", "--out", "hidden-latents", images="secret-place")
    lab.text("--out", "hidden-text", images="secret-place")
    found = {}
    for name, more in (("plain", []), ("private", ["--no-tags"])):
        lab.run("flux-train", "--latents", "hidden-latents", "--text", "hidden-text", "--model", model, "--out", f"run-of-{name}", "--max-steps", "2",
                "--ema-decay", "0.5", *more)
        step, = (lab.folder / f"run-of-{name}").glob("step-*")
        found[name] = {}
        for file in step.glob("*.safetensors"):
            data = file.read_bytes()
            found[name][file.name] = json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]]).get("__metadata__", {})
            if name == "private":
                for word in (b"zebra", b"hidden", b"bicycle", b"secret", b"mine", b"run-of", b"subset", str(lab.folder).encode(), b"stripes"):
                    assert word not in data.lower(), f"{file.name} holds {word}"
    about = found["plain"]["lora.safetensors"]
    assert json.loads(about["ss_tag_frequency"]) == {"subset-0": {"zebra on a bicycle": 1, "hidden words": 2, "a zebra": 1}}, about
    assert json.loads(about["ss_dataset_dirs"]) == {"subset-0": {"n_repeats": 1, "img_count": 2}}, about
    assert json.loads(about["ss_reg_dataset_dirs"]) == {}
    assert about["ss_sd_model_name"] == "model-of-mine.safetensors"
    private = found["private"]["lora.safetensors"]
    gone = {"ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_sd_model_name"}
    # hashes are of all that is said
    assert set(about) - set(private) == gone and all(about[key] == private[key] for key in private if not key.startswith("sshs_"))


def weighted_caches(lab, subset):
    """Two subsets, the second one with `subset`, of pictures whose left half is transparent."""
    lab.pictures("own", 2, alpha=lambda x: 255 if x > 31 else 0)
    lab.pictures("other", 2, alpha=lambda x: 255 if x > 31 else 0)
    (lab.folder / "set.toml").write_text("[[datasets]]\nresolution = 64\nbatch_size = 1\n"
                                         "[[datasets.subsets]]\nimage_dir = 'own'\ncaption_extension = '.txt'\n"
                                         f"[[datasets.subsets]]\nimage_dir = 'other'\ncaption_extension = '.txt'\n{subset}\n")
    lab.latents("--dataset", "set.toml", "--out", "latents")
    lab.text("--dataset", "set.toml", "--out", "text")
    return {"latents": lab.folder / "latents", "text": lab.folder / "text"}


def train_prior_loss_weight(lab):
    caches = weighted_caches(lab, "is_reg = true")
    lab.train("--out", "one", "--max-steps", "4", **caches)
    lab.train("--out", "third", "--max-steps", "4", "--prior-loss-weight", "0.25", **caches)
    one, third = lab.losses("one"), lab.losses("third")
    assert one != third
    # the first regularisation image meets weights that are equal or nearly so
    ratios = [b / a for a, b in zip(one, third)]
    assert min(abs(ratio - 0.25) for ratio in ratios) < 0.02 and min(abs(ratio - 1) for ratio in ratios) < 0.02, ratios


def train_masked_loss(lab):
    caches = weighted_caches(lab, "alpha_mask = true")
    runs = {}
    for mode in ("off", "on", "renormalised"):
        lab.train("--out", mode, "--max-steps", "4", f"--masked-loss={mode}", **caches)
        runs[mode] = lab.losses(mode)
    assert runs["off"] != runs["on"] != runs["renormalised"] != runs["off"], runs
    lab.train("--out", "auto", "--max-steps", "4", **caches)
    assert lab.losses("auto") == runs["on"]


def train_plan(lab):
    arguments = ["--model", lab.models / "flux.safetensors", "--method", "lora", "--device", "cpu"]
    assert lab.run("flux-train", *arguments, code=None).returncode == 2  # no caches, nothing to train
    table = lab.run("flux-train", "--plan", "--resolution", "64x64", *arguments).stdout_text
    assert "total" in table or "peak" in table, table
    assert json.loads(lab.run("flux-train", "--plan=json", "--resolution", "64x64", *arguments).stdout_text)["fits"]


def train_reader_threads(lab):
    def threads(count):
        child = lab.start("flux-train", "--latents", lab.fixtures / "latents", "--text", lab.fixtures / "text", "--model",
                          lab.models / "flux.safetensors", "--out", f"run{count}", "--max-steps", "100000", "--reader-threads", count)
        metrics = lab.folder / f"run{count}/metrics.jsonl"
        try:
            for _ in range(600):
                if child.poll() is not None:
                    raise AssertionError(child.communicate()[1][-600:])
                if metrics.exists() and metrics.read_text().count("\n") >= 2:
                    break
                time.sleep(0.1)
            return len(os.listdir(f"/proc/{child.pid}/task"))
        finally:
            child.kill()
            child.communicate()
    one, five = threads(1), threads(5)
    assert five == one + 4, f"{one} threads with one reader, {five} with five"


def train_rehash(lab):
    settled(lab)

    def hash_of(run):
        names = sorted(path for path in (lab.folder / run).rglob("*") if path.suffix in (".json", ".html", ".toml"))
        return any(WRONG in path.read_text() for path in names)
    lab.train("--out", "first", "--max-steps", "1")
    remember_wrong_hashes(lab)
    lab.train("--out", "believed", "--max-steps", "1")
    lab.train("--out", "anew", "--max-steps", "1", "--rehash")
    assert hash_of("believed") and not hash_of("anew") and not hash_of("first")


# ---- several ranks

def start_ranks(lab, out, of_rank, *more):
    """A process for each of `of_rank`, its own options."""
    return [lab.start("flux-train", "--latents", lab.fixtures / "latents", "--text", lab.fixtures / "text", "--model",
                      lab.models / "flux.safetensors", "--rank", "4", "--learning-rate", "0.001", "--seed", "3", "--batch-size", "1", "--out", out,
                      *options, *more) for options in of_rank]


def ranks(lab, out, of_rank, *more):
    """The same, ended."""
    children = start_ranks(lab, out, of_rank, *more)
    for child in children:
        child.stdout_text, child.stderr_text = child.communicate(timeout=240)
    return children


BOTH = [["--dist-rank", "0", "--dist-world", "2"], ["--dist-rank", "1", "--dist-world", "2"]]


def train_dist(lab):
    """Rank and world: two processes have twice the samples a step, and the second writes nothing."""
    first, second = ranks(lab, "out", BOTH, "--max-steps", "1")
    assert first.returncode == second.returncode == 0, first.stderr_text + second.stderr_text
    line, = (lab.folder / "out/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["samples"] == 2 and first.stdout_text and not second.stdout_text


def train_dist_store(lab):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for child in ranks(lab, "out", BOTH, "--max-steps", "1", "--dist-store", f"127.0.0.1:{port}"):
        assert child.returncode == 0 and f"meeting at 127.0.0.1:{port}" in child.stderr_text, child.stderr_text
    for child in ranks(lab, "other", BOTH, "--max-steps", "1", "--dist-store", "./of all/ranks"):
        assert child.returncode == 0 and "meeting at the address in ./of all/ranks" in child.stderr_text, child.stderr_text


def train_dist_start_timeout(lab):
    for seconds in ("1", "3"):
        alone, = ranks(lab, "out", BOTH[:1], "--max-steps", "1", "--dist-start-timeout", seconds)
        assert alone.returncode == 5 and f"did not come within {seconds} s" in alone.stderr_text, alone.stderr_text


def train_dist_timeout(lab):
    """A rank that hangs is noticed after as many seconds: the default is 30."""
    children = start_ranks(lab, "out", BOTH, "--max-steps", "100000", "--dist-timeout", "3")
    end = time.monotonic() + 120
    while not (lab.folder / "out/metrics.jsonl").exists():
        assert time.monotonic() < end and children[0].poll() is None, "no step was made"
        time.sleep(0.05)
    children[1].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    _, error = children[0].communicate(timeout=120)
    children[1].kill()
    children[1].communicate()
    assert children[0].returncode == 5 and "rank 1 of 2" in error and time.monotonic() - begun < 25, error


def train_exact_reduction(lab):
    """With several batches a rank the order of the sums shows, if in few bits."""
    def weights(name, *more, ranks_of=BOTH):
        for child in ranks(lab, name, ranks_of, "--max-steps", "3", *more):
            assert child.returncode == 0, child.stderr_text
        return (lab.folder / name / "step-000003/state.safetensors").read_bytes().split(b"}}", 1)[1]
    one = weights("one", "--gradient-accumulation", "6", ranks_of=[[]])
    assert weights("exact", "--gradient-accumulation", "3", "--exact-reduction") == one
    assert weights("plain", "--gradient-accumulation", "3") != one


# ---- the caching tools

def encode_rehash(encode):
    def scene(lab):
        settled(lab)
        once = getattr(lab, encode)
        for name, more in (("first", []), ("believed", []), ("anew", ["--rehash"])):
            if name == "believed":
                remember_wrong_hashes(lab)
            once("--out", name, *(["--resolution", "64x64"] if encode == "latents" else []), *more, images=lab.fixtures / "images")
        found = {name: WRONG in json.dumps(lab.json(f"{name}/manifest.json")["weights"]) for name in ("first", "believed", "anew")}
        assert found == {"first": False, "believed": True, "anew": False}, found
    return scene


def encode_reproduce(encode):
    def scene(lab):
        more = ["--resolution", "64x64"] if encode == "latents" else []
        once = getattr(lab, encode)
        once("--out", "out", *more, images=lab.fixtures / "images")
        again = once("--out", "out", *more, images=lab.fixtures / "images")
        found = once("--out", "out", *more, "--reproduce", "3", images=lab.fixtures / "images")
        assert again["encoded"] == 0 and found["samples"] == 3 and found["equal"] == 3, (again, found)
    return scene


def latents_max_failed(lab):
    folder = lab.pictures("images", 2)
    (folder / "bad.png").write_bytes((folder / "0.png").read_bytes()[:90])
    (folder / "bad.txt").write_text("cut")
    arguments = ["--out", "out", "--resolution", "64x64"]
    assert lab.latents(*arguments, images="images", code=6)["failed"] == 1
    assert lab.latents(*arguments, "--max-failed", "1", images="images")["failed"] == 1


def text_max_failed(lab):
    (lab.pictures("images", 2) / "1.txt").write_bytes(b"not \xff UTF-8")
    assert lab.text("--out", "out", images="images", code=6)["failed"] == 1
    assert lab.text("--out", "out", "--max-failed", "1", images="images")["failed"] == 1


def latents_animated(lab):
    folder = lab.pictures("images", 1, 32, 32)
    gif(folder / "moving.gif", 3)
    (folder / "moving.txt").write_text("moving")
    arguments = ["--resolution", "64x64", "--out"]
    assert lab.latents(*arguments, "first", images="images")["encoded"] == 2
    found = lab.latents(*arguments, "refuse", "--animated", "refuse", images="images", code=6)
    assert found["encoded"] == 1 and found["failed"] == 1, found


def latents_background(lab):
    lab.pictures("images", 1, alpha=lambda x: 4 * x)
    for name in ("white", "black"):
        lab.latents("--resolution", "64x64", "--out", name, "--background", name, images="images")
    assert lab.samples("white") != lab.samples("black")


def latents_profile(lab):
    lab.pictures("images", 1, alpha=lambda x: 4 * x)  # composited in one, dropped in the other
    values = {}
    for name in ("default", "kohya"):
        lab.latents("--resolution", "64x64", "--out", name, "--profile", name, images="images")
        lab.run("flux-cache export", name, "--out", f"{name}-out")
        files = [path.read_bytes() for path in sorted((lab.folder / f"{name}-out").rglob("*.safetensors"))]
        values[name] = [data[8 + struct.unpack("<Q", data[:8])[0]:] for data in files]
    assert values["default"] and values["default"] != values["kohya"]


def latents_batch_size(lab):
    lab.pictures("images", 5)
    for size, passes in ((1, 5), (2, 3)):
        child = lab.run("flux-cache-latents", "--images", "images", "--ae", lab.models / "ae.safetensors", "--resolution", "64x64", "--out",
                        f"out{size}", "--batch-size", size)
        assert f"AE: 5 images passes={passes} batch_size={size}" in child.stderr_text, child.stderr_text
    assert lab.samples("out1") == lab.samples("out2")


def text_batch_size(lab):
    for size, words in ((1, "1 caption a pass"), (3, "3 captions a pass")):
        child = lab.run("flux-cache-text", "--images", lab.fixtures / "images", "--t5", lab.models / "t5.safetensors", "--clip",
                        lab.models / "clip.safetensors", "--out", f"out{size}", "--batch-size", size)
        assert words in child.stderr_text, child.stderr_text
    assert lab.samples("out1") == lab.samples("out3")


def text_prompts(lab):
    (lab.folder / "prompts.txt").write_text("# none\na cat\n\na dog\n")
    assert lab.text("--out", "out", "--prompts", "prompts.txt")["encoded"] == 2
    assert [sample for sample in lab.samples("out") if "a cat" in sample]


def text_missing_caption(lab):
    (lab.pictures("images", 2) / "1.txt").unlink()
    assert lab.run("flux-cache-text", "--images", "images", "--t5", lab.models / "t5.safetensors", "--clip", lab.models / "clip.safetensors",
                   "--out", "out", code=3)
    assert lab.text("--out", "out", "--missing-caption", "empty", images="images")["encoded"] == 2


def text_profile(lab):
    (lab.pictures("images", 1) / "0.txt").write_bytes("\ufeffmarked".encode())  # stripped, or part of the caption
    for name in ("default", "kohya"):
        lab.text("--out", name, "--profile", name, images="images")
    assert lab.samples("default") != lab.samples("kohya")


def random_captions(lab):
    (lab.pictures("images", 1) / "0.txt").write_text("one, two, three, four, five, six, seven")
    (lab.folder / "set.toml").write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'images'\ncaption_extension = '.txt'\n"
                                         "shuffle_caption = true\n")
    return ["--dataset", "set.toml"]


def text_variants(lab):
    dataset = random_captions(lab)
    assert lab.text(*dataset, "--out", "eight")["encoded"] == 8
    assert lab.text(*dataset, "--out", "three", "--text-variants", "3")["encoded"] == 3


def text_seed(lab):
    dataset = random_captions(lab)
    for name, more in (("zero", []), ("again", ["--seed", "0"]), ("five", ["--seed", "5"])):
        lab.text(*dataset, "--out", name, *more)
    assert lab.samples("zero") == lab.samples("again") != lab.samples("five")


# ---- the verbs

def verify_deep(lab):
    lab.latents("--resolution", "64x64", "--out", "out", images=lab.fixtures / "images")
    segment = next((lab.folder / "out").glob("seg-*.h5"))
    data = bytearray(segment.read_bytes())
    frames = [at for at in range(len(data) - 4) if data[at:at + 4] == b"\x28\xb5\x2f\xfd"]
    data[frames[-2] + 40] ^= 1  # inside a picture's numbers, which come behind the tables
    segment.write_bytes(data)
    # a manifest that vouches for the damaged file: its sums are right
    path = lab.folder / "out/manifest.json"
    manifest = json.loads(path.read_text())
    canonical = {"sort_keys": True, "ensure_ascii": False, "separators": (",", ":")}
    checksum = manifest.pop("checksum")
    assert xxh3(json.dumps(manifest, **canonical).encode(), 128) == checksum, "the test's own sum of a manifest"
    manifest["segments"][0]["xxh3_128"] = xxh3(bytes(data), 128)
    manifest["checksum"] = xxh3(json.dumps(manifest, **canonical).encode(), 128)
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    assert lab.report("flux-cache verify", "out")["ok"]
    assert not lab.report("flux-cache verify", "out", "--deep", code=1)["ok"]


def merge_strict(lab):
    # a machine without the wide instructions rounds otherwise
    narrow = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    for name, shard, more in (("a", "0/2", {}), ("b", "1/2", {}), ("c", "0/2", narrow)):
        lab.text("--dtype", "f32", "--shard", shard, "--out", name, images=lab.fixtures / "images", **more)
    assert lab.report("flux-cache merge", "a", "b", "c", "--out", "loose")["conflicts"] > 0
    lab.run("flux-cache merge", "a", "b", "c", "--out", "strict", "--strict", code=4)


def merge_out(lab):
    for i in range(2):
        lab.text("--shard", f"{i}/2", "--out", f"part{i}", images=lab.fixtures / "images")
    lab.run("flux-cache merge", "part0", "part1", code=2)
    lab.run("flux-cache merge", "part0", "part1", "--out", "whole")
    assert lab.samples("whole") == lab.samples(lab.fixtures / "text")


def gc_dry_run(lab):
    folder = lab.pictures("images", 3)
    lab.latents("--resolution", "64x64", "--out", "out", images="images")
    for name in ("2.png", "2.txt"):
        (folder / name).unlink()
    lab.latents("--resolution", "64x64", "--out", "out", images="images")
    for more, removed in ((["--dry-run"], 1), (["--dry-run"], 1), ([], 1), ([], 0)):
        assert lab.report("flux-cache gc", "out", *more)["removed_samples"] == removed, more


def inspect_recover(lab):
    folder = lab.folder / "images"
    folder.mkdir()
    for i in range(400):
        (folder / f"{i}.png").write_text("no picture is opened")
        (folder / f"{i}.txt").write_text(f"photo {i}")
    child = lab.start("flux-cache-text", "--images", "images", "--t5", lab.models / "t5.safetensors", "--clip", lab.models / "clip.safetensors",
                      "--out", "out")
    while child.poll() is None and not any(path.stat().st_size > 4096 for path in (lab.folder / "out").glob(".journal-*")):
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "it ended before it was killed"
    plain, recovered = (lab.report("flux-cache inspect", "out", *more) for more in ([], ["--recover"]))
    assert plain["num_samples"] == 0 < recovered["num_samples"] == plain["num_in_journals"], (plain, recovered)


def model_info_rehash(lab):
    settled(lab)
    model = lab.models / "flux.safetensors"
    first = lab.run("flux-model info", model).stdout_text
    remember_wrong_hashes(lab)
    assert WRONG in lab.run("flux-model info", model).stdout_text
    assert lab.run("flux-model info", model, "--rehash").stdout_text == first


def quantize(lab):
    sizes = {}
    for name in ("fp8", "nf4"):
        lab.run("flux-model convert", "--quantize", name, "--in", lab.models / "flux.safetensors", "--out", f"{name}.safetensors")
        sizes[name] = (lab.folder / f"{name}.safetensors").stat().st_size
    assert sizes["nf4"] < sizes["fp8"] < (lab.models / "flux.safetensors").stat().st_size, sizes


def names_of_begun(lab, *arguments):
    """Names of the tensors of the large file that flux-model tiny begins; it is not let finish."""
    child = lab.start("flux-model tiny", "--out", "begun", *arguments)
    try:
        while child.poll() is None:
            for path in (lab.folder / "begun").glob("*"):
                with path.open("rb") as file:
                    start = file.read(8)
                    size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
                    text = file.read(size)
                    if size and len(text) == size and text.startswith(b"{") and text.rstrip().endswith(b"}"):
                        return set(json.loads(text))
            time.sleep(0.01)
        raise AssertionError(child.communicate()[1])
    finally:
        child.kill()
        child.communicate()
        for path in (lab.folder / "begun").glob("*"):
            path.unlink()


def tiny_geometry(lab):
    dev, schnell = (names_of_begun(lab, "--geometry", name, "--depth", "1,1") for name in ("dev", "schnell"))
    assert any(name.startswith("guidance_in.") for name in dev) and not any(name.startswith("guidance_in.") for name in schnell)


def tiny_depth(lab):
    for depth in ((1, 2), (2, 1)):
        names = names_of_begun(lab, "--geometry", "dev", "--depth", f"{depth[0]},{depth[1]}")
        found = tuple(len({name.split(".")[1] for name in names if name.startswith(f"{kind}_blocks.")}) for kind in ("double", "single"))
        assert found == depth, (found, depth)


# ---- sampling and decoding

def sample_rehash(lab):
    settled(lab)
    arguments = ("--text", lab.fixtures / "prompts", "--model", lab.models / "flux.safetensors", "--size", "64x64", "--steps", "1")

    def wrong_in(name, *more):
        lab.run("flux-sample", *arguments, "--out", name, *more)
        return WRONG.encode() in (lab.folder / name).read_bytes()
    assert not wrong_in("first.h5")
    remember_wrong_hashes(lab)
    assert wrong_in("believed.h5") and not wrong_in("anew.h5", "--rehash")


def decode_overwrite(lab):
    arguments = (lab.fixtures / "samples.h5", "--ae", lab.models / "ae.safetensors", "--out", "out")
    assert lab.report("flux-decode", *arguments)["decoded"] == 2
    assert lab.report("flux-decode", *arguments)["kept"] == 2
    assert lab.report("flux-decode", *arguments, "--overwrite")["decoded"] == 2


def decode_scratch(lab):
    lab.run("flux-sample", "--text", lab.fixtures / "prompts", "--model", lab.models / "flux.safetensors", "--size", "1024x768", "--steps", "1", "--out",
            "large.h5")
    arguments = ("large.h5", "--ae", lab.models / "ae.safetensors", "--limit", "1")
    refusal = lab.run("flux-decode", *arguments, "--out", "none", "--memory", "1MB", code=5).stderr_text
    least = re.search(r"takes ([0-9.]+) MiB", refusal).group(1)
    memory = ("--memory", f"{float(least) + 8:.0f}MiB")
    assert lab.report("flux-decode", *arguments, "--out", "small", *memory)["scratch_bytes"] > 0
    lab.run("flux-decode", *arguments, "--out", "nowhere", *memory, "--scratch", "/proc/no", code=5)
    assert lab.report("flux-decode", *arguments, "--out", "large")["scratch_bytes"] == 0

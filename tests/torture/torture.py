"""What the programs of this folder share: two tools on small data, their runs, and what a cache folder holds."""
import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

KINDS = ("latents", "text")
PATIENCE = 500  # seconds for a program that takes a few: only what hangs takes longer; less than ctest's limit


ROOT = os.geteuid() == 0


def mount(*words):
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


class Failure(Exception):
    """Something was lost, wrong or badly reported."""


def require(true, message):
    if not true:
        raise Failure(message)


def arguments(description, **counts):
    """--build and --seed, and an integer flag for each of `counts`: its default is the short form's."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parents[2] / "build/ci")
    parser.add_argument("--seed", type=int, default=None, help="repeats the choices of an earlier run")
    for name, default in counts.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    given = parser.parse_args()
    given.build = given.build.resolve()
    if given.seed is None:
        given.seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {given.seed}", flush=True)
    return given


def png(width, height, seed, alpha):
    """A picture that differs from that of every other seed."""
    numbers = random.Random(seed)
    rows = b"".join(b"\0" + numbers.randbytes((4 if alpha else 3) * width) for _ in range(height))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6 if alpha else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


class Contents:
    """A folder as cache_contents reads it. Sets hold (key, xxh3)."""

    def __init__(self, lines):
        self.published, self.journal, self.wanted = set(), set(), set()
        self.by_file = {}
        self.listed = set()  # by flux-cache inspect --recover
        self.complete = False
        self.bad = []
        for line in lines.splitlines():
            word, *rest = line.split(" ")
            if word == "bad":
                self.bad.append(line)
            elif word == "complete":
                self.complete = True
            elif word == "wanted":
                self.wanted.add(tuple(rest))
            elif word in ("published", "journal"):
                getattr(self, word).add(tuple(rest[1:]))
                self.by_file.setdefault(rest[0], set()).add(tuple(rest[1:]))
            else:
                self.bad.append(line)  # the rest of a message

    @property
    def samples(self):
        return self.published | self.journal


class Tool:
    """One of the two encoding tools with a data set of its own in `folder`.

    The data set has versions: version v > 0 has new content in a third of the items of version 0, and half as many items
    less. reference(v) is what an uninterrupted run on an empty folder makes of it: a set of (key, xxh3).
    """

    def __init__(self, kind, build, folder, models, num_items):
        self.kind, self.build, self.folder, self.num_items = kind, build, folder, num_items
        self.images, self.models = folder / "images", models
        self.images.mkdir(parents=True)
        (folder / "home").mkdir()
        # a picture with transparent parts has a second tensor, its mask
        (folder / "set.toml").write_text(
            f"[[datasets]]\nresolution = 32\nenable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\n"
            f"bucket_reso_steps = 16\n[[datasets.subsets]]\nimage_dir = '{self.images}'\nalpha_mask = true\n"
            f"caption_extension = '.txt'\n")
        self.flags = []  # more of them
        self.version = None
        self.references = {}
        self.full_seconds = self.idle_seconds = 0  # of an uninterrupted run of version 0, and of one that has nothing to do
        self.set_version(0)

    def set_version(self, version):
        if version == self.version:
            return
        self.version = version
        left_out = version > 0 and self.num_items // 6
        for i in range(self.num_items):
            picture, caption = self.images / f"{i:04d}.png", self.images / f"{i:04d}.txt"
            if left_out and (i + version) % 6 == 0:
                picture.unlink(missing_ok=True)
                caption.unlink(missing_ok=True)
                continue
            content = 1000 * (version if i % 3 == version % 3 else 0) + i
            if self.kind == "latents":
                picture.write_bytes(png(48 if i % 2 else 32, 32 if i % 4 else 48, content, alpha=i % 5 == 0))
            else:
                picture.write_bytes(b"no picture is opened")
            caption.write_text(f"photo {content}\n")

    def spoil_item(self):
        """Makes the first item of version 0 one that cannot be encoded."""
        self.set_version(0)
        self.version = None  # to be written anew
        file = self.images / ("0000.png" if self.kind == "latents" else "0000.txt")
        file.write_bytes(file.read_bytes()[:40] + b"caf\xe9")

    def command(self, out):
        start = [str(self.build / "bin" / f"flux-cache-{self.kind}"), "--dataset", str(self.folder / "set.toml"), "--out", str(out),
                 "--device", "cpu", "--json", *self.flags]
        if self.kind == "latents":
            return start + ["--ae", str(self.models / "ae.safetensors")]
        return start + ["--t5-length", "256", "--t5", str(self.models / "t5.safetensors"),
                        "--clip", str(self.models / "clip.safetensors"),
                        "--t5-tokenizer", str(self.models / "tokenizers/t5/spiece.model"),
                        "--clip-tokenizer", str(self.models / "tokenizers/clip")]

    def environment(self, out, **shim):
        """Of a run; `shim` are the variables of shim.cpp without TORTURE_, in lower case."""
        variables = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
        variables |= {"HOME": str(self.folder / "home"), "LC_ALL": "C", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
        if shim:
            variables |= {"LD_PRELOAD": str(self.build / "torture/torture_shim.so"), "TORTURE_FOLDER": str(shim.pop("folder", out))}
            variables |= {"TORTURE_" + name.upper(): str(value) for name, value in shim.items()}
        return variables

    def start(self, out, prefix=(), **shim):
        return subprocess.Popen([*prefix, *self.command(out)], env=self.environment(out, **shim), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
                                start_new_session=True)

    def run(self, out, prefix=(), **shim):
        """An uninterrupted run: (exit code, its report, stderr). A killed program has a negative code."""
        process = self.start(out, prefix, **shim)
        stdout, stderr = communicate(process)
        return process.returncode, json.loads(stdout) if stdout.strip() else None, stderr

    def contents(self, out):
        done = subprocess.run([self.build / "torture/cache_contents", out], capture_output=True, text=True, timeout=300)
        require(done.returncode in (0, 1), f"cache_contents ended with {done.returncode}: {done.stdout[-500:]}{done.stderr}")
        found = Contents(done.stdout)
        if out.exists() and not found.bad:
            self.compare_inspect(out, found)
        return found

    def compare_inspect(self, out, found):
        """flux-cache inspect says of any folder what cache_contents reads in it, and changes nothing."""
        before = sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir())
        done = subprocess.run([self.build / "bin/flux-cache", "inspect", out, "--json", "--samples", "--recover"],
                              capture_output=True, text=True, timeout=300)
        require(done.returncode == 0, f"flux-cache inspect ended with {done.returncode}: {done.stderr}")
        report = json.loads(done.stdout)
        listed = {(sample["key"], sample["tensor_xxh3"]) for sample in report["samples"]}
        # of a complete cache what its items want, and what a run has made since; else all there is
        at_least = found.journal | (found.wanted if found.complete else found.published)
        found.listed = listed
        require(at_least <= listed <= found.samples and report["num_samples"] == len(listed) and
                report["complete"] == found.complete and not report["problems"],
                f"flux-cache inspect says num_samples {report['num_samples']}, lists {len(listed)}, complete {report['complete']}, "
                f"problems {report['problems']}; at least {len(at_least)} are there, complete {found.complete}")
        require(sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir()) == before,
                "flux-cache inspect changed the folder")

    def reference(self, version):
        if version not in self.references:
            self.set_version(version)
            out = self.folder / f"reference-{version}"
            before = time.monotonic()
            code, report, stderr = self.run(out)
            seconds = time.monotonic() - before
            require(code == 0, f"the uninterrupted run ended with {code}:\n{stderr}")
            found = self.contents(out)
            require(found.complete and not found.bad and len(found.wanted) == report["encoded"] > 0,
                    f"the uninterrupted run made {len(found.wanted)} samples: {report} {found.bad}")
            self.references[version] = found.wanted
            if version == 0:
                self.full_seconds = seconds
                before = time.monotonic()
                code, report, stderr = self.run(out)
                self.idle_seconds = time.monotonic() - before
                require(code == 0 and report["encoded"] == 0, f"the second run ended with {code}: {report}\n{stderr}")
            shutil.rmtree(out)
        return self.references[version]

    def known(self):
        """Every sample of every reference by its key."""
        return {key: xxh3 for reference in self.references.values() for key, xxh3 in reference}

    def check(self, found, where):
        """Nothing under a published name is bad, and every sample is that of an uninterrupted run."""
        require(not found.bad, f"{where}: {found.bad}")
        known = self.known()
        wrong = [key for key, xxh3 in found.samples | found.wanted if known.get(key) != xxh3]
        require(not wrong, f"{where}: samples with other content: {wrong}")

    def complete(self, out, where, must_keep=None, **shim):
        """Runs the tool to its end: it succeeds, makes the reference's samples, encodes none of `must_keep` again."""
        reference = self.reference(self.version)
        code, report, stderr = self.run(out, **shim)
        require(code == 0, f"{where}: the next run ended with {code}:\n{stderr}")
        self.check_complete(out, where, report, reference, must_keep)
        return report

    def check_complete(self, out, where, report, reference, must_keep=None):
        found = self.contents(out)
        self.check(found, where)
        require(found.complete, f"{where}: the next run left no manifest")
        require(found.wanted == reference,
                f"{where}: {len(found.wanted ^ reference)} samples differ from an uninterrupted run's")
        if must_keep is not None:
            kept = len(must_keep & reference)
            require(report["kept"] == kept, f"{where}: {kept} samples were finished, the next run kept {report['kept']}")
        hidden = sorted(name for name in os.listdir(out) if name.startswith("."))
        require(not hidden, f"{where}: the finished cache has {hidden}")
        require(not found.journal, f"{where}: the finished cache has a journal")


class Workspace:
    """A temporary folder with tiny models and both tools; removed at the end."""

    def __init__(self, given, num_items):
        self.given = given
        self.num_items = num_items

    def __enter__(self):
        self.temporary = tempfile.TemporaryDirectory(prefix="flux-torture-")
        self.folder = pathlib.Path(self.temporary.name).resolve()
        try:
            made = subprocess.run([self.given.build / "bin/flux-model", "tiny", "--out", self.folder / "models", "--seed", "7"],
                                  capture_output=True, text=True, env=dict(os.environ, HOME=str(self.folder)))
            require(made.returncode == 0, f"flux-model tiny: {made.stderr}")
            self.tools = [Tool(kind, self.given.build, self.folder / kind, self.folder / "models", self.num_items)
                          for kind in KINDS]
        except BaseException:
            self.temporary.cleanup()
            raise
        return self

    def __exit__(self, *_):
        self.temporary.cleanup()


def both(workspace, work):
    """work(tool, random numbers of its own) for both tools at once. Returns the exit code; prints failures."""
    failures = []

    def attempt(tool):
        try:
            work(tool, random.Random(f"{workspace.given.seed} {tool.kind}"))
        except Exception as error:  # whatever it is, the other tool's thread ends first
            failures.append(f"{tool.kind}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=attempt, args=(tool,)) for tool in workspace.tools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"failures {len(failures)}")
    return 1 if failures else 0


class Progress:
    """Counts the cases that the tools' threads have done; says so every half minute."""

    def __init__(self):
        self.planned = self.done = 0
        self.lock = threading.Lock()
        self.said = time.monotonic()

    def plan(self, cases):
        with self.lock:
            self.planned += cases

    def step(self):
        with self.lock:
            self.done += 1
            if time.monotonic() - self.said >= 30:
                self.said = time.monotonic()
                print(f"{self.done} of {self.planned} cases planned so far", flush=True)


class Operation:
    """One line of a log of shim.cpp."""

    def __init__(self, letter, start, end, offset, length, path, other, data):
        self.letter, self.start, self.end, self.offset, self.length = letter, start, end, offset, length
        self.path, self.other, self.data = path, other, data


def read_log(file):
    bytes_ = pathlib.Path(file).read_bytes()
    operations, at = [], 0
    while at < len(bytes_):
        letter, len_a, len_b, start, end, offset, length, len_data = struct.unpack_from("<cIIqqqqq", bytes_, at)
        at += 49
        a, b = bytes_[at:at + len_a].decode(), bytes_[at + len_a:at + len_a + len_b].decode()
        at += len_a + len_b
        operations.append(Operation(letter.decode(), start, end, offset, length, a, b, bytes_[at:at + len_data]))
        at += len_data
    return operations


def communicate(process):
    """(stdout, stderr) of a program of its own session. One that hangs is a Failure, and all of the session ends."""
    try:
        return process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, stderr = process.communicate()
        raise Failure(f"{process.args[0]} has not ended after {PATIENCE} s:\n{stderr}") from None


class Lag:
    """Measures, while it is entered, by how many seconds at most this machine wakes a sleeper too late."""

    def __enter__(self):
        self.seconds = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.measure)
        self.thread.start()
        return self

    def measure(self):
        step = 0.02
        before = time.monotonic()
        while not self.over.wait(step):
            now = time.monotonic()
            self.seconds = max(self.seconds, now - before - step)
            before = now

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def kill(process):
    """SIGKILL and wait. Returns whether the process was still running."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def main(work, given, num_items):
    """Runs work(tool, numbers) on both tools and ends the program."""
    with Workspace(given, num_items) as workspace:
        code = both(workspace, work)
    sys.exit(code)

"""What the programs that torture flux-train share: small runs that stream, and what their folders hold."""
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

import torture

# of both kinds of training; every run goes on from what is there
COMMON = ["--save-every", "1", "--resume", "--seed", "5", "--learning-rate", "1e-3", "--resident-blocks", "0"]
FLAGS = {
    # every third batch of an epoch of four ends an update: updates cross the ends of epochs
    "full": ["--method", "full", "--optimizer", "adamw8bit", "--precision", "bf16", "--block-inputs", "disk",
             "--gradient-accumulation", "3", "--ema-decay", "0.8", "--ema-dtype", "bf16"],
    "lora": ["--rank", "64", "--stream-adapters", "--batch-size", "2", "--gradient-accumulation", "2", "--optimizer", "adamw8bit",
             "--ema-decay", "0.8"],
}
PLAIN = {"run.toml", "metrics.jsonl", "report.html", "tensorboard"}  # what else is in a run's folder


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def metrics(out):
    """The log's lines without what a clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = ("second", "share", "memory")  # what the machine decides
    return [{key: value for key, value in line.items() if not any(word in key for word in measured)} for line in lines]


class Training:
    """One kind of training on the fixtures of the command-line cases."""

    def __init__(self, kind, build, folder, fixtures, steps):
        self.kind, self.build, self.fixtures, self.steps = kind, build, fixtures, steps
        self.folder = folder / kind
        self.scratch = self.folder / "scratch"
        (self.folder / "home").mkdir(parents=True)
        self.flags = FLAGS[kind] + COMMON
        self.seconds = self.idle_seconds = 0  # of the uninterrupted run, and of what is before its first step
        self.checkpoints = self.log = self.checkpoint_bytes = None
        self.make_reference()

    def command(self, out, scratch=None):
        return [str(self.build / "bin/flux-train"), "--latents", str(self.fixtures / "latents"), "--text",
                str(self.fixtures / "text"), "--model", str(self.fixtures / "models/flux.safetensors"), "--out", str(out),
                "--scratch", str(scratch or self.scratch), "--max-steps", str(self.steps), "--json", *self.flags]

    def start(self, out, prefix=(), scratch=None):
        environment = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
        environment |= {"HOME": str(self.folder / "home"), "LC_ALL": "C", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*prefix, *self.command(out, scratch)], env=environment, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True)

    def run(self, out, prefix=(), scratch=None):
        """(exit code, report or nothing, stderr)"""
        process = self.start(out, prefix, scratch)
        stdout, stderr = torture.communicate(process)
        return process.returncode, json.loads(stdout) if stdout.strip() else None, stderr

    def make_reference(self):
        out = self.folder / "reference"
        before = time.monotonic()
        code, report, stderr = self.run(out)
        self.seconds = time.monotonic() - before
        torture.require(code == 0 and report["steps"] == self.steps, f"the uninterrupted run ended with {code}:\n{stderr}")
        self.idle_seconds = report["seconds_to_first_step"]
        self.checkpoints = self.read(out)
        self.checkpoint_bytes = sum(file.stat().st_size for file in out.glob("step-000001/*"))
        torture.require(sorted(self.checkpoints) == list(range(1, self.steps + 1)), f"checkpoints {sorted(self.checkpoints)}")
        self.log = metrics(out)
        shutil.rmtree(out)

    def read(self, out):
        """{step: {file name: SHA-256}} of what stands under final names."""
        found = {}
        for path in out.glob("step-*") if out.exists() else []:
            found[int(path.name.removeprefix("step-"))] = {file.name: self.digest(file) for file in path.glob("*.safetensors")}
            json.loads((path / "state.json").read_text())
        return found

    def check(self, out, where):
        """Every checkpoint equals the uninterrupted run's, and no scratch file has a name. Returns their steps."""
        found = self.read(out)
        for step, files in found.items():
            torture.require(files == self.checkpoints[step], f"{where}: checkpoint {step} differs from the uninterrupted run's")
        left = sorted(path.name for path in self.scratch.iterdir()) if self.scratch.exists() else []
        torture.require(not left, f"{where}: scratch files are left: {left}")
        return set(found)

    def digest(self, file):
        return digest(file)

    def leftovers(self, out):
        """All but checkpoints and the log."""
        names = {path.name for path in out.iterdir()} if out.exists() else set()
        return {name for name in names - PLAIN if not name.startswith("step-")}

    def check_tidy(self, out, where, before=frozenset()):
        """`before` is what a killed run had left before a run that may not have come to its first step."""
        other = sorted(self.leftovers(out) - before)
        torture.require(not other, f"{where}: left {other}")

    def check_complete(self, out, where, before=frozenset()):
        """`before`: what killed runs had left in a folder whose steps were all made; a run changes nothing there."""
        steps = self.check(out, where)
        torture.require(self.steps in steps, f"{where}: the last step was not saved, but {sorted(steps)}")
        self.check_tidy(out, where, before)
        torture.require(metrics(out) == self.log, f"{where}: the log differs from the uninterrupted run's")

    def complete(self, out, where, scratch=None):
        before = self.leftovers(out) if self.steps in self.read(out) else frozenset()
        code, report, stderr = self.run(out, scratch=scratch)
        torture.require(code == 0 and report["steps"] == self.steps, f"{where}: the next run ended with {code}:\n{stderr}")
        self.check_complete(out, where, before)


class Workspace:
    """A temporary folder with fixtures and both kinds of training; removed at the end."""

    def __init__(self, given, steps, make=Training):
        self.given, self.steps, self.make = given, steps, make

    def __enter__(self):
        self.temporary = tempfile.TemporaryDirectory(prefix="flux-torture-")
        folder = pathlib.Path(self.temporary.name).resolve()
        try:
            script = pathlib.Path(__file__).resolve().parent.parent / "cli/make_fixtures.sh"
            made = subprocess.run([script, self.given.build / "bin", folder / "fixtures"], capture_output=True, text=True)
            torture.require(made.returncode == 0, f"{script.name}: {made.stderr}")
            self.tools = [self.make(kind, self.given.build, folder, folder / "fixtures", self.steps) for kind in FLAGS]
        except BaseException:
            self.temporary.cleanup()
            raise
        return self

    def __exit__(self, *_):
        self.temporary.cleanup()

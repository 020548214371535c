#!/usr/bin/env python3
"""flux-cache merge, gc, repair and copy, killed before, in the middle of and after single file operations, and with one that
fails: no wanted sample is ever lost, what is under a published name reads whole, inputs stay as they are, a failure is exit 5
with one message, and the same command again completes."""
import errno
import os
import shutil
import subprocess
import threading

import torture

NUM_ITEMS = 12
ACTIONS = ("kill_before", "kill_half", "kill_after", str(errno.ENOSPC), str(errno.EIO))

given = torture.arguments(__doc__, operations=48)
total = {"kills": 0, "failures": 0, "operations": 0}
skipped = set()
lock = threading.Lock()
progress = torture.Progress()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(folder):
    """Changes a byte in the middle of the first tensor of the first segment. Returns the segment's name."""
    segment = sorted(folder.glob("seg-*.h5"))[0]
    data = bytearray(segment.read_bytes())
    at = data.find(bytes.fromhex("28b52ffd"), len(data) // 4)  # a zstd frame
    data[at + 40] ^= 0x10
    segment.chmod(0o644)
    segment.write_bytes(data)
    return segment.name


class Verb:
    """`prepare` fills the folder `out` that is written to; `finished` checks what a run that ended well has made."""

    def __init__(self, name, command, out, prepare, finished, inputs=(), damaged=False):
        self.name, self.command, self.out, self.prepare, self.finished = name, command, out, prepare, finished
        self.inputs, self.damaged = inputs, damaged

    def run(self, tool, **shim):
        done = subprocess.run([tool.build / "bin/flux-cache", *map(str, self.command)], capture_output=True, text=True,
                              env=tool.environment(self.out, **shim), timeout=300)
        return done.returncode, done.stderr


def verbs(tool):
    """The cases; `kept` is a finished cache of version 1 that holds samples of version 0 too."""
    folder = tool.folder
    kept, out = folder / "kept", folder / "verb"
    for version in (0, 1):
        tool.set_version(version)
        tool.complete(kept, f"version {version}")
    reference = tool.reference(1)

    def copy_kept():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, out)

    def empty():
        shutil.rmtree(out, ignore_errors=True)

    def expect(published, where):
        found = tool.contents(out)
        tool.check(found, where)
        torture.require(found.complete and found.wanted == reference, f"{where}: {len(found.wanted ^ reference)} samples differ")
        torture.require(published is None or found.published == published,
                        f"{where}: {len(found.published)} samples are published, {len(published or [])} expected")
        hidden = [path.name for path in out.iterdir() if path.name.startswith(".")]
        torture.require(not hidden, f"{where}: left {hidden}")

    yield Verb("gc", ["gc", out], out, copy_kept, lambda where: expect(reference, where))
    yield Verb("copy", ["copy", kept, out, "--verify"], out, empty, lambda where: expect(None, where), [kept])

    in_segments = tool.contents(kept).by_file
    damaged = set()

    def prepare_repair():
        copy_kept()
        damaged.update(in_segments[damage(out)])  # a table may be hit, and all of the segment's samples with it

    def repaired(where):
        found = tool.contents(out)
        tool.check(found, where)
        torture.require(not found.journal, f"{where}: left a journal")
        lost = reference - found.published
        torture.require(lost <= damaged, f"{where}: {len(lost - damaged)} samples of whole segments are gone")
        report = tool.complete(out, f"{where}, then the encoding tool")
        torture.require(report["encoded"] == len(lost), f"{where}: {report['encoded']} encoded, {len(lost)} were lost")

    yield Verb("repair", ["repair", out], out, prepare_repair, repaired, damaged=True)

    help_text = subprocess.run([*tool.command(out)[:1], "--help"], capture_output=True, text=True).stdout
    if "--shard" not in help_text:
        skipped.add("merge (the tools have no --shard)")
        return
    parts = [folder / f"part-{i}" for i in range(2)]
    for i, part in enumerate(parts):
        tool.flags = ["--shard", f"{i}/2"]
        code, _, stderr = tool.run(part)
        tool.flags = []
        torture.require(code == 0, f"--shard {i}/2 ended with {code}:\n{stderr}")
    yield Verb("merge", ["merge", *parts, "--out", out], out, empty, lambda where: expect(reference, where), parts)


def work(tool, numbers):
    for version in range(2):
        tool.reference(version)
    there = subprocess.run([tool.build / "bin/flux-cache", "--help"], capture_output=True, text=True).stdout
    log = tool.folder / "log"
    for verb in verbs(tool):
        if f"\n  {verb.name} " not in there:
            skipped.add(verb.name)
            continue
        inputs = [files_of(folder) for folder in verb.inputs]
        verb.prepare()
        log.unlink(missing_ok=True)
        code, stderr = verb.run(tool, log=log)
        torture.require(code == 0, f"{verb.name}: ended with {code}:\n{stderr}")
        verb.finished(verb.name)
        letters = [operation.letter.upper() for operation in torture.read_log(log)]
        torture.require(letters, f"{verb.name}: did nothing")
        with lock:
            total["operations"] += len(letters)
        cases = [(at, action) for at in range(1, len(letters) + 1) for action in ACTIONS]
        chosen = numbers.sample(cases, min(len(cases), given.operations // 8))
        progress.plan(len(chosen))
        for at, action in chosen:
            where = f"{verb.name}, {action} at operation {at} of {len(letters)} ({letters[at - 1]})"
            verb.prepare()
            before = None if verb.damaged or not verb.out.exists() else tool.contents(verb.out)
            code, stderr = verb.run(tool, at=at, do=action)
            torture.require(code in ((-9, 0) if action.startswith("kill") else (0, 5)), f"{where}: ended with {code}:\n{stderr}")
            with lock:
                total["kills"] += code == -9
                total["failures"] += code == 5
            if not action.startswith("kill") and letters[at - 1] in "CWSRM":
                errors = [line for line in stderr.splitlines() if ": error: " in line]
                torture.require(code == 5 and len(errors) == 1 and os.strerror(int(action)) in errors[0] and
                                str(verb.out) in errors[0], f"{where}: ended with {code}:\n{stderr}")
            if not verb.damaged:
                found = tool.contents(verb.out)
                tool.check(found, where)
                torture.require(before is None or before.wanted <= found.samples, f"{where}: wanted samples are lost")
            code, stderr = verb.run(tool)
            torture.require(code == 0, f"{where}: the same command again ended with {code}:\n{stderr}")
            verb.finished(f"{where}, and again")
            torture.require(inputs == [files_of(folder) for folder in verb.inputs], f"{where}: an input was changed")
            progress.step()


try:
    torture.main(work, given, NUM_ITEMS)
finally:
    # a failure that need not end the program (of tidying, of a hint to the system) is neither a kill nor a failure
    print(f"flux-cache: {progress.done} cases at chosen operations, of {total['operations']}: {total['kills']} kills and "
          f"{total['failures']} failures; skipped: {', '.join(sorted(skipped)) or 'none'}")

#!/usr/bin/env python3
"""Disks that run full under flux-train, and limits on the size of files: for scratch files, and while a checkpoint is saved.
Each ends with exit 5 and one message, which names the bytes needed where the program knows them; earlier checkpoints stay
good, and the next run goes on once there is room and ends as the uninterrupted run."""
import os
import re
import shutil
import subprocess
import sys
import threading

import torture
import training

given = torture.arguments(__doc__, sizes=4)
done, skipped = [], set()
lock = threading.Lock()


def say(what):
    with lock:
        done.append(what)


def expect_failure(tool, out, where, result, named):
    """Exit 5, one message with the folder, bytes or the system's reason, and a hint. Returns the checkpoints that are good."""
    code, _, stderr = result
    torture.require(code == 5, f"{where}: ended with {code}:\n{stderr}")
    errors = [line for line in stderr.splitlines() if ": error: " in line]
    torture.require(len(errors) == 1 and str(named) in errors[0] and "\n  hint: " in stderr, f"{where}: {stderr}")
    needed = re.search(r"\b\d+ bytes (\([^)]*\) )?(are )?needed", errors[0])
    torture.require(needed or os.strerror(28) in errors[0] or os.strerror(27) in errors[0],
                    f"{where}: names neither the bytes needed nor what the disk said: {stderr}")
    steps = tool.check(out, where)
    if out.exists():
        tool.check_tidy(out, where)
    return steps, needed is not None


class Disk:
    """A tmpfs of a few bytes."""

    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        self.folder.mkdir()
        return self if torture.ROOT and torture.mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(self.folder)) else None

    def resize(self, kilobytes):
        torture.require(torture.mount("-o", f"remount,size={kilobytes}k", str(self.folder)), "remount failed")

    def __exit__(self, *_):
        subprocess.run(["umount", str(self.folder)], capture_output=True)


def full_scratch(tool, numbers):
    """Only full fine-tuning and adapters that stream take room there: all of it before the first step."""
    with Disk(tool.folder / "small-scratch") as disk:
        if not disk:
            return skipped.add("a full scratch disk (mount is not allowed)")
        out = tool.folder / "out"
        refused = 0
        for kilobytes in sorted(numbers.randint(16, 1000) for _ in range(given.sizes)):
            disk.resize(kilobytes)
            where = f"{tool.kind}, a scratch disk of {kilobytes} KiB"
            result = tool.run(out, scratch=disk.folder)
            if result[0] == 0:
                break
            steps, needed = expect_failure(tool, out, where, result, disk.folder)
            torture.require(not steps and needed, f"{where}: steps {steps} were made, or no bytes are named:\n{result[2]}")
            refused += 1
        torture.require(refused > 0, f"{tool.kind}: the scratch disk was never full")
        disk.resize(1 << 20)
        tool.complete(out, "after full scratch disks", scratch=disk.folder)
        torture.require(not list(disk.folder.iterdir()), "scratch files are left")
        shutil.rmtree(out)
        say(f"{tool.kind}: {refused} full scratch disks")


def full_run_folder(tool, numbers):
    """Checkpoints fill the disk: those that are there stay good, and more room is all that is missing."""
    with Disk(tool.folder / "small") as disk:
        if not disk:
            return skipped.add("a full disk while saving (mount is not allowed)")
        out = disk.folder / "out"
        size = tool.checkpoint_bytes // 1024 + 1
        refused, best = 0, set()
        for kilobytes in sorted(numbers.randint(16, tool.steps * size) for _ in range(given.sizes)):
            disk.resize(kilobytes)
            where = f"{tool.kind}, a disk of {kilobytes} KiB for checkpoints of {size}"
            result = tool.run(out)
            if result[0] == 0:
                break
            steps, _ = expect_failure(tool, out, where, result, out)
            torture.require(best <= steps, f"{where}: checkpoints {sorted(best - steps)} are lost")
            best = steps
            refused += 1
        torture.require(refused > 0, f"{tool.kind}: the disk was never full")
        disk.resize(1 << 20)
        tool.complete(out, "after full disks")
        say(f"{tool.kind}: {refused} full disks, {len(best)} checkpoints before the last of them")


def small_files(tool, numbers):
    """RLIMIT_FSIZE, which needs no root: whatever passes it fails, a scratch file, the log or a checkpoint."""
    out = tool.folder / "limited"
    for limit in sorted(int(tool.checkpoint_bytes / 2 ** numbers.uniform(1.5, 12)) for _ in range(given.sizes)):
        where = f"{tool.kind}, files of at most {limit} bytes"
        expect_failure(tool, out, where, tool.run(out, ["prlimit", f"--fsize={limit}"]), tool.folder)
    tool.complete(out, "after limits on the size of files")
    say(f"{tool.kind}: {given.sizes} limits")


def work(tool, numbers):
    full_scratch(tool, numbers)
    full_run_folder(tool, numbers)
    small_files(tool, numbers)


code = 1
try:
    with training.Workspace(given, steps=4) as workspace:
        code = torture.both(workspace, work)
finally:
    print(f"done: {', '.join(sorted(done))}")
    print(f"skipped: {', '.join(sorted(skipped)) or 'none'}")
sys.exit(code)

#!/usr/bin/env python3
"""Real limits: a small tmpfs that runs full, read-only mounts, folders without permission, limits on the size of files. Each
ends with exit 5 and one message, published files stay whole, nothing finished is lost, and the next run goes on."""
import errno
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading

import torture
from torture import ROOT, mount

NUM_ITEMS = 150

given = torture.arguments(__doc__, sizes=4)
done, skipped = [], set()
lock = threading.Lock()


def skip(what, why):
    with lock:
        skipped.add(f"{what} ({why})")


def expect_failure(tool, out, where, number, prefix=(), named=None):
    """A run that fails for want of a resource; what it left is good. Returns the samples that are there."""
    before = tool.contents(out).samples if os.access(out, os.R_OK | os.X_OK) else set()
    code, _, stderr = tool.run(out, prefix)
    torture.require(code == 5, f"{where}: ended with {code}:\n{stderr}")
    errors = [line for line in stderr.splitlines() if ": error: " in line]
    torture.require(len(errors) == 1, f"{where}: {len(errors)} messages:\n{stderr}")
    torture.require(str(named or out) in errors[0] and os.strerror(number) in errors[0] and "\n  hint: " in stderr,
                    f"{where}: does not name path, '{os.strerror(number)}' and a hint:\n{stderr}")
    found = tool.contents(out)
    tool.check(found, where)
    torture.require(before <= found.samples, f"{where}: {len(before - found.samples)} samples are lost")
    with lock:
        done.append(where)
    return found.samples


def full_disk(tool, numbers):
    folder = tool.folder / "small"
    folder.mkdir()
    if not ROOT or not mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)):
        return skip("a full tmpfs", "mount is not allowed")
    try:
        out = folder / "out"
        finished, failures = set(), 0
        # more and more room until it is enough: what was finished stays, and is not encoded again
        sizes = sorted(numbers.randint(16, 2500 if tool.kind == "text" else 450) for _ in range(given.sizes))
        sizes[0] = min(sizes[0], 64)  # surely too little
        for kilobytes in [*sizes, 65536]:
            torture.require(mount("-o", f"remount,size={kilobytes}k", str(folder)), "remount failed")
            code, report, stderr = tool.run(out)
            where = f"a disk of {kilobytes} KiB"
            found = tool.contents(out)
            tool.check(found, where)
            torture.require(finished <= found.samples, f"{where}: {len(finished - found.samples)} samples are lost")
            if code == 0:
                tool.check_complete(out, where, report, tool.reference(0), finished)
                break
            errors = [line for line in stderr.splitlines() if ": error: " in line]
            torture.require(code == 5 and len(errors) == 1 and os.strerror(errno.ENOSPC) in errors[0],
                            f"{where}: ended with {code}:\n{stderr}")
            failures += 1
            finished = found.samples
        torture.require(code == 0 and failures > 0, f"the disk was full {failures} times, the last run ended with {code}")
        with lock:
            done.append(f"{failures} full disks")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def read_only_mount(tool, finished):
    folder = tool.folder / "bound"
    shutil.copytree(finished, folder)
    (folder / "manifest.json").unlink()  # there is something to write
    if not ROOT or not mount("--bind", str(folder), str(folder)):
        return skip("a read-only mount", "mount is not allowed")
    try:
        torture.require(mount("-o", "remount,bind,ro", str(folder)), "remount failed")
        expect_failure(tool, folder, "a read-only mount", errno.EROFS)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    tool.complete(folder, "after a read-only mount", tool.contents(folder).samples)


def without_permission(tool):
    """A folder that may be read, but not written; root is let in anyway, so it runs without that capability."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="flux-torture-"))
    try:
        out = folder / "out"
        code, _, stderr = tool.run(out, at=9, ops="W", do="kill_after")
        torture.require(code == -9, f"was not killed: {code} {stderr}")
        prefix = []
        if ROOT:
            prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
            if not shutil.which("setpriv"):
                return skip("a folder without permission", "setpriv is not there")
            if subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
                return skip("a folder without permission", "the capability cannot be given up")
        out.chmod(0o555)
        try:
            finished = expect_failure(tool, out, "a folder without permission", errno.EACCES, prefix)
        finally:
            out.chmod(0o755)
        torture.require(finished, "nothing was in the folder")
        tool.complete(out, "after a folder without permission", finished)
    finally:
        shutil.rmtree(folder)


def small_files(tool, numbers):
    """RLIMIT_FSIZE: the write that passes it fails, in the journal, a segment or the index."""
    out = tool.folder / "limited"
    finished, failures = set(), 0
    for limit in sorted(int(1024 * 2**numbers.uniform(0, 7)) for _ in range(given.sizes)):
        where = f"files of at most {limit} bytes"
        code, report, stderr = tool.run(out, ["prlimit", f"--fsize={limit}"])
        found = tool.contents(out)
        tool.check(found, where)
        torture.require(finished <= found.samples, f"{where}: {len(finished - found.samples)} samples are lost")
        finished = found.samples
        if code == 0:
            break
        errors = [line for line in stderr.splitlines() if ": error: " in line]
        torture.require(code == 5 and len(errors) == 1 and os.strerror(errno.EFBIG) in errors[0] and str(out) in errors[0],
                        f"{where}: ended with {code}:\n{stderr}")
        failures += 1
    torture.require(failures > 0, "no limit was reached")
    tool.complete(out, "after limits on the size of files", finished)
    with lock:
        done.append(f"{failures} limits")


def work(tool, numbers):
    tool.reference(0)
    finished = tool.folder / "finished"
    tool.complete(finished, "at the start")
    full_disk(tool, numbers)
    read_only_mount(tool, finished)
    without_permission(tool)
    small_files(tool, numbers)
    # names that something else has
    taken = tool.folder / "taken"
    taken.write_text("a file")
    for out, number in [(taken, errno.ENOTDIR), (taken / "below", errno.ENOTDIR)]:
        code, _, stderr = tool.run(out)
        torture.require(code == 5 and stderr.count(": error: ") == 1 and str(taken) in stderr, f"{out}: {code}\n{stderr}")


try:
    torture.main(work, given, NUM_ITEMS)
finally:
    print(f"done: {', '.join(done)}")
    print(f"skipped: {', '.join(sorted(skipped)) or 'none'}")

#!/usr/bin/env python3
"""The n-th file operation of a run fails, n = 1, 2, ... until a run succeeds: with no space, an I/O error, or for good from
there on. A failed write, flush, rename, link or creation ends the run with exit 5 and one message that names the path and
the error; published files stay whole, nothing finished is lost, and the next run completes. Interrupted calls and short
writes are gone on with: exit 0. Short form: every fourth operation for no space, every sixteenth for the rest."""
import errno
import os
import re
import shutil
import threading

import torture

NUM_ITEMS = 3
OPERATIONS = "CWLSRHUMX"
MUST_FAIL = "CWSRM"  # a failed link, unlink or close can have another way around it

given = torture.arguments(__doc__, stride=4)
total = {"failures": 0, "interruptions": 0, "success": 0}
lock = threading.Lock()


def check_message(tool, stderr, out, number, where):
    """One error, with a path in the folder and the text of the errno."""
    errors = [line for line in stderr.splitlines() if ": error: " in line]
    torture.require(len(errors) == 1, f"{where}: {len(errors)} error messages:\n{stderr}")
    torture.require(str(out) in errors[0], f"{where}: the message names no path: {errors[0]}")
    torture.require(os.strerror(number) in errors[0], f"{where}: the message does not say {os.strerror(number)}: {errors[0]}")
    torture.require("\n  hint: " in stderr, f"{where}: no hint:\n{stderr}")
    torture.require(errors[0].startswith(f"flux-cache-{tool.kind}: error: "), f"{where}: {errors[0]}")


def attempt(tool, begin, out, where, at, do, letter, **shim):
    """One run with one failure. Returns whether there was an operation to fail."""
    begin()
    before = tool.contents(out).samples
    code, report, stderr = tool.run(out, at=at, do=do, log=tool.folder / "log", **shim)
    found = tool.contents(out)
    tool.check(found, where)
    torture.require(before <= found.samples, f"{where}: {len(before - found.samples)} samples are lost")
    if do in ("short", str(errno.EINTR)):
        torture.require(code == 0, f"{where}: ended with {code}, should have gone on:\n{stderr}")
        tool.check_complete(out, where, report, tool.reference(tool.version))
        with lock:
            total["interruptions"] += 1
        return
    torture.require(code in (0, 5), f"{where}: ended with {code}:\n{stderr}")
    torture.require(code == 5 or letter not in MUST_FAIL, f"{where}: ended with 0")
    if code == 5:
        check_message(tool, stderr, out, int(do), where)
        with lock:
            total["failures"] += 1
    tool.complete(out, f"{where}, then the next run", found.samples if code == 5 else None)


def work(tool, numbers):
    for version in range(2):
        tool.reference(version)
    out, finished, killed = tool.folder / "out", tool.folder / "finished", tool.folder / "killed"
    tool.set_version(0)
    tool.complete(finished, "at the start")
    code, _, _ = tool.run(killed, ops="W", at=5, do="kill_after")  # lock, head of the journal, three samples
    torture.require(code == -9 and len(tool.contents(killed).journal) > 0, "no journal was left")

    def begin_with(folder, version):
        def begin():
            tool.set_version(version)
            shutil.rmtree(out, ignore_errors=True)
            if folder:
                shutil.copytree(folder, out)
        return begin

    starts = [("an empty folder", begin_with(None, 0)), ("changed data", begin_with(finished, 1)),
              ("recovery", begin_with(killed, 0))]
    kinds = [("ENOSPC", str(errno.ENOSPC), {}, 1), ("EIO", str(errno.EIO), {}, 4), ("EDQUOT for good", str(errno.EDQUOT), {"on": 1}, 4),
             ("EINTR", str(errno.EINTR), {"ops": "WSL"}, 4), ("a short write", "short", {"ops": "W"}, 4)]
    for name, begin in starts:
        begin()
        log = tool.folder / "log"
        log.unlink(missing_ok=True)
        code, _, stderr = tool.run(out, log=log)
        torture.require(code == 0, f"{name}: ended with {code}:\n{stderr}")
        letters = [o.letter for o in torture.read_log(log)]
        torture.require(letters.count("R") >= 1 and letters.count("S") >= 3, f"{name}: few operations: {letters}")
        for what, do, shim, rarely in kinds:
            counted = [letter for letter in letters if letter.upper() in shim.get("ops", OPERATIONS)]
            step = given.stride * rarely if given.stride > 1 else 1
            if given.stride > 1 and name != "an empty folder":
                step *= 3
            for at in range(1 + numbers.randrange(step), len(counted) + 1, step):
                where = f"{name}, {what} in operation {at} of {len(counted)} ({counted[at - 1]})"
                attempt(tool, begin, out, where, at, do, counted[at - 1], **shim)
        # behind the last operation nothing fails
        begin()
        code, _, stderr = tool.run(out, at=len(letters) + 1, do=str(errno.EIO))
        torture.require(code == 0, f"{name}: no operation was to fail, but the run ended with {code}:\n{stderr}")
        with lock:
            total["success"] += 1


try:
    torture.main(work, given, NUM_ITEMS)
finally:
    print(f"failures {total['failures']} that ended a run, {total['interruptions']} interruptions, {total['success']} runs past the last")

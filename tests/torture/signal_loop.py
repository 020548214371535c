#!/usr/bin/env python3
"""SIGINT, SIGTERM and SIGHUP at random moments of both encoding tools: the run seals what is finished and exits with 130, 143
or 129, leaves no journal, lock or temporary file, and the next run goes on from there. One that comes before the program has
started ends it as any program."""
import shutil
import signal
import threading
import time

import torture

NUM_ITEMS = 150

given = torture.arguments(__doc__, signals=20)
total = {"signals": 0, "sealed": 0, "early": 0}
lock = threading.Lock()


def work(tool, numbers):
    reference = tool.reference(0)
    out = tool.folder / "out"
    finished = set()
    count = 0
    while count < given.signals // 2:
        number = numbers.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        to_do = len(reference - finished) / len(reference)
        after = numbers.uniform(0, tool.idle_seconds + (tool.full_seconds - tool.idle_seconds) * to_do)
        where = f"{number.name} after {after:.3f} s"
        process = tool.start(out)
        time.sleep(after)
        process.send_signal(number)
        before = time.monotonic()
        stdout, stderr = torture.communicate(process)
        seconds = time.monotonic() - before
        found = tool.contents(out)
        tool.check(found, where)
        torture.require(finished <= found.samples, f"{where}: {len(finished - found.samples)} samples are lost")
        if process.returncode == 0:  # it came too late
            torture.require(found.wanted == reference, f"{where}: other samples")
            shutil.rmtree(out)
            finished = set()
            continue
        count += 1
        finished = found.samples
        early = process.returncode == -number  # before the handlers were there
        torture.require(early or process.returncode == 128 + number, f"{where}: ended with {process.returncode}:\n{stderr}")
        with lock:
            total["signals"] += 1
            total["early"] += early
        if early:
            continue
        torture.require(not stdout, f"{where}: a result was printed: {stdout}")
        torture.require(stderr.count(": error: ") == stderr.count("stopped by a signal") == 1, f"{where}: {stderr}")
        # a whole run is enough of a measure of what this machine can do
        torture.require(seconds < 20 + 10 * tool.full_seconds, f"{where}: it took {seconds:.0f} s to stop")
        hidden = [path.name for path in out.iterdir() if path.name.startswith(".")] if out.exists() else []
        torture.require(not hidden and not found.journal, f"{where}: left {hidden}")
        with lock:
            total["sealed"] += len(found.published) > 0
    tool.complete(out, "at the end", finished)


try:
    torture.main(work, given, NUM_ITEMS)
finally:
    print(f"signals {total['signals']}: {total['early']} before the start, {total['sealed']} with samples sealed")

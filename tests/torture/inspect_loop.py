#!/usr/bin/env python3
"""flux-cache inspect looks into a folder again and again while an encoding tool writes there: it never fails, finds no bad
file, and no sample that it has listed is gone the next time, though journals become segments under its eyes."""
import json
import subprocess
import threading

import torture

NUM_ITEMS = 150

given = torture.arguments(__doc__, rounds=2)
looks = 0
lock = threading.Lock()


def work(tool, numbers):
    global looks
    out = tool.folder / "out"
    for version in (0, 1):
        tool.reference(version)
    for _ in range(given.rounds):
        for version in (0, 1):
            tool.set_version(version)
            process = tool.start(out)
            listed = set()
            while process.poll() is None:
                if not out.exists():
                    continue
                done = subprocess.run([tool.build / "bin/flux-cache", "inspect", out, "--json", "--samples", "--recover"],
                                      capture_output=True, text=True, timeout=60)
                torture.require(done.returncode == 0, done.stderr)
                report = json.loads(done.stdout)
                torture.require(not report["problems"], report["problems"])
                now = {(sample["key"], sample["tensor_xxh3"]) for sample in report["samples"]}
                gone = (listed - now) & tool.reference(version)  # others may have become unwanted
                torture.require(not gone, f"{len(gone)} of {len(listed)} samples are no longer listed; journals {report['journals']}")
                listed = now
                with lock:
                    looks += 1
            _, stderr = torture.communicate(process)
            torture.require(process.returncode == 0, stderr)


try:
    torture.main(work, given, NUM_ITEMS)
finally:
    print(f"looks {looks} into folders that were written to")

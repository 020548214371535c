#!/usr/bin/env python3
"""SIGKILL at uniformly random moments of runs of both encoding tools, on empty folders, folders of killed runs and finished
caches whose data changed. After each kill every published file reads whole and every sample that was finished before is
still there; what a later run keeps is exactly what was finished; a finished cache equals an uninterrupted run's."""
import json
import shutil
import threading
import time

import torture

NUM_ITEMS = 150  # more than a segment's 128, so that there are seals in the middle

given = torture.arguments(__doc__, kills=40)
total = {"kills": 0, "runs": 0, "finished": 0, "samples": 0}
lock = threading.Lock()


def count(**more):
    with lock:
        for name, value in more.items():
            total[name] += value
        if more.get("kills") and total["kills"] % 100 == 0:
            print(f"{total['kills']} kills", flush=True)


def work(tool, numbers):
    for version in range(3):
        tool.reference(version)
    out = tool.folder / "out"
    finished = listed = set()
    kills = version = 0
    scale = 1.0  # the machine may be less busy than when the uninterrupted run was measured
    while kills < given.kills // 2:
        tool.set_version(version)
        where = f"version {version}, after {kills} kills"
        process = tool.start(out)
        to_do = len(tool.reference(version) - finished) / len(tool.reference(0))
        expected = tool.idle_seconds + (tool.full_seconds - tool.idle_seconds) * to_do
        ends_itself = numbers.random() < 0.2  # else what is left to do would only approach nothing
        end = time.monotonic() + (300 if ends_itself else numbers.uniform(0, scale * expected))
        while process.poll() is None and time.monotonic() < end:
            time.sleep(min(0.005, max(0, end - time.monotonic())))
        count(runs=1)
        if process.poll() is None and torture.kill(process):
            kills += 1
            scale = min(1.0, scale * 1.05)
            found = tool.contents(out)
            tool.check(found, where)
            lost = finished - found.samples
            torture.require(not lost, f"{where}: {len(lost)} finished samples are lost")
            count(kills=1, samples=len(found.samples - finished))
            unlisted = (listed & tool.reference(version)) - found.listed  # it may have published: others are unwanted then
            torture.require(not unlisted, f"{where}: flux-cache inspect --recover no longer lists {len(unlisted)} samples")
            finished, listed = found.samples, found.listed
            continue
        if not ends_itself:
            scale = max(0.4, scale * 0.8)
        stdout, stderr = torture.communicate(process)
        torture.require(process.returncode == 0, f"{where}: ended with {process.returncode}:\n{stderr}")
        tool.check_complete(out, where, json.loads(stdout), tool.reference(version), finished)
        count(finished=1)
        version = (version + 1) % 3
        found = tool.contents(out)
        torture.require(found.listed == found.wanted, f"{where}: flux-cache inspect lists more than is wanted")
        finished, listed = found.samples, found.listed
        if version == 0:
            shutil.rmtree(out)
            finished = listed = set()
    tool.complete(out, "at the end", finished)


start = time.monotonic()
try:
    torture.main(work, given, NUM_ITEMS)
finally:
    print(f"kills {total['kills']}: {total['runs']} runs, {total['finished']} caches finished, {total['samples']} samples finished "
          f"by killed runs, {time.monotonic() - start:.0f} s")

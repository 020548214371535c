#!/usr/bin/env python3
"""Kills both encoding tools before, in the middle of and after single file operations: taking the lock, recovery, journal,
sealing, publishing of index and manifest, withdrawing the manifest when an item is bad, tidying. The state left is killed again in the next run, then completed; the
rules are those of kill_loop.py. Long form: every operation."""
import shutil
import threading

import torture

NUM_ITEMS = 8
ACTIONS = ("kill_before", "kill_half", "kill_after")

given = torture.arguments(__doc__, kills=48)
total = {"kills": 0, "operations": 0}
lock = threading.Lock()
progress = torture.Progress()


def count_operations(tool, folder, log, expected=0):
    log.unlink(missing_ok=True)
    code, _, stderr = tool.run(folder, log=log)
    torture.require(code == expected, f"a run with the recorder ended with {code}:\n{stderr}")
    return len(torture.read_log(log))


def kill_with_bad_item(tool, numbers, finished_cache, out, log, count):
    """A finished cache, one item of which became bad: exit 6, no manifest, the reason in quarantine.jsonl; with
    --max-failed 1 nothing is encoded and the manifest comes back."""
    reference = tool.reference(0)
    tool.spoil_item()

    def begin():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(finished_cache, out)

    begin()
    num_operations = count_operations(tool, out, log, expected=6)
    progress.plan(count)
    for _ in range(count):
        at, how = numbers.randint(1, num_operations), numbers.choice(ACTIONS)
        where = f"a bad item, {how} of operation {at}"
        begin()
        code, _, stderr = tool.run(out, at=at, do=how)
        torture.require(code in (-9, 6), f"{where}: ended with {code}:\n{stderr}")
        with lock:
            total["kills"] += code == -9
        found = tool.contents(out)
        tool.check(found, where)
        torture.require(reference <= found.samples, f"{where}: samples are lost")
        code, _, stderr = tool.run(out)
        torture.require(code == 6 and not (out / "manifest.json").exists(), f"{where}: the next run ended with {code}:\n{stderr}")
        quarantined = (out / "quarantine.jsonl").read_text().splitlines()
        torture.require(len(quarantined) == 1, f"{where}: quarantine.jsonl has {len(quarantined)} lines")
        tool.flags = ["--max-failed", "1"]
        code, report, stderr = tool.run(out)
        tool.flags = []
        found = tool.contents(out)
        torture.require(code == 0 and report["encoded"] == 0 and found.complete and len(found.wanted) == len(reference) - 1 and
                        found.wanted < reference, f"{where}: with --max-failed 1 it ended with {code}: {report}\n{stderr}")
        progress.step()


def work(tool, numbers):
    for version in range(2):
        tool.reference(version)
    out, log = tool.folder / "out", tool.folder / "log"
    # A finished cache whose data changed, and an empty folder
    tool.set_version(0)
    finished_cache = tool.folder / "finished"
    tool.complete(finished_cache, "at the start")
    starts = []
    for name, source, version in [("an empty folder", None, 0), ("changed data", finished_cache, 1)]:
        tool.set_version(version)
        shutil.rmtree(out, ignore_errors=True)
        if source:
            shutil.copytree(source, out)
        starts += [(name, source, version, number) for number in range(1, count_operations(tool, out, log) + 1)]
    cases = [(*start, action) for start in starts for action in ACTIONS]
    with lock:
        total["operations"] += len(starts)
    chosen = numbers.sample(cases, min(len(cases), given.kills // 5))  # each is followed by a second kill
    progress.plan(len(chosen))
    for name, source, version, number, action in sorted(chosen, key=lambda case: case[2]):
        tool.set_version(version)
        shutil.rmtree(out, ignore_errors=True)
        if source:
            shutil.copytree(source, out)
        finished = tool.contents(out).samples
        # first the case itself, then somewhere in the run that finds what it left: that is mostly recovery
        for at, how in [(number, action), (numbers.randrange(1, 24), numbers.choice(ACTIONS))]:
            where = f"{name}, {how} of operation {at}"
            code, _, stderr = tool.run(out, at=at, do=how)
            torture.require(code in (-9, 0), f"{where}: ended with {code}:\n{stderr}")
            found = tool.contents(out)
            tool.check(found, where)
            torture.require(finished <= found.samples, f"{where}: {len(finished - found.samples)} finished samples are lost")
            finished = found.samples
            with lock:
                total["kills"] += code == -9
        tool.complete(out, f"{name}, {action} of operation {number}, and again", finished)
        progress.step()
    kill_with_bad_item(tool, numbers, finished_cache, out, log, given.kills // 10)


try:
    torture.main(work, given, NUM_ITEMS)
finally:
    print(f"kills {total['kills']} in {progress.done} cases at chosen operations, of {total['operations']}")

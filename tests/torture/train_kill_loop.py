#!/usr/bin/env python3
"""SIGKILL, SIGINT and SIGTERM at random moments of flux-train: of a full fine-tuning whose weights, states and block inputs
stream from scratch files, and of a LoRA that streams, both with a checkpoint a step. After each, every checkpoint equals the
uninterrupted run's to the bit and nothing is left that blocks the next run; after SIGINT and SIGTERM the last whole step is
saved. What is finished equals the uninterrupted run: weights, states and log."""
import shutil
import signal
import sys
import threading
import time

import torture
import training

given = torture.arguments(__doc__, kills=10)
total = {"kills": 0, "in_steps": 0, "signals": 0, "early": 0, "finished": 0}
lock = threading.Lock()


def count(**more):
    with lock:
        for name, value in more.items():
            total[name] += value


def steps_made(out):
    return training.metrics(out) if (out / "metrics.jsonl").exists() else []


def stop(tool, out, process, number, where, before, leftovers, made_before):
    """Sends a signal to a run. Whether it had any effect."""
    process.send_signal(number)
    stdout, stderr = torture.communicate(process)
    code = process.returncode
    if code == 0:  # it came too late
        return False
    steps = tool.check(out, where)
    torture.require(before <= steps, f"{where}: checkpoints {sorted(before - steps)} are gone")
    if number == signal.SIGKILL:
        torture.require(code == -number, f"{where}: ended with {code}:\n{stderr}")
        count(kills=1, in_steps=len(steps) > 0)
        return True
    early = code == -number  # before the handlers were there
    torture.require(early or code == 128 + number, f"{where}: ended with {code}:\n{stderr}")
    count(signals=1, early=early)
    if early:
        return True
    torture.require(stderr.count(": error: ") == stderr.count("stopped by a signal") and not stdout, f"{where}: {stderr}")
    if out.exists():
        tool.check_tidy(out, where, leftovers)
        made = steps_made(out)
        # a run that did not get as far as its first step leaves what a killed one before it had written
        torture.require(not made or made == made_before or made[-1]["step"] in steps,
                        f"{where}: step {len(made)} was made and not saved: {sorted(steps)}")
    return True


def work(tool, numbers):
    out = tool.folder / "out"
    step_seconds = max(0.001, tool.seconds - tool.idle_seconds) / tool.steps
    kills = 0
    scale = 1.0  # the machine may be less busy than when the uninterrupted run was measured
    before = set()
    while kills < given.kills // 2:
        number = numbers.choices([signal.SIGKILL, signal.SIGINT, signal.SIGTERM], [4, 1, 1])[0]
        left = tool.steps - max(before, default=0)
        after = numbers.uniform(0, scale * (tool.idle_seconds + left * step_seconds))
        where = f"{number.name} after {after:.3f} s, from step {max(before, default=0)}"
        leftovers, made_before = tool.leftovers(out), steps_made(out)
        process = tool.start(out)
        end = time.monotonic() + after
        while process.poll() is None and time.monotonic() < end:
            time.sleep(min(0.005, max(0, end - time.monotonic())))
        if stop(tool, out, process, number, where, before, leftovers, made_before):
            kills += number == signal.SIGKILL
            scale = min(1.5, scale * 1.05)
            before = set(tool.read(out))
            continue
        scale = max(0.4, scale * 0.9)
        tool.check_complete(out, where, leftovers if tool.steps in before else frozenset())
        count(finished=1)
        shutil.rmtree(out)
        before = set()
    tool.complete(out, "at the end")
    count(finished=1)


start = time.monotonic()
code = 1
try:
    with training.Workspace(given, steps=8) as workspace:
        code = torture.both(workspace, work)
finally:
    print(f"kills {total['kills']}: {total['in_steps']} of runs that had saved, {total['signals']} other signals ({total['early']} before the "
          f"start), {total['finished']} runs finished, {time.monotonic() - start:.0f} s")
sys.exit(code)

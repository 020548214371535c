#!/usr/bin/env python3
"""How long flux-train takes to its first loss, against an empty LibTorch program: startup_bench.py BIN_DIR FIXTURES [RUNS].

BIN_DIR holds flux-train and startup_empty; FIXTURES is what tests/cli/make_fixtures.sh makes (small models, caches). One run of each to
warm the file cache, then RUNS (7) of each in turn; the medians are compared. Exit code 1 if the ratio is above the limit.
"""
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

LIMIT = 2.5  # how much slower than the empty program is still a quick start


def empty(bin_dir):
    start = time.monotonic()
    subprocess.run([bin_dir / "startup_empty"], check=True, capture_output=True)
    return time.monotonic() - start


def train(bin_dir, fixtures):
    """Seconds until the line with the first loss has been printed."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        process = subprocess.Popen(
            [bin_dir / "flux-train", "--latents", fixtures / "latents", "--text", fixtures / "text", "--model",
             fixtures / "models/flux.safetensors", "--out", pathlib.Path(folder) / "run", "--max-steps", "1", "--device", "cpu",
             "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        seconds = None
        for line in process.stderr:
            if seconds is None and ": step 1: loss" in line:
                seconds = time.monotonic() - start
        report = json.loads(process.stdout.read())
        if process.wait() != 0 or seconds is None:
            sys.exit("flux-train failed")
        return seconds, report["seconds_to_first_step"]


def main():
    bin_dir, fixtures = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    runs = int(sys.argv[3]) if len(sys.argv) > 3 else 7
    empty(bin_dir), train(bin_dir, fixtures)
    bare, ours, reported = [], [], []
    for _ in range(runs):
        bare.append(empty(bin_dir))
        seconds, own = train(bin_dir, fixtures)
        ours.append(seconds)
        reported.append(own)
    ratio = statistics.median(ours) / statistics.median(bare)
    print(f"empty LibTorch program {statistics.median(bare):.3f} s ({min(bare):.3f} to {max(bare):.3f})")
    print(f"flux-train, first loss {statistics.median(ours):.3f} s ({min(ours):.3f} to {max(ours):.3f}), "
          f"its own figure {statistics.median(reported):.3f} s")
    print(f"ratio {ratio:.2f}, limit {LIMIT}")
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())

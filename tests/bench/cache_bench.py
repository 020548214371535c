#!/usr/bin/env python3
"""Reading caches and their size against sd-scripts' npz files: cache_bench.py BIN_DIR [SECONDS]

Samples of 1024x1024 pictures, random order, files in memory; BIN_DIR holds cache_read_bench. Three rounds, in each our reader, the same frames by
pread and zstd alone, and the peer take turns for SECONDS (2) each; the best of each counts. sd-scripts reads through the worker processes of
torch's DataLoader, one or two; what its class does without one is in the table too (`cache_read_peer.py` says what that is).
"""
import json
import pathlib
import shutil
import sys
import tempfile

from bench_table import Run, Table, arguments, peers_python

SAMPLES = 48
PEER_BYTES = 9452653  # a sample of sd-scripts at 1024x1024, which cache_read_peer.py reproduces


def main():
    bin_dir, *seconds = arguments("BIN_DIR [SECONDS]")
    seconds = float(seconds[0]) if seconds else 2
    program, python = pathlib.Path(bin_dir) / "cache_read_bench", peers_python()
    peer = pathlib.Path(__file__).with_name("cache_read_peer.py")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="flux-bench-"))
    table = Table("Reading caches of 1024x1024 pictures, samples/s")
    try:
        for kind in ("full", "masked"):
            Run([program, "make", folder / kind, SAMPLES, kind])
        Run([python, peer, "make", folder / "npz", SAMPLES])
        best = {}
        for _ in range(3):
            rounds = {kind: Run([program, "read", folder / kind, seconds], {"OMP_NUM_THREADS": "1"}) for kind in ("full", "masked")}
            rounds["npz"] = Run([python, peer, "read", folder / "npz", seconds], {"OMP_NUM_THREADS": "1"})
            for kind, run in rounds.items():
                for name, value in json.loads(run.stdout).items():
                    if isinstance(value, dict):
                        value = value["per_second"]
                    best[kind, name] = max(value, best.get((kind, name), 0))
    finally:
        shutil.rmtree(folder)
    npz_1, npz_2 = best["npz", "1 worker"], best["npz", "2 workers"]
    table.add("sd-scripts' npz, DataLoader with 1 worker", npz_1)
    table.add("sd-scripts' npz, DataLoader with 2 workers", npz_2)
    table.add("sd-scripts' npz, its class in the process", best["npz", "in this process"])
    table.add("np.load alone", best["npz", "np.load"])
    table.add("sd-scripts' bytes a sample", best["npz", "bytes_a_sample"])
    for kind, times, share in (("full", 3, 0.40), ("masked", 6, 0.20)):
        raw, one, two = best[kind, "raw"], best[kind, "cache"], best[kind, "cache 2 threads"]
        table.add(f"{kind}: pread and zstd alone, 1 thread", raw)
        table.add(f"{kind}: our reader, 1 thread", one)
        table.add(f"{kind}: our reader, 2 threads", two)
        table.add(f"{kind}: batches of the trainer (with noise and posterior draw), 1 thread", best[kind, "batch"])
        table.add(f"{kind}: batches of the trainer, 2 threads", best[kind, "batch 2 threads"])
        table.add(f"{kind}: reader / pread and zstd", one / raw, "x", at_least=0.8)
        table.add(f"{kind}: 2 threads / 1 thread", two / one, "x", at_least=1.7)
        table.add(f"{kind}: reader / sd-scripts, 1 thread, 1 worker", one / npz_1, "x", at_least=times)
        table.add(f"{kind}: reader / sd-scripts, 2 threads, 2 workers", two / npz_2, "x", at_least=times)
        table.add(f"{kind}: reader / sd-scripts' class in the process", one / best["npz", "in this process"], "x")
        table.add(f"{kind}: bytes a sample", best[kind, "bytes_a_sample"])
        table.add(f"{kind}: bytes / sd-scripts'", best[kind, "bytes_a_sample"] / PEER_BYTES, "x", at_most=share)
    return table.finish()


if __name__ == "__main__":
    sys.exit(main())

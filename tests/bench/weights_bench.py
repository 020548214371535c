#!/usr/bin/env python3
"""Loading and saving 2.6 GB of weights against safetensors in Python: weights_bench.py BIN_DIR [REPEATS]

2 double and 4 single blocks of FLUX's width in bfloat16. Ours and the peers' in turns; the medians. Loading goes into memory of the process's own,
saving includes fsync. The peer that saves writes tensor by tensor, as sd-scripts' memory-efficient writer does.
"""
import json
import pathlib
import shutil
import statistics
import sys
import tempfile

from bench_table import Run, Table, arguments, peers_python

CASES = {"load cold": ["load", "cold"], "load warm": ["load", "warm"], "save": ["save"]}


def main():
    bin_dir, *rest = arguments("BIN_DIR [REPEATS]")
    repeats = int(rest[0]) if rest else 3
    bins = pathlib.Path(bin_dir)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="flux-bench-"))
    table = Table("Weights in and out of memory")
    try:
        Run([bins / "flux-model", "tiny", "--geometry", "dev", "--depth", "2,4", "--out", folder])
        model, out = folder / "flux.safetensors", folder / "out.safetensors"
        programs = {"ours": [bins / "weights_bench"], "peer": [peers_python(), pathlib.Path(__file__).with_name("weights_peer.py")]}
        for case, (what, *how) in CASES.items():
            runs = {name: [] for name in programs}
            for _ in range(repeats):
                for name, program in programs.items():
                    out.unlink(missing_ok=True)
                    runs[name].append(json.loads(Run([*program, what, model, *(how or [out])]).stdout))
            seconds = {name: statistics.median(run["seconds"] for run in of) for name, of in runs.items()}
            table.add(f"{case}: bytes", runs["ours"][0]["bytes"] / 1e9, "GB")
            for name in programs:
                table.add(f"{case}: {name}", seconds[name], "s")
            table.add(f"{case}: time, ours / peer", seconds["ours"] / seconds["peer"], "x", at_most=1.1)
            if what == "save":
                table.add("save: memory beside the weights", max(run["extra"] for run in runs["ours"]) / 2**20, "MiB", at_most=64)
    finally:
        shutil.rmtree(folder)
    return table.finish()


if __name__ == "__main__":
    sys.exit(main())

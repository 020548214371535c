#!/usr/bin/env python3
"""T5-XXL's encoder against transformers: text_bench.py BIN_DIR [LAYERS]

Seconds a caption and layer at the real width with random weights; LAYERS (4) of them stand for 24. Both warm, 512 tokens, bfloat16; the masked
rows are 8 captions of 96 and of 64 live tokens among 512 against the peer's 512, since it has no way to skip padding.
"""
import pathlib
import re
import sys

from bench_table import Run, Table, arguments, peers_python


def seconds(run):
    """Wall and CPU seconds a layer and caption, as t5_bench and peers_encoders.py print them."""
    wall, cpu = re.search(r": ([\d.]+) s \(([\d.]+) s of CPU\)", run.stdout).groups()
    return float(wall), float(cpu)


def main():
    bin_dir, *layers = arguments("BIN_DIR [LAYERS]")
    layers = layers[0] if layers else "4"
    program, peer = pathlib.Path(bin_dir) / "t5_bench", pathlib.Path(__file__).with_name("peers_encoders.py")
    table = Table("T5-XXL, bfloat16, a layer and caption of 512 tokens")
    cases = {"full": ["1", "3"], "masked, 96 live": ["8", "2", "96"], "masked, 64 live": ["8", "2", "64"]}
    best = {}
    for _ in range(2):
        runs = {name: Run([program, "bf16", "512", layers, *rest]) for name, rest in cases.items()}
        runs["transformers"] = Run([peers_python(), peer, "t5", "bf16", "512", layers, "3"])
        for name, run in runs.items():
            best[name] = tuple(map(min, seconds(run), best.get(name, (1e9, 1e9))))
    for name, (wall, cpu) in best.items():
        table.add(f"{name}", wall, "s")
        table.add(f"{name}: CPU", cpu, "s")
    wall, cpu = best["transformers"]
    for name in cases:
        table.add(f"{name}: speed", wall / best[name][0], "x", at_least=1.8 if name == "full" else 6)
        table.add(f"{name}: speed by CPU time", cpu / best[name][1], "x")
    return table.finish()


if __name__ == "__main__":
    sys.exit(main())

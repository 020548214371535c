#!/usr/bin/env python3
"""A training step at FLUX's width against diffusers (and peft): step_bench.py BIN_DIR [CASES]

1 double and 2 single blocks, 512x512, 512 text tokens, batch 1, random weights. Ours twice: the fastest setting, and the one that fits half of the
peer's peak. CASES of lora-bf16, lora-f32, full-adamw, full-adafactor, separated by commas.
"""
import json
import pathlib
import shutil
import sys
import tempfile

from bench_table import Run, Table, arguments, peers_python

# speed and peak RSS, as ratios to the peer
CASES = {
    "lora-bf16": (["--method", "lora", "--precision", "bf16"], ["lora", "adamw", "bf16"], 1.25, 0.5),
    "lora-f32": (["--method", "lora", "--precision", "f32"], ["lora", "adamw", "f32"], 1.1, 0.5),
    "full-adamw": (["--method", "full", "--optimizer", "adamw8bit", "--clip", "per-parameter", "--precision", "bf16"], ["full", "adamw", "bf16"], 1.5, 0.4),
    "full-adafactor": (["--method", "full", "--optimizer", "adafactor", "--precision", "bf16"], ["full", "adafactor", "bf16"], 2.4, 0.5),
}


def main():
    bin_dir, *rest = arguments("BIN_DIR [CASES]")
    cases = rest[0].split(",") if rest else list(CASES)
    bins = pathlib.Path(bin_dir)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="flux-bench-"))
    table = Table("A training step, 1 + 2 blocks at full width, 512x512")
    try:
        Run([bins / "flux-model", "tiny", "--geometry", "dev", "--depth", "1,2", "--out", folder / "m"])
        for case in cases:
            flags, peer_flags, speed, peak = CASES[case]
            peer = Run([peers_python(), pathlib.Path(__file__).with_name("step_peer.py"), *peer_flags, "1", "2", "512"])
            theirs = json.loads(peer.stdout)["seconds"]

            def ours(*more):
                run = Run([bins / "step_bench", "--model", folder / "m" / "flux.safetensors", "--resolution", "512x512", "--steps", "3", "--scratch",
                           folder, *flags, *more])
                return json.loads(run.stdout.splitlines()[-1])["seconds"], run.rss

            table.add(f"{case}: peer, a step", theirs, "s")
            table.add(f"{case}: peer, peak RSS", peer.rss / 1e9, "GB")
            seconds, rss = ours()
            table.add(f"{case}: ours, fastest, a step", seconds, "s")
            table.add(f"{case}: ours, fastest, peak RSS", rss / 1e9, "GB")
            table.add(f"{case}: speed", theirs / seconds, "x", at_least=speed)
            seconds, rss = ours("--host-memory", str(int(peer.rss * peak)))
            table.add(f"{case}: ours, small, a step", seconds, "s")
            table.add(f"{case}: ours, small, peak RSS", rss / 1e9, "GB")
            table.add(f"{case}: speed, small", theirs / seconds, "x", at_least=speed)
            table.add(f"{case}: peak RSS, small", rss / peer.rss, "x", at_most=peak)
    finally:
        shutil.rmtree(folder)
    return table.finish()


if __name__ == "__main__":
    sys.exit(main())

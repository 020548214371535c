#!/usr/bin/env python3
"""Caching latents with flux-cache-latents against diffusers: latents_bench.py BIN_DIR [512-bf16,512-f32,1024-bf16,1024-f32 [PICTURES]]

Random weights of FLUX's geometry, the same file for both; pictures a little larger than the resolution. Ours is the whole tool: (a run over
1 + N pictures less a run over one) / N, decode to fsync included. The peer is the best of N pictures after one to warm up. Peak RSS is that of
the whole process.
"""
import json
import pathlib
import shutil
import sys
import tempfile

from bench_table import Run, Table, arguments, peers_python, png

TARGETS = {"512-bf16": 2.0, "512-f32": 1.3, "1024-bf16": 2.5, "1024-f32": 1.3}


def main():
    bin_dir, *rest = arguments("BIN_DIR [CASES] [PICTURES]")
    cases = rest[0].split(",") if rest else list(TARGETS)
    pictures = int(rest[1]) if len(rest) > 1 else 3
    tool, python, peer = pathlib.Path(bin_dir) / "flux-cache-latents", peers_python(), pathlib.Path(__file__).with_name("latents_peer.py")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="flux-bench-"))
    env = {"XDG_CACHE_HOME": str(folder / "memo")}
    table = Table("Caching latents")
    try:
        Run([python, peer, "make", folder / "ae.safetensors"])
        for case in cases:
            side, precision = case.split("-")
            for count, name in ((1, f"one-{side}"), (1 + pictures, f"all-{side}")):
                (folder / name).mkdir(exist_ok=True)
                for i in range(count):
                    png(folder / name / f"{i}.png", int(side) * 9 // 8, int(side) * 9 // 8, i)

            def ours(name):
                out = folder / f"out-{name}-{precision}"
                run = Run([tool, "--images", folder / f"{name}-{side}", "--ae", folder / "ae.safetensors", "--resolution", side, "--precision",
                           precision, "--out", out, "--device", "cpu", "--json"], env)
                if json.loads(run.stdout)["encoded"] != (1 if name == "one" else 1 + pictures):
                    sys.exit(run.stdout)
                shutil.rmtree(out)
                return run

            ours("one")  # hashes the weights
            one, every = ours("one"), ours("all")
            other = Run([python, peer, "encode", folder / "ae.safetensors", folder / f"all-{side}", precision, side, folder / "npz"], env)
            theirs = json.loads(other.stdout)
            wall, cpu = (every.wall - one.wall) / pictures, (every.cpu - one.cpu) / pictures
            table.add(f"{case}: ours, a picture", wall, "s")
            table.add(f"{case}: diffusers, a picture", theirs["wall"], "s")
            table.add(f"{case}: ours, CPU", cpu, "s")
            table.add(f"{case}: diffusers, CPU", theirs["cpu"], "s")
            table.add(f"{case}: ours, peak RSS", every.rss / 1e9, "GB")
            table.add(f"{case}: diffusers, peak RSS", other.rss / 1e9, "GB")
            table.add(f"{case}: speed", theirs["wall"] / wall, "x", at_least=TARGETS[case])
            table.add(f"{case}: speed by CPU time", theirs["cpu"] / cpu, "x")
            table.add(f"{case}: peak RSS", every.rss / other.rss, "x", at_most=0.5)
    finally:
        shutil.rmtree(folder)
    return table.finish()


if __name__ == "__main__":
    sys.exit(main())

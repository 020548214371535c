#!/usr/bin/env python3
"""A run with nothing to do over many samples: rerun_bench.py BIN_DIR [SAMPLES]

Makes SAMPLES (10,000) pictures of 64x64 pixels with a caption each and small random models, fills both caches once, and then times the same
commands again, whole processes from start to exit; then edits one caption and one picture and counts what is encoded.
"""
import json
import pathlib
import shutil
import sys
import tempfile

from bench_table import Run, Table, arguments, png

LIMIT_SECONDS = 3


def main():
    bin_dir, *samples = arguments("BIN_DIR [SAMPLES]")
    bin_dir, samples = pathlib.Path(bin_dir), int(samples[0]) if samples else 10000
    folder = pathlib.Path(tempfile.mkdtemp(prefix="flux-bench-"))
    table = Table(f"Re-runs over {samples} samples")
    env = {"XDG_CACHE_HOME": str(folder / "memo")}
    try:
        Run([bin_dir / "flux-model", "tiny", "--out", folder / "models"], env)
        (folder / "images").mkdir()
        for i in range(samples):
            png(folder / f"images/{i:05}.png", 64, 64, i)
            (folder / f"images/{i:05}.txt").write_text(f"caption number {i} of many\n")
        models = folder / "models"
        commands = {
            "latents": [bin_dir / "flux-cache-latents", "--images", folder / "images", "--ae", models / "ae.safetensors", "--resolution", "64",
                        "--out", folder / "latents", "--device", "cpu", "--json"],
            "text": [bin_dir / "flux-cache-text", "--images", folder / "images", "--t5", models / "t5.safetensors", "--clip",
                     models / "clip.safetensors", "--t5-tokenizer", models / "tokenizers/t5/spiece.model", "--clip-tokenizer",
                     models / "tokenizers/clip", "--t5-length", "256", "--pad-policy", "masked", "--out", folder / "text", "--device", "cpu",
                     "--json"]}
        for name, command in commands.items():
            first = Run(command, env)
            table.add(f"{name}: first run", first.wall, "s")
            table.add(f"{name}: encoded by it", json.loads(first.stdout)["encoded"], at_least=samples)
            best = None
            for _ in range(3):
                again = Run(command, env)
                report = json.loads(again.stdout)
                if report["encoded"] != 0 or report["kept"] != samples:
                    sys.exit(f"{name}: a run with nothing to do says {again.stdout}")
                if best is None or again.wall < best.wall:
                    best = again
            table.add(f"{name}: nothing to do, whole process, best of 3", best.wall, "s", at_most=LIMIT_SECONDS)
            table.add(f"{name}: the same, CPU", best.cpu, "s")
            table.add(f"{name}: the same, peak RSS", best.rss / 1e6, "MB")
        (folder / f"images/{samples // 2:05}.txt").write_text("an edited caption\n")
        png(folder / f"images/{samples // 3:05}.png", 64, 64, samples + 1)
        for name, command in commands.items():
            edited = json.loads(Run(command, env).stdout)
            table.add(f"{name}: encoded after one edit", edited["encoded"], at_most=1)
            if edited["encoded"] != 1 or edited["changed"] != 1:
                sys.exit(f"{name}: after one edit: {edited}")
    finally:
        shutil.rmtree(folder)
    return table.finish()


if __name__ == "__main__":
    sys.exit(main())

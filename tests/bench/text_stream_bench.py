#!/usr/bin/env python3
"""T5-XXL streamed from its file against T5-XXL in memory: text_stream_bench.py BIN_DIR [LIVE_TOKENS [LAYERS]]

flux-cache-text on random weights of T5-XXL's width and depth (9.5 GB), 256 captions a pass: once with room for the model, once in 3 GiB. The
captions have about LIVE_TOKENS (24) tokens and are masked, so that both finish in minutes; with longer ones a layer computes longer and reads as
much. Seconds a caption are those of a run over 512 less those of a run over 256, so that loading is in neither. Both caches must be equal.
"""
import json
import pathlib
import shutil
import sys
import tempfile

from bench_table import Run, Table, arguments

PASS = 256


def main():
    bin_dir, *rest = arguments("BIN_DIR [LIVE_TOKENS] [LAYERS]")
    bins = pathlib.Path(bin_dir)
    live, depth = int(rest[0]) if rest else 24, ["--depth", rest[1]] if len(rest) > 1 else []
    folder = pathlib.Path(tempfile.mkdtemp(prefix="flux-bench-"))
    env = {"XDG_CACHE_HOME": str(folder / "memo"), "OMP_WAIT_POLICY": "passive"}
    table = Table("T5-XXL in memory and streamed")
    try:
        Run([bins / "flux-model", "tiny", "--out", folder / "tiny"])
        Run([bins / "flux-model", "tiny", "--geometry", "t5-xxl", *depth, "--out", folder / "t5"])
        for count in (PASS, 2 * PASS):
            lines = [" ".join(f"{(7 * i + k) % 997}" for k in range(live // 3)) for i in range(count)]
            (folder / f"{count}.txt").write_text("\n".join(lines) + "\n")
        seconds, samples, peak = {}, {}, {}
        for name, budget in (("in memory", "20GiB"), ("streamed", "3GiB")):
            walls = []
            for count in (PASS, 2 * PASS):
                out = folder / f"{name}-{count}"
                run = Run([bins / "flux-cache-text", "--prompts", folder / f"{count}.txt", "--t5", folder / "t5/t5.safetensors", "--clip",
                           folder / "tiny/clip.safetensors", "--t5-tokenizer", folder / "tiny/tokenizers/t5/spiece.model", "--clip-tokenizer",
                           folder / "tiny/tokenizers/clip", "--precision", "bf16", "--pad-policy", "masked", "--batch-size", str(PASS),
                           "--host-memory", budget, "--out", out, "--device", "cpu", "--json"], env)
                if ("streams from its file" in run.stderr) != (name == "streamed"):
                    sys.exit(f"{name}: {run.stderr}")
                if json.loads(run.stdout)["encoded"] != count:
                    sys.exit(f"{name}: {run.stdout}")
                walls.append(run.wall)
                peak[name] = run.rss
            seconds[name] = (walls[1] - walls[0]) / PASS
            found = json.loads(Run([bins / "flux-cache", "inspect", "--json", "--samples", out]).stdout)
            samples[name] = sorted((s["key"], s["tensor_xxh3"]) for s in found["samples"])
            table.add(f"{name}: a caption", seconds[name], "s")
            table.add(f"{name}: {2 * PASS} captions, whole process", walls[1], "s")
        if samples["in memory"] != samples["streamed"]:
            sys.exit("the caches differ")
        table.add("in memory: peak RSS", peak["in memory"] / 2**30, "GiB")
        table.add("streamed: peak RSS", peak["streamed"] / 2**30, "GiB", at_most=3)
        table.add("streamed: throughput", seconds["in memory"] / seconds["streamed"], "x", at_least=0.8)
    finally:
        shutil.rmtree(folder)
    return table.finish()


if __name__ == "__main__":
    sys.exit(main())

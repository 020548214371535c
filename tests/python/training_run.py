"""A short training of the fixtures' tiny model, for the tests of what people watch."""
import json
import os
import subprocess


def train(bin_dir, fixtures, out, steps, *more):
    subprocess.run([bin_dir / "flux-train", "--latents", fixtures / "latents", "--text", fixtures / "text", "--model",
                    fixtures / "models/flux.safetensors", "--out", out, "--rank", "4", "--learning-rate", "0.001", "--seed", "3",
                    "--max-steps", str(steps), *more], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

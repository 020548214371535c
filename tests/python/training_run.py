"""A short training of the fixtures' tiny model, and what it leaves, for several tests."""
import json
import os
import struct
import subprocess


def train(bin_dir, fixtures, out, steps, *more):
    subprocess.run([bin_dir / "flux-train", "--latents", fixtures / "latents", "--text", fixtures / "text", "--model",
                    fixtures / "models/flux.safetensors", "--out", out, "--rank", "4", "--learning-rate", "0.001", "--seed", "3",
                    "--max-steps", str(steps), *more], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tensors(path):
    """The bytes of each tensor, without the file's metadata."""
    data = path.read_bytes()
    size, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], data[8 + size + entry["data_offsets"][0]:8 + size + entry["data_offsets"][1]])
            for name, entry in header.items()}

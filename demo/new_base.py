#!/usr/bin/env python3
"""Writes an untrained FLUX transformer of the demo's size, float32: new_base.py OUT.safetensors [SEED]. Standard library only.
Weights keep the size of what passes through them; modulations and the last layer are zero, as DiTs begin: every block is the
identity, and the velocity 0."""
import array
import json
import math
import random
import sys

HIDDEN, MLP, HEAD, DOUBLE, SINGLE = 256, 1024, 128, 1, 3
PATCH, CLIP, T5, SINUSOID = 64, 128, 64, 256  # of what flux-model tiny and the demo's autoencoder give


def shapes():
    out = {}

    def linear(name, rows, columns):
        out[name + ".weight"] = (rows, columns)
        out[name + ".bias"] = (rows,)

    def norms(prefix):
        out[prefix + "norm.query_norm.scale"] = out[prefix + "norm.key_norm.scale"] = (HEAD,)

    linear("img_in", HIDDEN, PATCH)
    linear("txt_in", HIDDEN, T5)
    for name, columns in [("time_in", SINUSOID), ("vector_in", CLIP), ("guidance_in", SINUSOID)]:
        linear(name + ".in_layer", HIDDEN, columns)
        linear(name + ".out_layer", HIDDEN, HIDDEN)
    for prefix in [f"double_blocks.{i}.{stream}_" for i in range(DOUBLE) for stream in ("img", "txt")]:
        linear(prefix + "mod.lin", 6 * HIDDEN, HIDDEN)
        linear(prefix + "attn.qkv", 3 * HIDDEN, HIDDEN)
        norms(prefix + "attn.")
        linear(prefix + "attn.proj", HIDDEN, HIDDEN)
        linear(prefix + "mlp.0", MLP, HIDDEN)
        linear(prefix + "mlp.2", HIDDEN, MLP)
    for prefix in [f"single_blocks.{i}." for i in range(SINGLE)]:
        linear(prefix + "modulation.lin", 3 * HIDDEN, HIDDEN)
        linear(prefix + "linear1", 3 * HIDDEN + MLP, HIDDEN)
        linear(prefix + "linear2", HIDDEN, HIDDEN + MLP)
        norms(prefix)
    linear("final_layer.adaLN_modulation.1", 2 * HIDDEN, HIDDEN)
    linear("final_layer.linear", PATCH, HIDDEN)
    return out


def values(name, shape, draws):
    count = math.prod(shape)
    if name.endswith(".scale"):
        return array.array("f", [1]) * count
    if name.endswith(".bias") or any(part in name for part in ("mod.lin", "modulation", "final_layer")):
        return array.array("f", [0]) * count
    return array.array("f", (draws.gauss(0, 1 / math.sqrt(shape[1])) for _ in range(count)))


def main(path, seed):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes().items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draws = random.Random(seed)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes().items():
            numbers = values(name, shape, draws)
            if sys.byteorder == "big":
                numbers.byteswap()
            file.write(numbers.tobytes())
    print(f"{at // 4} parameters in {path}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)

"""Writes a safetensors file with FLUX's names and shapes and no bytes on disk: enough for `flux-train --plan`.

  sparse_flux.py OUT.safetensors [--blocks D,S] [--no-guidance]

The values are a hole, so the file takes some KB whatever its size says.
"""
import argparse
import json
import os
import struct


def shapes(num_double=19, num_single=38, hidden=3072, mlp=12288, head=128, guidance=True):
    """BFL names of the transformer and their shapes."""
    out = {}

    def linear(name, rows, columns):
        out[name + ".weight"] = [rows, columns]
        out[name + ".bias"] = [rows]

    linear("img_in", hidden, 64)
    linear("txt_in", hidden, 4096)
    for name, columns in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        if name == "guidance_in" and not guidance:
            continue
        linear(name + ".in_layer", hidden, columns)
        linear(name + ".out_layer", hidden, hidden)
    for i in range(num_double):
        for stream in ("img", "txt"):
            p = f"double_blocks.{i}.{stream}_"
            linear(p + "mod.lin", 6 * hidden, hidden)
            linear(p + "attn.qkv", 3 * hidden, hidden)
            out[p + "attn.norm.query_norm.scale"] = [head]
            out[p + "attn.norm.key_norm.scale"] = [head]
            linear(p + "attn.proj", hidden, hidden)
            linear(p + "mlp.0", mlp, hidden)
            linear(p + "mlp.2", hidden, mlp)
    for i in range(num_single):
        p = f"single_blocks.{i}."
        linear(p + "linear1", 3 * hidden + mlp, hidden)
        linear(p + "linear2", hidden, hidden + mlp)
        out[p + "norm.query_norm.scale"] = [head]
        out[p + "norm.key_norm.scale"] = [head]
        linear(p + "modulation.lin", 3 * hidden, hidden)
    linear("final_layer.linear", 64, hidden)
    linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return out


def write(path, **geometry):
    """bfloat16 tensors; raises OSError where a file cannot be so large."""
    header, at = {}, 0
    for name, shape in shapes(**geometry).items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + at)
    return 8 + len(text) + at


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--blocks", default="19,38")
    parser.add_argument("--no-guidance", action="store_true")
    args = parser.parse_args()
    num_double, num_single = (int(n) for n in args.blocks.split(","))
    size = write(args.out, num_double=num_double, num_single=num_single, guidance=not args.no_guidance)
    print(f"{args.out}: {size} bytes, {os.stat(args.out).st_blocks * 512} on disk")


if __name__ == "__main__":
    main()

"""Memory and time of flux-lora merge into a model of full width: lora_merge_bench.py BIN_DIR [--blocks 19,38] [--ranks 16,128]

The base has FLUX's names and shapes and no bytes on disk (sparse_flux.py); a LoRA a rank adapts every matrix of its blocks. The result is written in full
(23.8 GB of 19,38) into a folder that goes again. Exit 1 if the process came above 1 GiB, or what it wrote is not base + LoRAs.
"""
import argparse
import array
import json
import pathlib
import struct
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import sparse_flux  # noqa: E402

LIMIT = 1 << 30


def bf16(value):
    return struct.unpack("<I", struct.pack("<f", value))[0] >> 16


def write_lora(path, rank, blocks):
    """sd-scripts' layout; down is 1 / 1024 and up 1 / 8 everywhere, so that rank R adds R / 8192."""
    entries, parts, at = {}, [], 0
    for name, shape in sparse_flux.shapes(num_double=blocks[0], num_single=blocks[1]).items():
        if not (name.endswith(".weight") and "_blocks." in name and len(shape) == 2):
            continue
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        for part, size, value in ((".lora_down.weight", [rank, shape[1]], 1 / 1024), (".lora_up.weight", [shape[0], rank], 1 / 8)):
            count = size[0] * size[1]
            entries[module + part] = {"dtype": "BF16", "shape": size, "data_offsets": [at, at + 2 * count]}
            parts.append((count, bf16(value)))
            at += 2 * count
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for count, code in parts:
            file.write(array.array("H", [code]).tobytes() * count)


def first_value(path, name):
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        about = json.loads(file.read(size))[name]
        file.seek(8 + size + about["data_offsets"][0])
        return struct.unpack("<f", b"\0\0" + file.read(2))[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin", type=pathlib.Path)
    parser.add_argument("--blocks", default="19,38")
    parser.add_argument("--ranks", default="16,128")
    args = parser.parse_args()
    blocks = [int(n) for n in args.blocks.split(",")]
    ranks = [int(n) for n in args.ranks.split(",")]
    with tempfile.TemporaryDirectory(prefix="flux-merge-", dir=".") as folder:
        folder = pathlib.Path(folder)
        base, out = folder / "base.safetensors", folder / "out.safetensors"
        bytes_of_base = sparse_flux.write(base, num_double=blocks[0], num_single=blocks[1])
        loras = []
        for rank in ranks:
            loras.append(folder / f"rank{rank}.safetensors")
            write_lora(loras[-1], rank, blocks)
        start = time.monotonic()
        done = subprocess.run([args.bin / "flux-lora", "merge", *loras, "--base", base, "--out", out, "--json"], stdout=subprocess.PIPE, check=True)
        seconds = time.monotonic() - start
        report = json.loads(done.stdout)
        value, wanted = first_value(out, "single_blocks.0.linear1.weight"), sum(ranks) / 8192
        print(f"base {bytes_of_base / 1e9:.1f} GB, LoRAs of rank {args.ranks} ({sum(lora.stat().st_size for lora in loras) / 1e6:.0f} MB), "
              f"{report['changed']} matrices: {seconds:.0f} s, VmHWM {report['peak_rss_bytes'] / 2**20:.0f} MiB")
        if report["peak_rss_bytes"] >= LIMIT or abs(value - wanted) > wanted / 256:
            print(f"too much memory, or {value} is not {wanted}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

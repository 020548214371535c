"""Caching latents with diffusers' AutoencoderKL: decode, resize, encode, write an npz, one picture after the other.

    python latents_peer.py make FILE                              random weights of FLUX's geometry
    python latents_peer.py encode FILE IMAGES bf16|f32 SIDE OUT   one JSON object: seconds a picture, on the clock and of CPU
"""
import gc
import json
import os
import resource
import sys
import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

GEOMETRY = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[128, 256, 512, 512],
                layers_per_block=2, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)


def make(path):
    torch.manual_seed(1)
    save_file(AutoencoderKL(**GEOMETRY).state_dict(), path)


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def encode(path, images, precision, side, out):
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[precision]
    with torch.device("meta"):
        model = AutoencoderKL(**GEOMETRY)
    model.load_state_dict(load_file(path), assign=True)
    model = model.to(dtype).eval()
    del model.decoder
    gc.collect()
    os.makedirs(out, exist_ok=True)
    wall, cpu = [], []
    for name in sorted(os.listdir(images)):
        start, used = time.monotonic(), cpu_seconds()
        picture = Image.open(os.path.join(images, name)).convert("RGB").resize((int(side), int(side)), Image.LANCZOS)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).unsqueeze(0).to(dtype) / 127.5 - 1
        with torch.no_grad():
            latents = (model.encode(pixels).latent_dist.sample() - 0.1159) * 0.3611
        np.savez(os.path.join(out, name + ".npz"), latents=latents[0].float().numpy(), original_size=np.array(picture.size),
                 crop_ltrb=np.array([0, 0, int(side), int(side)]))
        wall.append(time.monotonic() - start)
        cpu.append(cpu_seconds() - used)
    # the first picture warms up
    print(json.dumps({"wall": min(wall[1:]), "cpu": min(cpu[1:])}))


if __name__ == "__main__":
    {"make": make, "encode": encode}[sys.argv[1]](*sys.argv[2:])

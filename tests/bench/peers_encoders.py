"""The same figures as vae_bench and t5_bench, of diffusers' and transformers' own classes; see docs/benchmarks.md.

    python peers_encoders.py vae [bf16|f32] [side in pixels] [runs]
    python peers_encoders.py t5 [bf16|f32] [tokens] [layers] [runs]
"""
import resource
import sys
import time

import torch


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def best(run, runs):
    run()  # warms up
    wall, cpu = [], []
    for _ in range(runs):
        start, used = time.monotonic(), cpu_seconds()
        with torch.no_grad():
            run()
        wall.append(time.monotonic() - start)
        cpu.append(cpu_seconds() - used)
    return min(wall), min(cpu)


def main(what="vae", precision="bf16", *numbers):
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[precision]
    numbers = [int(n) for n in numbers]
    if what == "vae":
        from diffusers import AutoencoderKL
        side, runs = (numbers + [512, 3][len(numbers):])[:2]
        model = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[128, 256, 512, 512],
            layers_per_block=2, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False).to(dtype).eval()
        pixels = torch.rand(1, 3, side, side).to(dtype) * 2 - 1
        with torch.no_grad():
            wall, cpu = best(lambda: model.encode(pixels), runs)
        text = f"vae encode {precision} {side}x{side}: {wall:.2f} s an image ({cpu:.2f} s of CPU)"
    else:
        from transformers import T5Config, T5EncoderModel
        tokens, layers, runs = (numbers + [512, 2, 3][len(numbers):])[:3]
        model = T5EncoderModel(T5Config(
            vocab_size=1000, d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=layers, feed_forward_proj="gated-gelu")).to(dtype).eval()
        ids = torch.randint(1, 1000, (1, tokens))
        with torch.no_grad():
            wall, cpu = best(lambda: model(ids), runs)
        text = f"t5 {precision} {tokens} tokens: {wall / layers:.3f} s ({cpu / layers:.3f} s of CPU) a layer and caption"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{text}, best of {runs}; peak RSS {peak / 1e9:.2f} GB; torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main(*sys.argv[1:])

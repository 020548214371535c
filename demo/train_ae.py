#!/usr/bin/env python3
"""Trains the demo's autoencoder, FLUX's layout with narrow channels, on drawn shapes: train_ae.py OUT.safetensors.
Needs torch and safetensors (scripts/setup --peers); 40 minutes on one core. It trains by the clock, so that the weights are not
the same on every machine, and the base has to be trained on them anew (train_base)."""
import argparse
import itertools
import math
import pathlib
import random
import sys
import time

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import shapes

SCALE, SHIFT = 0.3611, 0.1159  # what FLUX does to raw latents
CHANNELS, MULT, BLOCKS, LATENTS, SIDE = 32, (1, 2, 2, 2), 1, 16, 64


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (part(y).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Conv(nn.Module):
    """A convolution called `conv` in the files: halves the sides, or doubles them first."""

    def __init__(self, channels, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0))


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Block(channels, channels), Attention(channels), Block(channels, channels)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.down = nn.ModuleList()
        width = CHANNELS
        for level, mult in enumerate(MULT):
            part = nn.Module()
            part.block = nn.ModuleList(Block(width if b == 0 else CHANNELS * mult, CHANNELS * mult) for b in range(BLOCKS))
            width = CHANNELS * mult
            if level + 1 < len(MULT):
                part.downsample = Conv(width, True)
            self.down.append(part)
        self.mid = Middle(width)
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, 2 * LATENTS, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for part in self.down:
            for block in part.block:
                x = block(x)
            if hasattr(part, "downsample"):
                x = part.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x)))).chunk(2, 1)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        width = CHANNELS * MULT[-1]
        self.conv_in = nn.Conv2d(LATENTS, width, 3, padding=1)
        self.mid = Middle(width)
        levels = []
        for level, mult in reversed(list(enumerate(MULT))):
            part = nn.Module()
            part.block = nn.ModuleList(Block(width if b == 0 else CHANNELS * mult, CHANNELS * mult) for b in range(BLOCKS + 1))
            width = CHANNELS * mult
            if level > 0:
                part.upsample = Conv(width, False)
            levels.append(part)
        self.up = nn.ModuleList(reversed(levels))  # numbered like the encoder's, run the other way round
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for part in reversed(self.up):
            for block in part.block:
                x = block(x)
            if hasattr(part, "upsample"):
                x = part.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()


def pictures(seed, count):
    """[count, 3, 64, 64] in [-1, 1]: each colour on each ground and the other way round, larger moves and sizes than those that
    the base learns, and any two colours at times."""
    draws = random.Random(seed)
    out = torch.empty(count, SIDE, SIDE * 3, dtype=torch.uint8)
    everything = list({**shapes.COLOURS, **shapes.GROUNDS}.values())
    for i in range(count):
        two = draws.sample(everything, 2) if i % 4 else [tuple(draws.randrange(256) for _ in range(3)) for _ in range(2)]
        picture = shapes.Picture(two[0], draws.choice(list(shapes.SHAPES)), two[1],
                                 (draws.uniform(-0.3, 0.3), draws.uniform(-0.3, 0.3)), draws.uniform(0.7, 1.25))
        for row, data in enumerate(shapes.draw(picture, SIDE, SIDE)):
            out[i, row] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return (out.unflatten(2, (SIDE, 3)).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


KL_WEIGHT = 2e-3
NOISE = 0.15  # in latents, when the decoder trains alone: what a transformer leaves


def train(net, data, options, minutes, decoder_alone):
    net.encoder.requires_grad_(not decoder_alone)
    parameters = [p for p in net.parameters() if p.requires_grad]
    rate = 7e-4 if decoder_alone else 1.5e-3
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    draws = torch.Generator().manual_seed(options.seed + decoder_alone)
    start = time.monotonic()
    sums, counted = torch.zeros(4), 0
    for step in itertools.count():
        done = (time.monotonic() - start) / (60 * minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * max(0.02, (1 + math.cos(math.pi * done)) / 2)
        batch = data[torch.randint(len(data), (options.batch,), generator=draws)]
        flips = torch.rand(2, generator=draws)
        batch = batch.flip([axis + 2 for axis in range(2) if flips[axis] < 0.5])
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = net.encoder(batch)
            mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
            raw = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            if decoder_alone:
                raw += NOISE / SCALE * torch.rand(len(raw), 1, 1, 1, generator=draws) * torch.randn_like(raw)
            output = net.decoder(raw).float()
        # the latents that the transformer sees are to be near a standard normal distribution
        scaled, log_variance = SCALE * (mean - SHIFT), logvar + 2 * math.log(SCALE)
        kl = 0.5 * (scaled.square() + log_variance.exp() - 1 - log_variance).mean()
        error = (output - batch).abs()
        loss = error.mean() + 2 * error.square().mean() + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        sums += torch.tensor([loss.item(), error.mean().item(), kl.item(), log_variance.exp().mean().sqrt().item()])
        counted += 1
        if step % 50 == 49:
            print(f"{100 * done:5.1f} %  step {step + 1}  loss {sums[0] / counted:.4f}  |error| {sums[1] / counted:.4f}  "
                  f"KL {sums[2] / counted:.3f}  noise {sums[3] / counted:.3f}  latents {scaled.std().item():.2f}", flush=True)
            sums.zero_()
            counted = 0
            save(net, options.out)
    save(net, options.out)


def save(net, path):
    safetensors.torch.save_file({k: v.to(torch.bfloat16).contiguous() for k, v in net.state_dict().items()}, path,
                                {"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--minutes", type=float, default=25, help="of both halves")
    parser.add_argument("--decoder-minutes", type=float, default=15, help="after that, of the decoder alone")
    parser.add_argument("--start", help="weights to go on from, with --minutes 0 in their decoder alone: the latents stay")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    net = AutoEncoder()
    if options.start:
        net.load_state_dict({k: v.float() for k, v in safetensors.torch.load_file(options.start).items()})
    print(f"{sum(p.numel() for p in net.parameters())} parameters", flush=True)
    data = pictures(options.seed, 4000)
    print("pictures are drawn", flush=True)
    for minutes, decoder_alone in [(options.minutes, False), (options.decoder_minutes, True)]:
        if minutes > 0:
            train(net, data, options, minutes, decoder_alone)


if __name__ == "__main__":
    main()

"""What reading a sample costs with sd-scripts' files: one npz of latents and one of text a picture.

    python cache_read_peer.py make DIR SAMPLES
    python cache_read_peer.py read DIR SECONDS     one JSON object: samples a second

The files have the arrays, shapes and types that sd-scripts 48d368f writes for FLUX at 1024x1024 (np.savez, not compressed, float32). `dataset` does
with them what its dataset class does for each visit of a batch of one: np.load of both files, all arrays of FLUX, copies into tensors, a batch
dimension by stack, and the small tensors of sizes and weights. `np.load` only reads the arrays.
"""
import json
import os
import random
import sys
import time

import numpy as np
import torch

ROWS = COLUMNS = 128  # of the latents of 1024x1024 pixels


def make(folder, count):
    os.makedirs(folder, exist_ok=True)
    numbers = np.random.default_rng(1)
    for i in range(count):
        size = f"_{ROWS}x{COLUMNS}"
        np.savez(f"{folder}/{i}_1024x1024_flux.npz", **{
            "latents" + size: numbers.standard_normal((16, ROWS, COLUMNS), dtype=np.float32),
            "original_size" + size: np.array([1024, 1024]),
            "crop_ltrb" + size: np.array([0, 0, 1024, 1024])})
        mask = np.zeros(512, dtype=np.int64)
        mask[:60 + i * 37 % 61] = 1
        np.savez(f"{folder}/{i}_flux_te.npz", l_pooled=numbers.standard_normal(768, dtype=np.float32),
                 t5_out=numbers.standard_normal((512, 4096), dtype=np.float32), txt_ids=np.zeros((512, 3), dtype=np.float32),
                 t5_attn_mask=mask, apply_t5_attn_mask=np.array(False))


def arrays(folder, i):
    image = np.load(f"{folder}/{i}_1024x1024_flux.npz")
    size = f"_{ROWS}x{COLUMNS}"
    if "latents" + size not in image:
        raise ValueError("no latents of this size")
    latents = image["latents" + size]
    original, crop = image["original_size" + size].tolist(), image["crop_ltrb" + size].tolist()
    for name in ("latents_flipped", "alpha_mask"):  # it looks for both
        if name + size in image:
            raise ValueError(name)
    text = np.load(f"{folder}/{i}_flux_te.npz")
    return latents, original, crop, [text[name] for name in ("l_pooled", "t5_out", "txt_ids", "t5_attn_mask")]


def visit(folder, i):
    latents, original, crop, text = arrays(folder, i)
    return {
        "latents": torch.stack([torch.FloatTensor(latents)]),
        "text_encoder_outputs_list": [torch.stack([torch.FloatTensor(array)]) for array in text],
        "loss_weights": torch.FloatTensor([1.0]),
        "original_sizes_hw": torch.stack([torch.LongTensor([original[1], original[0]])]),
        "crop_top_lefts": torch.stack([torch.LongTensor([crop[1], crop[0]])]),
        "target_sizes_hw": torch.stack([torch.LongTensor([1024, 1024])]),
        "network_multipliers": torch.FloatTensor([1.0]),
    }


class Samples(torch.utils.data.Dataset):
    def __init__(self, folder, count):
        self.folder, self.count = folder, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return visit(self.folder, i)


def only(batch):
    return batch[0]


def loader_rate(folder, count, seconds, num_workers):
    """Through DataLoader as sd-scripts makes it: shuffled, `num_workers` processes that persist."""
    loader = torch.utils.data.DataLoader(Samples(folder, count), batch_size=1, shuffle=True, collate_fn=only, num_workers=num_workers,
                                         persistent_workers=num_workers > 0)
    for _ in loader:  # starts the processes
        pass
    visits, start = 0, time.monotonic()
    while time.monotonic() < start + seconds:
        for _ in loader:
            visits += 1
    return {"per_second": visits / (time.monotonic() - start)}


def load_rate(folder, count, seconds):
    """np.load alone, in this thread."""
    order, visits, start = random.Random(1), 0, time.monotonic()
    while time.monotonic() < start + seconds:
        arrays(folder, order.randrange(count))
        visits += 1
    return {"per_second": visits / (time.monotonic() - start)}


def main(what, folder, number):
    if what == "make":
        make(folder, int(number))
        return
    torch.set_num_threads(1)
    names = os.listdir(folder)
    count, seconds = len(names) // 2, float(number)
    for i in range(count):
        visit(folder, i)  # warm
    print(json.dumps({
        "in this process": loader_rate(folder, count, seconds, 0),
        "1 worker": loader_rate(folder, count, seconds, 1),
        "2 workers": loader_rate(folder, count, seconds, 2),
        "np.load": load_rate(folder, count, seconds),
        "bytes_a_sample": sum(os.path.getsize(f"{folder}/{name}") for name in names) // count}))


if __name__ == "__main__":
    main(*sys.argv[1:])

#!/usr/bin/env python3
"""The peers of weights_bench: weights_peer.py load FILE cold|warm | save FILE OUT

load: safetensors' mapped file and a copy of every byte into memory of its own. save: a writer that holds one tensor at a time, as
sd-scripts' memory-efficient one: header, then the bytes of each tensor, then fsync.
"""
import json
import os
import struct
import sys
import time

import torch
from safetensors import safe_open


def load(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}


def forget(path):
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def main():
    what, path, how = sys.argv[1:4]
    torch.zeros(1)
    if what == "load":
        if how == "cold":
            forget(path)
        start = time.monotonic()
        tensors = load(path)
        seconds = time.monotonic() - start
    else:
        tensors = load(path)
        start = time.monotonic()
        header, at = {}, 0
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        with open(how, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors.values():
                out.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
            out.flush()
            os.fsync(out.fileno())
        seconds = time.monotonic() - start
    print(json.dumps({"seconds": seconds, "bytes": sum(t.numel() * t.element_size() for t in tensors.values())}))


if __name__ == "__main__":
    main()

"""flux-cache export --format npz, read by numpy, holds what h5py reads from the segments.

usage: cache_export_test.py FLUX_CACHE MAKE_TEST_CACHE PLUGIN_DIR
"""
import glob
import json
import os
import subprocess
import sys
import tempfile

os.environ["HDF5_PLUGIN_PATH"] = sys.argv[3]  # before HDF5 is loaded
import h5py
import numpy as np

NUM_SAMPLES = 140  # more than a segment


def samples(cache):
    """Key -> the arrays that an export of it must hold."""
    out = {}
    for path in glob.glob(os.path.join(cache, "seg-*.h5")):
        with h5py.File(path) as f:
            for i, key in enumerate(f["samples_key"]):
                if "samples_bucket" in f:
                    h, w = f["samples_bucket"][i]
                    latents = f[f"latents_{h}x{w}"][f["samples_row"][i]].astype("<f4")
                    arrays = {"mean": latents[:16], "logvar": latents[16:]}
                    if f"masks_{h}x{w}" in f and f["samples_flags"][i] & 2:
                        arrays["mask"] = f[f"masks_{h}x{w}"][f["samples_row"][i]]
                else:
                    arrays = {"t5": f["t5"][i].astype("<f4"), "clip": f["clip"][i].astype("<f4"), "t5_mask": f["samples_t5_mask"][i]}
                out[bytes(key).hex()] = arrays
    return out


with tempfile.TemporaryDirectory() as folder:
    for dtype in ("bf16", "f16", "f32"):
        subprocess.run([sys.argv[2], os.path.join(folder, dtype), str(NUM_SAMPLES), dtype], check=True)
        for kind in ("latents", "text"):
            cache, out = os.path.join(folder, dtype, kind), os.path.join(folder, dtype, kind + "-npz")
            subprocess.run([sys.argv[1], "export", cache, "--out", out, "--format", "npz"], check=True, capture_output=True)
            expected = samples(cache)
            assert len(expected) == NUM_SAMPLES and len(os.listdir(out)) == NUM_SAMPLES + 1
            for key, arrays in expected.items():
                with np.load(os.path.join(out, key + ".npz")) as found:
                    assert sorted(found.files) == sorted(arrays), (found.files, sorted(arrays))
                    for name, want in arrays.items():
                        got = found[name]
                        assert got.dtype == want.dtype and got.shape == want.shape, (name, got.dtype, got.shape, want.dtype, want.shape)
                        assert np.array_equal(got, want, equal_nan=name != "t5_mask"), name
            lines = [json.loads(line) for line in open(os.path.join(out, "index.jsonl"), encoding="utf-8")]
            assert {v["key"] for line in lines for v in line["variants"]} == set(expected)
            assert all(v["file"] == v["key"] + ".npz" for line in lines for v in line["variants"])
        print(f"{dtype}: {2 * NUM_SAMPLES} samples equal, numpy {np.__version__}")

"""Reads caches with h5py as their users would, without our code, and compares every value.

usage: cache_h5py_test.py MAKE_TEST_CACHE [PLUGIN_DIR]
With PLUGIN_DIR HDF5 takes its zstd filter from there, else from the package hdf5plugin (exit code 77 without it).
"""
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile

if len(sys.argv) > 2:
    os.environ["HDF5_PLUGIN_PATH"] = sys.argv[2]  # before HDF5 is loaded
    import h5py
else:
    try:
        import h5py
        import hdf5plugin  # noqa: F401 - registers the filter
    except ImportError as missing:
        print(f"skipped: no {missing.name} (scripts/setup --peers)")
        sys.exit(77)
import numpy as np  # noqa: E402

NUM_SAMPLES = 140  # more than a segment


def decoded(raw, dtype):
    """Bytes of a tensor as numbers: bfloat16 is the upper half of a float32."""
    if dtype == "bf16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, "<f2" if dtype == "f16" else "<f4")


def texts(f, name):
    offset, data = f[name + "_offset"][:], bytes(f[name + "_bytes"][:])
    assert len(data) == offset[-1] + 1 and data[-1] == 0
    return [data[a:b] for a, b in zip(offset[:-1], offset[1:])]


def check(values, raw, dtype):
    want = decoded(raw, dtype).reshape(values.shape)
    assert values.dtype == want.dtype, (values.dtype, want.dtype)
    # NaNs count as equal to NaNs; everything else to the last bit
    assert np.array_equal(values, want, equal_nan=True), np.nonzero(values != want)


def check_segment(path, folder, dtype):
    with h5py.File(path) as f:
        assert f.attrs["format"] == b"flux-cache" or f.attrs["format"] == "flux-cache", f.attrs["format"]
        assert f.attrs["schema_version"] == 1
        parameters = json.loads(f.attrs["parameters"])
        assert parameters["dtype"] == dtype
        n = int(f.attrs["num_samples"])
        for name in f:
            assert isinstance(f[name], h5py.Dataset) and f[name].chunks, name
        for i in range(n):
            key = bytes(f["samples_key"][i]).hex()
            raw = open(os.path.join(folder, "expected", key), "rb").read()
            if "samples_bucket" in f:
                h, w = f["samples_bucket"][i]
                check(f[f"latents_{h}x{w}"][f["samples_row"][i]], raw, dtype)
            else:
                t5 = f["t5"][i]
                split = t5.size * (4 if dtype == "f32" else 2)
                check(t5, raw[:split], dtype)
                check(f["clip"][i], raw[split:], dtype)
                assert f["samples_t5_mask"][i].sum() == f["samples_t5_tokens"][i]
        return n, texts(f, "samples_path" if "samples_bucket" in f else "samples_caption")


def check_index(path, kind):
    with h5py.File(path) as f:
        assert f.attrs["num_items"] == NUM_SAMPLES
        assert len(f["items_item"]) == NUM_SAMPLES and len(f["variants_key"]) == NUM_SAMPLES
        assert np.all(f["variants_weight"][:] == 1.0)
        for i, text in enumerate(texts(f, "items_path")):
            assert text == (b"" if i % 5 == 4 else b"photos/\xff " + kind.encode() + b"%d\n.jpg" % i), text


def check_manifest(path):
    text = open(path, encoding="utf-8").read()
    manifest = json.loads(text)
    assert manifest["complete"] is True and manifest["num_samples"] == NUM_SAMPLES
    # Python's json writes the same canonical form for what a test manifest holds
    assert text == json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    return manifest


with tempfile.TemporaryDirectory() as folder:
    for dtype in ("bf16", "f16", "f32"):
        subprocess.run([sys.argv[1], os.path.join(folder, dtype), str(NUM_SAMPLES), dtype], check=True)
        for kind in ("latents", "text"):
            root = os.path.join(folder, dtype, kind)
            names = sorted(glob.glob(os.path.join(root, "seg-*.h5")))
            manifest = check_manifest(os.path.join(root, "manifest.json"))
            assert [s["name"] for s in manifest["segments"]] == [os.path.basename(p) for p in names]
            found = [check_segment(p, os.path.join(folder, dtype), dtype) for p in names]
            assert sum(n for n, _ in found) == NUM_SAMPLES
            assert {t for _, all_ in found for t in all_} >= {b"", b"photos/\xff " + kind.encode() + b"0\n.jpg"}
            check_index(os.path.join(root, "index.h5"), kind)
            for tool in (["h5ls"], ["h5dump", "-H"]):
                if shutil.which(tool[0]):
                    out = subprocess.run(tool + names[:1], check=True, capture_output=True, text=True).stdout
                    assert "samples_key" in out
        print(f"{dtype}: {2 * NUM_SAMPLES} samples equal, h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}")

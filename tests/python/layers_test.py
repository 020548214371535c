"""The include check accepts this tree, and fails on each kind of wrong include."""
import pathlib
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def check(root):
    return subprocess.run([ROOT / "scripts/check-layers", root], capture_output=True, text=True)


class Layers(unittest.TestCase):
    def test_this_tree(self):
        result = check(ROOT)
        self.assertEqual((result.returncode, result.stderr), (0, ""))

    def refuses(self, file, include, why):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, file)
            path.parent.mkdir(parents=True)
            path.write_text(f"#include {include}\n")
            result = check(folder)
            self.assertEqual(result.returncode, 1)
            self.assertIn(why, result.stderr)

    def test_upward(self):
        self.refuses("common/core/a.h", '"formats/cache/reader.h"', "common/core is below formats")
        self.refuses("common/tensor/a.cpp", '"common/models/vae/vae.h"', "common/tensor is below common/models")
        self.refuses("pipelines/text/a.cpp", '"tools/flux-train/a.h"', "pipelines is below tools")

    def test_torch_too_low(self):
        self.refuses("formats/cache/a.cpp", "<ATen/core/Tensor.h>", "LibTorch starts at common/tensor")
        self.refuses("common/ops/a.cu", "<c10/cuda/CUDAStream.h>", "no .cu file sees it")

    def test_stages(self):
        self.refuses("pipelines/train/a.cpp", '"pipelines/text/run.h"', "the stages meet on disk only")

    def test_unrooted(self):
        self.refuses("common/core/a.cpp", '"error.h"', "not rooted at the repository")


if __name__ == "__main__":
    unittest.main()

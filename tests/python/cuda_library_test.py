"""What libflux_cuda.so offers, without a GPU: cuda_library_test.py LIBRARY NVIDIA...

Opens it with every symbol resolved, which needs the NVIDIA libraries: below one of the folders NVIDIA, as scripts/setup --cuda or --peers installs
them, else it is skipped (77).
"""
import ctypes
import os
import pathlib
import sys

library, folders = sys.argv[1], [pathlib.Path(name) for name in sys.argv[2:]]
needed = ("cudnn", "cusparselt", "nccl", "nvshmem", "cu13")
nvidia = next((folder for folder in folders if all((folder / name / "lib").is_dir() for name in needed)), None)
if nvidia is None:
    print("skipped: the NVIDIA libraries are not installed (scripts/setup --cuda, or --peers)")
    sys.exit(77)
if "OPENED" not in os.environ:  # the loader reads the path at the start of a process
    path = ":".join(str(nvidia / name / "lib") for name in needed)
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OPENED": "1", "LD_LIBRARY_PATH": path})

opened = ctypes.CDLL(library, mode=os.RTLD_NOW | os.RTLD_GLOBAL)
assert opened.flux_cuda_device_count() >= 0
for name in ("flux_cuda_use", "flux_cuda_free_bytes", "flux_cuda_pin", "flux_cuda_unpin", "flux_cuda_make_nccl_backend"):
    getattr(opened, name)
assert opened.flux_cuda_nccl_fits() == 1, "built with another version of NCCL than LibTorch"

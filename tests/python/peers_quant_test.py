"""Files of `flux-model convert --quantize` against bitsandbytes (nf4) and torch (fp8), tensor by tensor, exactly.
peers_quant_test.py BIN_DIR FIXTURES; exit code 77 without the peers.
"""
import pathlib
import subprocess
import sys
import tempfile

try:
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
    from safetensors.torch import load_file
except ImportError as error:
    print(f"skipped: {error} (scripts/setup --peers installs it)")
    sys.exit(77)

BLOCK = 64


def nf4(weight):
    codes, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return codes.view(weight.shape[0], -1), state.absmax, state


def fp8(weight):
    out, size = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -size % BLOCK)).view(out, -1, BLOCK)
    scale = (padded.abs().amax(2, keepdim=True) / 448).clamp(min=1e-12)
    codes = (padded / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).view(out, -1)[:, :size], scale.squeeze(2), None


def main(bin_dir, fixtures):
    plain = load_file(fixtures / "models/flux.safetensors")
    failures = compared = 0
    with tempfile.TemporaryDirectory() as folder:
        for word, reference in {"nf4": nf4, "fp8": fp8}.items():
            path = pathlib.Path(folder) / f"{word}.safetensors"
            subprocess.run([bin_dir / "flux-model", "convert", "--quantize", word, "--in", fixtures / "models/flux.safetensors",
                            "--out", path], check=True)
            ours = load_file(path)
            for name, tensor in plain.items():
                if name + "_scale" not in ours:
                    if not torch.equal(ours[name], tensor.bfloat16()):
                        print(f"{word}: {name} is not the plain tensor")
                        failures += 1
                    continue
                codes, scales, state = reference(tensor.bfloat16())
                compared += 1
                mine = ours[name].view(torch.uint8)
                if mine.shape != codes.shape or not torch.equal(mine, codes) or not torch.equal(ours[name + "_scale"], scales):
                    print(f"{word}: {name}: codes or scales differ")
                    failures += 1
                if state is not None:  # and what bitsandbytes makes of our file is near the weight
                    loaded = QuantState(absmax=ours[name + "_scale"], shape=tensor.shape, blocksize=BLOCK, code=state.code,
                                        quant_type="nf4", dtype=torch.bfloat16)
                    back = dequantize_4bit(mine.reshape(-1, 1), loaded)
                    if not torch.equal(back, dequantize_4bit(codes.reshape(-1, 1), state)):
                        print(f"{word}: {name}: bitsandbytes reads something else")
                        failures += 1
    print(f"{compared} matrices compared, {failures} failures")
    return 0 if failures == 0 and compared == 2 * 26 else 1


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])))

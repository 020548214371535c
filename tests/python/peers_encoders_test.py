"""Caches hold what diffusers and transformers compute of the same weights, pictures and captions.
peers_encoders_test.py BIN_DIR FIXTURES; exit code 77 without the peers.

The pictures have the size of their bucket, so that decoding and resizing play no part. Everything is float32.
"""
import pathlib
import subprocess
import sys
import tempfile

try:
    import h5py
    import hdf5plugin  # noqa: F401 - registers the filter
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
except ImportError as error:
    print(f"skipped: {error} (scripts/setup --peers installs it)")
    sys.exit(77)

LIMIT = 5e-6  # relative l2 error, the limit of the reference vectors in float32
SIZES = [(64, 64), (128, 32), (32, 128)]  # width, height: 4096 pixels each
CAPTIONS = ["a red square", "A Photo of   two cats, sitting!", "über naïve façade ☕ 東京"]
LENGTH = 256


def difference(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def bfl_to_diffusers(name, levels):
    """An autoencoder's tensor name in diffusers' layout; the decoder's levels are counted the other way round."""
    half, rest = name.split(".", 1)
    parts = rest.split(".")
    if parts[0] in ("down", "up"):
        level = int(parts[1]) if parts[0] == "down" else levels - 1 - int(parts[1])
        if parts[2] == "block":
            last = parts[4:]
            last[0] = last[0].replace("nin_shortcut", "conv_shortcut")
            return ".".join([half, parts[0] + "_blocks", str(level), "resnets", parts[3]] + last)
        return ".".join([half, parts[0] + "_blocks", str(level), parts[2] + "rs", "0", "conv", parts[-1]])
    if parts[0] == "mid":
        if parts[1] == "attn_1":
            place = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}[parts[2]]
            return f"{half}.mid_block.attentions.0.{place}.{parts[3]}"
        return ".".join([half, "mid_block", "resnets", str(int(parts[1][-1]) - 1)] + parts[2:])
    return f"{half}.{rest.replace('norm_out', 'conv_norm_out')}"


def load_autoencoder(file):
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    levels = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.down."))
    widths = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    blocks = 1 + max(int(name.split(".")[4]) for name in weights if name.startswith("encoder.down.0.block."))
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, block_out_channels=widths,
        layers_per_block=blocks, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False).eval()
    model.load_state_dict({bfl_to_diffusers(name, levels): tensor[:, :, 0, 0] if ".attn_1." in name and tensor.dim() == 4 else tensor
                           for name, tensor in weights.items()})
    return model


def load_t5(file):
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    heads = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape[1]
    inner = weights["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0]
    vocabulary, width = weights["shared.weight"].shape
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=inner // heads, num_heads=heads, feed_forward_proj="gated-gelu",
        d_ff=weights["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        num_layers=1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.block.")))
    model = T5EncoderModel(config).eval()
    missing, surplus = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"} and not surplus, (missing, surplus)
    return model


def load_clip(file):
    weights = {name.removeprefix("text_model."): tensor.float() for name, tensor in load_file(file).items()}
    vocabulary, width = weights["embeddings.token_embedding.weight"].shape
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, num_attention_heads=width // 64, hidden_act="quick_gelu",
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0], max_position_embeddings=77,
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layers.")),
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1)
    model = CLIPTextModel(config).eval()
    names = model.state_dict().keys()
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    missing, surplus = model.load_state_dict({prefix + name: tensor for name, tensor in weights.items()}, strict=False)
    assert not surplus and all(name.endswith("position_ids") for name in missing), (missing, surplus)
    return model


def texts(file, name):
    offset, data = file[name + "_offset"][:], file[name + "_bytes"][:].tobytes()
    return [data[a:b].decode() for a, b in zip(offset[:-1], offset[1:])]


def check_latents(bin_dir, models, folder):
    images = folder / "images"
    images.mkdir()
    random = np.random.default_rng(1)
    for i, (width, height) in enumerate(SIZES):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(images / f"{i}.png")
    subprocess.run([bin_dir / "flux-cache-latents", "--images", images, "--ae", models / "ae.safetensors", "--out", folder / "latents",
                    "--resolution", "64x64", "--dtype", "f32", "--precision", "f32"], check=True)
    model = load_autoencoder(models / "ae.safetensors")
    compared = 0
    for segment in (folder / "latents").glob("seg-*.h5"):
        with h5py.File(segment) as file:
            for path, (rows, columns), row in zip(texts(file, "samples_path"), file["samples_bucket"][:], file["samples_row"][:]):
                pixels = torch.tensor(np.asarray(Image.open(images / path))).permute(2, 0, 1)[None].float() / 127.5 - 1
                assert pixels.shape[2:] == (rows * 8, columns * 8), (path, rows, columns)
                ours = torch.tensor(file[f"latents_{rows}x{columns}"][row])
                with torch.no_grad():
                    posterior = model.encode(pixels).latent_dist
                for name, theirs, part in (("mean", posterior.mean, ours[:16]), ("logvar", posterior.logvar, ours[16:])):
                    rel = difference(part, theirs[0])
                    print(f"{path} {name}: rel {rel:.2g}")
                    assert rel <= LIMIT, (path, name, rel)
                compared += 1
    assert compared == len(SIZES), compared


def check_text(bin_dir, models, folder):
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(caption + "\n" for caption in CAPTIONS), encoding="utf-8")
    tokenizers = models / "tokenizers"
    t5, clip = load_t5(models / "t5.safetensors"), load_clip(models / "clip.safetensors")
    t5_tokens = T5Tokenizer.from_pretrained(tokenizers / "t5", extra_ids=0)
    clip_tokens = CLIPTokenizer.from_pretrained(tokenizers / "clip")
    for pad_policy in ("full", "masked"):
        out = folder / f"text-{pad_policy}"
        subprocess.run([bin_dir / "flux-cache-text", "--prompts", prompts, "--t5", models / "t5.safetensors", "--clip",
                        models / "clip.safetensors", "--t5-tokenizer", tokenizers / "t5/spiece.model", "--clip-tokenizer", tokenizers / "clip",
                        "--out", out, "--t5-length", str(LENGTH), "--pad-policy", pad_policy, "--precision", "f32", "--dtype", "f32"], check=True)
        compared = 0
        for segment in out.glob("seg-*.h5"):
            with h5py.File(segment) as file:
                for i, caption in enumerate(texts(file, "samples_caption")):
                    got = t5_tokens(caption, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
                    live = int(got.attention_mask.sum())
                    assert live == file["samples_t5_tokens"][i], (caption, live, file["samples_t5_tokens"][i])
                    ids = clip_tokens(caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
                    with torch.no_grad():
                        mask = got.attention_mask if pad_policy == "masked" else None
                        theirs = t5(got.input_ids, attention_mask=mask).last_hidden_state[0]
                        pooled = clip(ids).pooler_output[0]
                    ours = torch.tensor(file["t5"][i])
                    if pad_policy == "masked":
                        assert not ours[live:].any()
                        ours, theirs = ours[:live], theirs[:live]
                    for name, a, b in (("t5", ours, theirs), ("clip", torch.tensor(file["clip"][i]), pooled)):
                        rel = difference(a, b)
                        print(f"{caption!r} {name} {pad_policy}: rel {rel:.2g}")
                        assert rel <= LIMIT, (caption, name, pad_policy, rel)
                    compared += 1
        assert compared >= len(CAPTIONS), compared


def main(bin_dir, fixtures):
    torch.manual_seed(0)
    models = fixtures / "models"
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        check_latents(bin_dir, models, folder)
        check_text(bin_dir, models, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(*(pathlib.Path(argument).resolve() for argument in sys.argv[1:3])))

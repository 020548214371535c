"""A LoRA that flux-train saved, merged into diffusers' own transformer as W + alpha/rank up down, gives the velocities that
this project computes with the LoRA attached. peers_lora_test.py BIN_DIR FIXTURES; exit code 77 without the peers.

The reference outputs are written as a case of kind `lora`, and flux-check compares, with that kind's recorded limits.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

try:
    import torch
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import load_file, safe_open, save_file
except ImportError as error:
    print(f"skipped: {error} (scripts/setup --peers installs it)")
    sys.exit(77)

LIMITS = {"rel": 3e-06, "max": 1e-05, "gradients": {"rel": 8e-06, "max": 1e-05}, "merged": {"rel": 2e-07, "max": 1e-06}}


def to_diffusers(weights, hidden, mlp):
    """BFL names and fused matrices -> diffusers' names (reference architecture: qkv split by rows, last adaLN swapped)."""
    out = {}

    def put(ours, theirs, rows=None):
        for part in ("weight", "bias"):
            tensor = weights[f"{ours}.{part}"]
            if rows is None:
                out[f"{theirs}.{part}"] = tensor
            else:
                for name, piece in zip(theirs, tensor.split(rows)):
                    out[f"{name}.{part}"] = piece

    def norm(ours, theirs):
        out[theirs + ".weight"] = weights[ours + ".scale"]

    for ours, theirs in {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}.items():
        put(ours, theirs)
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
    for ours, theirs in embedders.items():
        if ours + ".in_layer.weight" in weights:
            put(ours + ".in_layer", f"time_text_embed.{theirs}.linear_1")
            put(ours + ".out_layer", f"time_text_embed.{theirs}.linear_2")
    for part in ("weight", "bias"):
        shift, scale = weights[f"final_layer.adaLN_modulation.1.{part}"].chunk(2)
        out[f"norm_out.linear.{part}"] = torch.cat([scale, shift])
    depth = {kind: 1 + max(int(k.split(".")[1]) for k in weights if k.startswith(kind)) for kind in ("double_blocks", "single_blocks")}
    for i in range(depth["double_blocks"]):
        a, b = f"double_blocks.{i}", f"transformer_blocks.{i}"
        put(f"{a}.img_mod.lin", f"{b}.norm1.linear")
        put(f"{a}.txt_mod.lin", f"{b}.norm1_context.linear")
        put(f"{a}.img_attn.qkv", [f"{b}.attn.to_{x}" for x in "qkv"], [hidden] * 3)
        put(f"{a}.txt_attn.qkv", [f"{b}.attn.add_{x}_proj" for x in "qkv"], [hidden] * 3)
        for x, name in (("q", "query"), ("k", "key")):
            norm(f"{a}.img_attn.norm.{name}_norm", f"{b}.attn.norm_{x}")
            norm(f"{a}.txt_attn.norm.{name}_norm", f"{b}.attn.norm_added_{x}")
        put(f"{a}.img_attn.proj", f"{b}.attn.to_out.0")
        put(f"{a}.txt_attn.proj", f"{b}.attn.to_add_out")
        for stream, name in (("img", "ff"), ("txt", "ff_context")):
            put(f"{a}.{stream}_mlp.0", f"{b}.{name}.net.0.proj")
            put(f"{a}.{stream}_mlp.2", f"{b}.{name}.net.2")
    for i in range(depth["single_blocks"]):
        a, b = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        put(f"{a}.linear1", [f"{b}.attn.to_q", f"{b}.attn.to_k", f"{b}.attn.to_v", f"{b}.proj_mlp"], [hidden] * 3 + [mlp])
        put(f"{a}.linear2", f"{b}.proj_out")
        put(f"{a}.modulation.lin", f"{b}.norm.linear")
        for x, name in (("q", "query"), ("k", "key")):
            norm(f"{a}.norm.{name}_norm", f"{b}.attn.norm_{x}")
    return out, depth


def merge(weights, lora, multiplier):
    """W + multiplier alpha/rank up down, by matching the underscored names of all linears."""
    merged = dict(weights)
    linears = {"lora_unet_" + key.removesuffix(".weight").replace(".", "_"): key for key in weights if key.endswith(".weight")}
    modules = {key.split(".")[0] for key in lora}
    for module in modules:
        down, up = lora[module + ".lora_down.weight"].float(), lora[module + ".lora_up.weight"].float()
        scale = multiplier * float(lora[module + ".alpha"]) / down.shape[0]
        key = linears[module]
        merged[key] = weights[key] + scale * (up @ down)
    return merged, len(modules)


def main(bin_dir, fixtures):
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model_file = fixtures / "models/flux.safetensors"
        subprocess.run([bin_dir / "flux-train", "--latents", fixtures / "latents", "--text", fixtures / "text", "--model", model_file,
                        "--out", folder / "run", "--method", "lora", "--rank", "4", "--alpha", "2", "--max-steps", "10",
                        "--learning-rate", "0.01", "--seed", "1"], check=True)
        lora_file = folder / "run/step-000010/lora.safetensors"
        lora = load_file(lora_file)
        weights = {key: value.float() for key, value in load_file(model_file).items()}
        hidden, mlp = weights["img_in.weight"].shape[0], weights["double_blocks.0.img_mlp.0.weight"].shape[0]
        head = weights["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]

        height, width, length = 8, 12, 20
        tokens = height // 2 * width // 2
        rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
        img_ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(tokens, 3).float()
        txt_ids = torch.zeros(length, 3)
        inputs = {"input.img": torch.randn(2, tokens, 64), "input.txt": torch.randn(2, length, weights["txt_in.weight"].shape[1]),
                  "input.y": torch.randn(2, weights["vector_in.in_layer.weight"].shape[1]),
                  "input.timestep": torch.tensor([0.3, 0.9]), "input.guidance": torch.tensor([1.0, 3.5]),
                  "input.img_ids": img_ids, "input.txt_ids": txt_ids}
        outputs = {}
        for multiplier in (1.0, 0.5):
            merged, num_modules = merge(weights, lora, multiplier)
            state, depth = to_diffusers(merged, hidden, mlp)
            reference = FluxTransformer2DModel(
                in_channels=64, num_layers=depth["double_blocks"], num_single_layers=depth["single_blocks"], attention_head_dim=head,
                num_attention_heads=hidden // head, joint_attention_dim=inputs["input.txt"].shape[2],
                pooled_projection_dim=inputs["input.y"].shape[1], guidance_embeds="guidance_in.in_layer.weight" in weights,
                axes_dims_rope=(head // 8, head * 7 // 16, head * 7 // 16))
            reference.load_state_dict(state)
            with torch.no_grad():
                outputs[f"output.{multiplier}"] = reference(
                    hidden_states=inputs["input.img"], encoder_hidden_states=inputs["input.txt"], pooled_projections=inputs["input.y"],
                    timestep=inputs["input.timestep"], guidance=inputs["input.guidance"], img_ids=img_ids, txt_ids=txt_ids).sample
        base, _ = to_diffusers(weights, hidden, mlp)
        reference.load_state_dict(base)
        with torch.no_grad():
            plain = reference(hidden_states=inputs["input.img"], encoder_hidden_states=inputs["input.txt"],
                              pooled_projections=inputs["input.y"], timestep=inputs["input.timestep"], guidance=inputs["input.guidance"],
                              img_ids=img_ids, txt_ids=txt_ids).sample
        effect = float((outputs["output.1.0"] - plain).norm() / plain.norm())
        assert effect > 1e-4, f"the LoRA changes the output by {effect} only: nothing to compare"
        assert num_modules == depth["double_blocks"] * 10 + depth["single_blocks"] * 3, num_modules

        case = folder / "case"
        case.mkdir()
        save_file(inputs, folder / "inputs.safetensors")
        save_file(outputs, case / "kohya_vectors.safetensors")
        with safe_open(lora_file, "pt") as file:
            save_file(lora, case / "kohya.safetensors", file.metadata())
        (case / "case.json").write_text(json.dumps({"kind": "lora", "limits": LIMITS, "model": str(model_file),
                                                    "inputs": "../inputs.safetensors"}))
        subprocess.run([bin_dir / "flux-check", case], check=True)
        print(f"{num_modules} modules, effect {effect:.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*(pathlib.Path(argument).resolve() for argument in sys.argv[1:3])))

"""diffusers and PEFT read what flux-lora and flux-model write in their layout, and compute the same with it.
peers_lora_layouts_test.py BIN_DIR FIXTURES; exit code 77 without the peers.

A LoRA, a DoRA and a LoKr of flux-train, converted to diffusers' layout and loaded by diffusers, give the velocities of the model that flux-lora merged
them into; what diffusers writes is read back, and what PEFT writes is merged.
"""
import pathlib
import subprocess
import sys
import tempfile

try:
    import torch
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
except ImportError as error:
    print(f"skipped: {error} (scripts/setup --peers installs it)")
    sys.exit(77)

LIMIT = 2e-5  # of float32 products in another order, relative to what the adapter changes


def velocities(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample.double()


def main(bin_dir, fixtures):
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)

        def run(tool, *arguments):
            subprocess.run([bin_dir / tool.split()[0], *tool.split()[1:], *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)

        def load(path):
            return FluxTransformer2DModel.from_pretrained(path, torch_dtype=torch.float32)

        model_file, base = fixtures / "models/flux.safetensors", folder / "base"
        run("flux-model convert", "--in", model_file, "--layout", "diffusers", "--dtype", "f32", "--shard-size", "4MB", "--out", base)
        plain = load(base)
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
        c = plain.config
        inputs = {"hidden_states": torch.randn(2, 24, c.in_channels), "encoder_hidden_states": torch.randn(2, 20, c.joint_attention_dim),
                  "pooled_projections": torch.randn(2, c.pooled_projection_dim), "timestep": torch.tensor([0.3, 0.9]),
                  "guidance": torch.tensor([1.0, 3.5]) if c.guidance_embeds else None,
                  "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(24, 3).float(), "txt_ids": torch.zeros(20, 3)}
        before = velocities(plain, inputs)

        def compare(name, lora):
            """`lora` in diffusers' layout, loaded by diffusers and merged by flux-lora."""
            merged = folder / f"{name}-merged"
            run("flux-lora merge", lora, "--base", base, "--out", merged)
            wanted = velocities(load(merged), inputs)
            adapted = load(base)
            adapted.load_lora_adapter(load_file(lora), prefix="transformer")
            found = velocities(adapted, inputs)
            effect = (wanted - before).norm() / before.norm()
            difference = (found - wanted).norm() / (wanted - before).norm()
            print(f"{name}: effect {effect:.3g}, difference {difference:.3g}")
            assert effect > 1e-3, f"{name} changes the output by {effect} only: nothing to compare"
            assert difference < LIMIT, name
            return adapted

        for name, more in {"lora": ["--alpha", 3], "dora": ["--dora"], "lokr": ["--network-algo", "lokr", "--lokr-factor", 8]}.items():
            run("flux-train", "--latents", fixtures / "latents", "--text", fixtures / "text", "--model", model_file, "--out", folder / name,
                "--rank", 4, "--max-steps", 10, "--learning-rate", "0.01", "--seed", 1, "--lora-dtype", "f32", *more)
            kohya, lora = folder / name / "step-000010/lora.safetensors", folder / f"{name}.safetensors"
            run("flux-lora convert", kohya, "--to", "diffusers", "--out", lora)
            adapted = compare(name, lora)
            if name == "lora":
                # what diffusers writes is read back
                adapted.save_lora_adapter(folder / "saved", adapter_name=next(iter(adapted.peft_config)), safe_serialization=True)
                saved = next((folder / "saved").glob("*.safetensors"))
                run("flux-lora check", kohya, saved)

        # what PEFT writes: alpha is in adapter_config.json
        wrapped = get_peft_model(load(base), LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "add_v_proj", "proj_mlp", "ff.net.2"],
                                                        init_lora_weights=False))
        wrapped.save_pretrained(folder / "peft")
        run("flux-lora merge", folder / "peft", "--base", base, "--out", folder / "peft-merged")
        wanted = velocities(wrapped, inputs)
        difference = (velocities(load(folder / "peft-merged"), inputs) - wanted).norm() / (wanted - before).norm()
        print(f"peft: difference {difference:.3g}")
        assert difference < LIMIT
    return 0


if __name__ == "__main__":
    sys.exit(main(*(pathlib.Path(argument).resolve() for argument in sys.argv[1:3])))

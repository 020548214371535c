#!/usr/bin/env python3
"""One training step of diffusers' FLUX transformer with random weights, for step_bench.py: step_peer.py lora|full OPTIMIZER f32|bf16 DOUBLE SINGLE SIDE

LoRA: peft, rank 16 on every Linear of the blocks, adapters in float32, AdamW. Full: adamw (torch, fused) or adafactor (transformers, no
relative step). Gradient checkpointing as people use it to save memory. The second step is measured.
"""
import json
import sys
import time

import torch


def main():
    method, optimizer_name, precision, double, single, side = sys.argv[1:7]
    from diffusers import FluxTransformer2DModel

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    net = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=int(double), num_single_layers=int(single), attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True)
    torch.set_default_dtype(torch.float32)
    if method == "lora":
        from peft import LoraConfig

        net.requires_grad_(False)
        net.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=r"(single_)?transformer_blocks\..*\.(linear|to_q|to_k|to_v|to_out\.0"
                                   r"|add_q_proj|add_k_proj|add_v_proj|to_add_out|net\.0\.proj|net\.2|proj_mlp|proj_out)"))
        for p in net.parameters():
            if p.requires_grad:
                p.data = p.data.float()
    net.train()
    trained = [p for p in net.parameters() if p.requires_grad]
    if optimizer_name == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    else:
        from transformers.optimization import Adafactor

        optimizer = Adafactor(trained, lr=1e-4, relative_step=False, scale_parameter=False, warmup_init=False)
    n = int(side) // 16
    ids = torch.zeros(n, n, 3)
    ids[..., 1] = torch.arange(n)[:, None]
    ids[..., 2] = torch.arange(n)[None, :]
    args = dict(hidden_states=torch.randn(1, n * n, 64, dtype=dtype), encoder_hidden_states=torch.randn(1, 512, 4096, dtype=dtype),
                pooled_projections=torch.randn(1, 768, dtype=dtype), timestep=torch.full((1,), 0.5, dtype=dtype), img_ids=ids.view(-1, 3).to(dtype),
                txt_ids=torch.zeros(512, 3, dtype=dtype), guidance=torch.ones(1), return_dict=False)
    target = torch.randn(1, n * n, 64)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=method == "lora" and precision == "bf16")
    for _ in range(2):
        start = time.monotonic()
        with autocast:
            out = net(**args)[0]
        loss = torch.nn.functional.mse_loss(out.float(), target)
        loss.backward()
        if method == "lora" or optimizer_name == "adamw":
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - start
    print(json.dumps({"seconds": seconds, "loss": loss.item()}))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Optimizer steps of this project, bitsandbytes and transformers on the same number of parameters, one after the other.
   optim_bench.py BIN_DIR [--parameters N] [--threads N]      needs the peers of scripts/setup --peers"""
import argparse, os, re, subprocess, sys, time

PEER = r"""
import sys, time, torch
kind, rows, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads); torch.manual_seed(1)
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
p = torch.nn.Parameter((torch.randn(rows, 3072) * 0.02).to(torch.bfloat16)); p.grad = (torch.randn(rows, 3072) * 1e-3).to(torch.bfloat16)
if kind == "adamw8bit":
    import bitsandbytes as bnb; opt = bnb.optim.AdamW8bit([p], lr=1e-3)
elif kind == "adafactor":
    from transformers.optimization import Adafactor; opt = Adafactor([p], lr=1e-3, scale_parameter=False, relative_step=False, warmup_init=False)
else:
    opt = torch.optim.AdamW([p], lr=1e-3, fused=True)
opt.step(); open("/proc/self/clear_refs", "w").write("5"); before = status("VmRSS"); best = 1e9
for _ in range(4 if kind != "adamw" else 10):
    t = time.perf_counter(); opt.step(); best = min(best, time.perf_counter() - t)
print(p.numel() / best / 1e6, (status("VmHWM") - before) / 1048576)
"""
TARGETS = {"adamw8bit": 10, "adafactor": 8}


def main():
    parser = argparse.ArgumentParser(); parser.add_argument("bin"); parser.add_argument("--parameters", type=int, default=67_043_328); parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    peers = os.path.join(os.environ.get("FLUX_STAGES_CACHE", os.path.expanduser("~/.cache/flux-stages")), "peers/bin/python")
    rates, memory = {}, 0

    def ours():
        """Best rates so far; before and after the peers, since a shared machine is not equally fast all the time."""
        nonlocal memory
        command = [os.path.join(args.bin, "optim_bench"), "adamw", "adamw8bit", "adafactor", "--parameters", str(args.parameters), "--threads", str(args.threads)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(out, end="")
        for m in re.finditer(r"^(\w+) +(\d+) M/s best.*extra ([\d.]+) MiB", out, re.M):
            rate, extra = rates.get(m[1], (0, 0))
            rates[m[1]] = (max(rate, float(m[2])), max(extra, float(m[3])))
        memory = max(memory, float(re.search(r"([\d.]+) GB/s", out)[1]))

    ours()
    peers_runs = {kind: subprocess.run([peers, "-c", PEER, kind, str(args.parameters // 3072), str(args.threads)], capture_output=True, text=True) for kind in ("adamw8bit", "adafactor", "adamw")}
    ours()
    failed = False
    for kind, run in peers_runs.items():
        if run.returncode:
            print(f"{kind}: the peer did not run: {run.stderr.strip().splitlines()[-1]}"); failed = True; continue
        peer, extra = map(float, run.stdout.split())
        line = f"{kind}: ours {rates[kind][0]:.0f} M/s, extra {rates[kind][1]:.2f} MiB; peer {peer:.0f} M/s, extra {extra:.0f} MiB; ratio {rates[kind][0] / peer:.1f}"
        if kind in TARGETS:
            share = rates[kind][0] * 1e6 * 10 / (memory * 1e9)
            line += f" (target {TARGETS[kind]}); {100 * share:.0f} % of the memory bound"
            failed |= rates[kind][0] < TARGETS[kind] * peer or rates[kind][1] >= 1
        print(line)
    return failed


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""What a step costs on many GPUs: scale_model.py BIN_DIR MODEL [--NAME VALUE ...]; scale_model.py --check BIN_DIR MODEL

Prints the tables of docs/scale.md: for 8, 64 and 512 GPUs the step's time, what each GPU sends, what the storage reads and writes. Operations and
memory are those of `flux-train --plan`; bytes are counted here as common/engine moves them; rates are assumed and can be given (--flops,
--inside, --between, --storage).

--check runs steps on this machine in 1, 2 and 4 ranks of one thread each, over Gloo on a loopback of their own, and prints memory, bytes and
seconds beside what this model says of them, with the rates that one rank and dist_bench measure. Needs root (a network namespace) and a MODEL
that is small enough: flux-model tiny --geometry dev --depth 1,2.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile

HIDDEN, MLP, RANK = 3072, 12288, 16
# (inputs, outputs) of the matrices that a LoRA adapts, and all parameters, of a block
DOUBLE = [(HIDDEN, 6 * HIDDEN), (HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, MLP), (MLP, HIDDEN)] * 2
SINGLE = [(HIDDEN, 3 * HIDDEN + MLP), (HIDDEN + MLP, HIDDEN), (HIDDEN, 3 * HIDDEN)]
DOUBLE_PARAMETERS, SINGLE_PARAMETERS = 339_831_296, 141_591_808


def share(part):
    """Of what all have, what comes from the others."""
    return (part - 1) / part


def gathered_bytes(blocks, weight_bytes, sharing):
    """Forward and backward; the last two blocks are still in the ring when the backward begins."""
    return share(sharing) * weight_bytes * (2 * blocks - 2 * SINGLE_PARAMETERS)


def traffic(blocks, weight_bytes, micro_batches, world, sharing, exact):
    """Bytes that a rank receives a step in a full fine-tuning: (from those it shares a copy with, from other copies)."""
    gathered = gathered_bytes(blocks, weight_bytes, sharing)
    exchanged = share(sharing) * 4 * blocks * (micro_batches if exact else 1)
    copies = world // sharing
    part = 4 * blocks / sharing
    between = share(copies) * part * (sharing * micro_batches if exact else 2)
    return gathered + exchanged, between if copies > 1 else 0


def lora_traffic(adapters, micro_batches, world, exact):
    return share(world) * 4 * adapters * ((micro_batches if exact else 1) + 1)


def plan(bin_dir, model, world, sharing, *more):
    out = subprocess.run([bin_dir / "flux-train", "--plan", "json", "--model", model, "--resolution", "1024x1024", "--device", "cuda", "--device-memory",
                          "80GiB", "--host-memory", "200GiB", "--dist-rank", "0", "--dist-world", str(world),
                          *(["--dist-shard", str(sharing)] if sharing else []), *more], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


def tables(bin_dir, model, rates):
    blocks = 19 * DOUBLE_PARAMETERS + 38 * SINGLE_PARAMETERS
    adapters = RANK * sum(a + b for a, b in 19 * DOUBLE + 38 * SINGLE)
    samples = 4  # a GPU and step
    stored = 3.45e6  # bytes of a cached sample: 1024 px, T5 unmasked (docs/benchmarks.md)
    print("| method | GPUs | GPU memory | compute | receives in its machine | from others | a step | images a second | of perfect | storage reads | "
          "checkpoint |\n|---|---|---|---|---|---|---|---|---|---|---|")
    for method in ("lora", "full"):
        for world in (8, 64, 512):
            sharing = 8 if method == "full" else 0
            flags = ["--method", "full", "--optimizer", "adamw8bit"] if method == "full" else ["--method", "lora"]
            of = plan(bin_dir, model, world, sharing, "--batch-size", str(samples), *flags)
            compute = of["step"]["flops"] / rates["flops"]
            if method == "full":
                inside, between = traffic(blocks, 2, 1, world, sharing, False)
                gather = gathered_bytes(blocks, 2, sharing) / rates["inside"]
                # weights are gathered while blocks compute; gradients are exchanged between them
                seconds = max(compute, gather) + (inside / rates["inside"] - gather) + between / rates["between"]
                checkpoint = 11.9e9 * (2 + 2 + 2 * 4 / 256)
            else:
                inside, between = 0, lora_traffic(adapters, 1, world, False)
                # over the slowest link; a block's gradients travel while the one before computes
                seconds = max(compute, between / rates["between" if world > 8 else "inside"]) + 0.001
                if world == 8:
                    inside, between = between, 0
                checkpoint = adapters * (2 + 3 * 4)
            images = samples * world / seconds
            print(f"| {method} | {world} | {of['peak_bytes'] / 2**30:.0f} GiB | {compute:.2f} s | {inside / 1e9:.1f} GB | {between / 1e9:.1f} GB | "
                  f"{seconds:.2f} s | {images:.0f} | {compute / seconds:.2f} | {images * stored / 1e6:.0f} MB/s | {checkpoint / 1e9:.1f} GB, "
                  f"{checkpoint / rates['storage']:.0f} s |")


RUN = """set -e
ip link set lo up
for rank in $(seq 0 $((WORLD - 1))); do
  if [ $WORLD = 1 ]; then ranks=; else ranks="--dist-rank $rank --dist-world $WORLD"; fi
  "$@" $ranks > $OUT/$rank 2> $OUT/$rank.log &
done
wait
awk '/lo:/ {print $2}' /proc/net/dev > $OUT/bytes
"""


def ranks(world, *command):
    """Of each rank the last line, and the bytes on the loopback."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(["unshare", "--net", "bash", "-c", RUN, "bash", *map(str, command)], check=True,
                       env={**os.environ, "WORLD": str(world), "OUT": out, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TMPDIR": out})
        lines = [(pathlib.Path(out) / str(rank)).read_text().splitlines() for rank in range(world)]
        if not lines[0] or not lines[0][-1].startswith("{"):
            raise SystemExit((pathlib.Path(out) / "0.log").read_text())
        return [json.loads(of_rank[-1]) for of_rank in lines if of_rank], int((pathlib.Path(out) / "bytes").read_text())


def check(bin_dir, model):
    cores = len(os.sched_getaffinity(0))
    blocks = DOUBLE_PARAMETERS + 2 * SINGLE_PARAMETERS

    def step(world, accumulation, steps):
        return ranks(world, bin_dir / "step_bench", "--model", model, "--method", "full", "--optimizer", "adamw8bit", "--clip", "none", "--resolution",
                     "128x128", "--t5-length", "64", "--precision", "bf16", "--resident-blocks", "3", "--keep-graphs", "0", "--block-inputs", "device",
                     "--gradient-accumulation", accumulation, "--steps", steps)

    def seconds(of_ranks):
        return max(rank["seconds"] for rank in of_ranks)

    one, four = step(1, 1, 3)[0], step(1, 4, 3)[0]
    micro_batch = (seconds(four) - seconds(one)) / 3
    rest = seconds(one) - micro_batch  # updates
    print("| ranks | memory a rank | weights and states in blocks | of one rank's | a step, measured | by the model | received a step and rank | by the model |"
          "\n|---|---|---|---|---|---|---|---|")
    state = {}
    for world in (1, 2, 4):
        if world == 1:
            results, received, modelled_bytes, moving = four, 0, 0, 0
        else:
            results, few = step(world, 4 // world, 2)
            more = step(world, 4 // world, 4)
            results, received = more[0], (more[1] - few) / 2 / world
            rates = ranks(world, bin_dir / "dist_bench", "--megabytes", 64)[0][0]
            gathered = gathered_bytes(blocks, 2, world)
            modelled_bytes = sum(traffic(blocks, 2, 4 // world, world, world, False)) + lora_traffic(OUTSIDE, 1, world, False)
            moving = gathered / rates["gather"] + (modelled_bytes - gathered) / rates["exchange"]
        modelled = (4 / world * micro_batch + rest / world) * max(1, world / cores) + moving
        causes = results[0]["causes"]
        state[world] = causes["weights"] + causes["optimizer"] - OUTSIDE * 4
        print(f"| {world} | {results[0]['tensor_bytes'] / 2**20:.0f} MiB | {state[world] / 2**20:.0f} MiB | {state[world] / state[1]:.3f} | "
              f"{seconds(results):.2f} s | {modelled:.2f} s | {received / 1e6:.0f} MB | {modelled_bytes / 1e6:.0f} MB |", flush=True)


# what is outside of blocks: every rank has it
OUTSIDE = 64 * HIDDEN + HIDDEN + 4096 * HIDDEN + HIDDEN + 2 * (256 * HIDDEN + HIDDEN + HIDDEN * HIDDEN + HIDDEN) + \
    (768 * HIDDEN + HIDDEN + HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN * HIDDEN + 2 * HIDDEN + 64 * HIDDEN + 64


def main(arguments):
    if arguments[:1] == ["--check"]:
        check(*map(pathlib.Path, arguments[1:3]))
        return
    rates = {"flops": 4e14, "inside": 3e11, "between": 4e10, "storage": 5e9}
    for name, value in zip(arguments[2::2], arguments[3::2]):
        rates[name.removeprefix("--")] = float(value)
    tables(*map(pathlib.Path, arguments[:2]), rates)


if __name__ == "__main__":
    main(sys.argv[1:])

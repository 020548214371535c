"""Several ranks train one run: ranks_test.py BIN_DIR FIXTURES PART

Parts: flags torchrun mpirun (how they are started), sums, resume, watching, failures, and the same of weights that
ranks share (full_*). A launcher that is not installed is skipped by name (77).
"""
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

from training_run import metrics, tensors

BIN, FIXTURES = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).resolve()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "LC_ALL": "C"}
for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    ENVIRONMENT.pop(name, None)
BATCHES = 4  # an update, of all ranks


def command(out, *more):
    method = () if "full" in more else ("--rank", 4)
    options = {"--latents": FIXTURES / "latents", "--text": FIXTURES / "text", "--model": FIXTURES / "models/flux.safetensors", "--learning-rate": 0.01, "--seed": 3, "--batch-size": 1, "--max-steps": 5, "--out": out}
    for name in options.keys() & set(more):  # each is given once
        del options[name]
    return [str(part) for part in (BIN / "flux-train", *(word for option in options.items() for word in option), *method, *more)]


def finish(process, seconds=120):
    out, error = process.communicate(timeout=seconds)
    return process.returncode, out, error


def start(arguments, environment=None, folder=None):
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**ENVIRONMENT, **(environment or {})},
                            cwd=folder)


def start_ranks(world, out, *more, accumulation=None, of_rank=None):
    """One process each, told by flags who it is."""
    accumulation = accumulation or BATCHES // world
    return [start(command(out, "--dist-rank", rank, "--dist-world", world, "--gradient-accumulation", accumulation, *more,
                          *((of_rank or {}).get(rank, ()))))
            for rank in range(world)]


def succeed(processes):
    results = [finish(process) for process in processes]
    for rank, (code, _, error) in enumerate(results):
        assert code == 0, f"rank {rank}: exit {code}\n{error}"
    return results


def run_ranks(world, out, *more, **kind):
    if world == 1:
        return succeed([start(command(out, "--gradient-accumulation", BATCHES, *more))])
    return succeed(start_ranks(world, out, *more, **kind))


def weights(out, step=5, name="lora"):
    return tensors(out / f"step-{step:06d}/{name}.safetensors")


def floats(state):
    return {name: struct.unpack(f"<{len(data) // 4}f", data) for name, (dtype, data) in state.items() if dtype == "F32"}


def differ(a, b):
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def check_launched(out, folder):
    """A run of two ranks is that of one which accumulates."""
    run_ranks(1, folder / "one")
    assert not differ(weights(folder / "one"), weights(out)), "the LoRA of one rank is another"
    assert [line["samples"] for line in metrics(out)] == [BATCHES] * 5
    leftovers = [path.name for path in out.parent.iterdir() if path.name.endswith(".ranks")]
    assert not leftovers, leftovers


def started_by_flags(folder):
    out = folder / "out"
    results = run_ranks(2, out, "--exact-reduction")
    assert results[0][1].startswith("steps=5 "), results[0][1]
    assert results[1][1] == "", "only rank 0 writes to stdout"
    for rank, (_, _, error) in enumerate(results):
        assert f"rank {rank} of 2" in error and "by flags" in error, error
    check_launched(out, folder)


def find_torchrun():
    torchrun = pathlib.Path(os.environ.get("FLUX_STAGES_CACHE") or pathlib.Path.home() / ".cache/flux-stages") / "peers/bin/torchrun"
    if not torchrun.exists():
        skip("torchrun is not installed: scripts/setup --peers")
    return torchrun


def started_by_torchrun(folder):
    torchrun = find_torchrun()
    out = folder / "out"
    code, stdout, error = finish(start([torchrun, "--standalone", "--nproc-per-node", "2", "--no-python",
                                        *command(out, "--gradient-accumulation", BATCHES // 2, "--exact-reduction")]))
    assert code == 0, error
    assert stdout.count("steps=5 ") == 1, stdout
    assert "by torchrun" in error, error
    check_launched(out, folder)


def started_by_mpirun(folder):
    if not shutil.which("mpirun"):
        skip("mpirun is not installed: apt-get install openmpi-bin")
    out = folder / "out"
    code, stdout, error = finish(start(["mpirun", "-n", "2", "--oversubscribe", *command(out, "--gradient-accumulation", BATCHES // 2, "--exact-reduction")],
                                       {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}))
    assert code == 0, error
    assert stdout.count("steps=5 ") == 1, stdout
    assert "by mpirun" in error, error
    check_launched(out, folder)


def sums(folder):
    """Bits with --exact-reduction, rounding without, over 20 steps; all ranks write one log."""
    one, steps = folder / "one", ("--max-steps", 20)
    run_ranks(1, one, *steps)
    accepted = folder / "accepted"
    run_ranks(1, accepted, "--exact-reduction", *steps)
    assert not differ(weights(one, 20), weights(accepted, 20))
    for world in (2, 4):
        exact, plain = folder / f"exact{world}", folder / f"plain{world}"
        run_ranks(world, exact, "--exact-reduction", *steps)
        for name in ("lora", "state"):
            assert not differ(weights(one, 20, name), weights(exact, 20, name)), f"{world} ranks: {name}"
        for a, b in zip(metrics(one), metrics(exact)):
            for field in ("loss", "grad_norm", "sigma", "sample_loss", "epoch", "samples"):
                assert a.get(field) == b.get(field), f"{world} ranks, step {a['step']}: {field} {a.get(field)} and {b.get(field)}"
        run_ranks(world, plain, *steps)
        expected, found = floats(weights(one, 20, "state")), floats(weights(plain, 20, "state"))
        for name, values in expected.items():
            for x, y in zip(values, found[name]):
                assert abs(x - y) <= 1e-5 + 1e-3 * abs(x), f"{world} ranks: {name}: {x} and {y}"


def resume(folder):
    """Four ranks, then two, then one: the trajectory of one."""
    one, out = folder / "one", folder / "out"
    run_ranks(1, one, "--save-every", "1")
    for world, steps in ((4, 2), (2, 3), (1, 5)):
        run_ranks(world, out, "--exact-reduction", "--resume", "--max-steps", steps)
        assert not differ(weights(one, steps), weights(out, steps)), f"{world} ranks up to step {steps}"
        assert not differ(weights(one, steps, "state"), weights(out, steps, "state")), f"{world} ranks up to step {steps}"


FULL = ("--method", "full", "--learning-rate", 0.0005)
# what decides the numbers, and of 2 and 4 ranks what does not
FULL_CASES = [
    (("--precision", "bf16", "--optimizer", "adamw8bit"), {2: (), 4: ("--resident-blocks", 1, "--stream-from", "host")}),
    (("--precision", "f32", "--optimizer", "adamw", "--clip", "per-parameter", "--model-layout", "diffusers"),
     {2: ("--resident-blocks", 0, "--stream-from", "file"), 4: ("--stream-states",)}),
    (("--precision", "bf16", "--optimizer", "adamw", "--weight-mode", "kahan", "--state-dtype", "bf16", "--clip", "none", "--ema-decay", 0.9),
     {2: ("--resident-blocks", 2, "--stream-states"), 4: ("--dist-shard", 2)}),
    (("--precision", "f32", "--optimizer", "adamw8bit", "--max-grad-norm", 0.5),
     {2: ("--dist-shard", 1), 4: ("--resident-blocks", 0, "--stream-from", "file", "--ring-slots", 3)}),
]


def checkpoint(out, step):
    """Each file of tensors, byte for byte."""
    return {path.name: path.read_bytes() for path in (out / f"step-{step:06d}").glob("*.safetensors")}


def check_same_checkpoint(one, other, step, what):
    """Also their headers, which say nothing of ranks."""
    expected, found = checkpoint(one, step), checkpoint(other, step)
    assert {"model.safetensors", "state.safetensors"} <= expected.keys() == found.keys(), (what, expected.keys(), found.keys())
    for name, data in expected.items():
        assert data == found[name], f"{what}: {name}: {differ(tensors(one / f'step-{step:06d}' / name), tensors(other / f'step-{step:06d}' / name))}"


def full_exact(precision, folder):
    """Weights that ranks share: the files of one rank after 20 steps, to the byte, however they lie in memory."""
    for number, (decides, ranks) in enumerate(FULL_CASES):
        if precision not in decides:
            continue
        one = folder / f"one{number}"
        run_ranks(1, one, *FULL, "--max-steps", 20, *decides)
        for world, more in ranks.items():
            out = folder / f"ranks{world}-{number}"
            run_ranks(world, out, *FULL, "--max-steps", 20, "--exact-reduction", *decides, *more)
            check_same_checkpoint(one, out, 20, f"{world} ranks with {decides} {more}")
            for a, b in zip(metrics(one), metrics(out)):
                for field in ("loss", "grad_norm", "sample_loss"):
                    assert a.get(field) == b.get(field), f"{world} ranks, step {a['step']}: {field} {a.get(field)} and {b.get(field)}"
            assert not [path for path in out.rglob(".*")], "leftovers"


def full_plain(folder):
    """The same within tolerance when each rank adds its own gradients first."""
    for precision, tolerance in (("f32", 1e-4), ("bf16", 2e-2)):
        more = (*FULL, "--max-steps", 20, "--precision", precision)
        one = folder / precision
        run_ranks(1, one, *more)
        for world in (2, 4):
            out = folder / f"{precision}-{world}"
            run_ranks(world, out, *more)
            for a, b in zip(metrics(one), metrics(out)):
                assert abs(a["loss"] - b["loss"]) <= tolerance * abs(a["loss"]), f"{world} ranks, {precision}, step {a['step']}: {a['loss']} and {b['loss']}"
        expected, found = (floats(weights(folder / name, 20, "model")) for name in ("f32", "f32-2"))
        for name, values in expected.items():
            for x, y in zip(values, found[name]):
                assert abs(x - y) <= 1e-3, f"{name}: {x} and {y}"  # one step may move a weight by half of that


def full_memory(folder):
    """Weights and states of a rank fall with their number, but for what every rank has; and the plan knows."""
    state = {}
    for world in (1, 2, 4):
        out = folder / f"of{world}"
        fixed = (*FULL, "--optimizer", "adamw", "--keep-graphs", 0, "--resident-blocks", 4, "--max-steps", 2)
        results = run_ranks(world, out, *fixed)
        ranks = () if world == 1 else ("--dist-rank", 0, "--dist-world", world)
        planned, taken = (float(text) for text in re.search(r"tensors ([\d.]+) MiB at most, ([\d.]+) MiB planned", results[0][2]).groups())
        assert abs(planned / taken - 1) < 0.03, f"{world} ranks: {taken} MiB, planned {planned}"
        plan = start([str(word) for word in (BIN / "flux-train", "--plan", "json", "--resolution", "64x64", "--model",
                                             FIXTURES / "models/flux.safetensors", *fixed[:-2], *ranks)])
        code, text, error = finish(plan)
        assert code == 0, error
        causes = json.loads(text)["causes"]
        state[world] = causes["weights"] + causes["optimizer"]
    # a float32 weight has two float32 states
    outside = sum(3 * 4 * len(data) // (2 if dtype == "BF16" else 4)
                  for name, (dtype, data) in tensors(FIXTURES / "models/flux.safetensors").items() if "_blocks." not in name)
    shared = {world: bytes - outside for world, bytes in state.items()}
    # tensors begin at multiples of 64 KiB, which is a few percent of such a small model, and not in all parts the same
    assert 0.5 <= shared[2] / shared[1] < 0.53 and 0.25 <= shared[4] / shared[1] < 0.27, (state, outside)


def full_resume(folder):
    """Four ranks, then two, then one, and two again: weights, states and place in the data are those of one rank."""
    more = (*FULL, "--precision", "bf16", "--optimizer", "adamw8bit", "--ema-decay", 0.9, "--model-layout", "diffusers")
    one, out = folder / "one", folder / "out"
    run_ranks(1, one, "--save-every", "1", *more, "--max-steps", 7)
    for world, steps in ((4, 2), (2, 3), (1, 5), (2, 7)):
        # what fits may differ from rank to rank
        kind = {} if world == 1 else {"of_rank": {1: ("--keep-graphs", 0, "--resident-blocks", 1)}}
        run_ranks(world, out, "--exact-reduction", "--resume", "--max-steps", steps, *more, **kind)
        check_same_checkpoint(one, out, steps, f"{world} ranks up to step {steps}")


def full_watching(folder):
    """Held-out samples and pictures by weights that ranks share."""
    more = (*FULL, *WATCHED)
    run_ranks(1, folder / "one", *more)
    for world, residency in ((2, ()), (4, ("--resident-blocks", 0)), (4, ("--dist-shard", 2))):
        out = folder / f"ranks{world}{len(residency)}{residency[0] if residency else ''}"
        run_ranks(world, out, "--exact-reduction", *more, *residency)
        check_watched(folder / "one", out, world)
        check_same_checkpoint(folder / "one", out, 4, f"{world} ranks")


def full_failures(folder):
    """A save that one rank cannot write leaves no half checkpoint; a rank that dies leaves the last one."""
    out = folder / "full-disk"
    more = (*FULL, "--save-every", 1, "--max-steps", 3)
    run_ranks(2, out, *more[:-1], 1)
    size = (out / "step-000001/state.safetensors").stat().st_size
    processes = [start(("prlimit", f"--fsize={size // 2}" if rank == 1 else "--nofile=1024", *command(
        out, *more, "--resume", "--dist-rank", rank, "--dist-world", 2, "--gradient-accumulation", 2))) for rank in range(2)]
    results = [finish(process) for process in processes]
    assert [code for code, _, _ in results] == [5, 5], results
    assert "state.safetensors: writing failed: File too large" in results[1][2] and "ulimit" in results[1][2], results[1][2]
    assert "rank 1 of 2" in results[0][2] and "state.safetensors: writing failed: File too large" in results[0][2], results[0][2]
    names = sorted(path.name for path in out.iterdir() if "step-" in path.name)
    assert names == ["step-000001"], names
    run_ranks(2, out, *more, "--resume")
    # --out that is another folder for one of them
    (folder / "here").mkdir(), (folder / "there").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        store = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [start(command("out", *more, "--dist-rank", rank, "--dist-world", 2, "--dist-store", store, "--gradient-accumulation", 2),
                       folder=folder / place) for rank, place in enumerate(("here", "there"))]
    results = [finish(process) for process in processes]
    assert [code for code, _, _ in results] == [5, 2] and "out is not the folder that rank 0 writes to" in results[1][2], results
    assert "rank 1 of 2" in results[0][2], results[0][2]
    # killed between two saves: nothing is saved of a step whose parts are lost
    out = folder / "killed"
    processes = start_ranks(2, out, *FULL, "--max-steps", 5000, "--save-every", 4, "--keep-last", 2, "--dist-timeout", 5, "--exact-reduction")
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics_so_far(out)) > 9, processes)
    processes[1].kill()
    code, _, error = finish(processes[0], 60)
    assert code == 5 and "rank 1 of 2" in error, (code, error)
    processes[1].communicate()
    saved = sorted(int(path.name[5:]) for path in out.glob("step-*"))
    assert saved and all(step % 4 == 0 for step in saved), saved
    assert not [path for path in out.iterdir() if path.name.startswith(".step")], "half a checkpoint stays"
    run_ranks(2, out, *FULL, "--max-steps", saved[-1] + 2, "--exact-reduction", "--resume")
    one = folder / "one"
    run_ranks(1, one, *FULL, "--max-steps", saved[-1] + 2)
    check_same_checkpoint(one, out, saved[-1] + 2, "after a rank was killed")
    # what is not finite in any is refused by all, who save the step before
    wild = ("--method", "full", "--learning-rate", 1000, "--max-steps", 5)
    code, _, error = finish(start(command(folder / "wild", "--gradient-accumulation", BATCHES, *wild)))
    steps = metrics_so_far(folder / "wild")[-1]["step"]
    assert code == 3 and f"step {steps + 1}: " in error and "is not finite" in error, (code, error)
    results = [finish(process) for process in start_ranks(2, folder / "wild2", *wild, "--exact-reduction")]
    assert [code for code, _, _ in results] == [3, 3], results
    assert all(f"step {steps + 1}: " in error and "is not finite" in error for _, _, error in results), results
    check_same_checkpoint(folder / "wild", folder / "wild2", steps, "before a step that is not finite")
    # a signal to one stops all after a step that all save
    out = folder / "interrupted"
    processes = start_ranks(2, out, *FULL, "--max-steps", 5000, "--exact-reduction")
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics_so_far(out)) > 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    results = [finish(process) for process in processes]
    assert [code for code, _, _ in results] == [143, 143], results
    steps = metrics_so_far(out)[-1]["step"]
    run_ranks(1, folder / "whole", *FULL, "--max-steps", steps)
    check_same_checkpoint(folder / "whole", out, steps, "after a signal")


def frames(path):
    """The compressed chunks of an HDF5 file of ours (RFC 8878), which hold all but the words of its attributes."""
    data, out, at = path.read_bytes(), [], 0
    while (start := data.find(b"\x28\xb5\x2f\xfd", at)) >= 0:
        descriptor = data[start + 4]
        single = descriptor >> 5 & 1
        at = start + 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3] + (single, 2, 4, 8)[descriptor >> 6]
        last = False
        while not last:
            header = int.from_bytes(data[at:at + 3], "little")
            last, kind, size = header & 1, header >> 1 & 3, header >> 3
            at += 3 + (1 if kind == 1 else size)
        at += 4 if descriptor & 4 else 0
        out.append(data[start:at])
    assert out, f"{path} has no chunks"
    return out


WATCHED = ("--max-steps", 4, "--validation-split", 0.3, "--validate-every", 2, "--sample-every", 2, "--sample-count", 3, "--sample-steps", 2, "--prompts",
           FIXTURES / "prompts")


def validations(out):
    return [{**line["validation"], "seconds": None} for line in metrics(out) if "validation" in line]


def check_watched(one, other, world):
    """Losses of held-out samples and pictures on the way: equal to the bit."""
    assert len(validations(one)) == 2 and validations(one) == validations(other), (world, validations(one), validations(other))
    pictures = sorted((one / "samples").iterdir())
    assert [path.name for path in pictures] == ["step-000002.h5", "step-000004.h5"]
    for path in pictures:
        assert frames(path) == frames(other / "samples" / path.name), f"{world} ranks: {path.name}"
    assert json.loads((one / "best.json").read_text())["loss"] == json.loads((other / "best.json").read_text())["loss"]


def watching(folder):
    """Ranks share held-out samples and pictures; some ranks get none, and a signal to one ends both for all."""
    run_ranks(1, folder / "one", *WATCHED)
    for world in (2, 4):
        run_ranks(world, folder / f"ranks{world}", "--exact-reduction", *WATCHED)
        check_watched(folder / "one", folder / f"ranks{world}", world)
    # weights that stream pass by once for several batches
    streams = ("--resident-blocks", 0, "--exact-reduction", *WATCHED)
    run_ranks(4, folder / "streamed", *streams)
    check_watched(folder / "one", folder / "streamed", 4)
    # while pictures are sampled
    long = [word if word != 2 else 1000 if WATCHED[i - 1] == "--sample-steps" else 2 for i, word in enumerate(WATCHED)]
    out = folder / "interrupted"
    processes = start_ranks(2, out, *long, "--exact-reduction")
    wait_for(lambda: (out / "metrics.jsonl").exists() and metrics_so_far(out)[-1:] and metrics_so_far(out)[-1]["step"] == 2, processes)
    time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in (finish(process) for process in processes)] == [143, 143]
    assert not list((out / "samples").glob("*")) and (out / "step-000002").exists()
    run_ranks(4, out, "--exact-reduction", "--resume", *WATCHED)
    check_watched(folder / "one", out, 4)


def failures(folder):
    # another data order, another model
    subprocess.run([BIN / "flux-model", "tiny", "--out", folder / "other", "--seed", "9"], check=True, stdout=subprocess.DEVNULL)
    others = {"seed": ("--seed", "4"), "model": ("--model", folder / "other/flux.safetensors"), "resume": ("--resume",),
              "sample-every": ("--sample-every", 2, "--prompts", FIXTURES / "prompts"), "exact-reduction": ("--exact-reduction",)}
    for which, more in others.items():
        results = [finish(process) for process in start_ranks(2, folder / which, of_rank={1: more})]
        assert [code for code, _, _ in results] == [2, 2], results
        for _, _, error in results:
            assert f"rank 1 has another {which}" in error and "hint:" in error, error
        assert not (folder / which).exists(), "nothing was made"
    # a rank that does not come
    begun = time.monotonic()
    code, _, error = finish(start(command(folder / "alone", "--dist-rank", 0, "--dist-world", 2, "--dist-start-timeout", 2)))
    assert code == 5 and "rank 1 did not come within 2 s" in error and time.monotonic() - begun < 30, (code, error)
    # one that is killed, and one that hangs: the others end, name it, and go on from the last step
    for victim, number in ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)):
        out = folder / f"stopped{victim}-{number}"
        processes = start_ranks(2, out, "--max-steps", 5000, "--save-every", 5, "--keep-last", 2, "--dist-timeout", 5)
        wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics_so_far(out)) > 7, processes)
        begun = time.monotonic()
        processes[victim].send_signal(number)
        code, _, error = finish(processes[1 - victim], 60)
        assert code == 5 and f"rank {victim} of 2" in error and time.monotonic() - begun < 60, (victim, number, code, error)
        processes[victim].kill()
        processes[victim].communicate()
        succeed(start_ranks(2, out, "--max-steps", len(metrics_so_far(out)) + 2, "--resume"))
    # a signal to one rank stops all after the same step
    out = folder / "interrupted"
    processes = start_ranks(2, out, "--max-steps", 5000)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics_so_far(out)) > 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    results = [finish(process) for process in processes]
    assert [code for code, _, _ in results] == [143, 143], results
    steps = metrics_so_far(out)[-1]["step"]
    assert (out / f"step-{steps:06d}/lora.safetensors").exists()


def metrics_so_far(out):
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for(condition, processes, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, finish(process)
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def skip(why):
    print("skipped:", why)
    sys.exit(77)


PARTS = {"flags": started_by_flags, "torchrun": started_by_torchrun, "mpirun": started_by_mpirun, "sums": sums, "resume": resume,
         "watching": watching, "failures": failures, "full_exact_f32": functools.partial(full_exact, "f32"),
         "full_exact_bf16": functools.partial(full_exact, "bf16"), "full_plain": full_plain, "full_resume": full_resume,
         "full_watching": full_watching, "full_failures": full_failures, "full_memory": full_memory}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="flux-ranks-") as name:
        PARTS[sys.argv[3]](pathlib.Path(name))

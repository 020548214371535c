"""Under a real Slurm of this machine: slurm_test.py BIN_DIR FIXTURES PART

Parts: ranks torchrun (srun over two nodes); requeue warned cancelled killed moved (jobs of train.sbatch that are stopped); job (the whole of
pipelines/recipes/slurm); copies (to node-local disks); memory (control groups). Without Slurm, or root, skipped by name (77).
"""
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/support"))
import ranks_test as ranks  # noqa: E402  (reads BIN_DIR and FIXTURES too)
from one_machine_slurm import Slurm, Unavailable  # noqa: E402

BIN, FIXTURES = ranks.BIN, ranks.FIXTURES
MODELS = FIXTURES / "models"
RECIPES = ROOT / "pipelines/recipes/slurm"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
LORA = "--rank 4 --learning-rate 0.01 --seed 3 --batch-size 1 --exact-reduction --no-tensorboard"


class Cluster:
    """Slurm, and what its jobs are told."""

    def __init__(self, slurm, folder):
        self.slurm, self.folder = slurm, folder
        self.environment = ranks.ENVIRONMENT | slurm.environment | {
            "PATH": f"{BIN}:{slurm.environment['PATH']}", "WORK": str(FIXTURES), "MODEL": str(MODELS / "flux.safetensors"), "HOME": str(folder)}

    def run(self, *command, code=0, seconds=120, **variables):
        result = subprocess.run([str(word) for word in command], cwd=self.folder, env=self.environment | variables, capture_output=True, text=True,
                                timeout=seconds)
        assert code is None or result.returncode == code, f"{command}: exit {result.returncode}\n{result.stdout}{result.stderr}"
        return result

    def submit(self, out, *options, flags="", **variables):
        """A job of train.sbatch; its id."""
        done = self.run("sbatch", "--parsable", f"--output={self.folder}/%j.log", "--time=60", *options, RECIPES / "train.sbatch",
                        OUT=str(out), TRAIN_FLAGS=f"{LORA} {flags}", **variables)
        return done.stdout.strip()

    def show(self, job):
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", "-o", job).stdout.split() if "=" in word)

    def log(self, job):
        path = self.folder / f"{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, what, condition, seconds=120, job=None):
        end = time.monotonic() + seconds
        while not condition():
            over = job and self.show(job)["JobState"] in ENDED and not condition()
            assert not over and time.monotonic() < end, (f"{what} has not come within {seconds} s" +
                                                         (f"\n{self.show(job)}\n{self.log(job)}" if job else ""))
            time.sleep(0.1)

    def end(self, job, state="COMPLETED", seconds=180):
        found = {}

        def ended():
            found.update(self.show(job))
            return found["JobState"] in ENDED
        self.wait(f"the end of job {job}", ended, seconds, job)
        assert found["JobState"] == state, f"{found}\n{self.log(job)}"
        return found

    def steps(self, out):
        return len(ranks.metrics_so_far(out)) if (out / "metrics.jsonl").exists() else 0

    def wait_for_steps(self, job, out, count):
        self.wait(f"step {count}", lambda: self.steps(out) >= count, 120, job)

    def reference(self, steps):
        """The run that nothing stops, in one process."""
        out = self.folder / "reference"
        ranks.run_ranks(1, out, "--max-steps", steps, "--exact-reduction", "--no-tensorboard")
        return out


def require_equal(one, other, steps):
    for name in ("lora", "state"):
        assert not ranks.differ(ranks.weights(one, steps, name), ranks.weights(other, steps, name)), f"another {name} after {steps} steps"


def saved(out):
    return sorted(int(path.name[5:]) for path in out.glob("step-*"))


def several_ranks(cluster):
    """Tasks of srun on two nodes are the ranks of one run: 2, 4, and 3 of which one node has two."""
    steps = 6
    one = cluster.reference(steps)
    for world in (2, 4):
        out = cluster.folder / f"out{world}"
        result = cluster.run("srun", "--nodes=2", f"--ntasks-per-node={world // 2}", *ranks.command(
            out, "--gradient-accumulation", ranks.BATCHES // world, "--exact-reduction", "--no-tensorboard", "--max-steps", steps))
        require_equal(one, out, steps)
        assert result.stdout.count(f"steps={steps} ") == 1, result.stdout
        local = world // 2
        assert f"rank 0 of {world} (local 0 of {local}), by srun" in result.stderr, result.stderr
        assert [line["samples"] for line in ranks.metrics(out)] == [ranks.BATCHES] * steps
    # full fine-tuning, a copy of the weights a node
    full = ("--method", "full", "--learning-rate", 0.0005, "--exact-reduction", "--no-tensorboard")
    ranks.run_ranks(1, cluster.folder / "full", *full)
    cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", *ranks.command(cluster.folder / "full4", *full, "--dist-shard", 2))
    for name in ("model", "state"):
        assert not ranks.differ(*(ranks.weights(cluster.folder / out, 5, name) for out in ("full", "full4"))), f"another {name}"
    result = cluster.run("srun", "--nodes=2", "--ntasks=3", *ranks.command(cluster.folder / "uneven", "--max-steps", 2))
    assert "rank 0 of 3 (local 0 of 2), by srun" in result.stderr, result.stderr
    # --ntasks of a batch job is not the number of ranks: the script is one process, its srun has them
    job = cluster.run("sbatch", "--parsable", "--nodes=2", "--ntasks=4", f"--output={cluster.folder}/%j.log", "--wrap",
                      " ".join(ranks.command(cluster.folder / "script", "--max-steps", 2))).stdout.strip()
    cluster.end(job)
    assert "rank 0" not in cluster.log(job), cluster.log(job)
    assert not [path for path in cluster.folder.iterdir() if path.name.endswith(".ranks")]


def torchrun(cluster):
    """One agent a node, two ranks each; a signal ends all ranks, saved, whatever torchrun makes of it."""
    program = pathlib.Path(os.environ.get("FLUX_STAGES_CACHE") or pathlib.Path.home() / ".cache/flux-stages") / "peers/bin/torchrun"
    if not program.exists():
        ranks.skip("torchrun is not installed: scripts/setup --peers")
    out = cluster.folder / "out"
    where = {"PATH": f"{program.parent}:{cluster.environment['PATH']}", "LAUNCHER": "torchrun", "RANKS_PER_NODE": "2"}
    job = cluster.submit(out, "--nodes=2", "--ntasks=2", flags="--max-steps 100000 --keep-last 1", **where)
    cluster.wait_for_steps(job, out, 3)
    cluster.run("scancel", "--signal=TERM", job)
    cluster.wait("its second start", lambda: cluster.show(job)["Restarts"] == "1", 90, job)
    assert saved(out), cluster.log(job)
    cluster.wait_for_steps(job, out, saved(out)[-1] + 2)
    cluster.run("scancel", job)
    cluster.end(job, "CANCELLED")
    steps = saved(out)[-1]
    assert "by torchrun" in cluster.log(job), cluster.log(job)
    require_equal(cluster.reference(steps), out, steps)


def requeued_by_its_limit(cluster):
    """A job whose run ends by --time-limit is queued again and goes on, until all is done: the bits of a run that nothing stopped."""
    out, steps = cluster.folder / "out", 60
    # as if little were left of the job's time, at first
    squeue = cluster.folder / "squeue"
    squeue.write_text('#!/bin/bash\nif [ "${SLURM_RESTART_COUNT:-0}" -lt 2 ]; then echo 0:05; else exec /usr/bin/squeue "$@"; fi\n')
    squeue.chmod(0o755)
    job = cluster.submit(out, "--nodes=2", "--ntasks=2", flags="--max-steps 100000 --gradient-accumulation 2",
                         PATH=f"{cluster.folder}:{cluster.environment['PATH']}")
    cluster.wait("its third start", lambda: cluster.show(job)["Restarts"] == "2", 120, job)
    done = saved(out)
    assert len(done) == 2 and cluster.log(job).count("--time-limit: ") == 2, cluster.log(job)
    cluster.wait_for_steps(job, out, done[-1] + 3)
    cluster.run("scancel", "--signal=USR1", job)  # before a limit, as --signal asks for
    cluster.wait("its fourth start", lambda: cluster.show(job)["Restarts"] == "3", 120, job)
    cluster.run("scancel", job)
    cluster.end(job, "CANCELLED")
    done = saved(out)
    assert len(done) >= 3, done
    last = cluster.submit(out, "--nodes=2", "--ntasks=4", flags=f"--max-steps {done[-1] + 2}")
    cluster.end(last)
    steps = done[-1] + 2
    require_equal(cluster.reference(steps), out, steps)
    again = cluster.submit(out, flags=f"--max-steps {steps} --gradient-accumulation 4")
    cluster.end(again)
    assert f"all {steps} steps are done" in cluster.log(again), cluster.log(again)


def warned_by_slurm(cluster):
    """--signal of the job script: Slurm itself sends it, to every rank, as the limit comes near (up to half a minute before it is due)."""
    out = cluster.folder / "out"
    job = cluster.submit(out, "--nodes=2", "--ntasks=2", "--time=1", "--signal=USR1@15", flags="--max-steps 100000 --gradient-accumulation 2")
    cluster.wait("its second start", lambda: cluster.show(job)["Restarts"] == "1", 150, job)
    assert saved(out) == [cluster.steps(out)] and "exit code 143" in cluster.log(job), cluster.log(job)
    assert "--time-limit: " not in cluster.log(job), "it was not the signal\n" + cluster.log(job)
    cluster.run("scancel", job)
    cluster.end(job, "CANCELLED")


def cancelled(cluster):
    """scancel saves, ends all ranks and is the end; the same job submitted again goes on."""
    out = cluster.folder / "out"
    job = cluster.submit(out, "--nodes=2", "--ntasks=4", flags="--max-steps 100000")
    cluster.wait_for_steps(job, out, 3)
    begun = time.monotonic()
    cluster.run("scancel", job)
    cluster.end(job, "CANCELLED")
    cluster.wait("the end of its processes", lambda: not cluster.run("squeue", "-h", "-j", job, code=None).stdout.strip(), 60)
    assert time.monotonic() - begun < 29, "Slurm had to kill it"
    done = saved(out)
    assert done == [cluster.steps(out)], (done, cluster.steps(out), cluster.log(job))
    time.sleep(2)
    assert cluster.show(job)["JobState"] == "CANCELLED", "it was queued again"
    steps = done[0] + 2
    cluster.end(cluster.submit(out, "--nodes=2", "--ntasks=4", flags=f"--max-steps {steps}"))
    require_equal(cluster.reference(steps), out, steps)
    # a job in whose time no step fits is not queued again for ever
    squeue = cluster.folder / "squeue"
    squeue.write_text("#!/bin/bash\necho 0:01\n")
    squeue.chmod(0o755)
    job = cluster.submit(cluster.folder / "short", flags="--max-steps 5", PATH=f"{cluster.folder}:{cluster.environment['PATH']}")
    assert cluster.end(job, "FAILED")["ExitCode"] == "143:0", cluster.log(job)
    assert "not queued again" in cluster.log(job) and not saved(cluster.folder / "short"), cluster.log(job)


def processes_of(out):
    """{rank: process id} of the tasks of srun that train into `out`."""
    found = {}
    for path in pathlib.Path("/proc").iterdir():
        try:
            if path.name.isdigit() and (path / "exe").resolve().name == "flux-train" and str(out).encode() in (path / "cmdline").read_bytes():
                environment = dict(entry.split(b"=", 1) for entry in (path / "environ").read_bytes().split(b"\0") if b"=" in entry)
                found[int(environment[b"SLURM_PROCID"])] = int(path.name)
        except (OSError, KeyError):
            continue
    return found


def killed(cluster):
    """A rank that is killed, the first one too, ends the others within 60 s with its name; the job is queued again and goes on."""
    out = cluster.folder / "out"
    job = cluster.submit(out, "--nodes=2", "--ntasks=4", flags="--max-steps 100000 --save-every 5 --keep-last 2 --dist-timeout 5")
    for restart, victim in enumerate((3, 0)):
        cluster.wait_for_steps(job, out, (saved(out) or [0])[-1] + 7)
        cluster.wait("four ranks", lambda: len(processes_of(out)) == 4, 30, job)
        tasks = processes_of(out)
        begun = time.monotonic()
        os.kill(tasks.pop(victim), signal.SIGKILL)
        cluster.wait("the others' end", lambda: not set(tasks.values()) & set(processes_of(out).values()), 60, job)
        assert time.monotonic() - begun < 60
        assert f"rank {victim} of 4" in cluster.log(job), cluster.log(job)
        cluster.wait("its next start", lambda: cluster.show(job)["Restarts"] == str(restart + 1), 60, job)
    cluster.wait_for_steps(job, out, saved(out)[-1] + 7)
    cluster.run("scancel", job)
    cluster.end(job, "CANCELLED")
    steps = saved(out)[-1]
    require_equal(cluster.reference(steps), out, steps)


def moved(cluster):
    """A job whose process was killed on one node is queued again and goes on on another, which knows nothing of that process but its lock."""
    out = cluster.folder / "out"
    job = cluster.submit(out, "--nodelist=n1", flags="--max-steps 100000 --save-every 5 --keep-last 2 --gradient-accumulation 4")
    cluster.wait_for_steps(job, out, 7)
    os.kill(processes_of(out)[0], signal.SIGKILL)
    cluster.wait("its being queued again", lambda: cluster.show(job)["Restarts"] == "1", 60, job)
    cluster.run("scontrol", "update", f"JobId={job}", "NodeList=n2")
    assert (out / ".writer.lock").exists(), "nothing would be shown"
    cluster.wait("its start", lambda: cluster.show(job)["JobState"] == "RUNNING", 60, job)
    assert cluster.show(job)["BatchHost"] == "n2"
    cluster.wait_for_steps(job, out, cluster.steps(out) + 3)
    cluster.run("scancel", job)
    cluster.end(job, "CANCELLED")
    steps = saved(out)[-1]
    require_equal(cluster.reference(steps), out, steps)


def whole_job(cluster):
    """submit: caches in parts, one of which is stopped and queued again, merged; training in ranks; pictures."""
    folder, images, work = cluster.folder, cluster.folder / "images", cluster.folder / "work"
    cluster.run(ROOT / "scripts/demo-pictures", images, "12")
    (folder / "prompts.txt").write_text("a red circle\n")
    variables = {"WORK": str(work), "OUT": str(work / "run"), "DATA": f"--images {images}", "LATENTS_FLAGS": "--resolution 64x64",
                 "AE": str(MODELS / "ae.safetensors"), "CLIP": str(MODELS / "clip.safetensors"), "T5": str(MODELS / "t5.safetensors"),
                 "T5_TOKENIZER": str(MODELS / "tokenizers/t5/spiece.model"), "CLIP_TOKENIZER": str(MODELS / "tokenizers/clip"),
                 "TRAIN_FLAGS": f"{LORA} --max-steps 4 --gradient-accumulation 2", "TRAIN_SBATCH": "--nodes=2 --ntasks=2 --time=5",
                 "PROMPTS": str(folder / "prompts.txt"), "SAMPLE_FLAGS": "--size 64x64 --steps 2", "SBATCH_OUTPUT": f"{folder}/%j.log"}
    # the first task of the latents finds a SIGTERM early in its first try, as a preemption sends it
    slow = folder / "slow"
    slow.mkdir()
    (slow / "flux-cache-latents").write_text(
        f'#!/bin/bash\nif [ "$SLURM_ARRAY_TASK_ID" = 0 ] && [ -z "${{SLURM_RESTART_COUNT:-}}" ]; then\n  kill -TERM $$ & fi\n'
        f'exec {BIN}/flux-cache-latents "$@"\n')
    (slow / "flux-cache-latents").chmod(0o755)
    result = cluster.run(RECIPES / "submit", "3", "2", **variables, PATH=f"{slow}:{cluster.environment['PATH']}")
    jobs = [line.split("\t") for line in result.stdout.splitlines()]
    assert [name for _, name in jobs] == ["cache-latents", "merge-latents", "cache-text", "merge-text", "train", "sample"], result.stdout
    ids = {name: number for number, name in jobs}
    assert all(number.isdigit() for number in ids.values()), ids
    for name in ("merge-latents", "merge-text", "train", "sample"):
        cluster.end(ids[name], seconds=240)
    assert [cluster.show(f"{ids['cache-latents']}_{part}")["Restarts"] for part in range(3)] == ["1", "0", "0"]
    whole = folder / "whole"
    cluster.run(BIN / "flux-cache-latents", "--images", images, "--resolution", "64x64", "--ae", variables["AE"], "--out", whole / "latents")
    for kind in ("latents", "text"):
        assert json.loads((work / kind / "manifest.json").read_text()), kind
    assert samples(cluster, work / "latents") == samples(cluster, whole / "latents")
    assert saved(work / "run") == [4]
    assert list((work / "run/samples").glob("*.png")), list((work / "run").iterdir())
    # a part that fails for good: its merge and all that would follow is taken off the queue
    result = cluster.run(RECIPES / "submit", "2", "1", **(variables | {"WORK": str(folder / "none"), "AE": "absent.safetensors"}))
    ids = {name: number for number, name in (line.split("\t") for line in result.stdout.splitlines())}
    cluster.end(ids["merge-text"], seconds=120)
    for name in ("merge-latents", "train", "sample"):
        cluster.wait(f"the end of {name}", lambda: cluster.show(ids[name])["JobState"] == "CANCELLED", 60, ids[name])


def samples(cluster, cache):
    found = json.loads(cluster.run(BIN / "flux-cache", "inspect", cache, "--json", "--samples").stdout)
    assert found["complete"], cache
    return sorted((sample["key"], sample["tensor_xxh3"]) for sample in found["samples"])


def copies(cluster):
    """Caches on the nodes' own disks, read back; a damaged byte ends the job before training, and the file is named."""
    work, local = cluster.folder / "work", cluster.folder / "disk-%N"
    for kind in ("latents", "text"):
        shutil.copytree(FIXTURES / kind, work / kind)
    out = cluster.folder / "out"
    variables = {"WORK": str(work), "LOCAL": str(local)}
    job = cluster.submit(out, "--nodes=2", "--ntasks=2", flags="--max-steps 3 --gradient-accumulation 2", **variables)
    cluster.end(job)
    require_equal(cluster.reference(3), out, 3)
    for node in ("n1", "n2"):
        for kind in ("latents", "text"):
            assert (cluster.folder / f"disk-{node}" / kind / "manifest.json").exists(), (node, kind)
    assert f"disk-n1/latents" in (out / "run.toml").read_text(), "the copies are what is read"
    def damage(cache):
        segment = sorted(cache.glob("seg-*.h5"))[0]
        data = bytearray(segment.read_bytes())
        data[len(data) // 2] ^= 0xff
        segment.chmod(0o644)
        segment.write_bytes(data)
        return segment.name
    # of a node's copy: it is made again
    damage(cluster.folder / "disk-n2/latents")
    job = cluster.submit(cluster.folder / "again", "--nodes=2", "--ntasks=2", flags="--max-steps 3 --gradient-accumulation 2", **variables)
    cluster.end(job)
    require_equal(out, cluster.folder / "again", 3)
    # of what is copied
    name = damage(work / "text")
    shutil.rmtree(cluster.folder / "disk-n2/text")
    job = cluster.submit(cluster.folder / "never", "--nodes=2", "--ntasks=2", flags="--max-steps 3 --gradient-accumulation 2", **variables)
    found = cluster.end(job, "FAILED")
    assert found["ExitCode"] == "4:0" and name in cluster.log(job), (found, cluster.log(job))
    assert not (cluster.folder / "never").exists(), "it trained"


def memory(cluster):
    """The default of --host-memory is within the job's limit, which is of a group above the task's."""
    def budget(*options):
        result = cluster.run("srun", *options, BIN / "flux-train", "--plan", "--model", MODELS / "flux.safetensors", "--method", "lora", "--resolution",
                             "64x64", "--device", "cpu", code=None)
        found = re.search(r"--host-memory +([\d.]+) ([KMGT])iB", result.stdout)
        assert found, result.stdout + result.stderr
        return float(found[1]) * 1024 ** " KMGT".index(found[2])
    small, large = budget("--mem=900"), budget("--mem=1800")
    assert 0.5 * 900 < small / 2**20 < 900 and 0.5 * 1800 < large / 2**20 < 1800, (small, large)


PARTS = {"ranks": several_ranks, "torchrun": torchrun, "requeue": requeued_by_its_limit, "warned": warned_by_slurm, "cancelled": cancelled,
         "killed": killed, "moved": moved, "job": whole_job, "copies": copies, "memory": memory}


def main(part):
    cgroup = None
    if part == "memory":
        if not os.access("/sys/fs/cgroup/memory/cgroup.procs", os.W_OK):
            ranks.skip("no control groups of version 1 can be made here, by which Slurm limits memory without systemd")
        cgroup = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nConstrainRAMSpace=yes\n"
    with tempfile.TemporaryDirectory(prefix="flux-slurm-") as name:
        folder = pathlib.Path(name).resolve()
        try:
            with Slurm(folder / "slurm", cgroup=cgroup) as slurm:
                work = folder / "work"
                work.mkdir()
                PARTS[part](Cluster(slurm, work))
        except Unavailable as why:
            ranks.skip(why)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[3]))

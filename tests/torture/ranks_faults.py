#!/usr/bin/env python3
"""Faults at random moments of flux-train in 1 to 4 ranks on hosts of their own (network namespaces; without them on one host, and no
link is cut): SIGKILL of a rank, of one that saves, of all at once; SIGSTOP for ever and for a while; SIGTERM, SIGINT and SIGUSR1 to one
rank; a link cut for ever and for a while, and slow ones. LoRA and full fine-tuning, both streamed. After each all ranks end within 60 s,
naming the rank, or go on; every checkpoint equals the uninterrupted run's of one rank to the bit, the last whole step of a LoRA is saved
if rank 0 is alive, and the next run, of another number of ranks, goes on from there: weights, states and log are those of one rank."""
import hashlib
import pathlib
import random
import shutil
import signal
import sys
import time

import torture
import training

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path += [str(TESTS / "support"), str(TESTS / "python")]
import netns
import training_run

SILENCE, START = 8, 25  # --dist-timeout and --dist-start-timeout
LIMIT = 60  # seconds for all ranks to end
WORLDS = {"lora": (1, 2, 4), "full": (1, 2, 3)}
BATCHES = {"lora": 4, "full": 6}  # an update, of all ranks
SIGNALS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


class Training(training.Training):
    """The reference is one rank's and has every step."""

    def __init__(self, kind, *more):
        self.world, self.rank, self.save_every = 1, 0, 1
        super().__init__(kind, *more)
        self.save_every = 2

    def command(self, out, scratch=None):
        words = super().command(out, scratch)
        for name, value in (("--gradient-accumulation", BATCHES[self.kind] // self.world), ("--save-every", self.save_every)):
            words[words.index(name) + 1] = str(value)
        ranks = {"rank": self.rank, "world": self.world, "timeout": SILENCE, "start-timeout": START} if self.world > 1 else {}
        return [*words, "--exact-reduction", *(word for name, value in ranks.items() for word in (f"--dist-{name}", str(value)))]

    def digest(self, file):
        """Without the metadata, which says how many batches a rank has."""
        hashed = hashlib.sha256()
        for name, (dtype, data) in sorted(training_run.tensors(file).items()):
            hashed.update(f"{name} {dtype}".encode())
            hashed.update(data)
        return hashed.hexdigest()


class Job:
    """The ranks of a run, rank r on host r modulo their number."""

    def __init__(self, tool, out, world):
        self.world = world
        self.hosts = netns.Hosts(min(world, 3)) if world > 1 and LINKS else None
        self.processes = []
        for rank in range(world):
            tool.world, tool.rank = world, rank
            self.processes.append(tool.start(out, self.hosts[self.host_of(rank)].command([]) if self.hosts else ()))
        tool.world, tool.rank = 1, 0

    def host_of(self, rank):
        return rank % len(self.hosts)

    def runs(self):
        return any(process.poll() is None for process in self.processes)

    def wait(self, seconds, but=()):
        """[(exit code, stderr)] of each rank; those of `but` are not waited for, and killed. None: some have not ended in time."""
        end = time.monotonic() + seconds
        while late := [rank for rank, process in enumerate(self.processes) if process.poll() is None and rank not in but]:
            if time.monotonic() > end:
                return None
            time.sleep(0.02)
        for rank in but:
            self.processes[rank].kill()
        said = [process.communicate()[1] for process in self.processes]
        return [(process.returncode, stderr) for process, stderr in zip(self.processes, said)]

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()  # ends what is stopped, too
            process.communicate()
        if self.hosts:
            self.hosts.close()


class Fault:
    """`apply` happens to rank `victim`. What it does not end it heals."""

    ends = True
    needs_link = False

    def __init__(self, numbers, world):
        self.victim = numbers.randrange(world)
        self.seconds = numbers.uniform(0.2, SILENCE / 3)

    def apply(self, job):
        raise NotImplementedError

    def victims(self, job):
        return {self.victim}

    def check(self, job, results, where):
        """How the ranks ended."""
        for rank, (code, stderr) in enumerate(results):
            if rank in self.victims(job):
                torture.require(code == -signal.SIGKILL, f"{where}: rank {rank}: exit {code}:\n{stderr}")
            else:
                require_named(rank, code, stderr, self.victims(job), where)


def require_named(rank, code, stderr, victims, where):
    named = any(f"rank {victim} of" in stderr or f"rank {victim} did not come" in stderr for victim in victims) or 0 in victims and (
        "rank 0 " in stderr)
    torture.require(code == 5 and named and "hint:" in stderr, f"{where}: rank {rank}: exit {code}, does not name {victims}:\n{stderr}")


class Kill(Fault):
    def apply(self, job):
        job.processes[self.victim].kill()


class KillSaving(Kill):
    """Waits until rank 0 writes a checkpoint."""

    at_save = True


class KillAll(Fault):
    def victims(self, job):
        return set(range(job.world))

    def apply(self, job):
        for process in job.processes:
            process.kill()


class Hang(Fault):
    def apply(self, job):
        job.processes[self.victim].send_signal(signal.SIGSTOP)


class Pause(Hang):
    ends = False

    def apply(self, job):
        super().apply(job)
        time.sleep(self.seconds)
        job.processes[self.victim].send_signal(signal.SIGCONT)


class Stop(Fault):
    """A signal that asks for the end."""

    def __init__(self, numbers, world):
        super().__init__(numbers, world)
        self.number = numbers.choice(list(SIGNALS))

    def apply(self, job):
        job.processes[self.victim].send_signal(self.number)

    def check(self, job, results, where):
        expected = SIGNALS[self.number]
        if all(code == expected for code, _ in results):
            return
        # before the ranks had met, or before the handlers were there
        code, stderr = results[self.victim]
        torture.require(code in (expected, -self.number), f"{where}: rank {self.victim}: exit {code}:\n{stderr}")
        for rank, (code, stderr) in enumerate(results):
            if rank != self.victim:
                require_named(rank, code, stderr, {self.victim}, where)


class Cut(Fault):
    needs_link = True

    def apply(self, job):
        job.hosts[job.host_of(self.victim)].cut()

    def check(self, job, results, where):
        away = {rank for rank in range(job.world) if job.host_of(rank) == job.host_of(self.victim)}
        others = set(range(job.world)) - away
        for rank, (code, stderr) in enumerate(results):
            require_named(rank, code, stderr, others if rank in away else away, where)


class CutForAWhile(Cut):
    ends = False

    def apply(self, job):
        host = job.hosts[job.host_of(self.victim)]
        host.cut()
        time.sleep(self.seconds)
        host.mend()


class Slow(Fault):
    ends = False
    needs_link = True

    def __init__(self, numbers, world):
        super().__init__(numbers, world)
        self.megabits = numbers.randint(100, 300)

    def apply(self, job):
        job.hosts[job.host_of(self.victim)].slow_down("tbf", "rate", f"{self.megabits}mbit", "burst", "16kb", "latency", "4s")


FAULTS = {Kill: 4, KillSaving: 2, KillAll: 2, Hang: 2, Pause: 2, Stop: 4, Cut: 3, CutForAWhile: 3, Slow: 1}
total = {kind.__name__: 0 for kind in FAULTS} | {"late": 0, "finished": 0}
slowest = 0.0


def saves(out):
    return out.exists() and any(not path.name.startswith("step-") and path.name.lstrip(".").startswith("step-") for path in out.iterdir())


def last_made(out):
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return len(lines)


def wait_for_moment(tool, fault, job, out, numbers):
    """Any time from the start on; or soon after a step."""
    at_start, share, later = numbers.random() < 0.3, numbers.random(), numbers.random()
    if at_start:
        end = time.monotonic() + share * tool.idle_seconds * (1 + job.world / 2)
    else:
        made = last_made(out)
        step = made + int(share * max(0, tool.steps - made))
        while job.runs() and last_made(out) < step:
            time.sleep(0.01)
        end = time.monotonic() + later * 1.2 * tool.seconds / tool.steps
    while job.runs() and time.monotonic() < end:
        time.sleep(0.01)
    while job.runs() and getattr(fault, "at_save", False) and not saves(out):
        time.sleep(0.001)


def attempt(tool, numbers, out, fault_kind, world):
    """One run with one fault. Whether it is over, and all is done."""
    global slowest
    fault = fault_kind(numbers, world)
    before, leftovers, made_before = set(tool.read(out)), tool.leftovers(out), last_made(out)
    where = f"{tool.kind}, {fault_kind.__name__} of rank {fault.victim} of {world}, from step {max(before, default=0)}"
    job = Job(tool, out, world)
    try:
        wait_for_moment(tool, fault, job, out, numbers)
        late = not job.runs()
        where += f", at step {last_made(out)}"
        begun = time.monotonic()
        if not late:
            fault.apply(job)
        hung = {fault.victim} if isinstance(fault, Hang) and fault.ends and not late else set()
        results = job.wait(LIMIT if fault.ends else torture.PATIENCE, hung)
        seconds = time.monotonic() - begun
        codes = None if results is None else [code for code, _ in results]
        torture.require(results is not None, f"{where}: not all ranks ended")
    except torture.Failure as failure:
        for process in job.processes:
            process.kill()
        raise torture.Failure(f"{failure}\n" + "".join(f"--- rank {rank}\n{process.communicate()[1]}" for rank, process in
                                                       enumerate(job.processes))) from None
    finally:
        job.close()
    print(f"{where}: {codes} after {seconds:.1f} s", flush=True)
    steps = tool.check(out, where)
    torture.require(before <= steps, f"{where}: checkpoints {sorted(before - steps)} are gone")
    if late or fault.ends and 0 in codes:
        total["late"] += 1  # all was done
        torture.require(tool.steps in steps, f"{where}: {codes}, but step {tool.steps} is not saved")
    else:
        total[fault_kind.__name__] += 1
        if fault.ends:
            slowest = max(slowest, seconds)
            fault.check(job, results, where)
            made = last_made(out)
            if tool.kind == "lora" and made > made_before and 0 not in fault.victims(job) or set(codes) <= {130, 143}:
                torture.require(made in steps or made == made_before, f"{where}: step {made} was made and not saved: {sorted(steps)}")
            return False
    if 0 in codes and fault.ends:
        return False  # the next run finds that all is done
    torture.require(set(codes) == {0}, f"{where}: {codes}\n" + "\n".join(stderr for _, stderr in results))
    tool.check_complete(out, where, leftovers if tool.steps in before else frozenset())
    return True


def complete(tool, out, world):
    where = f"{tool.kind}, {world} ranks to the end"
    before = tool.leftovers(out) if tool.steps in tool.read(out) else frozenset()
    job = Job(tool, out, world)
    try:
        results = job.wait(torture.PATIENCE)
    finally:
        job.close()
    torture.require(results and all(code == 0 for code, _ in results), f"{where}: {results}")
    tool.check_complete(out, where, before)
    left = [path.name for path in out.parent.iterdir() if path.name.endswith(".ranks")]
    torture.require(not left, f"{where}: left {left}")
    print(f"{where}: the bits of one rank", flush=True)


def done():
    return sum(total[kind.__name__] for kind in FAULTS)


def work(tool, numbers, count):
    """`count` faults."""
    out = tool.folder / "out"
    kinds = [kind for kind in FAULTS if LINKS or not kind.needs_link]
    deck, goal = [], done() + count
    worlds = [world for world in WORLDS[tool.kind] if world > 1]
    while done() < goal:
        if not deck:  # each comes in its share, in any order
            deck = [kind for kind in kinds for _ in range(FAULTS[kind])]
            numbers.shuffle(deck)
        again, next_world = numbers.random() < 0.6, numbers.choice(WORLDS[tool.kind])
        over = attempt(tool, numbers, out, deck.pop(), numbers.choice(worlds))
        if not over and again and done() < goal:
            continue  # the next fault meets what this one left
        if not over:
            complete(tool, out, next_world)
        total["finished"] += 1
        shutil.rmtree(out)


given = torture.arguments(__doc__, count=5)
start, code = time.monotonic(), 1
try:
    with netns.Hosts(2):
        LINKS = True
except netns.Unavailable as error:
    LINKS = False
    print(f"left out: links ({error})")
try:
    with training.Workspace(given, steps=6, make=Training) as workspace:
        shares = {"lora": given.count - given.count // 2, "full": given.count // 2}
        for tool in workspace.tools:
            work(tool, random.Random(f"{given.seed} {tool.kind}"), shares[tool.kind])
    code = 0
except torture.Failure as failure:
    print(f"FAILED {failure}")
finally:
    print(f"faults {done()}: " + ", ".join(f"{count} {name}" for name, count in total.items()) +
          f"; all ranks ended within {slowest:.1f} s, {time.monotonic() - start:.0f} s in all")
sys.exit(code)

"""Ranks on several hosts: ranks_hosts_test.py BIN_DIR FIXTURES PART

Hosts are network namespaces (tests/support/netns.py); where none can be made the test is skipped by name (77). Parts: meet (how ranks
of several hosts find each other), meeting and lost (a rank that is killed or hangs, a link that is cut, before
the first step and later), between (a cut that rank 0 does not see),
pauses (of ranks and links, shorter than --dist-timeout), slow (links), elastic (torchrun starts all ranks again), gone (what a killed
test leaves).
"""
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "support"))
import netns
import ranks_test as ranks

BATCHES = 6  # an update, of all ranks
STEPS = 12
PORT = 29511
LIMIT = 60  # seconds for all ranks to end after one was lost


def start_ranks(hosts, world, out, *more, environment=None, batches=BATCHES):
    """Rank r on host r modulo their number."""
    return [ranks.start(hosts[rank % len(hosts)].command(
        ranks.command(out, "--dist-rank", rank, "--dist-world", world, "--gradient-accumulation", batches // world, "--exact-reduction", *more)),
                        environment) for rank in range(world)]


def run_alone(out, *more, batches=BATCHES):
    return ranks.succeed([ranks.start(ranks.command(out, "--gradient-accumulation", batches, *more))])


def require_same(one, out, steps):
    """The last checkpoint and the log of both."""
    for name in ("lora", "state"):
        found = ranks.differ(ranks.weights(one, steps, name), ranks.weights(out, steps, name))
        assert not found, f"{out.name}: {name} differs from that of one rank: {found}"
    expected, found = ranks.metrics(one), ranks.metrics(out)
    assert [line["step"] for line in found] == [line["step"] for line in expected], f"{out.name}: {found}"
    for a, b in zip(expected, found):
        for key in ("epoch", "loss", "grad_norm", "samples", "sigma", "sample_loss"):
            assert a.get(key) == b.get(key), f"{out.name}, step {a['step']}: {key} {b.get(key)}, of one rank {a.get(key)}"


def meet(folder):
    """By a file, by --dist-store and by MASTER_ADDR, on 2 and 3 hosts: the bits of one rank."""
    one, batches = folder / "one", 12
    run_alone(one, batches=batches)
    for count, world, how in ((2, 2, "file"), (3, 3, "store"), (3, 4, "file"), (2, 4, "master")):
        with netns.Hosts(count) as hosts:
            place = hosts[0].address
            more, environment = {"file": ((), {}), "store": (("--dist-store", f"{place}:{PORT}"), {}),
                                 "master": ((), {"MASTER_ADDR": place, "MASTER_PORT": str(PORT)})}[how]
            out = folder / f"{count}-{world}-{how}"
            ranks.succeed(start_ranks(hosts, world, out, "--dist-start-timeout", 60, *more, environment=environment, batches=batches))
            require_same(one, out, 5)
            left = [path.name for path in folder.iterdir() if path.name.endswith(".ranks")]
            assert not left, left
    # a host that cannot be reached
    with netns.Hosts(2) as hosts:
        hosts[1].cut()
        begun = time.monotonic()
        results = [ranks.finish(process) for process in start_ranks(hosts, 2, folder / "apart", "--dist-start-timeout", 3)]
        assert time.monotonic() - begun < LIMIT
        assert [code for code, _, _ in results] == [5, 5], results
        assert "rank 1 did not come within 3 s" in results[0][2], results[0][2]
        assert "rank 0" in results[1][2] and "within 3 s" in results[1][2], results[1][2]


def until_step(processes, out, step):
    ranks.wait_for(lambda: (out / "metrics.jsonl").exists() and len(ranks.metrics_so_far(out)) >= step, processes)


def last_saved(out):
    return max((int(path.name.removeprefix("step-")) for path in out.glob("step-*") if path.name.removeprefix("step-").isdigit()), default=0)


def end_all(processes):
    for process in processes:
        if process.poll() is None:
            process.kill()  # ends what is stopped, too
            print(process.communicate()[1], file=sys.stderr)


def lose(folder, one, name, world, victim, harm, *more, names=None, count=None):
    """Harms `victim` in the middle of a run: the others end in time and name it (`names`: what they say instead, by rank), the last
    whole step is saved, and the next run, of another number of ranks, makes the rest with the bits of `one`."""
    out = folder / name
    with netns.Hosts(count or world) as hosts:
        processes = start_ranks(hosts, world, out, "--max-steps", STEPS, "--save-every", 2, *more)
        until_step(processes, out, 3)
        begun = time.monotonic()
        harm(hosts, processes[victim])
        try:
            for rank, process in enumerate(processes):
                if rank == victim and harm in (pause, kill):
                    continue
                code, _, error = ranks.finish(process, max(1, LIMIT - (time.monotonic() - begun)))
                said = (names or {}).get(rank, f"rank {victim} of {world}")
                assert code == 5 and said in error, f"{name}: rank {rank}: exit {code}, not '{said}'\n{error}"
                assert "hint:" in error, error
        finally:
            end_all(processes)
        print(f"{name}: all ended after {time.monotonic() - begun:.1f} s", flush=True)
    made, saved = ranks.metrics_so_far(out)[-1]["step"], last_saved(out)
    assert saved == made if victim != 0 else saved >= 2, f"{name}: step {made} was made, {saved} is saved"
    with netns.Hosts(2) as hosts:
        ranks.succeed(start_ranks(hosts, 2, out, "--max-steps", STEPS, "--resume"))
    require_same(one, out, STEPS)


def kill(hosts, process):
    process.kill()


def pause(hosts, process):
    process.send_signal(signal.SIGSTOP)


def cut(hosts, process):
    hosts[len(hosts) - 1].cut()


def down(hosts, process):
    hosts[len(hosts) - 1].down()


def cut_from_1(hosts, process):
    hosts[2].cut_from(hosts[1])


def lose_while_meeting(folder, victim, harm, *expected):
    """One of ranks 0 and 1, while they wait for a rank that does not come."""
    what = f"rank {victim} while meeting, {harm.__name__}"
    with netns.Hosts(2) as hosts:
        processes = start_ranks(hosts, 3, folder / f"meeting-{victim}-{harm.__name__}", "--dist-timeout", 5)
        processes[2].kill()
        time.sleep(4)  # the others have come
        begun = time.monotonic()
        harm(hosts, processes[victim])
        try:
            code, _, error = ranks.finish(processes[1 - victim], LIMIT)
        finally:
            end_all(processes)
    assert code == 5 and all(text in error for text in expected), f"{what}: exit {code}\n{error}"
    print(f"{what}: ended after {time.monotonic() - begun:.1f} s", flush=True)


def meeting(folder):
    for harm in (kill, pause, cut):  # of the one that keeps the store
        lose_while_meeting(folder, 0, harm, "rank 0", "hint:")
    for harm in (kill, pause):
        lose_while_meeting(folder, 1, harm, "rank 1 came and has given no sign of life for 5 s")


def lost(folder):
    one = folder / "one"
    run_alone(one, "--max-steps", STEPS)
    quick = ("--dist-timeout", 5)
    alone = {2: "rank 0 of 3"}  # who is cut off cannot say more than that
    lose(folder, one, "cut", 3, 2, cut, *quick, names=alone)
    lose(folder, one, "down", 3, 2, down, *quick, names=alone)
    lose(folder, one, "killed-2", 3, 2, kill, *quick)
    lose(folder, one, "killed-0", 3, 0, kill, *quick)
    lose(folder, one, "paused-1", 3, 1, pause, *quick, count=2)
    lose(folder, one, "paused-0", 2, 0, pause, *quick)
    lose(folder, one, "cut-by-default", 2, 1, cut, names={1: "rank 0 of 2"})  # --dist-timeout 30


def between(folder):
    """All reach rank 0, which sees all alive; the link between two others is cut."""
    one = folder / "one"
    run_alone(one, "--max-steps", STEPS)
    said = "the connection to another rank broke"
    lose(folder, one, "between", 3, 2, cut_from_1, "--dist-timeout", 5, names={0: said, 1: said, 2: said})


def go_on(folder, one, name, world, harm, heal, seconds, *more):
    """Harm that ends before --dist-timeout: the run goes on and has the bits of `one`."""
    out = folder / name
    with netns.Hosts(world) as hosts:
        processes = start_ranks(hosts, world, out, "--max-steps", STEPS, *more)
        try:
            until_step(processes, out, 2)
            harm(hosts, processes)
            time.sleep(seconds)
            made = len(ranks.metrics_so_far(out))
            if heal:
                time.sleep(0.2)
                assert len(ranks.metrics_so_far(out)) == made, f"{name}: the run did not notice"
                heal(hosts, processes)
            results = ranks.succeed(processes)
        finally:
            end_all(processes)
        for _, _, error in results:
            assert "sign of life" not in error and ": error:" not in error, error
    require_same(one, out, STEPS)


def pauses(folder):
    one = folder / "one"
    run_alone(one, "--max-steps", STEPS)
    more = ("--dist-timeout", 20)
    for victim in (0, 1):
        go_on(folder, one, f"stopped-{victim}", 2, lambda _, processes: processes[victim].send_signal(signal.SIGSTOP),
              lambda _, processes: processes[victim].send_signal(signal.SIGCONT), 6, *more)
        go_on(folder, one, f"cut-{victim}", 2, lambda hosts, _: hosts[victim].cut(), lambda hosts, _: hosts[victim].mend(), 6, *more)
        go_on(folder, one, f"down-{victim}", 2, lambda hosts, _: hosts[victim].down(), lambda hosts, _: hosts[victim].up(), 6, *more)
    # all at once, as a suspended job: time in which nobody runs is nobody's silence
    go_on(folder, one, "suspended", 2, lambda _, processes: [process.send_signal(signal.SIGSTOP) for process in processes],
          lambda _, processes: [process.send_signal(signal.SIGCONT) for process in processes], 12, "--dist-timeout", 5)


def slow(folder):
    """0.5 MB of gradients a step and rank, sent 7 times, over 40 Mbit/s: the run takes longer, and nobody is taken for dead, though the
    signs of life wait behind gradients. Where the kernel can delay packets, those of a link across an ocean are."""
    one = folder / "one"
    run_alone(one)
    disciplines = {"narrow": ("tbf", "rate", "40mbit", "burst", "16kb", "latency", "4s"), "far": ("netem", "delay", "60ms", "rate", "200mbit")}
    missing = []
    for name, discipline in disciplines.items():
        with netns.Hosts(2) as hosts:
            try:
                hosts[1].slow_down(*discipline)
            except netns.Unavailable as error:
                missing.append(f"{name} ({error})")
                continue
            begun = time.monotonic()
            results = ranks.succeed(start_ranks(hosts, 2, folder / name, "--dist-timeout", 4))
            print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)
            for _, _, error in results:
                assert ": error:" not in error, error
        require_same(one, folder / name, 5)
    if missing:
        print("left out:", "; ".join(missing))


def ranks_below(agents, count):
    """{rank: process id} of the ranks that torchrun's agents have started, once there are `count`."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = dict(word.split("=", 1) for word in (path / "environ").read_text().split("\0") if "=" in word)
            if parent in agents and (path / "exe").resolve().name == "flux-train":
                found[int(variables["RANK"])] = int(path.name)
        except (OSError, KeyError):
            continue  # it has ended, or is about to start
    return found if len(found) == count else None


def elastic(folder):
    """torchrun --max-restarts: ranks are killed, the agents start all again, and the run has the bits of one rank. By an agent that has both
    ranks, and by one a host."""
    torchrun = ranks.find_torchrun()
    one = folder / "one"
    run_alone(one, "--max-steps", STEPS)
    with netns.Hosts(2) as hosts:
        # the hosts have one name, so that torchrun must be told which it is
        several = [hosts[number].command([torchrun, "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint",
                                          f"{hosts[0].address}:{PORT}", "--rdzv-id", 7, "--rdzv-conf", f"is_host={number == 0}",
                                          "--local-addr", hosts[number].address]) for number in range(2)]
        for name, agents, victims in (("one-agent", [[torchrun, "--standalone", "--nproc-per-node", 2]], (1, 0)), ("two-agents", several, (1,))):
            out = folder / name
            processes = [ranks.start([*map(str, agent), "--max-restarts", "2", "--no-python",
                                      *ranks.command(out, "--gradient-accumulation", BATCHES // 2, "--exact-reduction", "--max-steps", STEPS,
                                                     "--save-every", 2, "--resume", "--dist-timeout", 10)]) for agent in agents]
            try:
                for times, victim in enumerate(victims):
                    until_step(processes, out, 3 + 3 * times)
                    os.kill(ranks_below([process.pid for process in processes], 2)[victim], signal.SIGKILL)
                results = ranks.succeed(processes)
            finally:
                end_all(processes)
            assert sum(stdout.count(f"steps={STEPS} ") for _, stdout, _ in results) == 1, results
            resumed = sum(error.count("info: resumed ") for _, _, error in results)
            assert resumed == len(victims), f"{name}: {resumed} restarts: {results}"
            require_same(one, out, STEPS)


HELD = """
import sys, time
sys.path[:0] = [{support!r}, {here!r}]
import netns, ranks_test, ranks_hosts_test, pathlib
hosts = netns.Hosts(2)
processes = ranks_hosts_test.start_ranks(hosts, 2, pathlib.Path({out!r}), "--max-steps", 5000, "--dist-timeout", 5)
print(*[process.pid for process in processes], *[host.namespace.process.pid for host in hosts.all], hosts.switch.process.pid, flush=True)
time.sleep(600)
"""


def gone(folder):
    """What a killed test leaves: nothing, and its ranks end, for they reach nobody."""
    network = netns.call(["ip", "-brief", "link"])
    out, here = folder / "out", pathlib.Path(__file__).resolve().parent
    text = HELD.format(support=str(here.parent / "support"), here=str(here), out=str(out))
    test = subprocess.Popen([sys.executable, "-c", text, ranks.BIN, ranks.FIXTURES], stdout=subprocess.PIPE, text=True)
    line = test.stdout.readline()
    if not line:
        raise netns.Unavailable(f"exit code {test.wait()}")
    ids = [int(word) for word in line.split()]
    until_step([test], out, 2)
    test.kill()
    test.wait()
    end = time.monotonic() + LIMIT
    while left := [number for number in ids if pathlib.Path(f"/proc/{number}").exists()]:
        assert time.monotonic() < end, f"processes {left} of {ids} run on"
        time.sleep(0.1)
    assert netns.call(["ip", "-brief", "link"]) == network
    assert last_saved(out) == ranks.metrics_so_far(out)[-1]["step"], "the last whole step is not saved"


PARTS = {"meet": meet, "meeting": meeting, "lost": lost, "between": between, "pauses": pauses, "slow": slow, "elastic": elastic, "gone": gone}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="flux-hosts-") as name:
        try:
            PARTS[sys.argv[3]](pathlib.Path(name))
        except netns.Unavailable as error:
            ranks.skip(f"no network namespaces: {error}")

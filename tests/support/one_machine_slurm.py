"""A Slurm of this machine alone, for tests: munge, a controller and a daemon a node, which end with the test.

    with Slurm(folder, nodes=2) as slurm:
        subprocess.run(["srun", "-N2", "hostname"], env=os.environ | slurm.environment)

Each node has its own host name where the system lets it. What it needs and how it is had: scripts/setup --launchers.
Also a program: one_machine_slurm.py DIR [NODES] starts one, says which SLURM_CONF to export, and ends with the input.
"""
import ctypes
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

PROGRAMS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "srun": "slurm-wlm", "sbatch": "slurm-wlm"}
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PR_SET_PDEATHSIG = 1


class Unavailable(Exception):
    """Why there is no Slurm here."""


def die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Slurm:
    def __init__(self, folder, nodes=2, settings="", cgroup=None):
        """`settings`: more lines of slurm.conf; `cgroup`: those of cgroup.conf."""
        self.folder = pathlib.Path(folder).resolve()
        self.nodes, self.settings, self.cgroup = nodes, settings, cgroup
        self.conf = self.folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.conf), "PATH": PATH}
        self.daemons, self.munge = [], None

    def __enter__(self):
        for program, package in PROGRAMS.items():
            if not shutil.which(program, path=PATH):
                raise Unavailable(f"{program} is not installed: apt-get install {package}")
        if os.geteuid() != 0:
            raise Unavailable("Slurm's daemons need root")
        for last in (False, False, True):  # another process may take a port in between
            try:
                self.start()
                return self
            except BaseException as why:
                self.__exit__()
                if last or not isinstance(why, Unavailable):
                    raise

    def __exit__(self, *_):
        if len(self.daemons) > 1:
            self.run("scancel", "--user=root", check=False)
            end = time.monotonic() + 20
            while self.run("squeue", "-h", check=False).stdout.strip() and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        if self.cgroup is not None:
            for hierarchy in pathlib.Path("/sys/fs/cgroup").iterdir():
                for i in range(1, self.nodes + 1):
                    self.remove_groups(hierarchy / f"slurm_n{i}")
        self.daemons = []
        if self.munge:
            shutil.rmtree(self.munge, ignore_errors=True)

    @staticmethod
    def remove_groups(top):
        for folder, _, _ in os.walk(top, topdown=False):
            try:
                os.rmdir(folder)
            except OSError:
                pass  # somebody's task is there yet

    def run(self, *command, check=True, **more):
        result = subprocess.run([str(word) for word in command], env=os.environ | self.environment, capture_output=True, text=True, **more)
        assert not check or result.returncode == 0, f"{command}: exit {result.returncode}\n{result.stdout}{result.stderr}"
        return result

    def daemon(self, *command):
        with open(self.folder / f"{pathlib.Path(str(command[0])).name}-{len(self.daemons)}.out", "wb") as out:
            self.daemons.append(subprocess.Popen([str(word) for word in command], env=os.environ | self.environment, stdin=subprocess.DEVNULL,
                                                 stdout=out, stderr=out, preexec_fn=die_with_parent, start_new_session=True))

    def wait_for(self, what, condition, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            ended = [daemon.args[0] for daemon in self.daemons if daemon.poll() is not None]
            if ended or time.monotonic() > end:
                said = "".join(f"\n{path.name}: {path.read_text(errors='replace')[-800:]}" for path in sorted(self.folder.glob("*.[ol][uo][tg]")))
                raise Unavailable(f"Slurm does not start: {what}{' has ended: ' + str(ended) if ended else ''}{said}")
            time.sleep(0.1)

    def start(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.munge = pathlib.Path(tempfile.mkdtemp(prefix="munge-"))  # the path of a socket must be short
        self.munge.chmod(0o755)
        key = self.munge / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.munge}/socket", f"--pid-file={self.munge}/pid",
                    f"--log-file={self.folder}/munged.log", f"--seed-file={self.munge}/seed")
        self.wait_for("munged", lambda: (self.munge / "socket").exists())
        host = socket.gethostname().split(".")[0]
        ports = free_ports(1 + self.nodes)
        # each daemon in name spaces of its own has the name of its node, which all of them know
        hosts = self.folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {' '.join(f'n{i}' for i in range(1, self.nodes + 1))}\n" +
                         f"{pathlib.Path('/etc/hosts').read_text()}")
        apart = ["unshare", "--uts", "--mount", "sh", "-ec", 'mount --bind "$1" /etc/hosts; hostname "$2"; shift 2; exec "$@"', "sh", hosts]
        own_names = subprocess.run([*apart, "n1", "true"], capture_output=True).returncode == 0
        lines = [
            "ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", "SlurmUser=root", "AuthType=auth/munge",
            f"AuthInfo=socket={self.munge}/socket,cred_expire=5",  # a requeued job waits as long
            "CredType=cred/munge", f"StateSaveLocation={self.folder}/state", f"SlurmdSpoolDir={self.folder}/spool-%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid", f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
            f"SlurmctldLogFile={self.folder}/slurmctld.log", f"SlurmdLogFile={self.folder}/slurmd-%n.log", f"SlurmctldPort={ports[0]}",
            "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core_Memory", "DefMemPerNode=1000", "ReturnToService=2", "MpiDefault=none", "SlurmdParameters=config_overrides",
            "SwitchType=switch/none", "KillWait=30", "SchedulerParameters=sched_interval=1,bf_interval=1,default_queue_depth=100", "JobRequeue=1"]
        if self.cgroup is None:
            lines += ["ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none"]
        else:
            (self.folder / "cgroup.conf").write_text(self.cgroup)
            lines += ["ProctrackType=proctrack/cgroup", "TaskPlugin=task/cgroup"]
        lines += [f"NodeName=n{i} NodeHostname={f'n{i}' if own_names else host} NodeAddr=127.0.0.1 Port={ports[i]} CPUs=4 RealMemory=4000 State=UNKNOWN"
                  for i in range(1, self.nodes + 1)]
        lines += ["PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP", self.settings]
        self.conf.write_text("\n".join(lines) + "\n")
        (self.folder / "state").mkdir(exist_ok=True)
        self.daemon("slurmctld", "-D", "-f", self.conf)
        for i in range(1, self.nodes + 1):
            (self.folder / f"spool-n{i}").mkdir(exist_ok=True)
            slurmd = ["slurmd", "-D", "-f", str(self.conf), "-N", f"n{i}"]
            self.daemon(*([*apart, f"n{i}"] if own_names else []), *slurmd)
        self.wait_for("the nodes", lambda: self.run("sinfo", "-h", "-N", "-o", "%T", check=False).stdout.split() == ["idle"] * self.nodes)


def main(folder, nodes="2"):
    try:
        with Slurm(folder, int(nodes)) as slurm:
            print(f"export SLURM_CONF={slurm.conf}", flush=True)
            sys.stdin.read()
    except Unavailable as why:
        print(f"one_machine_slurm.py: {why}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Network namespaces as hosts, each with an address of its own, joined by a bridge: tests on one machine, links that can be cut.

    with Hosts(2) as hosts:
        process = subprocess.Popen(hosts[1].command(["ping", hosts[0].address]))
        hosts[1].cut()

The namespaces have no names: each lives as long as a process in it, and those that keep them end with the program that made them,
even if that is killed. So nothing is ever left behind, and the machine's own network is not touched. Needs iproute2 and util-linux,
and root or user namespaces that everybody may make. Run as a program it says whether they can be made.
"""
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time

NETWORK = "192.168.213"  # in the namespaces only
PR_SET_PDEATHSIG = 1


class Unavailable(Exception):
    """Why there can be no namespaces here."""


def end_with_parent():
    """For Popen's preexec_fn: SIGKILL when the thread that starts the process ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def call(words):
    """Its standard output; Unavailable if it fails."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Namespace:
    """One that has loopback only."""

    def __init__(self, owner=None):
        """`owner`: of the same user namespace, where this user is root; none: makes one if this user is not."""
        self.in_user = owner.in_user if owner else os.geteuid() != 0
        words = ["unshare", "--net"] + (["--user", "--map-root-user"] if self.in_user and not owner else [])
        keep = [*words, sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
        # its standard input ends with this program; the signal is for one that was forked meanwhile and holds the other end
        self.process = subprocess.Popen((owner.inside(keep) if owner else keep), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, preexec_fn=end_with_parent)
        if not self.process.stdout.readline():
            raise Unavailable(f"unshare: {self.process.communicate()[1].strip()}")

    def inside(self, words):
        """The command line that runs `words` there; as the same process, and as root of the user namespace."""
        user = ["--user", "--preserve-credentials"] if self.in_user else []
        return ["nsenter", f"--target={self.process.pid}", *user, "--net", "--", *map(str, words)]

    def ip(self, *words):
        return call(self.inside(["ip", *words]))

    def close(self):
        self.process.kill()
        self.process.communicate()


class Host:
    """A namespace with one address. Its link is cut and made slow from outside, as a cable is."""

    def __init__(self, number, switch):
        self.number, self.switch = number, switch
        self.address = f"{NETWORK}.{number + 1}"
        self.port = f"port{number}"  # on the switch
        self.namespace = Namespace(switch)
        switch.ip("link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns", str(self.namespace.process.pid))
        switch.ip("link", "set", self.port, "master", "switch", "up")
        self.namespace.ip("link", "set", "lo", "up")
        self.namespace.ip("address", "add", f"{self.address}/24", "dev", "eth0")
        self.namespace.ip("link", "set", "eth0", "up")

    def command(self, words):
        return self.namespace.inside(words)

    def cut(self):
        self.switch.ip("link", "set", self.port, "down")

    def mend(self):
        self.switch.ip("link", "set", self.port, "up")
        self.wait_until_reachable()

    def down(self):
        """By the host itself, which loses its routes."""
        self.namespace.ip("link", "set", "eth0", "down")

    def up(self):
        self.namespace.ip("link", "set", "eth0", "up")
        self.wait_until_reachable()

    def wait_until_reachable(self):
        end = time.monotonic() + 10
        # a port of the bridge learns for a moment before it forwards
        while "LOWER_UP" not in self.namespace.ip("link", "show", "eth0") or "state forwarding" not in self.switch.ip(
                "-detail", "link", "show", self.port):
            if time.monotonic() > end:
                raise Unavailable(f"the link of host {self.number} does not come up")
            time.sleep(0.02)

    def cut_from(self, other):
        """Between the two only: what one sends to the other is lost. A third reaches both."""
        for one, two in ((self, other), (other, self)):
            one.namespace.ip("neighbour", "replace", two.address, "lladdr", "02:00:00:00:00:01", "nud", "permanent", "dev", "eth0")

    def slow_down(self, *discipline):
        """Both ways: "tbf", "rate", "1mbit", ... or "netem", "delay", "100ms", .... Unavailable where the kernel lacks it."""
        call(self.switch.inside(["tc", "qdisc", "replace", "dev", self.port, "root", *discipline]))
        call(self.command(["tc", "qdisc", "replace", "dev", "eth0", "root", *discipline]))


class Hosts:
    """`count` of them that reach each other. Unavailable where none can be made; then nothing is left."""

    def __init__(self, count):
        self.all, self.switch = [], None
        for tool in ("ip", "tc", "unshare", "nsenter"):
            if not shutil.which(tool):
                raise Unavailable(f"{tool} is not installed: apt-get install iproute2 util-linux")
        try:
            self.switch = Namespace()
            self.switch.ip("link", "add", "switch", "type", "bridge", "forward_delay", "0")
            self.switch.ip("link", "set", "switch", "up")
            for number in range(count):
                self.all.append(Host(number, self.switch))
            for host in self.all:
                host.wait_until_reachable()
        except BaseException:
            self.close()
            raise

    def __getitem__(self, number):
        return self.all[number]

    def __len__(self):
        return len(self.all)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        for host in self.all:
            host.namespace.close()
        if self.switch:
            self.switch.close()


if __name__ == "__main__":
    try:
        with Hosts(2):
            print("namespaces can be made")
    except Unavailable as error:
        print(f"skipped: {error}")
        sys.exit(77)

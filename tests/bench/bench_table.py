"""What the benchmark scripts share: programs run with their time, CPU and memory, and the table at the end."""
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import time
import zlib

PEERS = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "flux-stages/peers/bin/python"


class Run:
    """One finished program: stdout, wall and CPU seconds, peak RSS in bytes."""

    def __init__(self, command, env=None, expect=0):
        command = [str(part) for part in command]
        start = time.monotonic()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **(env or {})})
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self.wall = time.monotonic() - start
            out.seek(0), err.seek(0)
            self.stdout, self.stderr = out.read().decode(errors="replace"), err.read().decode(errors="replace")
        self.cpu, self.rss = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
        if process.returncode != expect:
            sys.exit(f"{' '.join(command)}: exit {process.returncode}\n{self.stderr[-3000:]}")


def peers_python():
    """The Python of `scripts/setup --peers`; ends the program without it."""
    if not PEERS.exists():
        sys.exit("no peers to compare with: run scripts/setup --peers first")
    return PEERS


def png(path, width, height, seed):
    """A small picture of noise, each seed another one; smooth enough to look like something."""
    row = bytes((seed * 7919 + x * 31) % 251 for x in range(3 * width))
    raw = b"".join(b"\0" + bytes((value + y * (seed % 13 + 1)) & 255 for value in row) for y in range(height))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    note = b"seed\0" + str(seed).encode()  # no two files are equal
    pathlib.Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"tEXt", note) +
                                   chunk(b"IDAT", zlib.compress(raw, 1)) + chunk(b"IEND", b""))


def machine():
    name = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    return f"{os.cpu_count()} cores of {name}, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}"


class Table:
    """Rows of what was measured, its target, and whether it holds; `at_least` or `at_most` is the target."""

    def __init__(self, title):
        self.rows, self.failed = [], 0
        print(f"{title}: {machine()}\n")

    def add(self, what, value, unit="", at_least=None, at_most=None):
        target, verdict = "", ""
        if at_least is not None or at_most is not None:
            holds = value >= at_least if at_least is not None else value <= at_most
            target = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
            verdict = "holds" if holds else "MISSED"
            self.failed += not holds
        self.rows.append((what, f"{value:,.4g} {unit}".strip(), target, verdict))

    def finish(self):
        """Prints the table; returns the exit code: 1 if a target is missed and --check was given."""
        rows = [("what", "measured", "target", "")] + self.rows
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        rows.insert(1, tuple("-" * width for width in widths))
        for row in rows:
            print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        return 1 if self.failed and "--check" in sys.argv else 0


def arguments(usage):
    """The arguments without --check; ends the program if their number is not that of `usage`'s words."""
    given = [a for a in sys.argv[1:] if a != "--check"]
    required = [word for word in usage.split() if not word.startswith("[")]
    if not len(required) <= len(given) <= len(usage.split()):
        sys.exit(f"usage: {pathlib.Path(sys.argv[0]).name} {usage} [--check]")
    return given

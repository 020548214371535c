#!/usr/bin/env python3
"""Power cuts: runs of both encoding tools are recorded, and the folder is built as a disk may have it at random moments.
Of what was not flushed each 4 KiB page is there or not; of the changes to the folder since it was last flushed a random part
was done (half of the time the first ones in their order, else any). Then every published file reads whole, index and
manifest belong together, what was finished more than the journal's interval ago is there, nothing is wrong, and the next run
completes to an uninterrupted run's samples."""
import pathlib
import random
import shutil
import threading

import torture

NUM_ITEMS = 140  # more than a segment
PAGE = 4096
INTERVAL = 1.0  # of the journal, FORMAT.md section 8: seconds
SLOW = "a slow encoder"
PATIENCE = 0.5  # beside the longest flush that was recorded, and twice what a sleeper woke too late meanwhile

given = torture.arguments(__doc__, points=40)
total = {"points": 0, "operations": 0, "required": 0, "lost_within_interval": 0}
lock = threading.Lock()


class Inode:
    """A file: bytes that are on the disk for certain, and writes that may be."""

    def __init__(self, durable=b""):
        self.durable = bytearray(durable)
        self.pending = []  # (offset, bytes) or (length, None)

    def write(self, offset, data):
        at = 0
        while at < len(data):
            size = min(len(data) - at, PAGE - (offset + at) % PAGE)
            self.pending.append((offset + at, data[at:at + size]))
            at += size

    def bytes_with(self, survives):
        out = bytearray(self.durable)
        for offset, data in self.pending:
            if survives():
                end = offset + len(data or b"")
                out.extend(bytes(max(0, end - len(out))))
                if data is None:
                    del out[offset:]
                else:
                    out[offset:end] = data
        return out

    def flush(self):
        self.durable = self.bytes_with(lambda: True)
        self.pending = []


def change(names, operation):
    what, a, b = operation
    if what == "add":
        names[a] = b
    elif what == "rename" and a in names:
        names[b] = names.pop(a)
    elif what == "remove":
        names.pop(a, None)


class Disk:
    """A folder as a disk holds it while operations come in."""

    def __init__(self, folder, initial):
        self.folder = str(folder)
        self.durable = {name: Inode(data) for name, data in initial.items()}
        self.names = dict(self.durable)
        self.pending = []  # changes of names that are not flushed

    def name(self, path):
        torture.require(str(pathlib.PurePath(path).parent) == self.folder, f"{path} is not in {self.folder}")
        return pathlib.PurePath(path).name

    def change(self, what, a, b=None):
        change(self.names, (what, a, b))
        self.pending.append((what, a, b))

    def apply(self, operation):
        letter = operation.letter
        if letter in "XM" or letter.islower():
            return
        if operation.path.rstrip("/") == self.folder:
            if letter == "S":
                for pending in self.pending:
                    change(self.durable, pending)
                self.pending = []
            return
        name = self.name(operation.path)
        if letter == "C":
            if name not in self.names:
                self.change("add", name, Inode())
        elif letter == "W":
            # an unlinked file may still be written to; nobody sees it again
            if name in self.names:
                self.names[name].write(operation.offset, operation.data)
        elif letter == "L":
            self.names[name].pending.append((operation.length, None))
        elif letter == "S":
            if name in self.names:
                self.names[name].flush()
        elif letter == "R":
            self.change("rename", name, self.name(operation.other))
        elif letter == "H":
            self.change("add", self.name(operation.other), self.names[name])
        elif letter == "U":
            self.change("remove", name)

    def state(self, numbers):
        """What is on the disk after the power came back: name -> bytes."""
        names = dict(self.durable)
        if numbers.random() < 0.5:
            done = self.pending[:numbers.randint(0, len(self.pending))]
        else:
            done = [operation for operation in self.pending if numbers.random() < 0.5]
        for operation in done:
            change(names, operation)
        bytes_ = {}
        for name, inode in names.items():
            bytes_.setdefault(id(inode), inode.bytes_with(lambda: numbers.random() < 0.5))
        return {name: bytes(bytes_[id(inode)]) for name, inode in names.items()}

    def all(self):
        return {name: bytes(inode.bytes_with(lambda: True)) for name, inode in self.names.items()}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def write_files(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


class Recording:
    """A run from a folder's state, with every operation; `appended`: (time, key) of each sample put into the journal."""

    def __init__(self, tool, name, version, initial, **shim):
        self.name, self.version, self.initial = name, version, initial
        out, log = tool.folder / "out", tool.folder / "log"
        tool.set_version(version)
        write_files(out, initial)
        self.before = tool.contents(out).samples
        log.unlink(missing_ok=True)
        with torture.Lag() as lag:
            code, _, stderr = tool.run(out, log=log, **shim)
        self.patience = PATIENCE + 2 * lag.seconds
        torture.require(code == 0, f"{name}: the recorded run ended with {code}:\n{stderr}")
        self.operations = torture.read_log(log)
        disk = Disk(out, initial)
        for operation in self.operations:
            disk.apply(operation)
        torture.require(disk.all() == files_of(out), f"{name}: the recorder missed operations")
        self.slowest_flush = max((o.end - o.start for o in self.operations if o.letter == "S"), default=0) / 1e9
        # a journal's record begins with its magic, the length of its body and the sample's key
        self.appended = [(o.end, o.data[16:48].hex()) for o in self.operations
                         if o.letter == "W" and o.data.startswith(b"FXCJSMPL")]
        torture.require(name == "recovery" or self.appended, f"{name}: nothing was written into a journal")

    def crash(self, numbers, skip_flushes=False):
        """(time, number of operations before it, state of the disk)."""
        if numbers.random() < 0.5 or self.name == SLOW:  # uniform in time: mostly while samples are encoded
            time = numbers.randint(self.operations[0].start, self.operations[-1].end)
        else:  # uniform in operations: sealing, recovery and publishing, too
            time = numbers.choice(self.operations).end
        disk = Disk(pathlib.PurePath(self.operations[0].path).parent if self.operations[0].letter != "M"
                    else self.operations[0].path, self.initial)
        for operation in self.operations:
            if operation.end > time:
                break
            if not (skip_flushes and operation.letter == "S"):
                disk.apply(operation)
        return time, disk.state(numbers)


def examine(tool, recording, time, files, out, where):
    """What is wrong with a disk's state is a Failure. Returns what was found."""
    write_files(out, files)
    found = tool.contents(out)
    tool.check(found, where)
    keys = {key for key, _ in found.samples}
    lost = {key for key, _ in recording.before} - keys
    torture.require(not lost, f"{where}: {len(lost)} samples of earlier runs are lost")
    oldest = time - (INTERVAL + recording.patience + recording.slowest_flush) * 1e9
    required = {key for when, key in recording.appended if when <= oldest}
    torture.require(required <= keys,
                    f"{where}: {len(required - keys)} samples that were finished in time are lost")
    with lock:
        total["required"] += len(required)
        total["lost_within_interval"] += len({key for when, key in recording.appended if when <= time} - keys)
    return found


def check_new_folders(tool):
    """Folders that the tool makes are on the disk before anything in them has to be."""
    above, log = tool.folder / "above", tool.folder / "log"
    above.mkdir()
    out = above / "a/b"
    log.unlink(missing_ok=True)
    code, _, stderr = tool.run(out, log=log, folder=above)
    torture.require(code == 0, f"new folders: ended with {code}:\n{stderr}")
    unflushed, made = set(), 0
    for operation in torture.read_log(log):
        parent = str(pathlib.PurePath(operation.path).parent)
        if operation.letter == "M":
            unflushed.add(parent)
            made += 1
        elif operation.letter == "S":
            unflushed.discard(operation.path.rstrip("/"))
        torture.require(not (operation.letter == "W" and unflushed),
                        f"{operation.path} is written while {unflushed} is not flushed")
    torture.require(made == 2, f"{made} folders were made")


def work(tool, numbers):
    for version in range(2):
        tool.reference(version)
    check_new_folders(tool)
    out = tool.folder / "out"
    # The encoder's speed is that of a large one, so that the journal's interval matters
    empty = Recording(tool, "an empty folder", 0, {}, pause_us=20_000)
    complete = files_of(out)
    changed = Recording(tool, "changed data", 1, complete, pause_us=40_000)
    # many samples at once, then none for a while: those must not wait for the next one to be flushed
    slow = Recording(tool, SLOW, 0, {}, pause_us=2_500_000, pause_every=60)
    killed_at = next(i for i, o in enumerate(empty.operations) if o.letter == "W" and len(o.data) > 0 and
                     o.data.startswith(b"FXCJSMPL") and i > len(empty.operations) // 2)
    disk = Disk(out, {})
    for operation in empty.operations[:killed_at]:
        disk.apply(operation)
    recovery = Recording(tool, "recovery", 0, {name: data for name, data in disk.all().items() if name != ".writer.lock"})
    recordings = [empty, changed, recovery, slow]
    with lock:
        total["operations"] += sum(len(recording.operations) for recording in recordings)

    # The rules can fail: without a single flush they must
    caught = 0
    for _ in range(20):
        try:
            examine(tool, empty, *empty.crash(numbers, skip_flushes=True), out, "without flushes")
        except torture.Failure:
            caught += 1
    torture.require(caught >= 5, f"without any flush only {caught} of 20 states were found to be bad")

    for point in range(given.points // 2):
        recording = recordings[point % len(recordings)]
        state = random.Random(numbers.getrandbits(64))
        time, files = recording.crash(state)
        where = f"{recording.name}, power cut {point} after {(time - recording.operations[0].start) / 1e9:.3f} s"
        tool.set_version(recording.version)
        found = examine(tool, recording, time, files, out, where)
        tool.complete(out, where, found.samples)
        with lock:
            total["points"] += 1
            if total["points"] % 100 == 0:
                print(f"{total['points']} power cuts", flush=True)


try:
    torture.main(work, given, NUM_ITEMS)
finally:
    print(f"power cuts {total['points']} in {total['operations']} operations: {total['required']} samples had to survive, "
          f"{total['lost_within_interval']} younger ones were lost")

"""TensorBoard's own reader sees what metrics.jsonl holds, and after a kill and a resume each step once: peers_tensorboard_test.py
BIN_DIR FIXTURES; exit code 77 without the tensorboard package."""
import math
import pathlib
import struct
import sys
import tempfile

from training_run import metrics, train

try:
    from tensorboard.backend.event_processing import event_accumulator
except ImportError as error:
    print(f"skipped: {error} (scripts/setup --peers installs it)")
    sys.exit(77)

FIELDS = {"loss/step": "loss", "loss/smoothed": "loss_smoothed", "learning_rate": "learning_rate", "grad_norm": "grad_norm",
          "speed/images_per_second": "images_per_second", "speed/data_wait_share": "data_wait_share",
          "memory/peak_bytes": "memory_peak_bytes"}


def rounded(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def check(out):
    reader = event_accumulator.EventAccumulator(str(out / "tensorboard"), size_guidance={event_accumulator.SCALARS: 0})
    reader.Reload()
    assert set(reader.Tags()["scalars"]) == set(FIELDS), reader.Tags()
    lines = metrics(out)
    for tag, field in FIELDS.items():
        events = reader.Scalars(tag)
        assert [event.step for event in events] == [line["step"] for line in lines], (tag, [event.step for event in events])
        for event, line in zip(events, lines):
            assert math.isclose(event.value, rounded(line[field]), rel_tol=1e-6), (tag, event, line)
            assert event.wall_time > 1.7e9
    return len(lines)


def main(bin_dir, fixtures):
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "run"
        train(bin_dir, fixtures, out, 6, "--save-every", "4")
        assert check(out) == 6
        # as if the run had been killed before step 6 was saved: events of steps 5 and 6 are there, the checkpoint is not
        for file in (out / "step-000006").iterdir():
            file.unlink()
        (out / "step-000006").rmdir()
        train(bin_dir, fixtures, out, 9, "--resume", "--save-every", "4")
        files = sorted(path.name for path in (out / "tensorboard").iterdir())
        assert len(files) == 2 and all("tfevents" in name for name in files), files
        steps = check(out)
        assert steps == 9
        # a torn record, as a kill leaves it, ends its file and nothing else
        last = out / "tensorboard" / files[-1]
        last.write_bytes(last.read_bytes() + b"\x30\0\0\0")
        assert check(out) == 9
        train(bin_dir, fixtures, out, 10, "--resume", "--no-tensorboard")
        assert len(list((out / "tensorboard").iterdir())) == 2
        print(f"{steps} steps, {len(FIELDS)} curves, {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main(*(pathlib.Path(argument).resolve() for argument in sys.argv[1:3])))

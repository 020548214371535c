"""Runs one command-line case: run_case.py CASE_DIR BIN_DIR FIXTURE_DIR.

A case is a folder:
  cmd                     a bash script, run in an empty folder with the tools on PATH and $FIXTURES set
  exit                    the exit code expected (absent: 0)
  stdout.exact|.glob      what stdout must be; in a glob, * stands for any text, line breaks included
  stderr.exact|.glob      likewise
An absent stdout or stderr file means: not compared. `cmd` may end with checks of its own: set the exit code aside first.
"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile


def matches(kind, expected, actual):
    if kind == "exact":
        return expected == actual
    return re.fullmatch(".*".join(re.escape(part) for part in expected.split("*")), actual, re.S) is not None


def main(case, bin_dir, fixtures):
    with tempfile.TemporaryDirectory(prefix="flux-cli-") as folder:
        home = pathlib.Path(folder, "home")
        work = pathlib.Path(folder, "work")
        home.mkdir()
        work.mkdir()
        environment = {"PATH": f"{bin_dir}:{os.environ['PATH']}", "FIXTURES": str(fixtures), "HOME": str(home),
                       "LC_ALL": os.environ.get("LC_ALL", "C"), "OMP_WAIT_POLICY": "passive"}
        result = subprocess.run(["bash", "-u", case / "cmd"], cwd=work, env=environment, capture_output=True, timeout=240)
    expected_exit = int((case / "exit").read_text()) if (case / "exit").exists() else 0
    failures = []
    if result.returncode != expected_exit:
        failures.append(f"exit {result.returncode}, expected {expected_exit}")
    for stream in ("stdout", "stderr"):
        actual = getattr(result, stream).decode("utf-8", "backslashreplace")
        for kind in ("exact", "glob"):
            file = case / f"{stream}.{kind}"
            if file.exists() and not matches(kind, file.read_text(), actual):
                failures.append(f"{stream} is not as {file.name}:\n--- expected\n{file.read_text()}")
    if failures:
        for stream in ("stdout", "stderr"):
            failures.append(f"--- {stream}\n" + getattr(result, stream).decode("utf-8", "backslashreplace"))
        print("\n".join(failures))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*(pathlib.Path(argument).resolve() for argument in sys.argv[1:4])))

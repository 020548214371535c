"""cmake --install: install_test.py BUILD_DIR. What it puts in a folder runs there without the build tree, and its manifest names all of it.
"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile


def run(*arguments, **more):
    return subprocess.run([str(a) for a in arguments], check=True, capture_output=True, text=True, **more).stdout


def main(build):
    with tempfile.TemporaryDirectory(prefix="flux-install-", dir=build) as name:  # half a gigabyte
        folder = pathlib.Path(name)
        installed = folder / "installed"
        run("cmake", "--install", build, "--component", "Unspecified", "--prefix", installed)
        # it may be moved
        moved = folder / "elsewhere"
        installed.rename(moved)
        programs = sorted(path.name for path in (moved / "bin").iterdir())
        assert programs == sorted(path.name for path in (build / "bin").glob("flux-*")), programs
        environment = {"PATH": "/usr/bin:/bin", "HOME": name}
        for program in programs:
            assert program in run(moved / "bin" / program, "--version", env=environment)
            for line in run("ldd", moved / "bin" / program, env=environment).splitlines():
                path = re.search(r"=> (.*) \(0x|not found", line)
                where = pathlib.Path(os.path.realpath(path.group(1))) if path and path.group(1) else None
                assert "not found" not in line, (program, line)
                assert where is None or where.is_relative_to(moved) or where.is_relative_to("/usr/lib"), (program, line)
            assert (moved / f"share/man/man1/{program}.1").read_text().startswith(r".TH FLUX\-"), program
            assert "complete -F" in (moved / f"share/bash-completion/completions/{program}").read_text(), program
        named = {pathlib.Path(line).relative_to(installed) for line in (build / "install_manifest_Unspecified.txt").read_text().splitlines()}
        there = {path.relative_to(moved) for path in moved.rglob("*") if not path.is_dir()}
        assert named == there, named ^ there
    print(f"{len(programs)} programs, {len(there)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]).resolve()))

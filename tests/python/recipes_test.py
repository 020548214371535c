"""pipelines/recipes does what its README says: recipes_test.py BIN_DIR make|parallel|slurm

`make` runs shards.mk, `parallel` its work list by GNU parallel (skipped by name, 77, where that is not installed); `slurm` runs the job scripts with a stand-in for sbatch and srun that runs each task at once, with Slurm's
variables. Both merged caches must hold the very samples of caches made in one piece.
"""
import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPES = ROOT / "pipelines/recipes"

# Runs what it is given: `sbatch --parsable [--array=A-B] [--dependency=..] FILE`, once a task; an id on stdout as the real one.
SBATCH = """#!/bin/bash
set -eu
first=0 last=-1
for argument in "$@"; do
  case $argument in
    --array=*) range=${argument#--array=}; first=${range%-*} last=${range#*-} ;;
    --dependency=afterok:*) test -e "$JOBS/${argument##*:}" || { echo "job ${argument##*:} did not end well" >&2; exit 1; } ;;
    --*) ;;
    *) script=$argument ;;
  esac
done
id=$(($(ls "$JOBS" | wc -l) + 1))
if [ "$last" -ge 0 ]; then
  for task in $(seq "$first" "$last"); do
    SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=$((last - first + 1)) bash "$script" >&2
  done
else
  bash "$script" >&2
fi
touch "$JOBS/$id"
echo "$id"
"""
SRUN = '#!/bin/bash\nexec "$@"\n'


def samples(bin_dir, cache):
    out = subprocess.run([bin_dir / "flux-cache", "inspect", cache, "--json", "--samples"], check=True, capture_output=True, text=True)
    found = json.loads(out.stdout)
    assert found["complete"], cache
    return sorted((sample["key"], sample["tensor_xxh3"]) for sample in found["samples"])


def failing_part(run, work):
    """A part that fails is in the log with its exit code; nothing is merged, and again only that part is run."""
    run("make", "-f", RECIPES / "shards.mk", "list", "SHARDS=3", "LAUNCH=test $(part) != 1 &&", "WORK=failing", out=work.parent / "work.list")
    lines = (work.parent / "work.list").read_text().splitlines()
    assert len(lines) == 6 and all(line.startswith("test ") for line in lines), lines
    parallel = ["parallel", "--joblog", work.parent / "work.log", "--resume-failed", "--jobs", "2"]
    assert run(*parallel, stdin=work.parent / "work.list", code=None)[0] == 2, "two parts fail"
    ended = [line.split("\t") for line in (work.parent / "work.log").read_text().splitlines()[1:]]
    assert sorted(line[6] for line in ended) == ["0"] * 4 + ["1"] * 2, ended
    code, said = run("make", "-f", RECIPES / "shards.mk", "merge", "SHARDS=3", "WORK=failing", code=None)
    assert code and "1-of-3" in said, said
    (work.parent / "work.list").write_text("\n".join(line.split("&& ", 1)[1] for line in lines) + "\n")
    run(*parallel, stdin=work.parent / "work.list")
    assert len((work.parent / "work.log").read_text().splitlines()) == 1 + 6 + 2, "more than the failed parts were run"
    run("make", "-f", RECIPES / "shards.mk", "merge", "SHARDS=3", "WORK=failing")


def main(bin_dir, which):
    if which == "parallel" and not shutil.which("parallel"):
        print("skipped: GNU parallel is not installed: apt-get install parallel")
        return 77
    bin_dir = pathlib.Path(bin_dir).resolve()
    with tempfile.TemporaryDirectory(prefix="flux-recipes-") as folder:
        folder = pathlib.Path(folder)
        images, models, work = folder / "images", folder / "models", folder / "work"
        programs = folder / "bin"
        programs.mkdir()
        (folder / "jobs").mkdir()
        for name, text in {"sbatch": SBATCH, "srun": SRUN}.items():
            (programs / name).write_text(text)
            (programs / name).chmod((programs / name).stat().st_mode | stat.S_IXUSR)
        environment = os.environ | {
            "HOME": str(folder), "PATH": f"{programs}:{bin_dir}:{os.environ['PATH']}", "JOBS": str(folder / "jobs"),
            "OMP_WAIT_POLICY": "passive", "WORK": str(work), "DATA": f"--images {images}", "LATENTS_FLAGS": "--resolution 64x64",
            "AE": str(models / "ae.safetensors"), "CLIP": str(models / "clip.safetensors"), "T5": str(models / "t5.safetensors"),
            "T5_TOKENIZER": str(models / "tokenizers/t5/spiece.model"), "CLIP_TOKENIZER": str(models / "tokenizers/clip")}

        def run(*command, code=0, stdin=None, out=None):
            """What it says; with code None the exit code too, which is 0 else. `out` takes stdout."""
            result = subprocess.run([str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True,
                                    input=stdin.read_text() if stdin else None)
            if out:
                out.write_text(result.stdout)
            if code is None:
                return result.returncode, result.stdout + result.stderr
            assert result.returncode == code, f"{command}:\n{result.stdout}{result.stderr}"
            return result.stdout + result.stderr

        run(ROOT / "scripts/demo-pictures", images, "7")
        run(bin_dir / "flux-model", "tiny", "--out", models, "--seed", "3")

        def recipe():
            if which == "make":
                return run("make", "-f", RECIPES / "shards.mk", "-j", "2", "SHARDS=3")
            if which == "parallel":
                return run("make", "-f", RECIPES / "shards.mk", "parallel", "SHARDS=3")
            return run(RECIPES / "slurm/submit", "3", "2")

        recipe()
        run(bin_dir / "flux-cache-latents", "--images", images, "--resolution", "64x64", "--ae", models / "ae.safetensors", "--out",
            folder / "whole/latents")
        run(bin_dir / "flux-cache-text", "--images", images, "--t5", environment["T5"], "--clip", environment["CLIP"],
            "--t5-tokenizer", environment["T5_TOKENIZER"], "--clip-tokenizer", environment["CLIP_TOKENIZER"], "--out",
            folder / "whole/text")
        for kind in ("latents", "text"):
            assert samples(bin_dir, work / kind) == samples(bin_dir, folder / "whole" / kind), kind
        run(bin_dir / "flux-train", "--latents", work / "latents", "--text", work / "text", "--model", models / "flux.safetensors",
            "--out", folder / "run", "--max-steps", "1")

        before = {path: path.stat().st_mtime_ns for path in work.glob("*/manifest.json")}
        recipe()
        assert before == {path: path.stat().st_mtime_ns for path in work.glob("*/manifest.json")}, "nothing was new, yet something was written"
        caption = sorted(images.glob("*.txt"))[0]
        caption.write_text("a caption that nothing else has\n")
        recipe()
        changed = [path.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time]
        assert "text" in changed and "latents" not in changed, changed
        if which == "parallel":
            failing_part(run, work)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))

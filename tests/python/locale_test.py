"""The locale changes no byte: locale_test.py BIN_DIR

Runs the chain under C and under a de_DE.UTF-8 made for the test (decimal comma, dots between thousands), and compares everything that
is no time and no random name. Exits with 77 where the locale cannot be made.
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMES = {"seconds", "samples_per_second", "seconds_to_first_step", "peak_rss_bytes", "data_wait_seconds"}


def without_times(line):
    measured = ("second", "share", "memory")  # what the machine decides
    return {name: value for name, value in json.loads(line).items()
            if name not in TIMES and not any(word in name for word in measured)}


def main(bin_dir):
    bin_dir = pathlib.Path(bin_dir).resolve()
    with tempfile.TemporaryDirectory(prefix="flux-locale-") as folder:
        folder = pathlib.Path(folder)
        made = shutil.which("localedef") and subprocess.run(
            ["localedef", "-i", "de_DE", "-f", "UTF-8", folder / "de_DE.UTF-8"], capture_output=True).returncode == 0
        if not made:
            print("skipped: localedef cannot make de_DE.UTF-8 here (Debian's package locales has it)")
            return 77
        comma = subprocess.run(["bash", "-c", "printf '%.1f' 1,5"], capture_output=True, text=True,
                               env=os.environ | {"LOCPATH": str(folder), "LC_ALL": "de_DE.UTF-8"}).stdout
        assert comma == "1,5", f"the locale is not in force: {comma}"

        def chain(locale):
            work = folder / f"under {locale}"
            work.mkdir()
            environment = os.environ | {"HOME": str(work), "LOCPATH": str(folder), "LC_ALL": locale, "LANG": locale,
                                        "OMP_WAIT_POLICY": "passive"}

            def run(tool, *arguments):
                result = subprocess.run([bin_dir / tool, *arguments], cwd=work, env=environment, capture_output=True, text=True)
                assert result.returncode == 0, result.stderr
                return result.stdout

            subprocess.run([ROOT / "scripts/demo-pictures", work / "images", "3"], check=True)
            (work / "images" / "sz.txt").write_text("Straße, ÄÖÜ 1.234,5")
            shutil.copyfile(sorted((work / "images").glob("*.png"))[0], work / "images" / "sz.png")
            (work / "data.toml").write_text(
                '[general]\ncaption_dropout_rate = 0.25\n[[datasets]]\nresolution = [96, 64]\nenable_bucket = true\nbucket_reso_steps = 16\n'
                'min_bucket_reso = 32\nvalidation_split = 0.0\n[[datasets.subsets]]\nimage_dir = "images"\ncaption_extension = ".txt"\n')
            run("flux-model", "tiny", "--out", "models", "--seed", "3")
            out = [run("flux-cache-latents", "--dataset", "data.toml", "--ae", "models/ae.safetensors", "--out", "latents", "--json"),
                   run("flux-cache-text", "--dataset", "data.toml", "--t5", "models/t5.safetensors", "--clip", "models/clip.safetensors",
                       "--t5-tokenizer", "models/tokenizers/t5/spiece.model", "--clip-tokenizer", "models/tokenizers/clip", "--out",
                       "text", "--json"),
                   run("flux-train", "--latents", "latents", "--text", "text", "--model", "models/flux.safetensors", "--out", "run",
                       "--max-steps", "3", "--learning-rate", "1.5e-3", "--json")]
            found = {"summaries": [without_times(line) for line in out],
                     "metrics": [without_times(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()],
                     "lora": (work / "run/step-000003/lora.safetensors").read_bytes()}
            for kind in ("latents", "text"):
                manifest = json.loads((work / kind / "manifest.json").read_text())
                found[kind] = [manifest[name] for name in ("parameters", "plan", "plan_digest", "weights", "num_samples")]
                listed = json.loads(run("flux-cache", "inspect", kind, "--json", "--samples"))
                found[kind + " samples"] = sorted((s["key"], s["tensor_xxh3"]) for s in listed["samples"])
                shown = [line for line in run("flux-cache", "stats", kind).splitlines() if "/s" not in line]
                found[kind + " stats"] = shown
            return found

        first, second = chain("C"), chain("de_DE.UTF-8")
        for name, value in first.items():
            assert value == second[name], f"{name} differs between the locales:\n{value}\n{second[name]}"
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))

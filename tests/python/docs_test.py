"""Every command of docs/ and the READMEs does what it says: docs_test.py BIN_DIR FIXTURES ROOT PLUGIN_DIR [PAGE...]

The code blocks of a page are run in order, in one folder in which the names that the docs use are small models and pictures;
each must exit with 0. What cannot be run here is named in NOT_RUN with the reason, and parsed as far as that goes. A block
with an ellipsis is a fragment: its flags must be those of the program's --help, as those of commands inside sentences must.
A command that nothing covers is a failure, and so is a link to a file that is not there.
"""
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib

# What is large becomes small; nothing else of a command changes.
SMALLER = [
    (r"\b(1024x1024|768x768|512x512|2048x2048)\b", "64x64"),
    (r"--max-steps (1000|2000)\b", "--max-steps 2"),
    (r"--max-steps 1500\b", "--max-steps 4"),  # of a run that goes on
    (r"\bstep-00(1000|0500)\b", "step-000002"),
    (r"--(sample|save)-every \d+", r"--\1-every 1"),
    (r"--steps \d+", "--steps 2"),
    (r"--rank \d+", "--rank 2"),
    (r"--save-every 30min", "--save-every 1"),
    (r"--limit \d+", "--limit 2"),
    (r"/mnt/nvme/|/scratch/me/", "elsewhere/"),
    (r"flux-sample (?!.*--size)(?!.*--plan)", "flux-sample --size 64x64 "),
    (r"flux-sample (?!.*--steps)", "flux-sample --steps 2 "),
    (r"tests/golden/models ", "tests/golden/models/ops "),  # the networks have tests of their own, and take minutes
    (r"/data/reference/clip", "tests/golden/models/clip"),
    (r"not-finite-000013", "not-finite-000002"),
]

# What cannot be run here: (pattern, reason, how it is checked instead).
NOT_RUN = [
    (r"(torchrun|srun|mpirun) ", "needs the launcher; tests/python/ranks_test.py and slurm_test.py run ranks", "parse"),
    (r"([A-Z]+=\S+ )*sbatch |pipelines/recipes/slurm/submit", "needs Slurm; tests/python/slurm_test.py runs the recipes", "script"),
    (r".*--device cuda", "needs a GPU", "parse"),
    (r".*--geometry (dev|t5-xxl)", "writes up to 23.8 GB", "parse"),
    (r"([A-Z]+=\S+ )*(cmake|ctest) ", "builds the project", "preset"),
    (r"scripts/(setup|demo|test|package|torture)\b", "sets up, builds or takes long; tests of their own run their parts", "script"),
    (r"export PATH=", "the programs are on PATH here", None),
    (r"tensorboard ", "another project's; peers_tensorboard_test.py reads the files", None),
    (r"(rsync|scp|ssh) ", "needs another machine", None),
    (r"pip install ", "needs a network", None),
    (r"(nvidia-smi|sudo apt-get|apt) ", "needs the machine it is about", None),
]

# Besides the programs here: what may begin a line of a block that is run.
SHELL = (r"printf|echo|export|cp|mkdir|ls|cat|mv|rm|test|cd|nohup|timeout|python3?|pip|make|parallel|cmake|ctest|ninja|"
         r"torchrun|srun|mpirun|sbatch|tensorboard|rsync|scp|ssh|nvidia-smi")
PROGRAM = r"flux-(?:cache-latents|cache-text|cache|check|decode|lora|model|sample|train)"
COMMAND = re.compile(rf"(?:\$ )?(?:[A-Z_0-9]+=\S* )*(?:{PROGRAM}|scripts/\S+|pipelines/\S+|demo/\S+|{SHELL})(?=\s|$)")

# Blocks that hold no command, by how they begin: pictures, listings, formulas, output. Every other block is run.
NO_COMMAND = [r"images +──", r"tools(/ | ->)", r"flux-train: error: ", r"scale = ", r"value = ", r"run/run\.toml ", r"training \d+/\d+ steps"]

# What the reader of a page has made before, from other pages: functions of Stage.
GIVEN = {
    "docs/cache.md": ["caches", "parts", "backup"],
    "docs/caching.md": ["parts"],
    "docs/lora.md": ["loras", "tuned"],
    "docs/memory.md": ["caches"],
    "docs/ranks.md": ["caches"],
    "docs/reference.md": ["caches", "two_parts", "other", "loras", "vocabularies"],
    "docs/sampling.md": ["caches", "run_with_samples"],
    "docs/training.md": ["caches", "step_that_is_not_finite"],
    "docs/howto/slurm.md": ["caches"],
    "docs/howto/moving-caches.md": ["caches", "parts"],
    "docs/howto/resuming.md": ["caches"],
    "docs/howto/low-memory.md": ["caches"],
    "docs/howto/reading-a-cache-from-python.md": ["caches"],
}


def copy_cache(cache, to):
    """Without the locks of readers that other tests have killed, on hosts that this one knows nothing of."""
    shutil.copytree(cache, to, ignore=shutil.ignore_patterns(".*"))


class Stage:
    """A folder in which the names that the docs use are there."""

    def __init__(self, folder, bin_dir, fixtures, root, plugins):
        self.folder, self.fixtures = folder, fixtures
        models = fixtures / "models"
        for name, file in {"ae": "ae", "t5xxl_fp16": "t5", "t5xxl": "t5", "clip_l": "clip", "flux1-dev": "flux"}.items():
            (folder / f"{name}.safetensors").symlink_to(models / f"{file}.safetensors")
        shutil.copytree(fixtures / "images", folder / "photos")
        (folder / "tokenizer").symlink_to(models / "tokenizers/clip")
        (folder / "tokenizer_2").symlink_to(models / "tokenizers/t5")
        for name in ("presets", "scripts", "pipelines", "tests"):
            (folder / name).symlink_to(root / name)
        shutil.copy(fixtures / "prompts.txt", folder)
        (folder / "data.toml").write_text('[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "photos"\ncaption_extension = ".txt"\n')
        modules = folder / "modules"
        modules.mkdir()
        (modules / "hdf5plugin.py").write_text("# HDF5 finds the zstd filter in HDF5_PLUGIN_PATH here\n")
        self.environment = os.environ | {
            "PATH": f"{bin_dir}:{os.environ['PATH']}", "HOME": str(fixtures / "home"), "OMP_WAIT_POLICY": "passive", "LC_ALL": "C.UTF-8",
            "HDF5_PLUGIN_PATH": str(plugins), "PYTHONPATH": str(modules), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, command, timeout=120):
        return subprocess.run(["bash", "-o", "pipefail", "-ec", command], cwd=self.folder, env=self.environment, timeout=timeout,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)

    def must(self, command, code=0):
        result = self.run(command)
        assert result.returncode == code, f"{command}\n{result.stderr}"

    def caches(self):
        for name in ("latents", "text", "prompts"):
            copy_cache(self.fixtures / name, self.folder / "cache" / name)

    def parts(self, names=("part.0", "part.1", "part.2")):
        for i, name in enumerate(names):
            self.must(f"flux-cache-latents --images photos --resolution 64x64 --ae ae.safetensors --shard {i}/{len(names)} --out {name}")

    def two_parts(self):
        self.parts(("part-0", "part-1"))

    def backup(self):
        copy_cache(self.fixtures / "latents", self.folder / "backup" / "latents")

    def other(self):
        copy_cache(self.fixtures / "latents", self.folder / "other" / "latents")

    def vocabularies(self):
        (self.folder / "clip").symlink_to(self.folder / "tokenizer")
        (self.folder / "spiece.model").symlink_to(self.folder / "tokenizer_2/spiece.model")

    def loras(self):
        for name in ("lora", "style", "face"):
            shutil.copy(self.fixtures / "lora.safetensors", self.folder / f"{name}.safetensors")

    def tuned(self):
        """A model that full fine-tuning made, in the folder of a run."""
        self.must(f"flux-train --latents {self.fixtures}/latents --text {self.fixtures}/text --model flux1-dev.safetensors "
                  "--method full --max-steps 2 --out tuned && mkdir -p run/step-000002 && cp tuned/step-*/model.safetensors run/step-000002")

    def run_with_samples(self):
        self.must("flux-train --latents cache/latents --text cache/text --model flux1-dev.safetensors --max-steps 2 --out run "
                  "--sample-every 1 --sample-steps 1 --prompts cache/prompts")

    def step_that_is_not_finite(self):
        self.must("flux-train --latents cache/latents --text cache/text --model flux1-dev.safetensors --max-steps 3 --out run "
                  "--learning-rate 100 --alpha 1e6", 3)
        found = sorted(self.folder.glob("run/not-finite-*.safetensors"))[0]
        wanted = self.folder / "run/not-finite-000002.safetensors"
        if found != wanted:
            found.rename(wanted)


def blocks(text):
    """(line number, lines) of each code block, fenced or indented by four spaces after an empty line; the indent is cut off."""
    lines, i = text.split("\n"), 0
    while i < len(lines):
        fence = re.match(r"\s*```(\w*)", lines[i])
        if fence:
            end = i + 1
            while not lines[end].strip().startswith("```"):
                end += 1
            yield i + 2, lines[i + 1:end], fence[1]
            i = end + 1
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            end = i
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            while not lines[end - 1].strip():
                end -= 1
            indent = min(len(line) - len(line.lstrip()) for line in lines[i:end] if line.strip())
            yield i + 1, [line[indent:] for line in lines[i:end]], ""
            i = end
        else:
            i += 1


def commands(lines):
    """(offset, command) with continued lines and here-documents joined; of a block with `$ ` only the lines that have it."""
    transcript = any(line.startswith("$ ") for line in lines)
    i = 0
    while i < len(lines):
        start, command = i, lines[i]
        i += 1
        while command.endswith("\\"):
            command = command[:-1] + lines[i].strip()
            i += 1
        end = re.search(r"<<\s*'?(\w+)'?", command)
        if end:
            while lines[i - 1] != end[1]:
                command += "\n" + lines[i]
                i += 1
        if transcript:
            if not command.startswith("$ "):
                continue
            command = command[2:]
        if command.strip() and not command.startswith("#"):
            yield start, command


class Flags:
    """The flags of each program and verb, as its --help says."""

    def __init__(self, bin_dir):
        self.bin_dir, self.known = bin_dir, {}

    def help(self, *words):
        if words not in self.known:
            text = subprocess.run([self.bin_dir / words[0], *words[1:], "--help"], check=True, capture_output=True, text=True).stdout
            self.known[words] = set(re.findall(r"--[a-z0-9][a-z0-9-]*", text))
        return self.known[words]

    def unknown(self, command):
        """Flags in `command` that the programs in it do not have."""
        wrong = []
        for part in re.split(r"&&|\|\||[|;&]", re.sub(r"#.*", "", command)):
            words = part.split()
            at = next((i for i, word in enumerate(words) if re.fullmatch(PROGRAM, word)), None)
            if at is None:
                continue
            program, rest = words[at], words[at + 1:]
            verbs = [program]
            if program in ("flux-cache", "flux-lora", "flux-model") and rest and re.fullmatch(r"[a-z]+", rest[0]):
                verbs.append(rest[0])
            have = self.help(*verbs) | {"--help", "--version"}
            given = re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", " ".join(rest))
            wrong += [f"{' '.join(verbs)} has no {flag}" for flag in given if flag not in have]
        return wrong


class Pages:
    def __init__(self, bin_dir, fixtures, root, plugins):
        self.bin_dir, self.fixtures, self.root, self.plugins = bin_dir, fixtures, root, plugins
        self.flags, self.failures, self.ran, self.parsed = Flags(bin_dir), [], 0, 0

    def fail(self, where, why):
        print(f"FAIL {where}: {why}", flush=True)
        self.failures.append(where)

    def check(self, where, stage, command, reason, how):
        """A command that is not run: what can be said of it all the same."""
        self.parsed += 1
        for wrong in self.flags.unknown(command):
            self.fail(where, wrong)
        if how == "parse" and "..." not in command:
            part = re.search(rf"({PROGRAM}) [^&|;#]*", command)
            if part and "--print-config" in self.flags.help(part[1]):
                result = stage.run(part[0].rstrip() + " --print-config")
                if result.returncode:
                    self.fail(where, f"{command}\n{result.stderr}")
        elif how == "preset":
            presets = json.loads((self.root / "CMakePresets.json").read_text())
            names = {preset["name"] for kind in ("configurePresets", "buildPresets", "testPresets") for preset in presets.get(kind, [])}
            for name in re.findall(r"--preset (\S+)", command):
                if name not in names:
                    self.fail(where, f"CMakePresets.json has no preset {name}")
        elif how == "script":
            for path in re.findall(r"(?:scripts|pipelines|slurm)/[\w./-]+", command):
                file = self.root / (path if not path.startswith("slurm/") else f"pipelines/recipes/{path}")
                if not file.is_file():
                    self.fail(where, f"no file {path}")
                elif file.read_text().startswith("#!") and "bash" in file.read_text().split("\n")[0]:
                    if stage.run(f"bash -n {shlex.quote(str(file))}").returncode:
                        self.fail(where, f"{path} does not parse")

    def command(self, where, stage, command):
        small = command
        for pattern, replacement in SMALLER:
            small = re.sub(pattern, replacement, small)
        for pattern, reason, how in NOT_RUN:
            if re.match(pattern, small):
                return self.check(where, stage, small, reason, how)
        if "..." in small:  # a fragment
            self.parsed += 1
            if not re.search(PROGRAM, small):
                self.fail(where, f"a fragment of no program: {command}")
            for wrong in self.flags.unknown(small):
                self.fail(where, wrong)
            return None
        if not shutil.which("jq"):  # the output is JSON all the same
            small = re.sub(r"\bjq -r '[^']*'", "python3 -m json.tool", small)
        if not shutil.which("parallel"):  # its list is one of commands
            small = re.sub(r"^parallel .*<", "bash -e ", small)
        if "--tuned run/" in small and not list(stage.folder.glob("run/*/model.safetensors")):
            stage.tuned()
        self.ran += 1
        result = stage.run(small)
        if result.returncode:
            self.fail(where, f"exit {result.returncode}: {command}\n  as: {small}\n{result.stderr[-1500:]}")
        return None

    def job(self, where, stage, script):
        """A job script, with stand-ins for what Slurm has."""
        for pattern, replacement in SMALLER:
            script = re.sub(pattern, replacement, script)
        programs = stage.folder / "stand-ins"
        programs.mkdir(exist_ok=True)
        for name in ("srun", "scontrol"):
            (programs / name).write_text('#!/bin/bash\nexec "$@"\n')
            (programs / name).chmod(0o755)
        (stage.folder / "job").write_text(script)
        self.ran += 1
        result = stage.run('PATH="$PWD/stand-ins:$PATH" bash ./job')
        if result.returncode or not re.search(PROGRAM, script):
            self.fail(where, f"exit {result.returncode}: a job script\n{result.stderr[-1500:]}")

    def page(self, path):
        name = str(path.relative_to(self.root))
        text = path.read_text()
        with tempfile.TemporaryDirectory(prefix="flux-docs-") as folder:
            stage = Stage(pathlib.Path(folder), self.bin_dir, self.fixtures, self.root, self.plugins)
            begun = False
            for line, lines, kind in blocks(text):
                where = f"{name}:{line}"
                is_python = kind == "python" or re.match(r"(import|from) \w", lines[0])
                is_command = not is_python and any(COMMAND.match(text_line) for text_line in lines)
                if (is_python or is_command) and not begun:
                    begun = True
                    for given in GIVEN.get(name, []):
                        getattr(stage, given)()
                if is_python:
                    (stage.folder / "block.py").write_text("\n".join(lines))
                    self.command(where, stage, f"{shlex.quote(sys.executable)} block.py")
                elif lines[0].startswith("#!/bin/bash"):
                    self.job(where, stage, "\n".join(lines))
                elif is_command:
                    for offset, command in commands(lines):
                        if not COMMAND.match(command):
                            self.fail(f"{name}:{line + offset}", f"no rule covers this: {command}")
                        else:
                            self.command(f"{name}:{line + offset}", stage, command)
                elif kind == "toml":
                    tomllib.loads("\n".join(lines))
                elif not any(re.match(pattern, lines[0]) for pattern in NO_COMMAND):
                    self.fail(where, f"no rule covers this block: {lines[0]}")
        prose = "\n".join(self.prose(text))
        for span in re.findall(r"`([^`]+)`", prose):
            span = " ".join(span.split())
            if re.match(rf"{PROGRAM} ", span):
                self.parsed += 1
                for wrong in self.flags.unknown(span):
                    self.fail(name, f"`{span}`: {wrong}")
            script = re.match(r"(?:python3 )?((?:scripts|tests|demo|pipelines)/[\w./-]+)", span)
            if script and not re.search("[A-Z]$", script[1]) and not (self.root / script[1]).exists():  # vN is any
                self.fail(name, f"`{span}`: no such file")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
            if not (path.parent / target).exists():
                self.fail(name, f"a link to {target}, which is not there")

    @staticmethod
    def prose(text):
        code = set()
        for line, lines, _ in blocks(text):
            code.update(range(line - 1, line - 1 + len(lines)))
        for i, line in enumerate(text.split("\n")):
            if i not in code and not line.strip().startswith("```"):
                yield line


def pages_without_link(root, pages):
    """Pages of docs that docs/README.md does not name."""
    index = (root / "docs/README.md").read_text()
    linked = {(root / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", index)}
    return [page for page in pages if page.name != "README.md" and page.resolve() not in linked]


def main(bin_dir, fixtures, root, plugins, *only):
    bin_dir, fixtures, root = (pathlib.Path(path).resolve() for path in (bin_dir, fixtures, root))
    plugins = pathlib.Path(plugins).resolve()
    checked = Pages(bin_dir, fixtures, root, plugins)
    docs = sorted((root / "docs").rglob("*.md"))
    pages = [*(root / name for name in ("README.md", "CONTRIBUTING.md", "demo/README.md", "pipelines/recipes/README.md")), *docs]
    for page in pages:
        if not only or str(page.relative_to(root)) in only:
            start = time.monotonic()
            checked.page(page)
            print(f"{page.relative_to(root)}: {time.monotonic() - start:.1f} s", flush=True)
    if not only:
        for page in pages_without_link(root, docs):
            checked.fail(str(page.relative_to(root)), "docs/README.md does not link it")
        for name in GIVEN:
            if not (root / name).exists():
                checked.fail(name, "a page that is not there any more")
        assert checked.ran >= 60, f"only {checked.ran} commands found"
    print(f"{checked.ran} commands run, {checked.parsed} parsed, {len(checked.failures)} failures")
    return 1 if checked.failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

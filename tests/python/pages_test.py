"""What the programs write about themselves for others: pages_test.py BIN_DIR SOURCE_DIR [TOOL...]

Man pages: man (groff) and, where it is installed, mandoc find nothing to warn of, lexgrog finds name and purpose, and each option of --help is
there. Completion: an interactive bash that has read the script completes programs' options, the words of a choice, verbs and files.
"""
import os
import pathlib
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time

BIN = pathlib.Path(sys.argv[1]).resolve()
TOOLS = sys.argv[3:] or sorted(path.parent.name for path in pathlib.Path(sys.argv[2]).glob("tools/*/CMakeLists.txt"))


def said(tool, *arguments):
    return subprocess.run([BIN / tool, *arguments], check=True, capture_output=True, text=True).stdout


def options(tool):
    help_text = said(tool, "--help")
    verbs = re.search(r"\nverbs:\n((?:  .*\n)+)", help_text)
    verbs = [line.split()[0] for line in verbs.group(1).splitlines()] if verbs else []
    texts = [said(tool, verb, "--help") for verb in verbs] or [help_text]
    return verbs, {name for text in texts for name in re.findall(r"^  --([a-z0-9-]+)", text, re.M)}


def check_man(tool, folder):
    page = folder / f"{tool}.1"
    page.write_text(said(tool, "--help=man"))
    shown = subprocess.run(["man", "--warnings", "--local-file", page], capture_output=True, text=True, check=True,
                           env={**os.environ, "MANPAGER": "cat", "PAGER": "cat", "MANWIDTH": "200", "LC_ALL": "C.UTF-8"})
    assert not shown.stderr, f"{tool}: man warns: {shown.stderr}"
    text = re.sub(r".\x08|\x1b\[[0-9;]*m", "", shown.stdout).replace("\u2010", "-").replace("\u2212", "-")
    missing = {name for name in options(tool)[1] if f"--{name}" not in text}
    assert not missing, f"{tool}: not in its man page: {missing}"
    if shutil.which("lexgrog"):
        found = subprocess.run(["lexgrog", page], capture_output=True, text=True).stdout
        assert f'"{tool} - ' in found, f"{tool}: lexgrog says {found}"
    if shutil.which("mandoc"):
        lint = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", page], capture_output=True, text=True)
        assert lint.returncode == 0, f"{tool}: mandoc: {lint.stdout[:800]}"


class Bash:
    """An interactive bash in which scripts were read, on a terminal."""

    def __init__(self, scripts, folder):
        self.child, self.terminal = pty.fork()
        if self.child == 0:
            os.chdir(folder)
            os.environ.update({"TERM": "dumb", "LC_ALL": "C", "HOME": str(folder)})
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
        self.send("PS1='> '; bind 'set bell-style none'; bind 'set completion-query-items 0'; bind 'set page-completions off'\n")
        for script in scripts:
            self.send(f"source {script}\n")
        self.complete("")

    def send(self, text):
        os.write(self.terminal, text.encode())

    def complete(self, line, tabs=1):
        """The line as it is after a tab, and all that was shown: after two tabs, what there is to choose from."""
        # at its start goes a command that prints it, quoted
        self.send("\x15" + line + "\t" * tabs + "\x01printf '<%s>\\n' '\x05'\n")
        text, end = "", time.monotonic() + 30
        while not (found := re.search(r"^<(.*)>\r?$", text, re.M)):
            assert time.monotonic() < end, f"bash did not answer to {line!r}: {text!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                text += os.read(self.terminal, 65536).decode(errors="replace")
        return found.group(1).rstrip(), text

    def end(self):
        self.send("exit\n")
        os.waitpid(self.child, 0)
        os.close(self.terminal)


def check_bash(folder):
    scripts = []
    for tool in TOOLS:
        scripts.append(folder / f"{tool}.bash")
        scripts[-1].write_text(said(tool, "--help=bash"))
        subprocess.run(["bash", "-n", scripts[-1]], check=True)
    (folder / "only-file.safetensors").touch()
    bash = Bash(scripts, folder)
    try:
        for tool in TOOLS:  # each option of each program, from all but its last letter if no longer one starts so
            verbs, names = options(tool)
            if verbs:
                assert bash.complete(f"{tool} {verbs[0][:-1]}")[0] == f"{tool} {verbs[0]}", tool
            else:
                words = bash.complete(f"{tool} --", tabs=2)[1]
                assert not [name for name in names if f"--{name}" not in words], (tool, words)
        for line, became in (("flux-train --meth", "flux-train --method"), ("flux-train --method lo", "flux-train --method lora"),
                             ("flux-train --method=f", "flux-train --method=full"), ("flux-train --plan=j", "flux-train --plan=json"),
                             ("flux-train --resume --meth", "flux-train --resume --method"),
                             ("flux-train --model only", "flux-train --model only-file.safetensors"),
                             ("flux-train --rank only", "flux-train --rank only"),
                             ("flux-train --import-sd-scripts --meth only", "flux-train --import-sd-scripts --meth only-file.safetensors"),
                             ("flux-cache ver", "flux-cache verify"), ("flux-cache verify --de", "flux-cache verify --deep"),
                             ("flux-cache verify only", "flux-cache verify only-file.safetensors"),
                             ("flux-cache inspect --de", "flux-cache inspect --de")):
            found, _ = bash.complete(line)
            assert found == became, f"{line!r} became {found!r}"
    finally:
        bash.end()


def main():
    with tempfile.TemporaryDirectory(prefix="flux-pages-") as name:
        folder = pathlib.Path(name)
        if shutil.which("man"):
            for tool in TOOLS:
                check_man(tool, folder)
        check_bash(folder)
    print(f"pages of {len(TOOLS)} programs" + ("" if shutil.which("man") else ", man pages not: no man is installed"))
    return 0 if shutil.which("man") else 77


if __name__ == "__main__":
    sys.exit(main())

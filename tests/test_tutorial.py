"""The tutorial, line by line as a newcomer types it: one shell, an empty folder; what comes back is what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = (Path("docs/tutorial.md"), Path("docs/zh/tutorial.md"))
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINE_S = 90


def steps(path: Path) -> list[tuple[str, str]]:
    """(command, expected output) in order; a line after `> ` goes on with the command."""
    found: list[tuple[str, str]] = []
    for block in BLOCK.findall(path.read_text()):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], ""))
            elif line.startswith("> ") or line == ">":
                found[-1] = (f"{found[-1][0]}\n{line[2:]}", found[-1][1])
            else:
                found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
    return found


def matches(expected: str, got: str) -> bool:
    """`...` stands for anything; blanks at the ends of lines do not count."""
    parts = [
        re.escape(part) for part in "\n".join(line.rstrip() for line in expected.splitlines()).split("...")
    ]
    told = "\n".join(line.rstrip() for line in got.splitlines())
    return re.fullmatch(".*".join(parts), told.strip("\n"), re.DOTALL) is not None


class Shell:
    """One bash, as a person has it; after each command it prints a mark with the exit code."""

    def __init__(self, folder: Path) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "XDG_CACHE_HOME": str(folder / ".cache"), "COLUMNS": "200"}
        for name in ("QIPAN_STORE", "QIPAN_SITE", "QIPAN_DATABASE"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            ["timeout", "240", "bash", "--norc"], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

        self.run("set -m")  # jobs, as a terminal has them

    def run(self, command: str) -> tuple[str, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{command}\necho; echo @@@ $?\n")
        self.process.stdin.flush()
        lines: list[str] = []
        for line in self.process.stdout:
            if line.startswith("@@@ "):
                return "".join(line for line in lines if not re.match(r"\[\d+\]", line)).rstrip(
                    "\n"
                ) + "\n", int(line[4:])
            lines.append(line)
        raise AssertionError(f"the shell ended at: {command}\n{''.join(lines)}")


@pytest.mark.slow
def test_every_line_of_the_tutorial_does_what_it_says(tmp_path):
    """Of the English one; the test below holds the other to the same lines."""
    shell = Shell(tmp_path)
    seen = steps(TUTORIALS[0])
    assert len(seen) >= 20
    try:
        for command, expected in seen:
            got, code = shell.run(command)
            assert code == 0, f"$ {command}\n{got}exit code {code}"
            assert matches(expected, got) or (not expected and got == "\n"), (
                f"$ {command}\nexpected:\n{expected}\ngot:\n{got}"
            )
    finally:
        shell.run("kill -INT $(jobs -p) 2>/dev/null; wait")
        shell.process.kill()
        shell.process.wait()


def test_both_languages_type_and_get_the_same():
    english, chinese = map(steps, TUTORIALS)
    assert english == chinese


def test_a_wildcard_stands_for_anything_and_nothing_else_does():
    assert matches("a ... c\n", "a b c\n")
    assert matches("...\n  x\n", "head\n  x\n")
    assert not matches("a c\n", "a b c\n")
    assert not matches("a...\n", "b\n")


def test_the_site_of_the_docs_is_built_without_the_network(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")], capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    own = re.compile(r"Doc file '(index|tutorial|zh/tutorial|howto|explanation|store|api)\.md'")
    assert not own.search(done.stderr), done.stderr
    for page in ("index.html", "tutorial/index.html", "zh/tutorial/index.html", "store/index.html"):
        text = (tmp_path / "site" / page).read_text()
        assert not re.search(r'(?:src|href)="https?://(?!squidfunk|www\.mkdocs)', text), page

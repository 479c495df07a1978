"""Other people's job files, run with each program replaced by one that notes its arguments, environment and devices, and held
against what the manual of the tool says that its jobs see (`import_runs.yaml`)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qipan.cli.tables import print_directives
from qipan.workload import foreach
from qipan.workload.imports import parse_job, read_job

HERE = Path(__file__).parent
TABLE = yaml.safe_load((HERE / "import_runs.yaml").read_text())
PROGRAMS = (
    "python",
    "python3",
    "torchrun",
    "accelerate",
    "deepspeed",
    "perl",
    "nvidia-smi",
    "pip",
    "msrun",
    "module",
    "work.sh",
)
STUB = """#!{python} -S
import json, os, sys
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps([[os.path.basename(sys.argv[0]), *sys.argv[1:]], dict(os.environ)]) + "\\n")
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    for name in PROGRAMS:
        (folder / name).write_text(STUB.format(python=sys.executable))
        (folder / name).chmod(0o755)
    return folder


def calls(path, programs, folder):
    """(arguments, environment) of each program that the file's task starts, under what an engine sets."""
    task, _ = read_job(path)
    run = foreach.script(task.run, task.foreach) if task.foreach else task.run
    devices = ",".join(str(number) for number in range(task.devices.min))
    env = {
        "PATH": f"{programs}:{os.environ['PATH']}", "STUB_LOG": str(folder / "log"), "QIPAN_TASK_ID": "t-1", "QIPAN_ATTEMPT": "1",
        "QIPAN_NODE_RANK": "0", "QIPAN_NUM_NODES": "1", "QIPAN_DEVICES": devices, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
        "QIPAN_CHECKPOINT_DIR": str(folder), "QIPAN_EVENTS": str(folder / "events"), **dict(task.env),
    }  # fmt: skip
    if not (folder / "work.sh").exists():
        (folder / "work.sh").symlink_to(programs / "work.sh")
    subprocess.run(["bash", "-c", run], env=env, cwd=folder, check=True, capture_output=True, timeout=60)
    log = folder / "log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_a_script_of_several_lines_keeps_its_line_of_the_table(capsys):
    _, directives = parse_job("name: a\nrun: |\n  first\n  second\nresources: {accelerators: A100:1}\n")
    print_directives(directives)
    assert any("first second" in line and " used " in line for line in capsys.readouterr().out.splitlines())


def test_the_table_has_thirty_files_of_the_four_tools():
    tools = [str(HERE / "imports" / name) for name in TABLE["files"]]
    assert len(tools) >= 30
    assert all(Path(tool).exists() for tool in tools)


@pytest.mark.parametrize("name", TABLE["files"])
def test_programs_get_the_arguments_and_variables_that_their_tool_gives(name, programs, tmp_path):
    wanted = TABLE["files"][name]
    made = calls(HERE / "imports" / name, programs, tmp_path)
    assert sorted(argv for argv, _ in made) == sorted(wanted["argv"])
    for variable, value in {**TABLE["tools"][wanted["tool"]], **wanted.get("env", {})}.items():
        seen = [env.get(variable) for _, env in made]
        values = value if isinstance(value, list) else [value] * len(seen)
        assert sorted(seen, key=str) == sorted(
            (None if one is None else str(one) for one in values), key=str
        ), variable


def test_slurms_variables_are_those_of_its_manual():
    """Every SLURM_ variable that an imported script sets stands in sbatch's OUTPUT ENVIRONMENT VARIABLES."""
    done = subprocess.run(
        ["man", "-P", "cat", "sbatch"], capture_output=True, text=True, env={**os.environ, "MANWIDTH": "200"}
    )
    if "OUTPUT ENVIRONMENT VARIABLES" not in done.stdout:
        pytest.skip("Slurm's manual pages are not installed")
    manual = done.stdout.split("OUTPUT ENVIRONMENT VARIABLES")[1]
    known = set(re.findall(r"SLURM_[A-Z_]+", manual))
    for path in sorted((HERE / "imports").glob("*.sbatch")):
        made = set(re.findall(r"\b(SLURM_[A-Z_]+)=", read_job(path)[0].run.partition("\nsrun() {")[0]))
        assert made <= known, path.name


def test_an_item_that_was_interrupted_is_run_again_and_those_done_are_not(tmp_path):
    env = {
        "PATH": os.environ["PATH"],
        "QIPAN_CHECKPOINT_DIR": str(tmp_path),
        "QIPAN_EVENTS": str(tmp_path / "events"),
    }
    run = 'echo "$QIPAN_ITEM" >> "$QIPAN_CHECKPOINT_DIR/../ran"; [ "$QIPAN_ITEM" != b ] || [ -e "$QIPAN_CHECKPOINT_DIR/../again" ]'
    script = foreach.script(run, ("a", "b", "it's"))
    assert subprocess.run(["bash", "-c", script], env=env).returncode == 1
    (tmp_path / "again").touch()
    assert subprocess.run(["bash", "-c", script], env=env).returncode == 0
    assert (tmp_path / "ran").read_text().split("\n")[:-1] == ["a", "b", "b", "it's"]
    said = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert said[-2:] == [{"event": "progress", "step": 3, "steps": 3}, {"event": "checkpoint", "step": 3}]

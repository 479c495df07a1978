"""Other people's job files: every directive has a fate, written at the end of each file in tests/imports/."""

import os
import random
import re
import subprocess
from pathlib import Path

import pytest

from qipan.errors import InvalidInput
from qipan.workload.imports import parse_job, read_job
from qipan.workload.parse import KEYS

FILES = sorted(Path(__file__).parent.joinpath("imports").iterdir())


def expected(path):
    return dict(re.findall(r"^# (expect|used|approximated|ignored):? (.+)$", path.read_text(), re.MULTILINE))


def last_key(name):
    quoted = re.search(r"(?:^|\.)((?:nvidia|amd|huawei)\.com/[\w.]+|ray\.io/\w+)$", name)
    return quoted[1] if quoted else name.split(".")[-1].split("[")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_directive_has_the_fate_that_its_file_states(path):
    _, directives = read_job(path)
    for fate in ("used", "approximated", "ignored"):
        found = {last_key(row.name) for row in directives if row.fate == fate}
        assert found == set(expected(path).get(fate, "").split()), fate
    assert all(row.why and row.line > 0 for row in directives)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_task_asks_for_what_the_file_asked_for(path):
    task, _ = read_job(path)
    found = {"devices": f"{task.devices.min}-{task.devices.max}"}
    if task.limits.time_limit_s:
        found["time"] = f"{task.limits.time_limit_s:.0f}"
    for key, values in (
        ("chips", task.limits.chips),
        ("vendors", task.limits.vendors),
        ("env", [name for name, _ in task.env]),
    ):
        if values:
            found[key] = ",".join(values)
    if task.foreach:
        found["foreach"] = str(len(task.foreach))
    assert found == dict(pair.split("=") for pair in expected(path)["expect"].split())
    assert task.elastic == (task.devices.min < task.devices.max)


def test_there_are_thirty_files():
    assert len(FILES) >= 30


def ran(task, **extra):
    """What the task's shell line prints under the variables that an engine sets."""
    env = {"PATH": os.environ["PATH"], "QIPAN_TASK_ID": "t-1", "QIPAN_ATTEMPT": "2", "QIPAN_NODE_RANK": "0",
           "MASTER_ADDR": "10.0.0.1", **dict(task.env), **extra}  # fmt: skip
    return subprocess.run(
        ["bash", "-c", task.run], capture_output=True, text=True, env=env, check=True
    ).stdout.splitlines()


def test_a_batch_script_sees_slurms_variables_and_srun_starts_every_rank():
    text = """#!/bin/bash
#SBATCH --job-name=x --ntasks=3 --gpus=3
echo $SLURM_JOB_ID $SLURM_JOB_NAME $SLURM_NTASKS $SLURM_RESTART_COUNT
srun --cpus-per-task 2 bash -c 'echo rank $SLURM_PROCID'
"""
    first, *ranks = ran(parse_job(text)[0])
    assert first == "t-1 x 3 1"
    assert sorted(ranks) == ["rank 0", "rank 1", "rank 2"]


def test_a_batch_script_for_two_nodes_asks_for_two_and_srun_starts_those_of_its_own():
    text = "#!/bin/bash\n#SBATCH -N 2 --ntasks-per-node=2 --gres=gpu:2\nsrun bash -c 'echo rank $SLURM_PROCID local $SLURM_LOCALID'\n"
    task, _ = parse_job(text)
    assert (task.devices.min, task.devices.per_node) == (4, 2)
    said = ran(task, QIPAN_NUM_NODES="2", QIPAN_NODE_RANK="1")
    assert sorted(said) == ["rank 2 local 0", "rank 3 local 1"]


def test_a_jobset_of_eight_pods_asks_for_eight_nodes():
    task, _ = read_job(Path(__file__).parent / "imports/jobset.yaml")
    assert (task.devices.min, task.devices.per_node) == (64, 8)


def test_a_rank_that_fails_fails_the_script():
    task, _ = parse_job("#!/bin/bash\n#SBATCH -n 2\nsrun bash -c 'exit $SLURM_PROCID'\n")
    with pytest.raises(subprocess.CalledProcessError):
        ran(task)


def test_a_python_batch_script_runs_under_its_own_interpreter():
    assert ran(read_job(Path(__file__).parent / "imports/python.sbatch")[0]) == ["sbatch"]


def test_arguments_of_a_pod_keep_their_words_and_see_its_variables():
    text = """
apiVersion: batch/v1
kind: Job
metadata: {name: a}
spec: {template: {spec: {containers: [{name: a, command: [printf, "%s\\n", "x y", "run-$(RUN)", "$RUN"], env: [{name: RUN, value: first one}]}]}}}
"""
    assert ran(parse_job(text)[0]) == ["x y", "run-first one", "$RUN"]


def test_skypilot_and_dstack_tasks_see_their_tools_variables():
    sky, _ = parse_job(
        "num_nodes: 2\nsetup: echo set up\nrun: echo $SKYPILOT_NUM_NODES $SKYPILOT_NODE_RANK $SKYPILOT_NODE_IPS\n"
    )
    assert ran(sky) == ["set up", "2 0 10.0.0.1"]
    dstack, _ = parse_job(
        "type: task\nname: d\ncommands: [echo $DSTACK_RUN_NAME $DSTACK_GPUS_NUM]\nresources: {gpu: 4}\n"
    )
    assert ran(dstack) == ["d 4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "is no job file that Qipan reads"),
        ("#!/bin/bash\n#SBATCH --gres=gpu:many:x\n", "is not devices such as"),
        ("#!/bin/bash\n#SBATCH --time=soon\n", "j:2:1: time: 'soon' is not a time"),
        ("#!/bin/bash\n#SBATCH --array=1-x\n", "is not indices"),
        ("#!/bin/bash\n#SBATCH --array=0-999999\n", "more than 10000"),
        ("#!/bin/bash\n#SBATCH 'open\n", "cannot be read"),
        ("#!/bin/bash\n#SBATCH stray\n", "is no flag of sbatch"),
        ("#!/bin/bash\n#SBATCH --nodes=few\n", "is not a number of nodes"),
        ("apiVersion: batch/v1\nkind: Job\nspec: {template: {spec: {}}}\n", "has no containers"),
        ("apiVersion: batch/v1\nkind: Job\nspec: {parallelism: -1}\n", "is not a whole number"),
        ("apiVersion: ray.io/v1\nkind: RayJob\nspec: {}\n", "needs its command"),
        ("resources: {accelerators: 'H100:0'}\nrun: x\n", "is not devices such as H100:8"),
        ("services: {a: {command: x}, b: {command: y}}\n", "2 services"),
        ("services: {a: {image: x}}\n", "has no command"),
        ("type: service\nname: a\n", "Qipan reads type: task"),
        ("run: &a x\nsetup: *a\n", "aliases"),
        ("run: [\n", "is not YAML"),
        ("", "is empty"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_gets_one_clear_message(text, message):
    with pytest.raises(InvalidInput) as error:
        parse_job(text, "j")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_task_file_of_qipan_is_not_taken_for_another_tools():
    assert "run" in KEYS
    with pytest.raises(InvalidInput, match="is no job file"):
        parse_job("kind: train\nname: a\nrun: x\n")


def test_a_damaged_file_is_read_or_refused_and_nothing_else():
    rng = random.Random(1)
    damage = [
        "",
        "x",
        "-1",
        "{}",
        "[]",
        "[[a]]",
        "{a: {b: c}}",
        "null",
        "9" * 25,
        "'",
        "~",
        ": ",
        "²",
        "1e9",
        "$(",
    ]
    refused = 0
    for _ in range(300):
        words = re.split(r"(\s+|[:,\[\]{}=])", rng.choice(FILES).read_text())
        words[rng.randrange(len(words))] = rng.choice(damage)
        try:
            parse_job("".join(words), "j")
        except InvalidInput:
            refused += 1
    assert 0 < refused < 300

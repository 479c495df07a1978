"""Scripts moved between chips: verdict and line of each construct, and the losses of what was rewritten."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from portable_scripts import BLOCKED, TAIL, TRAINED
from qipan.catalogue import load_catalogue
from qipan.errors import InvalidInput
from qipan.portability import check_script
from qipan.portability.ported import ported_task, read_task
from qipan.portability.trial import compare, run_steps

STACKS = load_catalogue().stacks
MARK = re.compile(r"# -> (\w+)$", re.M)
#: runs each script of a JSON list in one process, and prints what it noted
DRIVER = """
import json, sys
from pathlib import Path
import torch
from qipan.portability.harness import run_script
shim = sys.argv[1] == "1"
for path in sys.argv[2:]:
    torch.set_default_device("cpu")
    found = run_script(Path(path), [], 3, shim) if not shim else None
    if shim:
        import qipan.portability.harness as h
        mode = h.cuda_is_cpu
        once = globals().setdefault("once", mode())
        h.cuda_is_cpu = lambda: once
        found = run_script(Path(path), [], 3, True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    print("QIPAN " + json.dumps(found), flush=True)
"""


def judged(text: str, target: str = "huawei"):
    """line -> the verdict that weighs most there."""
    weigh = ("runs", "rewritten", "blocks")
    found: dict[int, str] = {}
    for finding in check_script(text, STACKS[target]).findings:
        found[finding.line] = max(found.get(finding.line, "runs"), finding.verdict, key=weigh.index)
    return found


def marked(text: str):
    return {
        number: mark[1] for number, line in enumerate(text.splitlines(), 1) if (mark := MARK.search(line))
    }


@pytest.mark.parametrize("name", [*TRAINED, *BLOCKED])
def test_each_construct_has_its_verdict_at_its_line(name):
    text = TRAINED.get(name) or BLOCKED[name]
    assert judged(text) == marked(text)


def test_there_are_thirty_and_more():
    assert len(TRAINED) >= 40
    assert len(BLOCKED) >= 15


@pytest.mark.parametrize("name", [*TRAINED, *BLOCKED])
def test_on_the_chips_it_was_written_for_everything_runs(name):
    checked = check_script(TRAINED.get(name) or BLOCKED[name], STACKS["nvidia"])
    assert checked.verdict == "runs"
    assert checked.rewritten == checked.original


@pytest.mark.slow
def test_rewritten_scripts_have_the_losses_of_their_originals(tmp_path):
    names = list(TRAINED)
    for name in names:
        text = TRAINED[name] + TAIL
        (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / f"{name}_new.py").write_text(check_script(text, STACKS["huawei"]).rewritten)
    originals = losses([tmp_path / f"{name}.py" for name in names], shim=True)
    rewritten = losses([tmp_path / f"{name}_new.py" for name in names], shim=False)
    for name, before, after in zip(names, originals, rewritten, strict=True):
        assert (before["error"], after["error"]) == ("", ""), name
        assert len(after["losses"]) == 3, name
        assert after["losses"] == pytest.approx(before["losses"], rel=1e-6), name


def losses(paths: list[Path], shim: bool):
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, "1" if shim else "0", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("QIPAN ")]
    assert len(found) == len(paths), done.stderr[-2000:]
    return found


def test_vendors_that_call_themselves_cuda_need_little():
    checked = check_script(TRAINED["visible_devices"], STACKS["hygon"])
    assert '"HIP_VISIBLE_DEVICES"' in checked.rewritten
    assert check_script(BLOCKED["streams"], STACKS["metax"]).verdict == "runs"
    assert check_script(BLOCKED["triton"], STACKS["amd"]).verdict == "runs"
    assert check_script(BLOCKED["triton"], STACKS["iluvatar"]).verdict == "blocks"


def test_a_lazy_device_and_a_device_without_torch_are_said():
    assert check_script(TRAINED["cuda_methods"], STACKS["google_tpu"]).verdict == "blocks"
    with pytest.raises(InvalidInput, match="torch has no device"):
        check_script("import torch\n", STACKS["xilinx_fpga"])
    with pytest.raises(InvalidInput, match="line 2: is no Python"):
        check_script("import torch\nif:\n", STACKS["huawei"])


def test_a_task_is_written_for_the_target_behind_a_trial(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text("kind: train\nname: t\nrun: torchrun train.py --lr 0.1 && echo done\n")
    value, arguments = read_task(path, "train.py")
    assert arguments == ["--lr", "0.1"]
    made = yaml.safe_load(
        ported_task(value, "train.py", arguments, Path("train_huawei.py"), Path("l.json"), "huawei", "npu")
    )
    assert made["limits"] == {"vendors": ["huawei"]}
    assert made["run"].startswith(
        "python -m qipan.portability.trial l.json huawei npu train_huawei.py --lr 0.1 -- sh -c "
    )
    assert "torchrun train_huawei.py --lr 0.1 && echo done" in made["run"]


def found(losses, error="", devices=("npu",)):
    return {"losses": list(losses), "steps": len(losses), "devices": list(devices), "error": error}


@pytest.mark.parametrize(
    ("tried", "why"),
    [
        (found([1.0, 0.9]), ""), (found([1.0, 0.5]), "differ"), (found([1.0]), "times"), (found([], "X: y"), "failed"),
        (found([1.0, float("nan")]), "differ"), (found([1.0, 0.9], devices=["cpu"]), "ran on cpu"),
    ],
)  # fmt: skip
def test_a_trial_passes_only_with_the_same_losses_on_the_target(tried, why, tmp_path):
    script = tmp_path / "s.py"
    script.write_text("")
    trial = compare("huawei", "npu", script, found([1.0, 0.9], devices=["cpu"]), tried, 0.0)
    assert trial.passed == (not why)
    assert why in trial.why


@pytest.mark.slow
def test_a_task_whose_losses_differ_is_not_let_go(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAINED["cuda_methods"] + TAIL)
    checked = check_script(script.read_text(), STACKS["cpu"])
    ported = tmp_path / "train_cpu.py"
    ported.write_text(checked.rewritten)
    reference = run_steps(script, [], shim=True)
    for change, code in ((0.0, 0), (1.0, 100)):
        (tmp_path / "l.json").write_text(
            json.dumps({**reference, "losses": [loss + change for loss in reference["losses"]]})
        )
        command = [
            sys.executable,
            "-m",
            "qipan.portability.trial",
            str(tmp_path / "l.json"),
            "cpu",
            "cpu",
            str(ported),
            "--",
            "echo",
            "let go",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == code, done.stderr
        assert ("let go\n" in done.stdout) == (code == 0)
        assert json.loads((tmp_path / "trial.json").read_text())["passed"] == (code == 0)

"""The command line as its users meet it."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qipan.cli.app import ELSEWHERE, app

QIPAN = [sys.executable, "-m", "qipan.cli"]
SITE = str(Path(__file__).parent / "tiny_site.yaml")


def qipan(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*QIPAN, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_help_takes_little_cpu():
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert qipan("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert sorted(times)[2] <= 0.3, times


def test_without_a_server_the_error_names_the_command_that_starts_one(tmp_path):
    done = qipan("ps", "--store", str(tmp_path))
    assert done.returncode == 106
    assert "qipan up --store" in done.stderr
    assert "Traceback" not in done.stderr


def test_who_comes_from_another_tool_is_told_the_word_for_it_here():
    known = set(typer.main.get_command(app).commands)
    assert known >= set(ELSEWHERE.values())
    assert not known & set(ELSEWHERE)
    done = CliRunner().invoke(app, ["launch", "task.yaml"])
    assert done.exit_code == 2
    assert "here it is: qipan submit" in done.stderr


def test_a_store_that_is_none_cannot_be_verified(tmp_path):
    assert qipan("twin", "--verify", str(tmp_path)).returncode == 102


@pytest.mark.slow
def test_a_task_from_submission_to_bill_and_parking(tmp_path):
    store = tmp_path / "store"
    up = subprocess.Popen(
        [*QIPAN, "up", "--store", str(store), "--site", SITE, "--json"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    try:
        assert up.stdout is not None
        assert json.loads(up.stdout.readline())["event"] == "up"
        answer = json.loads(qipan("submit", "examples/tiny.yaml", "--store", str(store), "--json").stdout)
        assert answer["task_id"] == "tiny-1"
        assert answer["plan"]["options"]
        assert qipan("wait", "tiny-1", "--store", str(store)).returncode == 0
        [task] = json.loads(qipan("ps", "--store", str(store), "--json").stdout)["tasks"]
        assert (task["state"], task["progress"]) == ("done", 1.0)
        bill = json.loads(qipan("bill", "tiny-1", "--store", str(store), "--json").stdout)
        assert bill["receipt"]["cost_micro_cny"] == bill["charged_micro_cny"] > 0
        why = json.loads(qipan("why", "tiny-1", "--store", str(store), "--json").stdout)
        assert {entry["verdict"] for entry in why["decisions"]} == {"placed"}
        assert "attempt 1" in qipan("logs", "tiny-1", "--store", str(store)).stdout
        assert json.loads(qipan("ledger", "--store", str(store), "--json").stdout)["sum_micro_cny"] == 0
        assert qipan("why", "nobody", "--store", str(store)).returncode == 102

        qipan("submit", "examples/tiny.yaml", "--store", str(store))
        qipan("cancel", "tiny-2", "--store", str(store))
        assert qipan("wait", "tiny-2", "--store", str(store)).returncode == 103

        qipan("submit", "examples/tiny.yaml", "--store", str(store))
        time.sleep(2)
        up.send_signal(signal.SIGINT)
        assert up.wait(20) == 130
    finally:
        up.kill()
    assert subprocess.run(["pgrep", "-f", str(store)], capture_output=True).returncode == 1, (
        "a process was left"
    )
    assert qipan("twin", "--verify", str(store)).returncode == 0

    again = subprocess.Popen(
        [*QIPAN, "up", "--store", str(store), "--site", SITE, "--json"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    try:
        assert again.stdout is not None
        again.stdout.readline()
        assert qipan("wait", "tiny-3", "--store", str(store), "--timeout", "40").returncode == 0
        count = (store / "checkpoints" / "tiny-3" / "count").read_text()
        assert count == "100"
        again.send_signal(signal.SIGINT)
        assert again.wait(20) == 130
    finally:
        again.kill()


@pytest.mark.slow
def test_the_twin_runs_a_day():
    report = json.loads(qipan("twin", "examples/day.yaml", "--json").stdout)
    assert report["figures"]["done"] == 200


def test_why_of_the_twin_does_not_leave_a_snapshot_out_unsaid():
    done = qipan("twin", "examples/day.yaml", "--why", "a-1", "--from", "evening")
    assert done.returncode == 2
    assert "leave --from and --snapshot-at out" in done.stderr


@pytest.mark.slow
def test_the_twin_starts_from_a_moment_of_a_day(tmp_path):
    day, written = "examples/day.yaml", tmp_path / "evening"
    assert qipan("twin", day, "--snapshot-at", "20h").returncode == 2
    assert qipan("twin", day, "--snapshot-at", "20h", "--out", str(tmp_path)).returncode == 2
    told = json.loads(qipan("twin", day, "--snapshot-at", "20h", "--out", str(written), "--json").stdout)
    assert told["files"] == [str(written)]
    report = json.loads(qipan("twin", day, "--from", str(written), "--policy", "jct", "--json").stdout)
    assert (report["figures"]["done"], report["policy"]) == (200, "jct")


@pytest.mark.slow
def test_kinds_that_cannot_run_yet_are_refused_by_name(tmp_path):
    done = qipan("plan", "examples/serve-llama.yaml", "--site", SITE, "--json", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 104
    assert "not yet runnable" in json.loads(done.stdout)["refused"][0]["why"]


@pytest.mark.slow
def test_plan_explains_an_option_and_names_the_options_there_are():
    site = "examples/sites/three-vendors.yaml"
    shown = qipan("plan", "examples/llama-70b.yaml", "--site", site, "--explain", "1")
    assert shown.returncode == 0
    assert "limited by" in shown.stdout
    assert "odds to end by the deadline" in shown.stdout
    option = json.loads(
        qipan("plan", "examples/llama-70b.yaml", "--site", site, "--explain", "1", "--json").stdout
    )
    assert sum(option["parts_s"].values()) == pytest.approx(option["step_s"])
    missing = qipan("plan", "examples/llama-70b.yaml", "--site", site, "--explain", "99")
    assert missing.returncode == 102
    assert "99" in missing.stderr


def test_another_tools_file_is_planned_as_it_is(tmp_path):
    job = tmp_path / "job.sbatch"
    job.write_text(
        "#!/bin/bash\n#SBATCH --job-name=hello\n#SBATCH --time=00:01:00\n#SBATCH --mail-user=a@b\necho hello\n"
    )
    rows = json.loads(qipan("import", str(job), "--json").stdout)["directives"]
    assert {row["name"]: row["fate"] for row in rows}["mail-user"] == "ignored"
    made = json.loads(qipan("plan", str(job), "--site", SITE, "--json").stdout)
    assert made["options"][0]["devices"] == 1


LONG = "x" * 5000
MISTAKES = {
    "a port of another script": ["up", "--store", "STORE", "--api", "0.0.0.0:²"],
    "a port for metrics": ["board", "serve", "--store", "STORE", "--metrics", ":²"],
    "a port for a storage": ["storage", "serve", "STORE", "--token-file", "pyproject.toml", "--listen", "h:²"],
    "an address that is not closed": ["grid", "init", "cn", "--url", "[::1", "--store", "STORE"],
    "a server that is none": ["login", "https://[::1"],
    "a server's port": ["login", "https://board:²"],
    "a name too long": ["plan", LONG],
    "a store's name too long": ["ps", "--store", LONG],
    "a store in a file": ["up", "--store", "BINARY"],
    "a backup in no folder": ["backup", "STORE/no/folder", "--store", "STORE"],
    "a restore over a file": ["restore", "BINARY", "--store", "BINARY"],
    "a scenario in bytes": ["twin", "BINARY"],
    "an overlay in bytes": ["chips", "ls", "--overlay", "BINARY"],
    "a provider in bytes": ["up", "--store", "STORE", "--login", "BINARY"],
    "a token in bytes": ["grid", "join", "BINARY", "--store", "STORE"],
    "half a character": ["why", "\udcff", "--store", "STORE"],
    "half a character for a key": ["submit", "examples/tiny.yaml", "--key", "\udcff", "--store", "STORE"],
    "a time that is no number": ["exec", "tiny-1", "--timeout", "nan", "--store", "STORE", "ls"],
    "a wait that is no number": ["wait", "tiny-1", "--timeout", "nan", "--store", "STORE"],
    "a product's hour": ["market", "book", "sim/a@cn-east/firm/²", "--store", "STORE"],
}  # fmt: skip


@pytest.mark.parametrize("words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_a_sentence(words, tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x80")
    places = {"STORE": str(tmp_path / "store"), "BINARY": str(tmp_path / "bytes")}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    done = qipan(*words, XDG_CACHE_HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path), QIPAN_SITE=SITE)
    assert "Traceback" not in done.stderr
    assert done.returncode in (2, 102), done.stderr


@pytest.mark.parametrize(
    "variable", [{"QIPAN_TOKEN": "令牌"}, {"QIPAN_TOKEN": "a\nb"}, {"QIPAN_SERVER": "https://\udcff"}, {"QIPAN_STORE": LONG}]
)  # fmt: skip
def test_a_mistake_in_the_environment_is_told_in_a_sentence(variable, tmp_path):
    done = qipan("ps", **{"XDG_CONFIG_HOME": str(tmp_path), **variable})
    assert "Traceback" not in done.stderr
    assert done.returncode == 2, done.stderr

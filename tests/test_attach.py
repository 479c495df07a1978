"""An own torch loop with four lines more: it is parked, goes on, and ends where the unbroken loop ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "attach.py"


def start(folder: Path, name: str) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ, "QIPAN_CHECKPOINT_DIR": str(folder / "ckpt"), "QIPAN_EVENTS": str(folder / name), "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    slow = EXAMPLE.read_text().replace("optimizer.step()", "optimizer.step(); __import__('time').sleep(0.01)")
    return subprocess.Popen([sys.executable, "-c", slow], env=environment, stdout=subprocess.PIPE, text=True)


def events(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_attached_loop_parks_on_sigterm_and_goes_on(tmp_path):
    whole = start(tmp_path / "whole", "events")
    out, _ = whole.communicate(timeout=120)
    broken = start(tmp_path / "broken", "first")
    ends_s = time.monotonic() + 100
    while not any(one["event"] == "ready" for one in events(tmp_path / "broken" / "first")):
        assert time.monotonic() < ends_s
        time.sleep(0.01)
    broken.terminate()
    assert broken.wait(60) == 0
    first = events(tmp_path / "broken" / "first")
    again = start(tmp_path / "broken", "second")
    out_again, _ = again.communicate(timeout=120)
    second = events(tmp_path / "broken" / "second")
    assert first[-1]["event"] == "parked"
    assert (second[0]["event"], second[0]["step"]) == ("resumed", first[-1]["step"])
    assert second[-1]["event"] == "done"
    assert out_again == out, "the same loss to the last digit shown"


def test_the_example_adds_at_most_five_lines():
    assert (
        sum("# " in line and line.split("# ")[-1][:1].isdigit() for line in EXAMPLE.read_text().splitlines())
        <= 5
    )

"""Commands beside an attempt whose start failed, or whose board died over it: they take no place from others, and are not waited for."""

import os
import subprocess

import pytest

from qipan.engines import beside
from qipan.engines.shim import Spec


@pytest.fixture
def control(tmp_path):
    folder = tmp_path / "control"
    folder.mkdir()
    Spec(["sleep", "60"], dict(os.environ)).write(str(folder / "spec"))
    return folder


def test_a_start_that_fails_takes_no_place(tmp_path, control, monkeypatch):
    def fails(*given, **named):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", fails)
    for _ in range(beside.AT_ONCE_MAX + 1):
        with pytest.raises(OSError, match="temporarily"):
            beside.begin(tmp_path / "beside", control, ["true"], 60.0)
    assert list((tmp_path / "beside").iterdir()) == []


def test_one_that_a_board_died_over_is_over(tmp_path, control):
    place = tmp_path / "beside"
    for number in range(1, beside.AT_ONCE_MAX + 1):
        (place / str(number)).mkdir(parents=True)
        (place / str(number) / "spec.json").write_text("{}")
    assert not beside.read(place, "1", 0).over, "it may be starting"
    for folder in place.iterdir():
        os.utime(folder, (0, 0))
    piece = beside.read(place, "1", 0)
    assert (piece.over, piece.ended_by) == (True, "machine")
    assert beside.begin(place, control, ["true"], 60.0) == str(beside.AT_ONCE_MAX + 1)

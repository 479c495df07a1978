"""The duty cycle of the supervisor, where no cgroup holds a task to its share: it stops and continues what is its own, whatever a task writes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from qipan.engines import alive, devices, in_place, processes
from qipan.engines.shim import Log, Spec, Start, spawn
from qipan.engines.throttle import Throttle


@pytest.fixture
def sleeper():
    """Another process below this one, with a child of its own."""
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    one = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert one.stdout is not None
    yield one.pid, int(one.stdout.readline())
    os.killpg(one.pid, signal.SIGKILL)
    one.wait()


def turns(throttle: Throttle, pid: int, limit_s: float = 0.5) -> bool:
    """Whether the process is stopped in one of its turns."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        throttle.turn()
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] == "T":
                return True
        time.sleep(0.005)
    return False


def test_only_processes_below_the_supervisor_are_stopped(tmp_path, sleeper, monkeypatch):
    group, child = sleeper
    signalled = []
    monkeypatch.setattr("qipan.engines.throttle.signal_one", lambda pid, number: signalled.append(pid))
    for name, text in (("0", "1"), ("1", str(child)), ("2", "x"), ("3", "9" * 30), ("4", "-1")):
        (tmp_path / f"rank-{name}").write_text(text)
    throttle = Throttle(str(tmp_path), group, [0.0])
    throttle.turn()
    assert signalled == [child]


def test_files_that_are_no_marks_are_passed_over(tmp_path, sleeper):
    group, child = sleeper
    for name in ("rank-0.log", "rank-", "rank-x", "rank-\u00b2", "rank-00"):
        (tmp_path / name).write_text(str(child))
    throttle = Throttle(str(tmp_path), group, [0.0])
    assert turns(throttle, group), "where no rank is known the whole group is held to its share"
    throttle.release()
    assert in_place.leave(tmp_path, 0)


def test_a_rank_is_gone_when_its_process_is(tmp_path, sleeper):
    _, child = sleeper
    (tmp_path / "rank-1").write_text(str(child))
    (tmp_path / "rank-2").write_text("nothing")
    assert in_place.leave(tmp_path, 2)
    assert not (tmp_path / "rank-2").exists()
    assert not in_place.leave(tmp_path, 1)


def test_a_process_may_have_a_name_that_is_no_text(tmp_path):
    code = "import time; open('/proc/self/comm', 'wb').write(b') \\xff'); print(flush=True); time.sleep(60)"
    command = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as one:
        assert one.stdout is not None
        one.stdout.readline()
        (tmp_path / "rank-0").write_text(str(one.pid))
        try:
            assert one.pid in alive.left_of(tmp_path, os.getppid())
            assert devices.cpu_s_below(os.getppid()) > 0
            assert not in_place.leave(tmp_path, 0)
        finally:
            one.kill()


@pytest.mark.parametrize("enclosed", [False, True])
def test_who_waits_for_ranks_is_not_left_stopped_when_they_tell_who_they_are(tmp_path, enclosed):
    """A rank in a session of its own may tell it while the rest is stopped; then nobody would see how it ended."""
    waiter = "sh -c 'sleep 60 & echo $$ $!; wait' & wait"  # as torchrun in a sandbox: who waits is below its main process
    with subprocess.Popen(
        ["sh", "-c", waiter], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as main:
        assert main.stdout is not None
        waits, rank = map(int, main.stdout.readline().split())
        try:
            throttle = Throttle(str(tmp_path), main.pid, [0.0], enclosed)
            assert turns(throttle, waits, 20)
            (tmp_path / "rank-0").write_text(str(rank))
            assert turns(throttle, rank, 20)
            end_s = time.monotonic() + 60
            while "T" in {processes.stat_of(pid)[0] for pid in (main.pid, waits)}:
                assert time.monotonic() < end_s
                throttle.turn()
        finally:
            os.killpg(main.pid, signal.SIGKILL)


def test_a_process_that_was_just_started_hears_an_order_to_stop(tmp_path, monkeypatch):
    setsid, handler = os.setsid, signal.signal(signal.SIGTERM, lambda *_: None)
    monkeypatch.setattr("qipan.engines.shim.os.setsid", lambda: (time.sleep(0.3), setsid()))
    try:
        pid = spawn(Spec(["sleep", "60"], dict(os.environ)), dict(os.environ), Log(str(tmp_path / "log.txt")))
        os.killpg(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_an_attempt_is_over_when_its_last_process_is_however_long_that_takes(monkeypatch):
    """Memory of a device, or very much of a host's, takes seconds to be given back."""
    looks = iter([True] * 500 + [False])
    monkeypatch.setattr(processes, "have_children", lambda: next(looks))
    monkeypatch.setattr(processes, "descendants", lambda root: [])
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    processes.end_all()
    assert next(looks, None) is None


def test_another_users_process_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(processes, "have_children", lambda: True)
    monkeypatch.setattr(processes, "descendants", lambda root: [1])
    monkeypatch.setattr(processes, "signal_one", lambda pid, number: False)
    processes.end_all()


def test_what_an_attempt_lasted_is_told_by_the_clock_that_nobody_sets(monkeypatch):
    start = Start()
    monkeypatch.setattr("qipan.engines.shim.time.time", lambda: start.unix_s + 600)
    assert 0 <= start.now_s() - start.unix_s < 60

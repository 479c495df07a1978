"""A stream of samples from one stage to another: bounded, in order, nothing lost or twice, whoever is killed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qipan.errors import InvalidInput
from qipan.trainer.data import Corpus
from qipan.trainer.fed_rows import FedRows
from qipan.trainer.stream import Fed
from qipan.trainer.stream.feeder import Feeder, Window
from qipan.trainer.stream.pieces import ReaderState, Shape, pieces_in, read_reader, write_piece

pytestmark = pytest.mark.timeout(120)


def sample(position: int, size: int = 0) -> dict[str, bytes]:
    return {"txt": f"sample {position}".encode() * (1 + position % 3), "bin": bytes(size)}


class Killed(BaseException):
    pass


WORKERS = 3


class Story:
    """A feeder and a reader in one process, each killed where it hurts.  `sizes`: of the samples, in bytes."""

    def __init__(
        self, folder: Path, samples: int, per_piece: int, ahead_bytes: int, sizes: tuple[int, ...] = ()
    ) -> None:
        self.folder, self.ahead_bytes, self.sizes = folder, ahead_bytes, sizes or (0,) * samples
        self.shape = Shape(samples, per_piece, 10_240)
        (folder / "stream.json").write_text(
            json.dumps({"samples": samples, "per_piece": per_piece, "piece_bytes": 10_240})
        )
        self.biggest = self.furthest = 0
        self.saved: list[str] = []
        self.start_feeder()
        self.start_reader()

    def start_feeder(self) -> None:
        self.window = Window.open(self.folder, self.shape, self.ahead_bytes)
        self.busy: list[int] = []

    def start_reader(self) -> None:
        self.reader = Fed(self.folder, "prepare")
        self.position = len(self.saved)
        self.seen = list(self.saved)

    def begin(self) -> None:
        if len(self.busy) < WORKERS:
            number = self.window.begin(read_reader(self.folder), len(self.busy))
            self.busy += [number] if number is not None else []

    def make(self, killed_after: int | None = None) -> None:
        """One worker's piece; a kill leaves what it had written."""
        if not self.busy:
            return
        number = self.busy.pop(0)

        def prepare(position: int) -> dict[str, bytes]:
            if killed_after is not None and position % self.shape.per_piece >= killed_after:
                raise Killed
            return sample(position, self.sizes[position])

        try:
            size = write_piece(self.folder, number, self.shape.positions(number), prepare)
        except Killed:
            self.window.again(number)
            return
        self.biggest = max(self.biggest, size)
        self.window.made(number, size)

    def read(self) -> None:
        if self.position == self.shape.samples:
            return
        number = self.position // self.shape.per_piece
        self.reader.want(self.position)
        self.furthest = max(self.furthest, self.position)
        if (self.folder / f"piece-{number:09d}.tar").exists():
            [row] = self.reader.rows([self.position])
            self.seen.append(row["text"])
            self.position += 1

    def save(self) -> None:
        self.saved = list(self.seen)
        self.reader.saved(self.position)

    def ahead(self) -> int:
        return sum(
            size
            for number, size in pieces_in(self.folder).items()
            if self.shape.positions(number).stop > self.furthest
        )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_no_sample_is_lost_or_comes_twice_whoever_is_killed(per_piece, pieces_ahead, data):
    samples = data.draw(st.integers(1, 23))
    sizes = data.draw(st.tuples(*[st.sampled_from([0, 9_000, 40_000])] * samples))
    with tempfile.TemporaryDirectory() as name:
        story = Story(Path(name), samples, per_piece, pieces_ahead * 10_240, sizes)
        acts = {
            "begin": story.begin,
            "make": story.make,
            "worker killed": lambda: story.make(data.draw(st.integers(0, per_piece - 1))),
            "feeder killed": story.start_feeder,
            "read": story.read,
            "save": story.save,
            "reader killed": story.start_reader,
        }
        for act in data.draw(st.lists(st.sampled_from(sorted(acts)), max_size=60)):
            acts[act]()
            assert story.ahead() <= story.ahead_bytes + 2 * WORKERS * story.biggest, (
                "bounded ahead of the reader"
            )
        for _ in range(4 * samples + 8):  # and then both are left alone
            story.begin()
            story.make()
            story.read()
        assert story.seen == [sample(position)["txt"].decode() for position in range(samples)]
        story.save()
        story.reader.close()
        assert list(Path(name).glob("piece-*.tar")) == []


def test_a_piece_that_nobody_finished_is_made_though_those_after_it_fill_what_may_lie_ahead():
    window = Window(Shape(8, 1, 8), 64, {1: 22, 2: 22, 3: 22}, [7, 6, 5, 4, 0])
    assert [window.begin(ReaderState(), busy) for busy in (0, 1)] == [0, None]


def test_ranks_that_read_one_batch_larger_than_what_may_lie_ahead_all_get_their_samples(
    tmp_path, monkeypatch
):
    story = Story(tmp_path, 32, 2, 2 * 10_240)
    monkeypatch.setenv("RANK", "1")
    second, read = Fed(tmp_path, "prepare"), 8
    for _ in range(40):  # each reads its half of a batch of 16 and then waits for the other
        if story.position < 8:
            story.read()
        if read < 16:
            second.want(read)
            if read // 2 in pieces_in(tmp_path):
                assert second.raw(read)["txt"] == sample(read)["txt"]
                read += 1
        story.begin()
        story.make()
    assert (story.position, read) == (8, 16)
    assert max(pieces_in(tmp_path)) <= 7 + 2, "bounded ahead of the furthest"


def test_what_was_saved_past_is_gone_and_a_position_beyond_the_end_is_refused(tmp_path):
    story = Story(tmp_path, 8, 2, 10**9)
    for _ in range(4):
        story.begin()
        story.make()
    story.read()
    story.read()
    story.read()
    story.save()
    with pytest.raises(InvalidInput, match=r"sample 0 of prepare is gone: saved\(3\)"):
        story.reader.raw(0)
    with pytest.raises(InvalidInput, match="prepares samples 0 to 7"):
        story.reader.raw(8)
    assert read_reader(tmp_path) == ReaderState(3, 3)


def test_a_sample_without_files_is_refused_and_shifts_no_other(tmp_path):
    story = Story(tmp_path, 3, 3, 10**9)
    with pytest.raises(InvalidInput, match="sample 1 has no files"):
        write_piece(tmp_path, 0, range(3), lambda position: {} if position == 1 else sample(position))
    assert list(tmp_path.glob("piece-*")) == []
    write_piece(tmp_path, 0, (0, 2), sample)
    assert story.reader.raw(2) == sample(2)
    with pytest.raises(InvalidInput, match="holds no sample 1"):
        story.reader.raw(1)


def test_a_stage_killed_after_it_had_read_all_reads_again_from_where_it_saved(tmp_path, monkeypatch):
    story = Story(tmp_path, 8, 2, 10**9)
    for _ in range(3):
        story.begin()
        story.make()
        story.read()
        story.read()
        story.save() if story.position == 2 else None
    story.reader.close()
    Feeder(tmp_path, sample, 8, 1, 10**9).run()  # which has nobody to prepare for
    monkeypatch.setenv("QIPAN_CONTROL", str(tmp_path))  # told to stop, should it wait
    story.start_reader()
    assert [story.reader.raw(position) for position in range(2, 6)] == [
        sample(position) for position in range(2, 6)
    ]
    with pytest.raises(InvalidInput, match="nobody prepares sample 6 of prepare any more"):
        story.reader.raw(6)


def test_a_stream_of_another_length_in_the_folder_is_refused(tmp_path):
    Story(tmp_path, 8, 2, 1000)
    with pytest.raises(InvalidInput, match="holds a stream of 8 samples, 9 are asked for"):
        Feeder(tmp_path, sample, 9, 1, 1000).run()


def test_the_built_in_trainers_rows_are_the_samples_in_the_vocabulary_of_its_data(tmp_path, monkeypatch):
    monkeypatch.setenv("QIPAN_STREAMS", str(tmp_path))
    (tmp_path / "prepare").mkdir()
    story = Story(tmp_path / "prepare", 4, 2, 10**9)
    story.begin()
    story.make()
    corpus = Corpus(*[np.zeros(0, np.int64)] * 3, 5, {"s": 1, "a": 2, "m": 3, "0": 4})
    rows = FedRows("prepare", corpus).rows(0, 2, 7)
    assert rows.tolist() == [[1, 2, 3, 0, 0, 0, 0, 4], [1, 2, 3, 0, 0, 0, 0, 0]], (
        "what the data does not have is unknown"
    )
    with pytest.raises(InvalidInput, match="has 8 characters of txt; a row of work"):
        FedRows("prepare", corpus).rows(0, 1, 8)


# ---- with processes ----------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, time
from pathlib import Path
from qipan.trainer.stream import feed

def prepare(position):
    time.sleep(0.002)
    with open(sys.argv[1] + "/made", "a") as file:
        file.write(f"{os.getpid()} {position}\\n")
    if os.path.exists(sys.argv[1] + "/deadly") and position == 7:
        os._exit(9)
    if position == int(os.environ.get("BROKEN", "-1")):
        raise ValueError("no such picture")
    return {"txt": f"sample {position}".encode()}

feed(prepare, samples=120, workers=2, ahead_bytes=60_000, per_piece=5, folder=sys.argv[1] + "/stream")
"""


def feeder(tmp_path, **environment):
    (tmp_path / "prepare.py").write_text(SCRIPT)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("QIPAN_")}
    command = [sys.executable, str(tmp_path / "prepare.py"), str(tmp_path)]
    return subprocess.Popen(
        command, env={**kept, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def workers_of(tmp_path) -> list[int]:
    lines = (tmp_path / "made").read_text().splitlines() if (tmp_path / "made").exists() else []
    return list(dict.fromkeys(int(line.split()[0]) for line in lines))


def test_real_workers_and_a_feeder_are_killed_and_the_order_holds(tmp_path):
    process = feeder(tmp_path)
    stream = Fed(tmp_path / "stream", "prepare")
    seen = []
    for position in range(120):
        [row] = stream.rows([position])
        seen.append(row["text"])
        if position == 20:
            os.kill(workers_of(tmp_path)[-1], signal.SIGKILL)
        if position == 60:
            process.kill()
            process.communicate()
            process = feeder(tmp_path)
        if position % 30 == 29:
            stream.saved(position + 1)
    stream.close()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0, out
    assert seen == [f"sample {position}" for position in range(120)]
    assert len(workers_of(tmp_path)) == 6, (
        "the first feeder weighs a sample; its two, one for the killed, two more"
    )
    assert list((tmp_path / "stream").glob("piece-*")) == [], (
        "nothing is left behind, not even what was half written"
    )


def test_a_feeder_stops_when_enough_is_ahead_parks_when_told_and_goes_on(tmp_path):
    process = feeder(tmp_path)
    ends_s = time.monotonic() + 60
    while len(list((tmp_path / "stream").glob("*.tar"))) < 4:
        assert time.monotonic() < ends_s
        time.sleep(0.01)
    time.sleep(0.5)
    lies = sum(path.stat().st_size for path in (tmp_path / "stream").glob("*.tar"))
    assert 30_000 < lies <= 60_000
    process.terminate()
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, json.loads(out.splitlines()[-1])["event"]) == (0, "parked")
    process = feeder(tmp_path)
    with Fed(tmp_path / "stream", "prepare") as stream:
        assert [row["text"] for row in stream.rows(range(120))] == [
            f"sample {position}" for position in range(120)
        ]
    out, _ = process.communicate(timeout=20)
    assert json.loads(out.splitlines()[-1])["event"] == "done"


def test_a_sample_that_kills_every_worker_or_cannot_be_prepared_is_named(tmp_path):
    (tmp_path / "deadly").touch()
    out, _ = feeder(tmp_path).communicate(timeout=20)
    assert (
        "3 workers died (the last with exit code 9) while they prepared samples 5 to 9; look at those" in out
    )
    (tmp_path / "other").mkdir()
    process = feeder(tmp_path / "other", BROKEN="11")
    out, _ = process.communicate(timeout=20)
    assert "samples 10 to 14 cannot be prepared: ValueError('no such picture')" in out
    assert process.returncode != 0

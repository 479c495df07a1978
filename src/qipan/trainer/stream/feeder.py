"""The end that prepares: workers make pieces as long as the reader leaves room for them."""

import ctypes
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qipan.errors import InvalidInput
from qipan.trainer.stream.attempt import POLL_S, TELL_S, say, told_to_stop, with_room
from qipan.trainer.stream.pieces import (
    Prepare,
    ReaderState,
    Shape,
    drop_pieces,
    pieces_in,
    read_reader,
    read_shape,
    write_note,
    write_piece,
)

AHEAD_BYTES = 64 * 2**20
PIECE_BYTES = 2**20
PIECE_S = 0.25  # of work in a piece at most: the fed stage waits for whole pieces
DEATHS_MAX = 3  # workers that one piece may cost
PR_SET_PDEATHSIG = 1


def feed(
    prepare: Prepare, samples: int = 0, *, workers: int = 0, ahead_bytes: int = 0, per_piece: int = 0, folder: str = "streams/stage"
) -> None:  # fmt: skip
    """Prepare every sample of this stage, with one process a device.  Returns when all were prepared, or the fed stage has read what it wanted;
    ends the process with 0 when it was told to stop.  `samples`, `workers`, `ahead_bytes`, `folder`: outside Qipan, which states
    them.  Raises InvalidInput when a sample cannot be prepared."""
    streams = os.environ.get("QIPAN_STREAMS")
    if streams is not None:
        folder = f"{streams}/{os.environ['QIPAN_STAGE']}"
        samples = int(os.environ["QIPAN_SAMPLES"])
        ahead_bytes = int(os.environ["QIPAN_AHEAD_BYTES"])
        workers = len(os.environ["QIPAN_DEVICES"].split(","))
    if samples < 1:
        raise InvalidInput(f"samples is {samples}; say how many the stage prepares")
    Path(folder).mkdir(parents=True, exist_ok=True)
    feeder = Feeder(Path(folder), prepare, samples, max(1, workers), ahead_bytes or AHEAD_BYTES, per_piece)
    if not feeder.run():
        sys.exit(0)


@dataclass(slots=True)
class Window:
    """What is to be made and may be begun now.  `there`: number -> bytes of whole pieces that the reader has not passed; `missing`:
    what nobody makes yet, lowest last."""

    shape: Shape
    ahead_bytes: int
    there: dict[int, int]
    missing: list[int]
    most_bytes: int = 0  # that ever lay ahead

    @staticmethod
    def open(folder: Path, shape: Shape, ahead_bytes: int) -> "Window":
        # The pieces are listed before the reader is asked how far it has saved: what it drops in between lies before that.
        there = pieces_in(folder)
        first = read_reader(folder).saved // shape.per_piece
        return Window(
            shape, ahead_bytes, there, [n for n in range(shape.pieces - 1, first - 1, -1) if n not in there]
        )

    def begin(self, reader: ReaderState, busy: int) -> int | None:
        """The next piece, when what is ahead and what `busy` workers make leave room for it; always one that is waited for, or will be
        before what is there."""
        wanted = reader.position // self.shape.per_piece
        self.there = {n: size for n, size in self.there.items() if n >= wanted}
        if not self.missing:
            return None
        piece = max(self.there.values(), default=self.shape.piece_bytes)
        ahead = sum(self.there.values()) + (busy + 1) * piece
        if ahead > self.ahead_bytes and self.missing[-1] > max(wanted, min(self.there, default=wanted)):
            return None
        return self.missing.pop()

    def made(self, number: int, size: int) -> None:
        self.there[number] = size
        self.most_bytes = max(self.most_bytes, sum(self.there.values()))

    def again(self, number: int) -> None:
        """Whoever made it died."""
        self.missing = sorted([*self.missing, number], reverse=True)

    def low(self, busy: Iterable[int]) -> int:
        """All samples before this one are prepared."""
        return min(
            self.shape.samples,
            min([*self.missing[-1:], *busy], default=self.shape.pieces) * self.shape.per_piece,
        )


@dataclass(slots=True)
class _Worker:
    process: Any
    pipe: Any
    number: int | None = None  # the piece that it makes


@dataclass(slots=True)
class Feeder:
    """One attempt of a feeding stage: gives pieces to workers as long as the window lets it."""

    folder: Path
    prepare: Prepare
    samples: int
    workers: int
    ahead_bytes: int
    per_piece: int = 0
    _asked: bool = False
    _deaths: dict[int, int] = field(default_factory=dict)
    _pool: list[_Worker] = field(default_factory=list)
    _made: int = 0  # samples
    _busy_s: float = 0.0  # of its workers
    _held_s: float = 0.0  # in which a worker had nothing to do, for enough was ahead

    def run(self) -> bool:
        """Returns whether it is done (else it was told to stop)."""
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            window = Window.open(self.folder, self._shape(), self.ahead_bytes)
            done = self._make(window)
        finally:
            for worker in self._pool:
                worker.process.kill()
                worker.process.join()
            signal.signal(signal.SIGTERM, before)
        for part in self.folder.glob("piece-*.part"):
            part.unlink(missing_ok=True)
        drop_pieces(self.folder, window.shape.pieces_before(read_reader(self.folder).saved))
        say(
            "done" if done else "parked",
            step=window.shape.samples if done else window.low(self._open_pieces()),
        )
        return done

    def _shape(self) -> Shape:
        known = read_shape(self.folder)
        if known is not None and known.samples == self.samples:
            return known
        if known is not None:
            raise InvalidInput(
                f"{self.folder} holds a stream of {known.samples} samples, {self.samples} are asked for; name another folder"
            )
        began_s = time.monotonic()
        size = sum(len(body) for body in self.prepare(0).values()) + 1024
        sample_s = max(time.monotonic() - began_s, 1e-6)
        most = min(
            PIECE_BYTES / size, PIECE_S / sample_s, self.ahead_bytes / size / (2 * self.workers), self.samples / (4 * self.workers)
        )  # fmt: skip
        per_piece = self.per_piece or max(1, math.floor(most))
        shape = Shape(self.samples, per_piece, size * per_piece)
        write_note(self.folder / "stream.json", asdict(shape))
        return shape

    def _make(self, window: Window) -> bool:
        say("ready", step=window.low(()), steps=window.shape.samples)
        told_s = began_s = time.monotonic()
        while window.missing or self._open_pieces():
            turn_s = time.monotonic()
            reader = read_reader(self.folder)
            if reader.ended:
                break
            if self._asked or told_to_stop():
                return False
            self._fill_pool(window.shape)
            for worker in self._pool:
                if (
                    worker.number is None
                    and (number := window.begin(reader, len(self._open_pieces()))) is not None
                ):
                    worker.number = number
                    worker.pipe.send(number)
            held = window.missing and len(self._open_pieces()) < self.workers
            self._collect(window)
            now_s = time.monotonic()
            self._held_s += now_s - turn_s if held else 0.0
            if now_s - told_s >= TELL_S:
                told_s = now_s
                self._tell(window, now_s - began_s)
        self._tell(window, time.monotonic() - began_s)
        return True

    def _open_pieces(self) -> list[int]:
        return [worker.number for worker in self._pool if worker.number is not None]

    def _collect(self, window: Window) -> None:
        """What workers made; the piece of one that died is made by another."""
        busy = {worker.pipe: worker for worker in self._pool if worker.number is not None}
        if not busy:
            time.sleep(POLL_S)
        for pipe in multiprocessing.connection.wait(list(busy), POLL_S) if busy else []:
            worker = busy[pipe]
            number, worker.number = worker.number, None
            assert number is not None
            try:
                size, seconds, error = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                self._pool.remove(worker)
                worker.process.join()
                self._count_death(window.shape.positions(number), number, worker.process.exitcode)
                window.again(number)
                continue
            if error:
                raise InvalidInput(error)
            window.made(number, size)
            self._made += len(window.shape.positions(number))
            self._busy_s += seconds

    def _count_death(self, positions: range, number: int, code: int) -> None:
        deaths = self._deaths[number] = self._deaths.get(number, 0) + 1
        if deaths >= DEATHS_MAX:
            raise InvalidInput(
                f"{deaths} workers died (the last with exit code {code}) while they prepared samples {positions.start} to"
                f" {positions.stop - 1}; look at those"
            )

    def _fill_pool(self, shape: Shape) -> None:
        self._pool = [
            worker for worker in self._pool if worker.number is not None or worker.process.is_alive()
        ]
        context = multiprocessing.get_context("fork")  # `prepare` may be any function, with what it has read
        while len(self._pool) < self.workers:
            ours, theirs = context.Pipe()
            others = [ours, *(worker.pipe for worker in self._pool)]
            process = context.Process(
                target=_work, args=(theirs, others, self.folder, shape, self.prepare), daemon=True
            )
            process.start()
            theirs.close()
            self._pool.append(_Worker(process, ours))

    def _tell(self, window: Window, elapsed_s: float) -> None:
        low, samples = window.low(self._open_pieces()), window.shape.samples
        rate = {"samples_per_s_per_device": round(self._made / self._busy_s, 3)} if self._busy_s else {}
        say("progress", step=low, steps=samples)
        say("checkpoint", step=low)
        say(
            "stream", to=os.environ.get("QIPAN_FEEDS", ""), position=low, samples=samples, workers=self.workers, **rate,
            ahead_bytes=sum(window.there.values()), held_share=round(min(1.0, self._held_s / max(elapsed_s, 1e-9)), 3),
        )  # fmt: skip

    def _on_signal(self, _number: int, _frame: Any) -> None:
        self._asked = True


def _work(pipe: Any, others: list[Any], folder: Path, shape: Shape, prepare: Prepare) -> None:
    """One worker: makes the pieces that it is told, until the feeder is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the feeder ends it
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for other in others:
        other.close()
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        positions, size, seconds, error = shape.positions(number), 0, 0.0, ""
        try:
            size, seconds = with_room(folder, partial(_timed_piece, folder, number, positions, prepare))
        except Exception as problem:  # told to the feeder, which ends with it
            error = f"samples {positions.start} to {positions.stop - 1} cannot be prepared: {problem!r}"
        pipe.send((size, seconds, error))


def _timed_piece(folder: Path, number: int, positions: range, prepare: Prepare) -> tuple[int, float]:
    began_s = time.monotonic()
    return write_piece(folder, number, positions, prepare), time.monotonic() - began_s

"""The end that reads: it waits for samples, and says how far it is and from where on it would read again."""

import atexit
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from qipan.errors import InvalidInput
from qipan.trainer.shards import KINDS, Sample, bytes_of, decode, read_index
from qipan.trainer.stream.attempt import POLL_S, TELL_S, StoppedWaiting, say, told_to_stop
from qipan.trainer.stream.pieces import (
    ReaderState,
    Shape,
    drop_pieces,
    piece_path,
    read_reader,
    read_shape,
    write_note,
)


def fed(stage: str, folder: str = "streams/stage") -> "Fed":
    """The stream of the stage of that name, which `feeds` this one.  `folder`: outside Qipan."""
    streams = os.environ.get("QIPAN_STREAMS")
    stream = Fed(Path(streams, stage) if streams is not None else Path(folder), stage)
    atexit.register(stream.tell)
    return stream


class Fed:
    """The samples of a feeding stage.  Of several ranks each tells the feeder what it waits for, the one that `leads` what is saved."""

    def __init__(self, folder: Path, stage: str) -> None:
        self.folder, self.stage = folder, stage
        self.wait_s = 0.0  # for samples, after the first one came
        self.first_s = 0.0  # until the first one came
        self.rank = int(os.environ.get("RANK", "0"))
        self.leads = self.rank == 0
        before = read_reader(folder)
        self._state = replace(before, position=before.saved)
        self._shape: Shape | None = None
        self._open: tuple[int, dict[str, Sample]] = (-1, {})
        self._began_s = time.monotonic()
        self._came_s = self._told_s = 0.0
        self._read = 0
        self._written = ReaderState(-1)

    @property
    def samples(self) -> int:
        return self._shape_of().samples

    def rows(self, positions: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Decoded: `key`, then `text`, `image`, `audio`, `video` as `shards.decode` gives them, and what it does not know as bytes."""
        for position in positions:
            yield {
                "key": str(position),
                **{KINDS.get(name, name): decode(name, body) if name in KINDS else body for name, body in self.raw(position).items()},
            }  # fmt: skip

    def raw(self, position: int) -> dict[str, bytes]:
        """Extension -> body, of the sample at a position; waits until it was prepared.  Raises InvalidInput, StoppedWaiting."""
        shape = self._shape_of()
        if not 0 <= position < shape.samples:
            raise InvalidInput(
                f"{self.stage} prepares samples 0 to {shape.samples - 1}; {position} is none of them"
            )
        if position < self._state.saved:
            raise InvalidInput(
                f"sample {position} of {self.stage} is gone: saved({self._state.saved}) dropped what lies before"
            )
        number = position // shape.per_piece
        if number != self._open[0]:
            self.want(position)
            path = piece_path(self.folder, number)
            if self._state.ended and not path.exists():
                raise InvalidInput(
                    f"nobody prepares sample {position} of {self.stage} any more: this stage had read what it wanted;"
                    f" delete {self.folder} to begin anew"
                )
            self._wait_for(path)
            self._open = (number, {sample.key: sample for sample in read_index(path)})
        sample = self._open[1].get(f"{position:012d}")
        if sample is None:
            raise InvalidInput(
                f"{piece_path(self.folder, number)} holds no sample {position}; delete {self.folder}, {self.stage} makes it anew"
            )
        found = bytes_of(sample)
        self._state = replace(self._state, position=max(self._state.position, position + 1))
        self._read += 1
        if time.monotonic() - self._told_s >= TELL_S:
            self.tell()
        return found

    def want(self, position: int) -> None:
        """Tell the feeder what is read next: it makes room for that."""
        self._note(replace(self._state, position=position))

    def saved(self, position: int) -> None:
        """Started again, this stage would read from here: what lies before is dropped."""
        if self.leads and position > self._state.saved:
            self._note(replace(self._state, position=max(position, self._state.position), saved=position))
            drop_pieces(self.folder, self._shape_of().pieces_before(position))

    def close(self) -> None:
        """It reads no more: the feeder may end.  What was read and not saved stays: killed before its own end, the stage reads it again."""
        if self.leads:
            self._note(replace(self._state, ended=True))
        self.tell()

    def __enter__(self) -> "Fed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _shape_of(self) -> Shape:
        while self._shape is None:
            self._shape = read_shape(self.folder)
            if self._shape is None:
                self._wait_for(self.folder / "stream.json")
        return self._shape

    def _wait_for(self, path: Path) -> None:
        began_s = time.monotonic()
        while not path.exists():
            if told_to_stop():
                raise StoppedWaiting
            time.sleep(POLL_S)
            if time.monotonic() - max(began_s, self._told_s) >= TELL_S and self._came_s:
                self.tell(time.monotonic() - began_s)
        now_s = time.monotonic()
        if self._came_s:
            self.wait_s += now_s - began_s
        elif path.suffix == ".tar":
            self._came_s, self.first_s = now_s, now_s - self._began_s

    def _note(self, state: ReaderState) -> None:
        self._state = state
        if state != self._written:
            write_note(self.folder / f"reader-{self.rank}.json", asdict(state))
            self._written = state

    def wait_share(self, waiting_s: float = 0.0) -> float:
        """Of the time since the first sample came."""
        elapsed_s = time.monotonic() - self._came_s if self._came_s else 0.0
        return min(1.0, (self.wait_s + waiting_s) / elapsed_s) if elapsed_s > 0 else 0.0

    def tell(self, waiting_s: float = 0.0) -> None:
        """A line of events on how long it waited and how fast it takes samples.  `waiting_s`: of a wait that goes on."""
        if not self.leads or not self._came_s or not self._read:
            return
        self._told_s = now_s = time.monotonic()
        wait_s = self.wait_s + waiting_s
        worked_s = max(now_s - self._came_s - wait_s, 1e-6)
        rate = self._read / worked_s
        devices = len(os.environ.get("QIPAN_DEVICES", "0").split(","))
        say(
            "stream", **{"from": self.stage}, position=self._state.position, wait_s=round(wait_s, 3), first_s=round(self.first_s, 3),
            wait_share=round(self.wait_share(waiting_s), 4), samples_per_s=round(rate, 3),
            samples_per_s_per_device=round(rate / devices, 3),
        )  # fmt: skip

"""Between boards there are only bytes.  A `Carrier` moves frames and may lose, delay or repeat them; `Link` makes
them arrive once and in order, by numbers, acknowledgements and sending again.

A link's end has an *incarnation* (higher after each start of its board), so that numbers begin anew when one side
restarts: what was under way is then found by a census, reports have durable numbers (some may be left out).  An end that counts lower than
the other has heard (its store is a backup) is told so by the acknowledgement, and goes on above it.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import msgspec


class Carrier(Protocol):
    def send(self, frame: bytes) -> None: ...

    def receive(self) -> list[bytes]:
        """Frames that have arrived since the last call."""
        ...


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """`base` is the lowest number the sender can still send again; `ack` the highest number it took in order from
    the other side's incarnation `ack_of`.  `seq` 0 carries only the acknowledgement."""

    incarnation: int
    base: int
    seq: int
    ack_of: int
    ack: int
    body: bytes


@dataclass(slots=True)
class PairedCarrier:
    """In process: what one end sends, the other receives."""

    outgoing: deque[bytes]
    incoming: deque[bytes]

    def send(self, frame: bytes) -> None:
        self.outgoing.append(frame)

    def receive(self) -> list[bytes]:
        frames = list(self.incoming)
        self.incoming.clear()
        return frames


def carrier_pair() -> tuple[PairedCarrier, PairedCarrier]:
    there: deque[bytes] = deque()
    back: deque[bytes] = deque()
    return PairedCarrier(there, back), PairedCarrier(back, there)


@dataclass(slots=True)
class FaultyCarrier:
    """Loses, delays (hence reorders) and repeats frames by seed; `cut` loses all.  Delays count calls of
    `receive`, so a run needs no clock."""

    inner: Carrier
    rng: random.Random
    lose: float = 0.0
    delay: float = 0.0
    repeat: float = 0.0
    delay_calls_max: int = 5
    cut: bool = False
    _held: list[tuple[int, bytes]] = field(default_factory=list)
    _calls: int = 0

    def send(self, frame: bytes) -> None:
        if self.cut or self.rng.random() < self.lose:
            return
        self.inner.send(frame)
        if self.rng.random() < self.repeat:
            self.inner.send(frame)

    def receive(self) -> list[bytes]:
        self._calls += 1
        for frame in self.inner.receive():
            if self.cut:
                continue
            late = self.rng.randint(1, self.delay_calls_max) if self.rng.random() < self.delay else 0
            self._held.append((self._calls + late, frame))
        ready = [frame for due, frame in self._held if due <= self._calls]
        self._held = [(due, frame) for due, frame in self._held if due > self._calls]
        return ready


class Link:
    """One end.  `numbered` messages given to `push` keep their own (durable) numbers, else the link counts."""

    def __init__(
        self, carrier: Carrier, incarnation: int, resend_after_s: float = 1.0, window: int = 256
    ) -> None:
        self.carrier = carrier
        self._incarnation = incarnation
        self._resend_after_s = resend_after_s
        self._window = window
        self._unacked: dict[int, tuple[bytes, float]] = {}  # number -> (body, last sent at; -inf: never)
        self._last_pushed = 0
        self._peer = 0  # the other side's incarnation
        self._taken = 0  # highest number received in order
        self._acked_to_peer = (0, 0)

    def push(self, body: bytes, seq: int | None = None) -> None:
        self._last_pushed = seq if seq is not None else self._last_pushed + 1
        self._unacked[self._last_pushed] = (body, float("-inf"))

    def forget(self) -> None:
        """What was not acknowledged is never sent again; the other side goes on with what is pushed next."""
        self._unacked.clear()

    @property
    def unacknowledged(self) -> int:
        return len(self._unacked)

    @property
    def last_pushed(self) -> int:
        return self._last_pushed

    def flush(self, now_s: float) -> None:
        """Send what is new or was not acknowledged in time, at most a window of it."""
        base = next(iter(self._unacked), self._last_pushed + 1)
        sent = False
        for seq in list(self._unacked)[: self._window]:
            body, at_s = self._unacked[seq]
            if now_s >= at_s + self._resend_after_s:
                self._unacked[seq] = (body, now_s)
                self._send(base, seq, body)
                sent = True
        if not sent and self._acked_to_peer != (self._peer, self._taken):
            self._send(base, 0, b"")

    def _send(self, base: int, seq: int, body: bytes) -> None:
        self._acked_to_peer = (self._peer, self._taken)
        frame = Frame(self._incarnation, base, seq, self._peer, self._taken, body)
        self.carrier.send(msgspec.msgpack.encode(frame))

    def receive(self) -> list[tuple[int, bytes]]:
        """(number, body) of what arrived in order.  It is acknowledged by the next `flush`: commit it before."""
        out = []
        for raw in self.carrier.receive():
            try:
                frame = msgspec.msgpack.decode(raw, type=Frame)
            except msgspec.MsgspecError:
                continue  # a damaged frame is a lost frame: it is sent again
            if frame.ack_of > self._incarnation:
                self._incarnation = frame.ack_of + 1  # an earlier life of this end is remembered over there
                self._unacked = {seq: (body, float("-inf")) for seq, (body, _) in self._unacked.items()}
            if frame.incarnation < self._peer:
                self._acked_to_peer = (-1, -1)  # a restored store counts lower than we have heard: tell it
                continue
            if frame.incarnation > self._peer:
                self._peer, self._taken = frame.incarnation, frame.base - 1
            if frame.ack_of == self._incarnation:
                self._drop_taken(frame.ack)
            if frame.seq == 0:
                continue
            if (
                frame.base > self._taken + 1
            ):  # what lies between was acknowledged by an earlier run of this side
                self._taken = frame.base - 1
            if frame.seq == self._taken + 1:
                self._taken = frame.seq
                out.append((frame.seq, frame.body))
            else:
                self._acked_to_peer = (-1, -1)  # a repeat: its acknowledgement was lost, say it again
        return out

    def _drop_taken(self, ack: int) -> None:
        taken = [seq for seq in self._unacked if seq <= ack]
        for seq in taken:
            del self._unacked[seq]
        if taken and next(iter(self._unacked), ack + 1) != ack + 1:
            # numbers were left out behind it: what was sent after them came too early
            self._unacked = {seq: (body, float("-inf")) for seq, (body, _) in self._unacked.items()}

    @property
    def acknowledged(self) -> int:
        """The highest number the other side has taken."""
        return next(iter(self._unacked), self._last_pushed + 1) - 1

    def next_send_s(self) -> float | None:
        """When `flush` has something to send again; None when all was acknowledged."""
        if not self._unacked:
            return None
        return min(at_s for _, at_s in self._unacked.values()) + self._resend_after_s

    def heard_from(self) -> int:
        """The other side's incarnation; 0 when nothing was heard yet."""
        return self._peer

"""Another board as an engine, and the child's end of the same channel.  Both see only bytes."""

from collections.abc import Iterable
from dataclasses import replace

from qipan.channel import Carrier, Link
from qipan.events import (
    Command,
    CommandReceived,
    Fact,
    Message,
    Renew,
    Reserve,
    Resize,
    Start,
    Stop,
    TakeCensus,
    decode,
    encode,
)
from qipan.leases import EngineId

#: commands that a child did not take; one that is slower is dropped to a snapshot: they are forgotten, and a census
#: says what it holds
COMMANDS_MAX = 200_000


class BoardEngine:
    """The parent's end.  Reports of the child carry the child's durable numbers; they are taken in order and
    acknowledged when `observe` is called with a higher `after`, which the controller does once they are stored."""

    def __init__(self, engine: EngineId, carrier: Carrier, incarnation: int) -> None:
        self.engine = engine
        self._link = Link(carrier, incarnation)
        self._waiting: list[tuple[int, Fact]] = []
        self._taken = 0
        self._child_start = 0
        self._behind = False

    def reserve(self, command: Reserve) -> None:
        self._send(command)

    def start(self, command: Start) -> None:
        self._send(command)

    def resize(self, command: Resize) -> None:
        self._send(command)

    def stop(self, command: Stop) -> None:
        self._send(command)

    def renew(self, command: Renew) -> None:
        self._send(command)

    def census(self, command: TakeCensus) -> None:
        self._send(replace(command, taken=self._taken))

    def _send(self, command: Command) -> None:
        self._link.push(encode(command))
        if self._link.unacknowledged > COMMANDS_MAX:
            self._link.forget()
            self._behind = True

    def observe(self, after: int) -> list[tuple[int, Fact]]:
        self._taken = after
        for seq, body in self._link.receive():
            message = decode(body)
            assert isinstance(message, Fact)
            self._waiting.append((seq, message))
        if not self._waiting:
            return []
        self._waiting = [(seq, fact) for seq, fact in self._waiting if seq > after]
        return list(self._waiting)

    def started_again(self) -> bool:
        """Whether the child began anew since the last call (its first sign of life does not count), or was so slow that
        its commands were dropped: either way it is asked what it holds."""
        behind, self._behind = self._behind, False
        before, self._child_start = self._child_start, self._link.heard_from()
        return behind or before not in (0, self._child_start)

    @property
    def waiting(self) -> int:
        """Commands that the child has not taken yet."""
        return self._link.unacknowledged

    def flush(self, now_s: float) -> float | None:
        """Send and acknowledge.  Called after what `observe` gave was stored.  Returns when to call again."""
        self._link.flush(now_s)
        return self._link.next_send_s()


class ParentLink:
    """The child's end: reports go up with their numbers from the store, commands come down."""

    def __init__(self, carrier: Carrier, incarnation: int) -> None:
        self._link = Link(carrier, incarnation)
        self._waiting: list[Message] = []

    def report(self, numbered: Iterable[tuple[int, bytes]]) -> None:
        for seq, body in numbered:
            if seq > self._link.last_pushed:
                self._link.push(body, seq)

    def commands(self) -> list[CommandReceived]:
        """Commands that arrived since the last call, in order."""
        received = []
        for _, body in self._link.receive():
            message = decode(body)
            assert not isinstance(message, Fact)
            received.append(CommandReceived(message))
        return received

    def flush(self, now_s: float) -> float | None:
        """Send and acknowledge.  Called after what `commands` gave was stored.  Returns when to call again."""
        self._link.flush(now_s)
        return self._link.next_send_s()

    @property
    def waiting(self) -> int:
        """Reports that the parent has not taken yet."""
        return self._link.unacknowledged

    @property
    def acknowledged(self) -> int:
        return self._link.acknowledged

"""What a board places tasks on.  One small interface; local, slurm, ray, kubernetes, another board, and their
fake and peer: simulated."""

from typing import Protocol

from qipan.events import Fact, Renew, Reserve, Resize, Start, Stop, TakeCensus
from qipan.leases import EngineId


class Engine(Protocol):
    """Commands return nothing: what came of them is a fact.  Every command may arrive twice; one with a
    (term, generation) not above the task's last is ignored.  Leases lapse by themselves: the task is
    parked (checkpoint, stop) a little earlier, and nothing of it runs once the lease is over.  A command that names a lease the engine does not hold is answered by
    LeaseRefused.  Facts are numbered by the engine from 1 without gaps, survive
    its restart, and may be asked for again."""

    engine: EngineId

    def reserve(self, command: Reserve) -> None:
        """Hold `command.needs`, all or nothing.  Answered by LeaseGranted or LeaseRefused."""
        ...

    def start(self, command: Start) -> None:
        """Run inside the lease.  Answered by TaskStarted, then TaskProgress, and one TaskExited per attempt."""
        ...

    def resize(self, command: Resize) -> None:
        """Checkpoint, stop, and start the next attempt at the new point.  Answered by TaskExited("resized") and
        TaskStarted; devices above the new point's are free once the exit is reported."""
        ...

    def stop(self, command: Stop) -> None:
        """Answered by TaskExited("parked" or "cancelled"); the lease is given back."""
        ...

    def renew(self, command: Renew) -> None: ...

    def census(self, command: TakeCensus) -> None:
        """Answered by TasksHeld, after the facts of everything that happened before."""
        ...

    def observe(self, after: int) -> list[tuple[int, Fact]]:
        """The facts numbered above `after`, in order.  The first is always an EngineOffered; another follows
        when what can be had changes (failed devices, a child's asks)."""
        ...

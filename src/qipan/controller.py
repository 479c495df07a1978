"""The loop of a board, and the only one: gather facts, decide, store, then let commands go.

Facts, the tick and its decision are stored in one transaction before any command leaves.  After a crash the state
is built again from the newest snapshot and the ticks after it, and every engine is asked what it holds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import msgspec

from qipan.clock import Clock
from qipan.engines import Engine
from qipan.engines.board import BoardEngine, ParentLink
from qipan.errors import QipanError
from qipan.events import (
    BoardStarted,
    Command,
    CommandReceived,
    EngineAttached,
    Fact,
    Renew,
    Reserve,
    Resize,
    Start,
    Stop,
    TakeCensus,
    decode,
    encode,
)
from qipan.hardware import BoardId
from qipan.leases import EngineId, TaskId
from qipan.ledger import Transfer
from qipan.release import RELEASE
from qipan.scheduler import Decision, Moment, Settings, State, decide
from qipan.scheduler.snapshot import decode_state, encode_state
from qipan.store import Store, StoredFact, StoredTick

KEPT_EVERY_S = 86_400.0  # so far apart are the snapshots from which replay may begin
FACTS_A_TICK = 200  # so many facts count as a tick towards the next snapshot
HERE = "here"
PARENT = "parent"


class Bookkeeper(Protocol):
    """Turns facts into ledger postings at the topmost board.  Its state is rebuilt by replay."""

    def postings(self, fact: Fact, now_s: float) -> Sequence[Transfer]: ...

    def task_over(self, task_id: TaskId) -> Sequence[Transfer]: ...

    def due(self, now_s: float) -> Sequence[Fact]:
        """Facts that follow from the books by time alone: a budget that is nearly spent."""
        ...

    def next_due_s(self) -> float | None: ...

    def encode(self) -> bytes: ...

    def restore(self, body: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`state` as `scheduler.snapshot` writes it."""

    state: msgspec.Raw
    books: bytes


class Controller:
    def __init__(
        self,
        board: BoardId,
        store: Store,
        clock: Clock,
        engines: Mapping[EngineId, Engine],
        parent: ParentLink | None = None,
        settings: Settings = Settings(),  # noqa: B008  (frozen)
        books: Bookkeeper | None = None,
        snapshot_every: int = 500,
    ) -> None:
        self.board = board
        self.store = store
        self.clock = clock
        self.engines = dict(sorted(engines.items()))
        self.parent = parent
        self.books = books
        self.state = State(board, settings, top=parent is None)
        store.put("settings", msgspec.json.encode({"settings": settings, "top": parent is None}).decode())
        self._snapshot_every = snapshot_every
        self._inbox: list[Fact] = []
        self._wake_s: float | None = None
        self._since_snapshot = [0, 0]  # ticks, facts
        self._failed: Exception | None = None  # what is in memory may be ahead of what is stored
        self._recover()
        same_boot = store.get("boot_id") in (None, clock.boot_id())
        store.put("boot_id", clock.boot_id())
        self.accept(BoardStarted(tuple(self.engines), same_boot, int(store.get("reign") or "0")))
        #: hears of each tick: (this board, its facts, what was decided, when, how long it took in seconds)
        self.on_tick: Callable[[Controller, Sequence[Fact], Decision, float, float], None] | None = None
        self.settle: Callable[[], None] = lambda: None  # waits until what was stored is stored elsewhere, too

    # ---- one step --------------------------------------------------------------------------------------------------

    def accept(self, fact: Fact) -> None:
        """Take a fact from people; it is durable after the next `step`."""
        self._inbox.append(fact)

    def attach(self, engine: Engine) -> None:
        """An engine joins while the board runs; it is asked what it holds first."""
        self.engines = dict(sorted({**self.engines, engine.engine: engine}.items()))
        self.accept(EngineAttached(engine.engine))

    def step(self) -> bool:
        """Gather, decide, store, send.  Returns whether there was anything to decide on.  After a step that failed nothing is decided
        from what is in memory: every further one raises the same, until the board is started from its store."""
        if self._failed is not None:
            raise self._failed
        try:
            return self._step()
        except Exception as error:
            self._failed = error
            raise

    def _step(self) -> bool:
        moment = Moment(self.clock.now_s(), self.clock.lease_s())
        if self.books is not None:
            self._inbox += self.books.due(moment.now_s)
        gathered = self._gather()
        due = self._wake_s is not None and moment.now_s >= self._wake_s
        if gathered or due:
            self._tick(gathered, moment)
        self._flush(moment)
        return bool(gathered) or due

    @property
    def wake_s(self) -> float | None:
        """When `step` has something to do by time alone."""
        books_s = self.books.next_due_s() if self.books is not None else None
        times = [time_s for time_s in (self._wake_s, self._resend_s, books_s) if time_s is not None]
        return min(times) if times else None

    _resend_s: float | None = None

    def _gather(self) -> list[tuple[str, int, Fact]]:
        """(source, the source's number, fact)."""
        gathered: list[tuple[str, int, Fact]] = []
        for name, engine in self.engines.items():
            gathered += [(name, seq, fact) for seq, fact in engine.observe(self.store.cursor(name))]
            if isinstance(engine, BoardEngine) and engine.started_again():
                self.accept(EngineAttached(name))
        if self.parent is not None:
            above = self.store.cursor(PARENT)
            for i, command in enumerate(self.parent.commands()):
                gathered.append((PARENT, above + 1 + i, command))
                if isinstance(command.command, TakeCensus):
                    self.store.number_reports_after(command.command.taken)
        here = self.store.cursor(HERE)
        gathered += [(HERE, here + 1 + i, fact) for i, fact in enumerate(self._inbox)]
        self._inbox.clear()
        return gathered

    def _tick(self, gathered: Sequence[tuple[str, int, Fact]], moment: Moment) -> None:
        began_s = perf_counter()
        facts = [fact for _, _, fact in gathered]
        decision = decide(self.state, facts, moment)
        cause = f"{self.board}/{decision.tick}"
        stored = [
            StoredFact(source, seq, fact.kind, task_of(fact), encode(fact, cause))
            for source, seq, fact in gathered
        ]
        tick = StoredTick(decision.tick, moment.now_s, moment.lease_s, self.clock.boot_id(), b"", ())
        reports = [encode(report, cause) for report in decision.reports]
        body = encode_decision(decision)
        tick = StoredTick(decision.tick, moment.now_s, moment.lease_s, self.clock.boot_id(), body, ())
        transfers = self._transfers(facts, decision, moment.now_s)
        numbers = self.store.record(stored, tick, reports, decision.reasons, transfers)
        self.settle()
        self._wake_s = decision.wake_s
        if self.parent is not None:
            self.parent.report(zip(numbers, reports, strict=True))
        for sent in decision.commands:
            deliver(self.engines[sent.engine], sent.command)
        self._since_snapshot[0] += 1
        self._since_snapshot[1] += len(facts)
        if self.on_tick is not None:
            self.on_tick(self, facts, decision, moment.now_s, perf_counter() - began_s)
        if self._snapshot_is_due():
            self.snapshot(keep=moment.now_s - self._kept_s >= KEPT_EVERY_S)

    def _snapshot_is_due(self) -> bool:
        """After so many ticks or facts, but a large state only when there is a quarter as much to say anew: a restart reads no
        more than that beside the snapshot."""
        ticks, facts = self._since_snapshot
        many = ticks >= self._snapshot_every or facts >= self._snapshot_every * FACTS_A_TICK
        return many and facts * 4 >= len(self.state.tasks)

    def _transfers(self, facts: Sequence[Fact], decision: Decision, now_s: float) -> list[Transfer]:
        if self.books is None:
            return []
        transfers = [transfer for fact in facts for transfer in self.books.postings(fact, now_s)]
        for task_id, _ in decision.ended:
            transfers += self.books.task_over(task_id)
        return transfers

    def _flush(self, moment: Moment) -> None:
        times = [
            engine.flush(moment.now_s) for engine in self.engines.values() if isinstance(engine, BoardEngine)
        ]
        if self.parent is not None:
            times.append(self.parent.flush(moment.now_s))
            self.store.forget_reports(self.parent.acknowledged)
        self._resend_s = min((time_s for time_s in times if time_s is not None), default=None)

    # ---- start again -----------------------------------------------------------------------------------------------

    def snapshot(self, *, keep: bool = False) -> None:
        """`keep`: replay may begin here, after what was before is forgotten or when another release decided it.  None is taken after a
        step that failed: it would hold a tick that was not stored, and replay would pass over its facts and charges."""
        if self._failed is not None:
            return
        books = self.books.encode() if self.books else b""
        body = msgspec.msgpack.encode(Snapshot(msgspec.Raw(encode_state(self.state)), books))
        now_s = self.store.latest_now_s()
        self.store.save_snapshot(self.state.tick, body, now_s, keep=keep)
        self._since_snapshot = [0, 0]
        if keep:
            self._kept_s = now_s

    def _recover(self) -> None:
        found = self.store.snapshot()
        if found is not None:
            snapshot = msgspec.msgpack.decode(found[1], type=Snapshot)
            self.state = decode_state(bytes(snapshot.state))
            if self.books is not None:
                self.books.restore(snapshot.books)
        for tick in self.store.ticks(after=self.state.tick):
            decision = replay_tick(self.state, tick)
            if self.books is not None:
                self._transfers([fact_of(body) for body in tick.facts], decision, tick.now_s)
            self._wake_s = decision.wake_s
        kept = self.store.snapshots()
        self._kept_s = max((one.now_s for one in kept if one.kept), default=self.store.first_now_s())
        if self.store.last_release() not in ("", RELEASE):
            self.snapshot(keep=True)  # what comes is decided by another release
        if self.parent is not None:
            self.parent.report(self.store.reports_after(0, most=1_000_000))


def deliver(engine: Engine, command: Command) -> None:
    match command:
        case Reserve():
            engine.reserve(command)
        case Start():
            engine.start(command)
        case Resize():
            engine.resize(command)
        case Stop():
            engine.stop(command)
        case Renew():
            engine.renew(command)
        case TakeCensus():
            engine.census(command)


# ---- replay ----------------------------------------------------------------------------------------------------------


def replay_tick(state: State, tick: StoredTick) -> Decision:
    """Decide again from stored facts.  Raises QipanError when the commands are not the stored ones, byte for byte, those of another
    release as this one reads them."""
    facts = [fact_of(body) for body in tick.facts]
    decision = decide(state, facts, Moment(tick.now_s, tick.lease_s))
    again = encode_decision(decision)
    if again != tick.decision and again != as_read_now(tick.decision):
        raise QipanError(
            f"board {state.board}, tick {tick.tick}: deciding again gave other commands than stored;"
            " the store was written by another release, or a decision read something that is not a fact.\n"
            f"  stored: {tick.decision[:600]!r}\n  again:  {again[:600]!r}"
        )
    return decision


def verify(store: Store, board: BoardId, settings: Settings, *, top: bool) -> int:
    """Replay all ticks of a store, from the beginning or from the kept snapshot where what is not forgotten begins;
    returns the number that gave the same commands.  Raises QipanError at the first tick that differs.  Ticks that an
    earlier release decided otherwise are passed over up to the next snapshot, and not counted."""
    state, count, passed = State(board, settings, top=top), 0, 0
    snapshots = {snapshot.tick: snapshot.body for snapshot in store.snapshots()}
    first = store.first_tick()
    if first > 1:
        if first - 1 not in snapshots:
            raise QipanError(
                f"board {board} begins at tick {first} without a snapshot before it; restore a backup"
            )
        state = state_in(snapshots[first - 1])
    for tick in store.ticks():
        if tick.tick <= passed:
            continue
        try:
            replay_tick(state, tick)
            count += 1
        except QipanError:
            later = [number for number in snapshots if number >= tick.tick]
            if tick.written_by == RELEASE or not later:
                raise
            passed = min(later)
            state = state_in(snapshots[passed])
    return count


def state_in(snapshot: bytes) -> State:
    return decode_state(bytes(msgspec.msgpack.decode(snapshot, type=Snapshot).state))


def fact_of(body: bytes) -> Fact:
    message = decode(body)
    assert isinstance(message, Fact), f"{message} is no fact"
    return message


def encode_decision(decision: Decision) -> bytes:
    """Stable bytes of a decision: what `--verify` compares."""
    return msgspec.json.encode(
        (
            decision.board,
            decision.term,
            decision.tick,
            [(sent.engine, msgspec.Raw(encode(sent.command))) for sent in decision.commands],
            [msgspec.Raw(encode(report)) for report in decision.reports],
            decision.reasons,
            decision.ended,
            decision.wake_s,
        )
    )


def as_read_now(stored: bytes) -> bytes:
    """A stored decision as this release writes it: fields that came since have their defaults."""
    board, term, tick, commands, reports, reasons, ended, wake_s = msgspec.json.decode(stored, type=_Stored)
    return msgspec.json.encode(
        (
            board,
            term,
            tick,
            [(engine, msgspec.Raw(encode(decode(bytes(command))))) for engine, command in commands],
            [msgspec.Raw(encode(decode(bytes(report)))) for report in reports],
            reasons,
            ended,
            wake_s,
        )
    )


_Stored = tuple[
    str, int, int, list[tuple[str, msgspec.Raw]], list[msgspec.Raw], msgspec.Raw, msgspec.Raw, msgspec.Raw
]


def task_of(fact: Fact) -> str:
    if isinstance(fact, CommandReceived):
        return "" if isinstance(fact.command, Renew | TakeCensus) else fact.command.task_id
    order = getattr(fact, "order", None)
    return str(order.task_id if order is not None else getattr(fact, "task_id", ""))


__all__ = ["Bookkeeper", "Controller", "verify"]

"""A model of the protocol between boards, small enough to be searched whole: one board over two, two tasks, links that are
cut, boards that crash.  The boards' code is `decide` itself; only links, time and engines are modelled.

A state holds every board's state as bytes, what each engine runs, and what is under way on each link.  From each state the search
goes every way: any link's next message is delivered, a link is cut (one way or both) or heals, a board crashes and starts again, or, when no
message can be delivered, time goes on by one.  Messages on a link keep their order and arrive once (`channel`
sees to that, and has its own tests); a crash of the parent loses its commands that had not arrived, reports are durable.

never    a task runs at two engines at one time
never    a task that was submitted is gone
always   every path ends with both tasks over, within the horizon: progress when the link heals
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from qipan.curves import Curve, Need, Point
from qipan.events import (
    BoardStarted,
    Command,
    CommandReceived,
    EngineAttached,
    EngineOffered,
    Fact,
    HeldTask,
    LeaseGranted,
    LeaseRefused,
    Renew,
    Reserve,
    Resize,
    Start,
    Stop,
    TakeCensus,
    TaskExited,
    TasksHeld,
    TaskStarted,
    TaskSubmitted,
    decode,
    encode,
)
from qipan.hardware import BoardId, ChipClassId
from qipan.leases import EngineId, LeaseId, Offer, Order, TaskId, Usage
from qipan.scheduler import Moment, Settings, State, decide
from qipan.scheduler.snapshot import decode_state, encode_state

CHIP = ChipClassId("sim/a")
TOP, LEFT, RIGHT = 0, 1, 2
NAMES = ("top", "left", "right")
CLOCKS = (0.0, 1000.0, 5000.0)  # no two boards' lease clocks agree
MODEL = Settings(lease_s=4.0, margin_s=1.0, retry_s=1.0)
HEAL_BY = 11  # a cut lasts no longer than until then
HORIZON = 40
END = b"again"  # stands on a link where a board's restart is heard


@dataclass(frozen=True, slots=True)
class Held:
    """One lease at an engine; `began` None: not started.  Times are the world's."""

    lease_id: LeaseId
    order: Order
    generation: int
    until: float
    attempt: int = 0
    began: float | None = None


@dataclass(frozen=True, slots=True)
class Leaf:
    """An engine with one device.  `last`: task -> the (term, generation) of its last command; `over`: what ended."""

    held: tuple[tuple[TaskId, Held], ...] = ()
    last: tuple[tuple[TaskId, tuple[int, int]], ...] = ()
    over: tuple[TaskId, ...] = ()


@dataclass(frozen=True, slots=True)
class World:
    """`down` and `up`: by child, what is under way.  `cut`: (child, downwards, upwards) or None."""

    now: int
    boards: tuple[bytes, bytes, bytes]
    leaves: tuple[Leaf, Leaf]
    down: tuple[tuple[bytes, ...], tuple[bytes, ...]] = ((), ())
    up: tuple[tuple[bytes, ...], tuple[bytes, ...]] = ((), ())
    cut: tuple[int, bool, bool] | None = None
    cuts_left: int = 1
    crashes_left: int = 1


@dataclass(frozen=True, slots=True)
class Searched:
    """`violation` "" when there was none; else `path` leads to it."""

    states: int
    violation: str
    path: tuple[str, ...] = ()


def search(settings: Settings = MODEL, *, cuts: int = 1, crashes: int = 1, most: int = 2_000_000) -> Searched:
    """Every state that can be reached.  Depth first, so that a violation is met early."""
    model = Model(settings)
    first = replace(model.begin(), cuts_left=cuts, crashes_left=crashes)
    before: dict[World, tuple[World, str] | None] = {first: None}
    waiting = [first]
    while waiting:
        world = waiting.pop()
        violation = model.violation(world)
        if violation:
            return Searched(len(before), violation, _path(before, world))
        for name, after in model.ways(world):
            if after not in before:
                before[after] = (world, name)
                waiting.append(after)
        if len(before) > most:
            return Searched(len(before), f"more than {most} states: the search was not exhausted")
    return Searched(len(before), "")


def _path(before: dict[World, tuple[World, str] | None], world: World) -> tuple[str, ...]:
    steps = []
    while (came := before[world]) is not None:
        world, name = came
        steps.append(f"{world.now}: {name}")
    return tuple(reversed(steps))


#: (a board's new state, its engine, reports upward, commands by child)
Ticked = tuple[bytes, Leaf, tuple[bytes, ...], tuple[tuple[int, bytes], ...]]


class Model:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tasks = {TaskId("one"): 6.0, TaskId("two"): 2.0}  # -> how long it runs
        self._ticked: dict[tuple[int, int, bytes, Leaf, tuple[bytes, ...]], Ticked] = {}
        self._tops: dict[bytes, tuple[frozenset[TaskId], frozenset[TaskId]]] = {}

    def begin(self) -> World:
        """Both children attached and idle, both tasks just submitted at the top."""
        boards = tuple(
            encode_state(State(BoardId(name), self.settings, top=i == TOP)) for i, name in enumerate(NAMES)
        )
        world = World(0, boards, (Leaf(), Leaf()))  # type: ignore[arg-type]
        for child in (LEFT, RIGHT):
            offer = Offer(CHIP, 1, (), 1, 1_000_000, NAMES[child], "")
            world = self._feed(
                world, child, [BoardStarted((self._engine(child),), True), EngineOffered(self._engine(child), (offer,), False)]
            )  # fmt: skip
        world = self._feed(world, TOP, [BoardStarted((EngineId("left"), EngineId("right")), True)])
        world = self._settle(world)
        orders = [self._order(task_id) for task_id in self.tasks]
        return self._feed(world, TOP, [TaskSubmitted(order, 0) for order in orders])

    def _order(self, task_id: TaskId) -> Order:
        curve = Curve((Point("p", (Need(CHIP, 1),), 1.0, 1.0, 1.0, 0.0, 0.0),), self.tasks[task_id])
        wish = "restart" if task_id == "one" else "wait"
        return Order(task_id, "me", task_id, curve, 2_000_000, 0.0, on_partition=wish, preemptible=False)

    # ---- where it can go -----------------------------------------------------------------------------------------------

    def ways(self, world: World) -> Iterator[tuple[str, World]]:
        if self.over(world):
            return
        quiet = True
        for child in (LEFT, RIGHT):
            if world.down[child - 1] and not _is_cut(world, child, down=True):
                quiet = False
                yield f"to {NAMES[child]}", self._deliver_down(world, child)
            if world.up[child - 1] and not _is_cut(world, child, down=False):
                quiet = False
                yield f"from {NAMES[child]}", self._deliver_up(world, child)
        if world.cuts_left and world.cut is None:
            for child in (LEFT, RIGHT):
                for down, up in ((True, True), (True, False), (False, True)):
                    way = "both ways" if down and up else "down" if down else "up"
                    yield (
                        f"cut {NAMES[child]} {way}",
                        replace(world, cut=(child, down, up), cuts_left=world.cuts_left - 1),
                    )
        if world.cut is not None and quiet:
            yield "heal", replace(world, cut=None)
        if world.crashes_left:
            for board in (TOP, LEFT, RIGHT):
                yield f"crash {NAMES[board]}", self._crash(world, board)
        if quiet and world.now < (HORIZON if world.cut is None else HEAL_BY):
            yield "time", self._time(world)

    def over(self, world: World) -> bool:
        return len(self._known(world)[1]) == len(self.tasks)

    def _known(self, world: World) -> tuple[frozenset[TaskId], frozenset[TaskId]]:
        """(live tasks, tasks that are over) at the top."""
        body = world.boards[TOP]
        if body not in self._tops:
            top = decode_state(body)
            self._tops[body] = frozenset(top.tasks), frozenset(top.over)
        return self._tops[body]

    def violation(self, world: World) -> str:
        running = [
            {task_id for task_id, held in leaf.held if held.began is not None} for leaf in world.leaves
        ]
        twice = running[0] & running[1]
        if twice:
            return f"{sorted(twice)[0]} runs at both engines at {world.now}"
        live, over = self._known(world)
        gone = [task_id for task_id in self.tasks if task_id not in live | over]
        if gone:
            return f"{gone[0]} is lost at {world.now}"
        if world.now >= HORIZON:
            return f"no end by {HORIZON}: only {sorted(over)} are over"
        return ""

    def _deliver_down(self, world: World, child: int) -> World:
        queue = world.down[child - 1]
        command = decode(queue[0])
        assert not isinstance(command, Fact)
        world = replace(world, down=_with(world.down, child, queue[1:]))
        return self._feed(world, child, [CommandReceived(command)])

    def _deliver_up(self, world: World, child: int) -> World:
        queue = world.up[child - 1]
        world = replace(world, up=_with(world.up, child, queue[1:]))
        if queue[0] == END:
            return self._feed(world, TOP, [EngineAttached(EngineId(NAMES[child]))])
        fact = decode(queue[0])
        assert isinstance(fact, Fact)
        return self._feed(world, TOP, [fact])

    def _crash(self, world: World, board: int) -> World:
        """Its state is in its store; commands that were on their way from it are gone."""
        world = replace(world, crashes_left=world.crashes_left - 1)
        if board == TOP:
            world = replace(world, down=((), ()))
            return self._feed(world, TOP, [BoardStarted((EngineId("left"), EngineId("right")), True)])
        world = replace(world, up=_with(world.up, board, (*world.up[board - 1], END)))
        return self._feed(world, board, [BoardStarted((self._engine(board),), True)])

    def _time(self, world: World) -> World:
        world = replace(world, now=world.now + 1)
        for child in (LEFT, RIGHT):
            leaf, facts = self._advance(world.leaves[child - 1], child, world.now)
            world = replace(world, leaves=_with(world.leaves, child, leaf))
            world = self._feed(world, child, facts)
        return self._feed(world, TOP, [])

    def _settle(self, world: World) -> World:
        """Deliver all, in a fixed order."""
        while any(world.down) or any(world.up):
            for child in (LEFT, RIGHT):
                if world.down[child - 1]:
                    world = self._deliver_down(world, child)
                if world.up[child - 1]:
                    world = self._deliver_up(world, child)
        return world

    # ---- a board's tick ------------------------------------------------------------------------------------------------

    def _feed(self, world: World, board: int, facts: list[Fact]) -> World:
        """Decide on the facts, and on those with which the board's own engine answers at once."""
        leaf = world.leaves[board - 1] if board != TOP else Leaf()
        key = (board, world.now, world.boards[board], leaf, tuple(encode(fact) for fact in facts))
        ticked = self._ticked.get(key)
        if ticked is None:  # many ways lead to the same tick
            ticked = self._ticked[key] = self._tick(board, world.now, world.boards[board], leaf, facts)
        body, leaf, reports, commands = ticked
        world = replace(world, boards=_at(world.boards, board, body))
        if board != TOP:
            up = _with(world.up, board, (*world.up[board - 1], *reports))
            return replace(world, leaves=_with(world.leaves, board, leaf), up=up)
        for child, command in commands:
            world = replace(world, down=_with(world.down, child, (*world.down[child - 1], command)))
        return world

    def _tick(self, board: int, now: int, body: bytes, leaf: Leaf, facts: list[Fact]) -> Ticked:
        moment = Moment(float(now), now + CLOCKS[board])
        reports, commands = list[bytes](), list[tuple[int, bytes]]()
        while True:
            state = decode_state(body)
            decision = decide(state, facts, moment)
            state.tick = 0
            body, facts = encode_state(state), []
            reports += [encode(report) for report in decision.reports]
            for sent in decision.commands:
                if board == TOP:
                    commands.append((NAMES.index(sent.engine), encode(sent.command)))
                else:
                    leaf, answers = self._obey(leaf, board, sent.command, now)
                    facts += answers
            if not facts:
                return body, leaf, tuple(reports), tuple(commands)

    # ---- the engine ----------------------------------------------------------------------------------------------------

    def _engine(self, child: int) -> EngineId:
        return EngineId(f"{NAMES[child]}-engine")

    def _obey(self, leaf: Leaf, child: int, command: Command, now: int) -> tuple[Leaf, list[Fact]]:
        engine, held, last = self._engine(child), dict(leaf.held), dict(leaf.last)
        if isinstance(command, TakeCensus):
            entries = tuple(
                HeldTask(
                    entry.order, entry.lease_id, entry.generation, entry.attempt or entry.order.attempt,
                    entry.began is not None, "p", (Need(CHIP, 1),), engine, 0.0, 0.0, entry.until - now,
                )
                for entry in held.values()
            )  # fmt: skip
            term = max((term for _, (term, _) in leaf.last), default=0)
            over = tuple((task_id, "done") for task_id in leaf.over)
            return leaf, [TasksHeld(engine, term, command.asked_lease_s, entries, over)]
        if isinstance(command, Renew):
            for task_id, entry in held.items():
                if entry.lease_id in command.lease_ids:
                    held[task_id] = replace(entry, until=now + command.duration_s)
            return replace(leaf, held=tuple(held.items())), []
        task_id = command.task_id
        if (command.term, command.generation) <= last.get(task_id, (0, 0)):
            return leaf, []
        last[task_id] = (command.term, command.generation)
        leaf = replace(leaf, last=tuple(sorted(last.items())))
        known = held.get(task_id)
        if isinstance(command, Reserve):
            if held:
                why = LeaseRefused(
                    task_id, command.lease_id, engine, command.generation, "the device is taken"
                )
                return leaf, [why]
            held[task_id] = Held(
                command.lease_id, command.order, command.generation, now + command.duration_s
            )
            granted = LeaseGranted(task_id, command.lease_id, engine, command.generation, command.needs)
            return replace(leaf, held=tuple(held.items())), [granted]
        if known is None or known.lease_id != command.lease_id:
            return leaf, [
                LeaseRefused(task_id, command.lease_id, engine, command.generation, "no such lease")
            ]
        if isinstance(command, Start):
            began = replace(known, generation=command.generation, attempt=command.attempt, began=float(now))
            held[task_id] = began
            started = TaskStarted(
                task_id,
                known.lease_id,
                engine,
                command.generation,
                command.attempt,
                "p",
                (Need(CHIP, 1),),
                engine,
            )
            return replace(leaf, held=tuple(held.items())), [started]
        assert isinstance(command, Stop), f"{Resize} of a task with one point"
        del held[task_id]
        leaf = replace(leaf, held=tuple(held.items()))
        if known.began is None:
            return leaf, [LeaseRefused(task_id, known.lease_id, engine, command.generation, "released")]
        how = "parked" if command.park else "cancelled"
        return leaf, [self._exit(replace(known, generation=command.generation), child, how, float(now))]

    def _advance(self, leaf: Leaf, child: int, now: int) -> tuple[Leaf, list[Fact]]:
        """What ends by itself: a task that is done, or one whose lease is over."""
        kept, facts, over = [], list[Fact](), leaf.over
        for task_id, held in leaf.held:
            if held.began is not None and now >= held.began + self.tasks[task_id] and now <= held.until:
                facts.append(self._exit(held, child, "done", float(now)))
                over = (*over, task_id)
            elif now >= held.until:
                facts.append(
                    self._exit(held, child, "parked", held.until)
                    if held.began is not None
                    else LeaseRefused(
                        task_id, held.lease_id, self._engine(child), held.generation, "it lapsed"
                    )
                )
            else:
                kept.append((task_id, held))
        return replace(leaf, held=tuple(kept), over=over), facts

    def _exit(self, held: Held, child: int, how: str, at_s: float) -> TaskExited:
        task_id, done_s = held.order.task_id, self.tasks[held.order.task_id] if how == "done" else 0.0
        assert held.began is not None
        usage = Usage(
            task_id, held.attempt, NAMES[child], self._engine(child), CHIP, 1, "p", held.began, at_s, at_s - held.began, True
        )  # fmt: skip
        return TaskExited(
            task_id, held.lease_id, self._engine(child), held.generation, held.attempt, how, 0, done_s, done_s, how, usage  # type: ignore[arg-type]
        )  # fmt: skip


def _is_cut(world: World, child: int, *, down: bool) -> bool:
    if world.cut is None or world.cut[0] != child:
        return False
    return world.cut[1] if down else world.cut[2]


T = TypeVar("T")


def _with(pair: tuple[T, T], child: int, value: T) -> tuple[T, T]:
    return (value, pair[1]) if child == LEFT else (pair[0], value)


def _at(boards: tuple[bytes, bytes, bytes], board: int, body: bytes) -> tuple[bytes, bytes, bytes]:
    changed = list(boards)
    changed[board] = body
    return changed[0], changed[1], changed[2]

"""The digital twin: the real controllers on a manual clock, with simulated engines at the leaves.  There is no
second scheduler here, only time, arrivals and faults."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qipan.channel import Carrier, FaultyCarrier
from qipan.clock import ManualClock, named_random
from qipan.engines.simulated import Behaviour, SimulatedEngine
from qipan.engines.topology import tiers_of
from qipan.events import LinksSet, TaskSubmitted
from qipan.forecast import Hours
from qipan.hardware import BoardId, BoardSpec
from qipan.leases import EngineId, Offer, Order, TaskId, room_of
from qipan.ledger import Books, Tariff
from qipan.ledger.books import hold_of_bid
from qipan.network import Link
from qipan.scheduler import Settings
from qipan.scheduler.moves import links_of
from qipan.store import Store
from qipan.tree import Tree, build_tree

if TYPE_CHECKING:
    from qipan.twin.check import Seen


@dataclass(frozen=True, slots=True)
class Happening:
    """Something that the world does to the boards at a time.  `act` gets the world."""

    at_s: float
    name: str
    act: "Callable[[World], None]"


@dataclass(frozen=True, slots=True)
class Faults:
    """How bad the links are; all zero for good ones."""

    lose: float = 0.0
    delay: float = 0.0
    repeat: float = 0.0


@dataclass(slots=True)
class World:
    tree: Tree
    clock: ManualClock
    happenings: list[Happening] = field(default_factory=list)
    after_step: "list[Callable[[World], None]]" = field(default_factory=list)
    steps: int = 0
    backups: dict[BoardId, Store] = field(default_factory=dict)
    restored: bool = False  # a board over others was: what only it knew of charges is gone
    gone: set[TaskId] = field(default_factory=set)  # known only to a board when its machine was lost
    services: dict[TaskId, Hours] = field(default_factory=dict)  # replicas, to be checked
    # what `check` saw last: the marks of a board with services; at a board's engine; task -> where it ran
    checked: dict[BoardId, object] = field(default_factory=dict)
    seen: "dict[BoardId, Seen]" = field(default_factory=dict)
    runs_at: dict[TaskId, BoardId] = field(default_factory=dict)

    def submit(self, order: Order, at: BoardId | None = None) -> None:
        """`at`: the board where it enters; the top keeps it."""
        order = replace(order, entered_at=str(at or ""))
        self.tree.root.accept(TaskSubmitted(order, hold_of_bid(order)))

    def simulated(self, board: BoardId) -> SimulatedEngine:
        engine = self.tree.engines[board]
        assert isinstance(engine, SimulatedEngine)
        return engine

    def run(self, until_s: float, most_steps: int = 2_000_000) -> None:
        """Until `until_s`, or until nothing more can happen."""
        self.happenings.sort(key=lambda happening: (happening.at_s, happening.name))
        while True:
            self._settle(most_steps)
            next_s = self._next_s()
            if next_s is None or next_s > until_s:
                if self.clock.now_s() < until_s and next_s is not None:
                    self.clock.advance_to(until_s)
                return
            self.clock.advance_to(max(self.clock.now_s(), next_s))
            while self.happenings and self.happenings[0].at_s <= self.clock.now_s():
                self.happenings.pop(0).act(self)

    def _settle(self, most_steps: int) -> None:
        while True:
            busy = self.tree.step()
            self.steps += 1
            for check in self.after_step:
                check(self)
            if not busy and not self._in_flight():
                return
            if self.steps > most_steps:
                raise AssertionError(f"the boards did not come to rest in {most_steps} steps")

    def _in_flight(self) -> bool:
        return any(_holds_frames(carrier) for carrier in self.tree.carriers.values())

    def _next_s(self) -> float | None:
        times = [
            engine.next_event_s()
            for engine in self.tree.engines.values()
            if isinstance(engine, SimulatedEngine)
        ]
        times += [controller.wake_s for controller in self.tree.controllers.values()]
        times += [happening.at_s for happening in self.happenings[:1]]
        known = [time_s for time_s in times if time_s is not None]
        return min(known, default=None)

    def all_over(self) -> bool:
        return all(not controller.state.tasks for controller in self.tree.controllers.values())


def build_world(
    spec: BoardSpec,
    *,
    seed: int,
    settings: Settings = Settings(),  # noqa: B008  (frozen)
    behaviour: Behaviour = Behaviour(),  # noqa: B008  (frozen)
    faults: Faults = Faults(),
    make_store: Callable[[BoardId], Store] = lambda _board: Store(None),
    start_s: float = 0.0,
    links: tuple[Link, ...] = (),
    topology: bool = False,
) -> World:
    """`topology`: engines keep which device each task has, and tell what blocks are free."""
    clock = ManualClock(start_s)

    def make_engine(board: BoardSpec) -> SimulatedEngine:
        name = EngineId(f"{board.board}-engine")
        rng = named_random(seed, f"engine/{board.board}")
        return SimulatedEngine(
            name, board.board, pool_offers(board), clock, rng, behaviour, room_of(board.stores), links_of(links),
            {pool.chip_class: tiers_of(pool) for pool in board.pools} if topology else {},
        )  # fmt: skip

    def wrap(source: BoardId, target: BoardId, carrier: Carrier) -> Carrier:
        rng: random.Random = named_random(seed, f"link/{source}/{target}")
        return FaultyCarrier(carrier, rng, faults.lose, faults.delay, faults.repeat)

    tree = build_tree(
        spec,
        clock=clock,
        make_engine=make_engine,
        make_store=make_store,
        settings=settings,
        make_books=lambda: books_of(spec),
        wrap=wrap,
    )
    if links:
        for controller in tree.controllers.values():
            controller.accept(LinksSet(links))
    return World(tree, clock)


def books_of(spec: BoardSpec) -> Books:
    """The books of the tree's owner, at the pools' posted tariffs."""
    pools = [pool for board in spec.walk() for pool in board.pools]
    return Books(
        Tariff(
            "twin",
            {f"{pool.site}|{pool.chip_class}": pool.tariff_micro_cny_per_device_hour for pool in pools},
        )
    )


def pool_offers(board: BoardSpec) -> tuple[Offer, ...]:
    """What a leaf engine with this board's pools offers."""
    return tuple(
        Offer(
            pool.chip_class, pool.devices, (), pool.devices, pool.tariff_micro_cny_per_device_hour,
            board.board, board.region,
        )
        for pool in board.pools
    )  # fmt: skip


def crash(board: BoardId) -> Callable[[World], None]:
    """The board's process dies and is started again from its store."""
    return lambda world: world.tree.start(board)


def back_up(board: BoardId) -> Callable[[World], None]:
    """Copy the board's store, for `restore`."""

    def act(world: World) -> None:
        world.backups[board] = world.tree.stores[board].copy_to(None)

    return act


def restore(board: BoardId) -> Callable[[World], None]:
    """The board's machine is lost; it starts again from its last backup, or from nothing if there is none."""

    def act(world: World) -> None:
        state = world.tree.controllers[board].state
        world.restored |= board not in world.tree.engines
        if state.top:  # a reservation that was on its way is gone with it
            others = [other.state for name, other in world.tree.controllers.items() if name != board]
            known = {task_id for other in others for task_id in (*other.tasks, *other.over)}
            world.gone |= set(state.tasks) - known
        world.tree.stores[board].close()
        world.tree.stores[board] = world.backups.pop(board) if board in world.backups else Store(None)
        world.tree.start(board)

    return act


def cut_off(board: BoardId, at_s: float, for_s: float) -> list[Happening]:
    """Nothing passes between the board and its parent for a while."""

    def cut(on: bool) -> Callable[[World], None]:
        def act(world: World) -> None:
            parent = next(
                spec.board
                for spec in world.tree.spec.walk()
                if board in [child.board for child in spec.children]
            )
            for (source, target), carrier in world.tree.carriers.items():
                if {source, target} == {board, parent} and isinstance(carrier, FaultyCarrier):
                    carrier.cut = on

        return act

    return [Happening(at_s, f"cut {board}", cut(True)), Happening(at_s + for_s, f"heal {board}", cut(False))]


def outage(board: BoardId, at_s: float, for_s: float) -> list[Happening]:
    """A data centre has no power for a while: what runs there is lost, and nothing can start."""

    def change(on: bool) -> Callable[[World], None]:
        def act(world: World) -> None:
            spec = next(spec for spec in world.tree.spec.walk() if spec.board == board)
            for pool in spec.pools:
                why = "power is back" if on else "no power"
                world.simulated(board).change_devices(
                    pool.chip_class, pool.devices if on else -pool.devices, why
                )

        return act

    return [
        Happening(at_s, f"dark {board}", change(False)),
        Happening(at_s + for_s, f"light {board}", change(True)),
    ]


def kill_task(board: BoardId, pick: int) -> Callable[[World], None]:
    """One running attempt at a leaf dies; `pick` chooses which."""

    def act(world: World) -> None:
        running = sorted(world.simulated(board).running())
        if running:
            world.simulated(board).kill(running[pick % len(running)], "killed by the scenario")

    return act


def arrivals(
    orders: Iterable[Order], at: Callable[[TaskId], BoardId | None] = lambda _task: None
) -> list[Happening]:
    """Each order enters at its `submitted_s`, at the board that `at` names (None: the top)."""

    def submit(order: Order) -> Callable[[World], None]:
        return lambda world: world.submit(order, at(order.task_id))

    return [Happening(order.submitted_s, f"submit {order.task_id}", submit(order)) for order in orders]


def _holds_frames(carrier: Carrier) -> bool:
    if isinstance(carrier, FaultyCarrier):
        return bool(carrier._held) or _holds_frames(carrier.inner)
    return bool(getattr(carrier, "incoming", ()))

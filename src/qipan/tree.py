"""A tree of boards in one process: controllers joined by channels.  What stands at the leaves, which store and
which clock is handed in, so the host and the twin build the very same tree."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qipan.channel import Carrier, carrier_pair
from qipan.clock import Clock
from qipan.controller import Bookkeeper, Controller
from qipan.engines import Engine
from qipan.engines.board import BoardEngine, ParentLink
from qipan.hardware import BoardId, BoardSpec
from qipan.leases import EngineId
from qipan.scheduler import Settings
from qipan.store import Store

WrapCarrier = Callable[[BoardId, BoardId, Carrier], Carrier]


@dataclass(slots=True)
class Tree:
    """`controllers` parents first.  `engines` are the leaves' own; `carriers` the ends of the links, by
    (board, other board); all of them outlive the restart of a board."""

    spec: BoardSpec
    clock: Clock
    settings: Settings
    stores: dict[BoardId, Store]
    engines: dict[BoardId, Engine]
    make_books: Callable[[], Bookkeeper] | None = None
    carriers: dict[tuple[BoardId, BoardId], Carrier] = field(default_factory=dict)
    controllers: dict[BoardId, Controller] = field(default_factory=dict)
    outer: Carrier | None = None  # to a parent in another process
    joined: dict[BoardId, Carrier] = field(
        default_factory=dict
    )  # children in other processes, below the root

    @property
    def root(self) -> Controller:
        return self.controllers[self.spec.board]

    def step(self) -> bool:
        """Step every board once, parents first.  Returns whether any had something to decide on."""
        busy = [controller.step() for controller in self.controllers.values()]
        return any(busy)

    def start(self, board: BoardId) -> None:
        """Start a board, or start it again after a crash: its state comes from its store."""
        spec = next(spec for spec in self.spec.walk() if spec.board == board)
        parent = next((above.board for above in self.spec.walk() if spec in above.children), None)
        store = self.stores[board]
        incarnation = next_incarnation(store, self.clock)
        # Above all that an earlier life may have used, also one that a lost machine's store knew and this one does not: a report
        # under a number that the parent has had already would be taken for a repeat.
        store.number_reports_after(incarnation)
        engines: dict[EngineId, Engine] = {}
        if board in self.engines:
            engines[self.engines[board].engine] = self.engines[board]
        for child in spec.children:
            name = EngineId(child.board)
            engines[name] = BoardEngine(name, self.carriers[board, child.board], incarnation)
        upward = self.carriers[board, parent] if parent is not None else None
        if board == self.spec.board:
            upward = self.outer
            for joined, carrier in self.joined.items():
                name = EngineId(joined)
                engines[name] = BoardEngine(name, carrier, incarnation)
        link = ParentLink(upward, incarnation) if upward is not None else None
        books = self.make_books() if link is None and self.make_books else None
        self.controllers[board] = Controller(board, store, self.clock, engines, link, self.settings, books)

    def waiting(self) -> list[tuple[str, str, int]]:
        """(board, the board at the other end, messages that it has not taken yet) of every link; "parent" in another process."""
        found = []
        for board, controller in self.controllers.items():
            for name, engine in controller.engines.items():
                if isinstance(engine, BoardEngine):
                    found.append((str(board), str(name), engine.waiting))
            if controller.parent is not None:
                above = next((spec.board for spec in self.spec.walk() if any(child.board == board for child in spec.children)), "parent")  # fmt: skip
                found.append((str(board), str(above), controller.parent.waiting))
        return found

    def join(self, board: BoardId, carrier: Carrier) -> None:
        """A child in another process joined the root while it runs."""
        self.joined[board] = carrier
        incarnation = int(self.stores[self.spec.board].get("incarnation") or "1")
        self.root.attach(BoardEngine(EngineId(board), carrier, incarnation))


def next_incarnation(store: Store, clock: Clock) -> int:
    """Higher than at every earlier start; the time makes it so for a store that was restored, too."""
    incarnation = max(int(store.get("incarnation") or "0") + 1, round(clock.now_s() * 1e6))
    store.put("incarnation", str(incarnation))
    return incarnation


def build_tree(
    spec: BoardSpec,
    *,
    clock: Clock,
    make_engine: Callable[[BoardSpec], Engine],
    make_store: Callable[[BoardId], Store],
    settings: Settings,
    make_books: Callable[[], Bookkeeper] | None = None,
    wrap: WrapCarrier = lambda _source, _target, carrier: carrier,
    outer: Carrier | None = None,
    joined: Mapping[BoardId, Carrier] | None = None,
) -> Tree:
    boards = spec.walk()
    tree = Tree(
        spec,
        clock,
        settings,
        {board.board: make_store(board.board) for board in boards},
        {board.board: make_engine(board) for board in boards if board.pools},
        make_books,
        outer=outer,
        joined=dict(joined or {}),
    )
    for board in boards:
        for child in board.children:
            above, below = carrier_pair()
            tree.carriers[board.board, child.board] = wrap(board.board, child.board, above)
            tree.carriers[child.board, board.board] = wrap(child.board, board.board, below)
    for board in boards:
        tree.start(board.board)
    return tree

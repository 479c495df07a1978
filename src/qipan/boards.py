"""All boards of a site in one process, opened over their stores: they are stepped here, and whoever takes tasks in or tells of them
is handed this."""

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import msgspec

from qipan.channel import Carrier
from qipan.clock import SystemClock
from qipan.controller import verify
from qipan.engines.leaf import LeafEngine
from qipan.engines.make import leaf_engine
from qipan.events import LinksSet, ParkRequested, RulesSet
from qipan.hardware import BoardId, BoardSpec, Pool
from qipan.ledger import Books, Tariff, check_balances
from qipan.ledger.transfer import move
from qipan.quota import QuotaRule
from qipan.scheduler import Settings
from qipan.scheduler.moves import links_of
from qipan.store import Store, StoreFolder
from qipan.transfer import Stager
from qipan.tree import Tree, build_tree
from qipan.workload.site import Site


class Boards:
    """Every method may be called from any thread."""

    def __init__(
        self,
        site: Site,
        folder: Path,
        database: str | None = None,
        outer: Carrier | None = None,
        joined: Mapping[BoardId, Carrier] | None = None,
    ) -> None:
        """`outer` leads to a parent, `joined` to children of the top board, in other processes."""
        self.site = site
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        stores = StoreFolder(folder, database)
        self.stores: dict[BoardId, Store] = {}
        for number, board in enumerate(site.root.walk()):
            self.stores[board.board] = stores.open(board.board)
            self.stores[board.board].put("order", str(number))  # parents first: so they are backed up
        self.store.put("site", msgspec.json.encode(site.root).decode())  # for the twin
        self.clock = SystemClock(max(store.latest_now_s() for store in self.stores.values()))
        self.tariff = Tariff(
            site.tariff_version,
            {
                f"{pool.site}|{pool.chip_class}": pool.tariff_micro_cny_per_device_hour
                for pool in self._all_pools()
            },
        )
        self.tree: Tree = build_tree(
            site.root,
            clock=self.clock,
            make_engine=self._engine,
            make_store=self.stores.__getitem__,
            settings=Settings(lease_s=site.lease_s),
            make_books=lambda: Books(self.tariff),
            outer=outer,
            joined=joined,
        )
        for tenant in site.tenants:
            opening = move(
                f"opening/{tenant.name}", "opening", "bank", f"tenant/{tenant.name}", tenant.balance_micro_cny
            )
            self.store.post(opening, self.clock.now_s())
        if self.tree.root.state.parked:
            self.tree.root.accept(ParkRequested(False, "up"))
        for controller in self.tree.controllers.values():
            if controller.state.links != links_of(site.links):
                controller.accept(LinksSet(site.links))

    def _all_pools(self) -> list[Pool]:
        """Those whose use may be paid here."""
        return self.site.pools()

    def _engine(self, board: BoardSpec) -> LeafEngine:
        own = next((store for store in board.stores if store.url), None)
        stager = Stager(own, self.site.storages, self.site.ways) if own is not None else None
        return leaf_engine(
            board, self.folder / "engines" / board.board, self.clock, self.folder / "checkpoints", stager
        )

    @property
    def store(self) -> Store:
        return self.stores[self.site.root.board]

    @property
    def engines(self) -> dict[BoardId, LeafEngine]:
        return {
            board: engine for board, engine in self.tree.engines.items() if isinstance(engine, LeafEngine)
        }

    def step(self) -> None:
        with self.lock:
            for _ in range(100):
                if not self.tree.step():
                    return

    def set_rules(self, rules: tuple[QuotaRule, ...]) -> None:
        """Every board keeps its own of these quota rules, in place of those before."""
        with self.lock:
            for controller in self.tree.controllers.values():
                if controller.state.rules != tuple(
                    rule for rule in rules if rule.board in ("*", controller.board)
                ):
                    controller.accept(RulesSet(rules))

    def balances(self) -> dict[str, int]:
        with self.lock:
            return {account: balance for account, _currency, balance in self.store.balances()}

    def ledger_sum(self) -> int:
        with self.lock:
            return sum(check_balances(self.store.balances()).values())

    def close(self) -> None:
        """All is closed, also where a full disk takes no snapshot; then that is raised."""
        with self.lock, ExitStack() as opened:
            for store in self.stores.values():
                opened.callback(store.close)
            for engine in self.engines.values():
                opened.callback(engine.close)
            for controller in self.tree.controllers.values():
                controller.snapshot()


def verify_store(folder: Path) -> dict[str, int]:
    """Replay every board's store; board -> ticks that gave the same commands.  Raises QipanError, NotFound."""
    stores, counts = StoreFolder(folder), {}
    for board in stores.boards():
        store = stores.open(board, writer=False)
        meta = msgspec.json.decode(store.get("settings") or b"{}", type=dict)
        settings = msgspec.convert(meta.get("settings", {}), type=Settings)
        counts[board] = verify(store, BoardId(board), settings, top=bool(meta.get("top", True)))
        store.close()
    return counts

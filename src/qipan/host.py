"""What `qipan up` and `qipan demo` run, and what the API speaks to: the boards of a site in one process with their loop, where people
hand tasks in and ask of them."""

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qipan.attempt_folders import last_at
from qipan.boards import Boards
from qipan.channel import Carrier
from qipan.controller import fact_of
from qipan.engines.leaf import LeafEngine
from qipan.errors import NotFound, QipanError
from qipan.events import Fact, ParkRequested
from qipan.hardware import BoardId
from qipan.intake import Intake
from qipan.journal import Journal
from qipan.journal.exchange import Exchange, Placed, Stock
from qipan.leases import TaskId
from qipan.market import Bid
from qipan.queries import Queries
from qipan.workload.site import Site

LOOP_S = 0.05
FORGET_EVERY_S = 3600.0
SWEEP_EVERY_S = 60.0
TRADE_AGAIN_S = 60.0  # after something in the market went wrong
log = logging.getLogger("qipan.host")


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """This side of a link to a board in another process.  `silent_s`: since anything came; None: nothing ever did."""

    peer: str
    connected: bool
    silent_s: float | None
    bytes_in: int
    bytes_out: int
    dropped: int


class Host(Boards):
    """Every method may be called from any thread."""

    def __init__(
        self,
        site: Site,
        folder: Path,
        database: str | None = None,
        keep_s: float | None = None,
        outer: Carrier | None = None,
        joined: Mapping[BoardId, Carrier] | None = None,
    ) -> None:
        """`outer` leads to a parent, `joined` to children of the top board, in other processes."""
        super().__init__(site, folder, database, outer, joined)
        self._stop = threading.Event()
        #: question -> what this board says of a task, for boards below: what is computed for people, who are served by others
        self.answers: dict[str, Callable[[str], Any]] = {}
        self.queries = self._make_queries()
        self.intake = self._make_intake()
        self.intake.take_up()
        self.keep_s, self._forgot_s = keep_s, float("-inf")
        self._stock = [
            Stock(
                pool.site, board.region, pool.chip_class, pool.devices, pool.tariff_micro_cny_per_device_hour
            )
            for board in site.root.walk()
            for pool in board.pools
        ]
        self._trade_s: float | None = 0.0
        self._swept_s = float("-inf")

    def _make_queries(self) -> Queries:
        return Queries(self)

    def _make_intake(self) -> Intake:
        return Intake(self, self.queries)

    # ---- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Step the boards until `stop` is called."""
        while not self._stop.is_set():
            self.step()
            self.trade()
            self.forget()
            self.sweep()
            self._stop.wait(LOOP_S)

    def forget(self) -> None:
        """What is older than `keep_s` goes from the stores, once an hour."""
        if self.keep_s is None or time.monotonic() - self._forgot_s < FORGET_EVERY_S:
            return
        self._forgot_s = time.monotonic()
        with self.lock:
            for store in self.stores.values():
                store.forget_before(self.clock.now_s() - self.keep_s)

    def sweep(self) -> None:
        """What is kept for the live goes with the last of them, looked at every SWEEP_EVERY_S: what stages streamed to each other, rounds."""
        if time.monotonic() - self._swept_s < SWEEP_EVERY_S:
            return
        self._swept_s = time.monotonic()
        with self.lock:
            self._sweep_streams()
            self.intake.coordinator.sweep()

    def _sweep_streams(self) -> None:
        live = self.tree.root.state.tasks
        for folder in (self.folder / "checkpoints").glob("*.streams"):
            task_id = folder.name.removesuffix(".streams")
            known = self.store.submission(task_id) is not None
            if known and not any(TaskId(name) in live for name in self.queries.parts(task_id)):
                shutil.rmtree(folder, ignore_errors=True)

    def stop(self) -> None:
        self._stop.set()

    def park(self, limit_s: float) -> bool:
        """Ask every task for a checkpoint and its end; returns whether all were parked in time."""
        with self.lock:
            self.tree.root.accept(ParkRequested(True, "Ctrl-C"))
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s:
            self.step()
            with self.lock:
                if not any(engine.running() for engine in self.engines.values()):
                    self.step()
                    return True
            time.sleep(LOOP_S)
        return False

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.intake.close()

    # ---- who leads -------------------------------------------------------------------------------------------------

    @property
    def audience(self) -> str:
        """What access tokens of this host are good for, and nothing else."""
        return f"qipan:{self.site.root.board}"

    def leads(self) -> bool:
        """Whether this process decides for its boards."""
        return True

    def must_lead(self) -> None:
        """Raises Unreachable where a standby may have taken over, so that what is written here may be lost."""

    def ends(self) -> list[LinkEnd]:
        """Of links to other processes."""
        return []

    # ---- the market ------------------------------------------------------------------------------------------------

    @property
    def exchange(self) -> Exchange:
        """On the store's database of now: it is watched from when a standby comes."""
        return Exchange(Journal(self.store.db), self._stock, lambda: secrets.token_hex(16), self.ready)

    def trade(self) -> None:
        """Clear and settle the auctions whose time has come.  What goes wrong there does not stop the boards."""
        now_s = self.clock.now_s()
        if self._trade_s is None or now_s < self._trade_s:
            return
        with self.lock:
            try:
                self._trade_s = self.exchange.tick(now_s)
            except QipanError as error:
                log.warning("the market waits %.0f s: %s", TRADE_AGAIN_S, error)
                self._trade_s = now_s + TRADE_AGAIN_S

    def place_order(self, product: str, bid: Bid, trader: str) -> Placed:
        """Raises InvalidInput, OverLimit."""
        with self.lock:
            placed = self.exchange.place(product, bid, trader, self.clock.now_s())
            self._trade_s = 0.0
            return placed

    def ready(self, board: str, chip_class: str) -> int:
        """Devices of a board that its engines can use now, free or not."""
        here = self.tree.controllers.get(BoardId(board))
        engines = (here or self.tree.root).state.engines.values()
        return sum(
            offer.devices
            for engine in engines
            if not engine.lost
            for offer in engine.offers
            if offer.chip_class == chip_class and (here is not None or offer.site == board)
        )

    # ---- notes -----------------------------------------------------------------------------------------------------

    def note(self, fact: Fact) -> None:
        """A fact for people to read, durable when this returns."""
        with self.lock:
            self.tree.root.accept(fact)
            self.step()

    def noted(self, kinds: Sequence[str], after: int | None, most: int) -> list[tuple[int, float, Fact]]:
        """(fact id, Unix time, fact) of some kinds, in order: the first ones after a fact id, or the newest of all."""
        with self.lock:
            rows = self.store.facts_of_kinds(kinds, after, most)
        return [(fact_id, at_s, fact_of(body)) for fact_id, at_s, _, body in rows]

    # ---- beside a task ---------------------------------------------------------------------------------------------

    def beside(self, task_id: str, act: str, name: str, given: list[Any]) -> Any:
        """A person's command beside a running task: `begin` [words, seconds] answers its name, `read` [after] what it printed,
        `end` [] ends it.  Raises NotFound, InvalidInput, OverLimit."""
        self.queries.task(task_id)
        engine = self.engine_of(task_id)
        if engine is None:
            raise NotFound(f"{task_id} does not run here now; `qipan why {task_id}` says where it is")
        with self.lock:
            return engine.act_beside(task_id, act, name, given)

    def engine_of(self, task_id: str) -> LeafEngine | None:
        """The engine here that runs it, or ran it last."""
        with self.lock:
            board = last_at(self.folder, task_id)
        return self.engines.get(board) if board is not None else None

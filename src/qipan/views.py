"""What people see of the boards beside a task: squares, prices, decisions, costs.  Reads a host, changes nothing."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from qipan.controller import fact_of
from qipan.errors import InvalidInput, NotFound, OverLimit, QipanError
from qipan.events import TaskExited, TaskProgress, TaskSubmitted
from qipan.hardware import BoardId
from qipan.host import Host
from qipan.leases import AskStep, TaskId, Usage
from qipan.ledger import charged_once, make_receipt
from qipan.outcomes import WhatIf
from qipan.scheduler import Moment, Phase, State
from qipan.scheduler.asks import asks_of
from qipan.scheduler.conditions import of_storage
from qipan.stored import facts_of_kind, submitted_plan

Sees = Callable[[str], bool]  # tenant -> whether the caller may know of it


@dataclass(frozen=True, slots=True)
class Holder:
    """`task_id` and `tenant` are empty when the task is another tenant's."""

    task_id: str
    tenant: str
    devices: int


@dataclass(frozen=True, slots=True)
class PoolView:
    chip_class: str
    devices: int
    free: int
    tariff_micro_cny_per_device_hour: int
    train_flops_per_s: float | None
    holders: tuple[Holder, ...]
    busy: int = 0  # devices whose task runs; the others leased are about to start or to stop
    useful_share: float | None = (
        None  # of the time of the tasks that hold them; None: none says how far it is
    )


@dataclass(frozen=True, slots=True)
class StorageLease:
    """What a task's lease holds of the storage while it has the lease.  Names are empty when it is another tenant's."""

    task_id: str
    tenant: str
    space_bytes: int
    write_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class StorageView:
    """Where a board's tasks keep their checkpoints.  0: not counted."""

    storage_id: str
    space_bytes: int
    write_bytes_per_s: float
    leases: tuple[StorageLease, ...]


@dataclass(frozen=True, slots=True)
class BoardView:
    """`tasks`: live ones; where it stands is known when the site file says so."""

    board: str
    children: tuple[str, ...]
    pools: tuple[PoolView, ...]
    tasks: int
    region: str
    longitude: float | None
    latitude: float | None
    storages: tuple[StorageView, ...] = ()


@dataclass(frozen=True, slots=True)
class LinkView:
    """A link of the site file; `between` names two sites."""

    between: tuple[str, str]
    bytes_per_s: float
    latency_s: float
    price_micro_cny_per_gib: int


@dataclass(frozen=True, slots=True)
class Price:
    """`asks`: at which shadow price how many devices more would be given to a new task, cheapest first."""

    board: str
    chip_class: str
    site: str
    devices: int
    largest_gang: int
    tariff_micro_cny_per_device_hour: int
    asks: tuple[AskStep, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """One decision about one task."""

    at_s: float
    board: str
    task_id: str
    verdict: str
    text: str


@dataclass(frozen=True, slots=True)
class Cost:
    """`spent` counts what runs now up to its newest report; `planned` is of the option chosen at submission."""

    task_id: str
    spent_micro_cny: int
    hold_micro_cny: int
    planned_p50_micro_cny: int
    planned_p90_micro_cny: int
    useful_share: float | None = None


@dataclass(frozen=True, slots=True)
class BookedTask:
    """A task's receipt against what the ledger took: `agrees` when they are one."""

    task_id: str
    tenant: str
    outcome: str
    cost_micro_cny: int
    charged_micro_cny: int
    agrees: bool


class Useful:
    """The useful time of tasks: of the device-seconds that an attempt had, those that its lasting progress takes at the
    rate of its point.  Facts are read once, as they come."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._known: dict[str, _Progress] = {}

    def share(self, task_id: str) -> float | None:
        """None while nothing says how far the task is.  The host's lock is held."""
        known = self._known.setdefault(task_id, _Progress())
        for fact_id, _, body in self._host.store.facts_of(
            task_id, ("task_progress", "task_exited"), after=known.after
        ):
            known.after = fact_id
            known.take(fact_of(body))
        if not known.progress or self._host.store.submission(task_id) is None:
            return None
        plan = submitted_plan(self._host.store, task_id)
        rates = {point.point_id: point.rate for point in plan.curve.points} if plan.curve else {}
        useful_s = sum(gain / rates.get(point, 1.0) * devices for point, devices, gain in known.gains())
        return min(1.0, useful_s / max(known.device_s(), 1e-9))

    def forget(self, live: Iterable[str]) -> None:
        for task_id in set(self._known) - set(live):
            del self._known[task_id]


@dataclass(slots=True)
class _Progress:
    """attempt -> (its last usage, work done that lasts); a lost attempt keeps what was checkpointed."""

    after: int = 0
    progress: bool = False
    attempts: dict[int, tuple[Usage, float]] = field(default_factory=dict)

    def take(self, fact: object) -> None:
        if isinstance(fact, TaskProgress):
            self.attempts[fact.attempt] = (fact.usage, fact.done_s)
            self.progress = self.progress or fact.done_s > 0
        elif isinstance(fact, TaskExited):
            lost = fact.outcome in ("lost", "failed")
            self.attempts[fact.attempt] = (fact.usage, fact.saved_s if lost else fact.done_s)

    def gains(self) -> list[tuple[str, int, float]]:
        """(point, devices, work gained) of each attempt."""
        found, before = [], 0.0
        for _, (usage, done_s) in sorted(self.attempts.items()):
            found.append((usage.point_id, usage.devices, max(0.0, done_s - before)))
            before = max(before, done_s)
        return found

    def device_s(self) -> float:
        return sum(usage.device_s for usage, _ in self.attempts.values())


def boards(host: Host, sees: Sees, useful: Useful | None = None) -> list[BoardView]:
    """Parents first."""
    useful = useful or Useful(host)
    with host.lock:
        useful.forget(host.tree.root.state.tasks)
        views = []
        for spec in host.site.root.walk():
            state = _state_at(host, spec.board)
            pools = []
            for pool in spec.pools:
                holders = _holders(state, pool.chip_class, sees)
                pools.append(
                    PoolView(
                        pool.chip_class,
                        pool.devices,
                        pool.devices - sum(holder.devices for holder in holders),
                        pool.tariff_micro_cny_per_device_hour,
                        pool.probe.train_flops_per_s if pool.probe else None,
                        holders,
                        _busy(state, pool.chip_class),
                        _useful(state, pool.chip_class, useful),
                    )
                )
            children = tuple(str(child.board) for child in spec.children)
            views.append(
                BoardView(
                    spec.board, children, tuple(pools), len(state.tasks), spec.region, spec.longitude, spec.latitude,
                    storages(state, sees),
                )
            )  # fmt: skip
        return views


def _state_at(host: Host, board: BoardId) -> State:
    """A board's state; of one in another process, the live tasks that are known here to run there."""
    here = host.tree.controllers.get(board)
    if here is not None:
        return here.state
    there = State(board)
    for task_id, task in host.tree.root.state.tasks.items():
        if task.place.split("/")[-2:-1] == [board]:
            there.tasks[task_id] = task
    return there


def storages(state: State, sees: Sees) -> tuple[StorageView, ...]:
    found = []
    for engine, known in sorted(state.engines.items()):
        if known.room is not None:
            leases = []
            for task in state.tasks.at(engine):
                held, tenant = of_storage(task), task.order.tenant
                if any(held):
                    named = (task.task_id, tenant) if sees(tenant) else ("", "")
                    leases.append(StorageLease(*named, *held))
            room = known.room
            found.append(
                StorageView(room.storage_id, room.space_bytes, room.write_bytes_per_s, tuple(leases))
            )
    return tuple(found)


def _holders(state: State, chip_class: str, sees: Sees) -> tuple[Holder, ...]:
    found = []
    for task_id, task in sorted(state.tasks.items()):
        held = sum(need.devices for need in task.needs if need.chip_class == chip_class)
        if task.engine is not None and held:
            tenant = task.order.tenant
            found.append(Holder(task_id, tenant, held) if sees(tenant) else Holder("", "", held))
    return tuple(found)


def _busy(state: State, chip_class: str) -> int:
    return sum(
        need.devices
        for task in state.tasks.values()
        if task.engine is not None and task.phase in (Phase.RUNNING, Phase.RESIZING)
        for need in task.needs
        if need.chip_class == chip_class
    )


def _useful(state: State, chip_class: str, useful: Useful) -> float | None:
    """The mean over the pool's running tasks, by devices."""
    known = [
        (share, need.devices)
        for task_id, task in state.tasks.items()
        if task.engine is not None and task.phase in (Phase.RUNNING, Phase.RESIZING)
        for need in task.needs
        if need.chip_class == chip_class and (share := useful.share(task_id)) is not None
    ]
    devices = sum(count for _, count in known)
    return round(sum(share * count for share, count in known) / devices, 3) if devices else None


def links(host: Host) -> list[LinkView]:
    return [
        LinkView((link.source, link.target), link.bytes_per_s, link.latency_s, link.price_micro_cny_per_gib)
        for link in host.site.links
    ]


def prices(host: Host) -> list[Price]:
    """Every board's offers, parents first."""
    with host.lock:
        moment = Moment(host.clock.now_s(), host.clock.lease_s())
        return [
            Price(
                spec.board, offer.chip_class, offer.site or spec.board, offer.devices, offer.largest_gang,
                offer.tariff_micro_cny_per_device_hour, offer.asks,
            )
            for spec in host.site.root.walk()
            if spec.board in host.tree.controllers
            for offer in asks_of(host.tree.controllers[spec.board].state, moment)
        ]  # fmt: skip


ROW_MAX = 2**62
After = tuple[
    float, str, Annotated[int, msgspec.Meta(ge=0, le=ROW_MAX)]
]  # (now_s, board, row) of the last one seen


def decisions(
    host: Host, limit: int, after: After | None, visible: Callable[[str], bool]
) -> tuple[list[Told], After | None]:
    """The decisions of all boards, newest first, `limit` of them after `after`, and where they end (None: no more)."""
    with host.lock:
        rows = []
        for board, store in host.stores.items():
            bound = _bound(str(board), after)
            for row, at_s, task_id, verdict, text in store.reasons_before(*bound, limit + 1):
                rows.append(((at_s, str(board), row), Told(at_s, board, task_id, verdict, text)))
    rows.sort(key=lambda entry: entry[0], reverse=True)
    found = rows[:limit]
    told = [entry for _, entry in found if visible(entry.task_id)]
    return told, found[-1][0] if len(rows) > limit else None


def _bound(board: str, after: After | None) -> tuple[float, int]:
    """(now_s, row): this board's decisions at an earlier time, or then with a smaller row, come after `after`."""
    if after is None:
        return float("inf"), 0
    now_s, last_board, row = after
    return now_s, row if board == last_board else ROW_MAX if board < last_board else 0


def cost(host: Host, task_id: str) -> Cost:
    if (told := host.queries.above("cost", task_id)) is not None:
        return msgspec.convert(told, type=Cost)
    view = host.queries.task(task_id)
    usages = {
        (fact.task_id, fact.attempt, fact.usage.board): fact.usage
        for _, fact in host.queries.progress(task_id)
    }
    usages |= {
        (fact.task_id, fact.attempt, fact.usage.board): fact.usage
        for fact in charged_once(host.queries.exits(task_id))
    }
    so_far = make_receipt(
        TaskId(task_id), view.tenant, usages.values(), host.tariff.of, view.state, 0.0, lambda _body: ""
    )
    with host.lock:
        useful = Useful(host).share(task_id)
    chosen = submitted_plan(host.store, task_id).chosen_options()
    return Cost(
        task_id, so_far.cost_micro_cny, _hold(host, task_id), sum(one.cost_p50_micro_cny for one in chosen),
        sum(one.cost_p90_micro_cny for one in chosen), useful,
    )  # fmt: skip


def _hold(host: Host, task_id: str) -> int:
    """What was set aside when the task was submitted."""
    with host.lock:
        submitted = facts_of_kind(host.store, host.queries.parts(task_id), TaskSubmitted)
    return sum({fact.order.task_id: fact.hold_micro_cny for _, fact in submitted}.values())


def bill(host: Host, task_id: str) -> BookedTask:
    receipt, charged = host.queries.bill(task_id), host.queries.charged(task_id)
    return BookedTask(
        task_id, receipt.tenant, receipt.outcome, receipt.cost_micro_cny, charged, receipt.cost_micro_cny == charged
    )  # fmt: skip


def people(host: Host) -> list[tuple[str, int, int, int, int]]:
    """(tenant, balance, held for its tasks, live tasks, submitted tasks), in the site file's order."""
    views = host.queries.tasks()
    balances = host.balances()
    found = []
    for tenant in host.site.tenants:
        own = [view for view in views if view.tenant == tenant.name]
        live = [view for view in own if view.state not in ("done", "failed", "cancelled")]
        held = sum(balances.get(f"hold/{view.task_id}", 0) for view in live)
        found.append((tenant.name, balances.get(f"tenant/{tenant.name}", 0), held, len(live), len(own)))
    return found


WHAT_IF_S = 120.0


class AskedTwin:
    """Asks the twin in a process of its own, so that no decision waits for it; one question at a time."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._lock = threading.Lock()

    def ask(self, policy: str) -> WhatIf:
        """What `qipan twin --what-if` answers.  Raises the error that it names, OverLimit while another is asked."""
        if not self._lock.acquire(blocking=False):
            raise OverLimit("the twin is answering another what-if; ask again in a moment")
        try:
            command = [
                sys.executable,
                "-m",
                "qipan.cli",
                "twin",
                "--what-if",
                str(self._host.folder),
                "--policy",
                policy,
                "--json",
            ]
            done = subprocess.run(["nice", *command], capture_output=True, text=True, timeout=WHAT_IF_S)  # fmt: skip
        except subprocess.TimeoutExpired:
            raise OverLimit(
                f"the twin did not answer in {WHAT_IF_S:.0f} s; there are too many tasks to try again"
            ) from None
        finally:
            self._lock.release()
        if done.returncode == 0:
            return msgspec.json.decode(done.stdout, type=WhatIf)
        kind = {2: InvalidInput, 102: NotFound}.get(done.returncode, QipanError)
        raise kind(
            done.stderr.strip().splitlines()[-1].removeprefix("qipan: ")[:500]
            if done.stderr.strip()
            else "the twin failed"
        )

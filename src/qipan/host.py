"""All boards of a site in one process: what `qipan up` and `qipan demo` run.  It joins the concrete store, clock and
engines, and is what the API speaks to."""

import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from qipan.channel import Carrier
from qipan.clock import SystemClock
from qipan.controller import fact_of, verify
from qipan.engines.leaf import LeafEngine
from qipan.engines.make import leaf_engine
from qipan.errors import Infeasible, InvalidInput, NotFound, OverLimit, QipanError
from qipan.events import (
    BudgetRaised,
    CancelRequested,
    LinksSet,
    ParkRequested,
    RulesSet,
    TaskExited,
    TaskProgress,
    TaskSubmitted,
    without_launch,
)
from qipan.hardware import BoardId, BoardSpec, Pool
from qipan.journal import Journal
from qipan.journal.exchange import Exchange, Placed, Stock
from qipan.leases import Receipt, TaskId, Usage
from qipan.ledger import Books, Tariff, check_balances, make_receipt
from qipan.ledger.transfer import move
from qipan.market import Bid
from qipan.planner import Plan
from qipan.planner.experience import Place, beliefs, seen_in
from qipan.planner.learn import Belief, Seen
from qipan.planning import order_of, plan_on, plan_parts, tenant_of
from qipan.quantities import format_money
from qipan.quota import QuotaRule
from qipan.round_server import RoundServer
from qipan.rounds import Rules
from qipan.scheduler import Settings
from qipan.scheduler.limits import why_waiting_text
from qipan.scheduler.moves import links_of
from qipan.scheduler.why import why_waiting
from qipan.store import Store, StoreFolder
from qipan.transfer import Stager
from qipan.tree import Tree, build_tree
from qipan.workload import Launch, Task
from qipan.workload.site import Site
from qipan.workload.task import Part

LOOP_S = 0.05
FORGET_EVERY_S = 3600.0
TRADE_AGAIN_S = 60.0  # after something in the market went wrong
log = logging.getLogger("qipan.host")
#: so many of the newest ends of tasks correct the planner, looked for among so many facts
LESSONS, LESSON_FACTS = 200, 200_000


@dataclass(frozen=True, slots=True)
class TaskView:
    """One task as people see it."""

    task_id: str
    name: str
    tenant: str
    state: str
    place: str
    point: str
    devices: int
    attempt: int
    progress: float  # share of the work done
    saved: float
    waiting: str
    submitted_s: float


class Host:
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
        self._stop = threading.Event()
        self._round_server: RoundServer | None = None
        if (folder / "rounds.port").exists():
            self._rounds()
        self._take_up()
        self.keep_s, self._forgot_s = keep_s, float("-inf")
        self._stock = [
            Stock(
                pool.site, board.region, pool.chip_class, pool.devices, pool.tariff_micro_cny_per_device_hour
            )
            for board in site.root.walk()
            for pool in board.pools
        ]
        self._trade_s: float | None = 0.0
        self._lessons: dict[str, list[tuple[Place, Seen]]] = {}  # of each task that ended
        self._beliefs: dict[Place, Belief] = {}
        self._learned_to = 0

    def set_rules(self, rules: tuple[QuotaRule, ...]) -> None:
        """Every board keeps its own of these quota rules, in place of those before."""
        with self.lock:
            for controller in self.tree.controllers.values():
                if controller.state.rules != tuple(
                    rule for rule in rules if rule.board in ("*", controller.board)
                ):
                    controller.accept(RulesSet(rules))

    def _rounds(self) -> RoundServer:
        """The coordinator of tasks over several sites.  It keeps its port, for the tasks that run on know it."""
        if self._round_server is None:
            path = self.folder / "rounds.port"
            port = int(path.read_text()) if path.exists() else 0
            self._round_server = RoundServer(
                self.site.address, self.folder / "rounds", port=port, key=self._round_key
            )
            path.write_text(self._round_server.address.rpartition(":")[2])
            for task_id, _ in self.store.submissions():
                self._open_rounds(task_id, self.submitted_task(task_id))
        return self._round_server

    def _round_key(self, task_id: str) -> str:
        """What the sites of one task, and nobody else, can show its coordinator and each other."""
        path = self.folder / "rounds.key"
        if not path.exists():
            path.touch(0o600)
            path.write_text(secrets.token_hex(32))
        return hmac.new(path.read_bytes(), task_id.encode(), "sha256").hexdigest()

    def _open_rounds(self, task_id: str, task: Task) -> None:
        if task.sites is not None and self._round_server is not None:
            sites = task.sites
            names = tuple(part.at for part in sites.parts)
            self._round_server.open(task_id, Rules(sites.every, sites.grace_s, sites.min_sites, names))

    def _all_pools(self) -> list[Pool]:
        """Those whose use may be paid here."""
        return self.site.pools()

    def _take_up(self) -> None:
        """A submission whose fact was not stored before a crash is handed in again: once taken, never lost."""
        state = self.tree.root.state
        for task_id, submitted_s in self.store.submissions():
            if TaskId(task_id) in state.tasks or TaskId(task_id) in state.over:
                continue
            found = self.store.submission(task_id)
            assert found is not None
            task, plan = msgspec.json.decode(found[1], type=Task), msgspec.json.decode(found[2], type=Plan)
            if task.sites is None:  # its parts are submissions of their own
                self.tree.root.accept(self._submitted(task, TaskId(task_id), plan, submitted_s))

    def _submitted(self, task: Task, task_id: TaskId, plan: Plan, now_s: float) -> TaskSubmitted:
        assert plan.curve is not None
        hold = task.limits.max_cost_micro_cny or plan.options[0].cost_p90_micro_cny
        order = order_of(self.site, task, task_id, plan.curve, now_s)
        if task.part is not None:
            order = replace(
                order,
                gang=task.part.gang,
                launch=msgspec.json.encode(
                    Launch(task, part_environment(task.part, self._round_key(task.part.of)))
                ),
            )
        return TaskSubmitted(order, hold, task.limits.max_cost_micro_cny)

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
    def exchange(self) -> Exchange:
        """On the store's database of now: it is watched from when a standby comes."""
        return Exchange(Journal(self.store.db), self._stock, lambda: secrets.token_hex(16), self.ready)

    # ---- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Step the boards until `stop` is called."""
        while not self._stop.is_set():
            self.step()
            self.trade()
            self.forget()
            self._stop.wait(LOOP_S)

    def step(self) -> None:
        with self.lock:
            for _ in range(100):
                if not self.tree.step():
                    return

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

    def forget(self) -> None:
        """What is older than `keep_s` goes from the stores, once an hour."""
        if self.keep_s is None or time.monotonic() - self._forgot_s < FORGET_EVERY_S:
            return
        self._forgot_s = time.monotonic()
        with self.lock:
            for store in self.stores.values():
                store.forget_before(self.clock.now_s() - self.keep_s)

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
        with self.lock:
            for controller in self.tree.controllers.values():
                controller.snapshot()
            for engine in self.engines.values():
                engine.close()
            for store in self.stores.values():
                store.close()
        if self._round_server is not None:
            self._round_server.close()

    @property
    def engines(self) -> dict[BoardId, LeafEngine]:
        return {
            board: engine for board, engine in self.tree.engines.items() if isinstance(engine, LeafEngine)
        }

    # ---- what people ask -------------------------------------------------------------------------------------------

    def plan(self, task: Task) -> Plan:
        return plan_on(self.site, task, self.learned())

    def learned(self) -> dict[Place, Belief]:
        """What tasks that ended taught, by site and chip class; the newest LESSONS of them."""
        with self.lock:
            newest = self.store.fact_count()
            after = max(self._learned_to, newest - LESSON_FACTS)
            ended = self.store.newest_of_kind("task_exited", after, LESSONS) if newest > after else []
            for _, task_id in reversed(ended):
                if self.store.submission(task_id) is not None:
                    facts = [fact for _, fact in Host.progress(self, task_id)]
                    self._lessons.pop(task_id, None)
                    self._lessons[task_id] = seen_in(self.submitted_plan(task_id), facts)
            for task_id in list(self._lessons)[:-LESSONS]:
                del self._lessons[task_id]
            if ended:
                self._beliefs = beliefs(one for lessons in self._lessons.values() for one in lessons)
            self._learned_to = newest  # last, so that what was cut off is read again
            return self._beliefs

    def submit(self, task: Task, key: str | None = None) -> tuple[str, Plan]:
        """Plan, hold the money, hand the task to the top board.  Durable when it returns.  The same key submits
        once.  Raises Infeasible, OverLimit, InvalidInput when the key was used for another task."""
        with self.lock:
            if key is not None and (known := self.store.submitted_with(key)) is not None:
                if self.submitted_task(known) != task:
                    raise InvalidInput(
                        f"the key {key[:80]!r} submitted another task ({known}); use a new key"
                    )
                return known, self.submitted_plan(known)
            if task.sites is not None:
                return self._submit_sites(task, key)
            plan = self.plan(task)
            if plan.curve is None:
                reasons = "; ".join(f"{refused.place}: {refused.why}" for refused in plan.refused)
                raise Infeasible(f"{task.name}: no place can run it: {reasons}")
            task_id = self._new_id(task.name)
            fact = self._submitted(task, TaskId(task_id), plan, self.clock.now_s())
            self._check_funds(fact.order.tenant, fact.hold_micro_cny)
            encoded = msgspec.json.encode(task), msgspec.json.encode(plan)
            self.store.save_submission(task_id, key, fact.order.submitted_s, *encoded)
            self.tree.root.accept(fact)
            self.step()
            return task_id, plan

    def _submit_sites(self, task: Task, key: str | None) -> tuple[str, Plan]:
        """Each part is submitted as a task of its own; the whole one is their sum."""
        task_id, now_s = self._new_id(task.name), self.clock.now_s()
        parts, plan = plan_parts(self.site, task, task_id, self._rounds().address)
        facts = [self._submitted(part, TaskId(name), own, now_s) for name, (part, own) in parts.items()]
        self._check_funds(facts[0].order.tenant, sum(fact.hold_micro_cny for fact in facts))
        self.store.save_submission(task_id, key, now_s, msgspec.json.encode(task), msgspec.json.encode(plan))
        self._open_rounds(task_id, task)
        for fact, (name, (part, own)) in zip(facts, parts.items(), strict=True):
            self.store.save_submission(name, None, now_s, msgspec.json.encode(part), msgspec.json.encode(own))
            self.tree.root.accept(fact)
        self.step()
        return task_id, plan

    def parts(self, task_id: str) -> list[str]:
        """The ids of a task's parts; itself when it has none."""
        found = self.store.submission(task_id)
        if found is None or b'"parts"' not in found[1]:
            return [task_id]
        if msgspec.json.decode(found[1], type=Task).sites is None:
            return [task_id]
        return [name for name, _ in self.store.submissions() if name.startswith(f"{task_id}.")]

    def _new_id(self, name: str) -> str:
        taken = set(self.store.submitted_as(name))
        number = 1
        while f"{name}-{number}" in taken:
            number += 1
        return f"{name}-{number}"

    def _check_funds(self, tenant: str, hold: int) -> None:
        balance = self.store.balance(f"tenant/{tenant}")
        if balance is None:
            raise NotFound(f"tenant {tenant!r} has no account; the site file's tenants: "
                           f"{', '.join(known.name for known in self.site.tenants)}")  # fmt: skip
        if balance < hold:
            raise OverLimit(
                f"tenant {tenant} has {format_money(balance)}, the task needs a hold of {format_money(hold)};"
                " lower limits.max_cost or top up"
            )

    def tasks(self) -> list[TaskView]:
        with self.lock:
            return [self._view(task_id, submitted_s) for task_id, submitted_s in self.store.submissions()]

    def task_ids(self) -> list[str]:
        """In the order of submission."""
        with self.lock:
            return [task_id for task_id, _ in self.store.submissions()]

    def task(self, task_id: str) -> TaskView:
        with self.lock:
            found = self.store.submission(task_id)
            if found is None:
                known = ", ".join(name for name, _ in self.store.submissions()[-5:]) or "none"
                raise NotFound(f"no task {task_id!r}; the latest are: {known}")
            return self._view(task_id, found[0])

    def _view(self, task_id: str, submitted_s: float) -> TaskView:
        submission = self.store.submission(task_id)
        assert submission is not None
        task = msgspec.json.decode(submission[1], type=Task)
        if task.sites is not None:
            return whole_view(
                task_id,
                task,
                tenant_of(self.site, task),
                submitted_s,
                [self._part_view(name) for name in self.parts(task_id)],
            )
        root = self.tree.root.state
        over = root.over.get(TaskId(task_id))
        live = root.tasks.get(TaskId(task_id))
        tenant = tenant_of(self.site, task)
        if live is None:
            done = 1.0 if over == "done" else 0.0
            return TaskView(
                task_id, task.name, tenant, over or "queued", "", "", 0, 0, done, done, "", submitted_s
            )
        work_s = live.order.curve.work_s
        state = "parked" if root.parked and live.phase == "queued" else str(live.phase)
        devices = sum(need.devices for need in live.needs) if live.engine else 0
        return TaskView(
            task_id, task.name, tenant, state, live.place, live.point_id, devices, live.attempt,
            live.done_s / work_s, live.saved_s / work_s, why_waiting_text(root, live, self.clock.now_s()), submitted_s,
        )  # fmt: skip

    def _part_view(self, task_id: str) -> TaskView:
        found = self.store.submission(task_id)
        assert found is not None
        return self._view(task_id, found[0])

    def submitted_task(self, task_id: str) -> Task:
        found = self.store.submission(task_id)
        assert found is not None
        return msgspec.json.decode(found[1], type=Task)

    def submitted_plan(self, task_id: str) -> Plan:
        found = self.store.submission(task_id)
        assert found is not None
        return msgspec.json.decode(found[2], type=Plan)

    def why(self, task_id: str) -> dict[str, Any]:
        """Every decision about the task on every board, and what keeps it waiting now."""
        view = self.task(task_id)
        with self.lock:
            told = [
                {"at_s": at_s, "board": board, "verdict": verdict, "text": text}
                for board, store in self.stores.items()
                for name in self.parts(task_id)
                for at_s, verdict, text in store.reasons_of(name)
            ]
            told.sort(key=lambda entry: (entry["at_s"], [*self.stores].index(BoardId(str(entry["board"])))))
            waiting = why_waiting(
                self.tree.root.state, TaskId(task_id), self.clock.now_s(), self.clock.lease_s()
            )
        return {"task_id": task_id, "state": view.state, "decisions": told, "waiting": waiting}

    def cancel(self, task_id: str, by: str) -> None:
        self.task(task_id)
        with self.lock:
            for name in self.parts(task_id):
                self.tree.root.accept(CancelRequested(TaskId(name), by))
            self.step()

    def raise_budget(self, task_id: str, budget_micro_cny: int, by: str) -> None:
        """A task that was parked because its budget was spent goes on.  Raises NotFound, InvalidInput, OverLimit."""
        view = self.task(task_id)
        with self.lock:
            before = self._budget_of(task_id)
            if before is None or TaskId(task_id) not in self.tree.root.state.tasks:
                why = "is over" if before is not None else "has no limits.max_cost"
                raise InvalidInput(f"{task_id} {why}: there is no budget to raise; submit it anew")
            if budget_micro_cny <= before:
                raise InvalidInput(
                    f"{task_id} has a budget of {format_money(before)}; give more than that, not {format_money(budget_micro_cny)}"
                )
            self._check_funds(view.tenant, budget_micro_cny - before)
            self.tree.root.accept(BudgetRaised(TaskId(task_id), budget_micro_cny, by))
            self.step()

    def _budget_of(self, task_id: str) -> int | None:
        """What its owner lets it cost now."""
        facts = [
            fact_of(body) for _, _, body in self.store.facts_of(task_id, ["task_submitted", "budget_raised"])
        ]
        budgets = [fact.budget_micro_cny for fact in facts if isinstance(fact, TaskSubmitted | BudgetRaised)]
        known = [budget for budget in budgets if budget is not None]
        return max(known) if known else None

    def events(self, task_id: str, after: int = 0) -> list[dict[str, Any]]:
        """The task's facts at the top board, oldest first."""
        self.task(task_id)
        with self.lock:
            rows = sorted(
                row for name in self.parts(task_id) for row in self.store.facts_of(name, after=after)
            )
        return [
            {
                "fact_id": fact_id,
                "at_s": at_s,
                "kind": fact_of(body).kind,
                "fact": msgspec.to_builtins(without_launch(fact_of(body))),
            }
            for fact_id, at_s, body in rows
        ]

    def logs(self, task_id: str, after: int = 0) -> dict[str, Any]:
        """What the task's attempts printed, from character `after` of all attempts joined."""
        self.task(task_id)
        joined = self._log_text(task_id)
        return {"text": joined[after:], "next": len(joined)}

    def _log_text(self, task_id: str) -> str:
        texts = []
        for name in self.parts(task_id):
            for path in self._attempts(name):
                log = path / "log.txt"
                body = log.read_text(errors="replace") if log.exists() else ""
                part = name.removeprefix(task_id).replace(".", " ", 1)
                texts.append(f"---{part} attempt {path.name.rsplit('-', 1)[1]} ---\n{body}")
        return "".join(texts)

    def newest_fact(self, task_id: str) -> int:
        with self.lock:
            return max((self.store.newest_fact_of(name) for name in self.parts(task_id)), default=0)

    def log_bytes(self, task_id: str) -> int:
        """Grows when the task prints."""
        logs = [path / "log.txt" for name in self.parts(task_id) for path in self._attempts(name)]
        return sum(log.stat().st_size for log in logs if log.exists()) + len(logs)

    def _attempts(self, task_id: str) -> list[Path]:
        found = [
            path
            for path in (self.folder / "engines").glob(f"*/attempts/{task_id}-*")
            if path.name.rsplit("-", 1)[1].isdigit() and path.name.rsplit("-", 1)[0] == task_id
        ]
        return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))

    def progress(self, task_id: str) -> list[tuple[float, TaskProgress]]:
        with self.lock:
            rows = sorted(
                row for name in self.parts(task_id) for row in self.store.facts_of(name, ["task_progress"])
            )
        found = []
        for _, at_s, body in rows:
            fact = fact_of(body)
            assert isinstance(fact, TaskProgress)
            found.append((at_s, fact))
        return found

    def exits(self, task_id: str) -> list[TaskExited]:
        with self.lock:
            rows = sorted(
                row for name in self.parts(task_id) for row in self.store.facts_of(name, ["task_exited"])
            )
        found = []
        for _, _, body in rows:
            fact = fact_of(body)
            assert isinstance(fact, TaskExited)
            found.append(fact)
        return found

    # ---- money -----------------------------------------------------------------------------------------------------

    def balances(self) -> dict[str, int]:
        with self.lock:
            return {account: balance for account, _currency, balance in self.store.balances()}

    def ledger_sum(self) -> int:
        with self.lock:
            return sum(check_balances(self.store.balances()).values())

    def bill(self, task_id: str) -> Receipt:
        """The receipt of a task that is over, or of its ended attempts so far."""
        view = self.task(task_id)
        usages: dict[tuple[str, int, str], Usage] = {}
        lost_s = 0.0
        for fact in self.exits(task_id):
            if (fact.task_id, fact.attempt, fact.usage.board) not in usages and fact.outcome in (
                "lost",
                "failed",
                "cancelled",
            ):
                lost_s += max(0.0, fact.done_s - fact.saved_s)
            usages[fact.task_id, fact.attempt, fact.usage.board] = fact.usage
        return make_receipt(
            TaskId(task_id), view.tenant, usages.values(), self.tariff.of, view.state, lost_s, self._sign
        )

    def charged(self, task_id: str) -> int:
        """What the ledger took for the task: must equal the receipt."""
        with self.lock:
            rows = [row for name in self.parts(task_id) for row in self.store.postings_about(name)]
        return sum(amount for _key, account, amount, _currency in rows if account.startswith("provider/"))

    def _sign(self, body: bytes) -> str:
        path = self.folder / "receipt.key"
        if not path.exists():
            path.touch(0o600)
            path.write_bytes(secrets.token_bytes(32))
        return hmac.new(path.read_bytes(), body, hashlib.sha256).hexdigest()


def whole_view(task_id: str, task: Task, tenant: str, submitted_s: float, parts: list[TaskView]) -> TaskView:
    """A task of several parts is over when all are; until then it is what its busiest part is."""
    states = [part.state for part in parts]
    order = ("failed", "cancelled", "done") if all(s in ("done", "failed", "cancelled") for s in states) else (
        "running", "starting", "resizing", "stopping", "reserved", "reserving", "parked", "queued", "done"
    )  # fmt: skip
    state = next((one for one in order if one in states), "queued")
    waiting = "; ".join(f"{part.task_id}: {part.waiting}" for part in parts if part.waiting)
    return TaskView(
        task_id, task.name, tenant, state, " + ".join(sorted({part.place for part in parts if part.place})),
        " + ".join(part.point for part in parts if part.point), sum(part.devices for part in parts),
        max((part.attempt for part in parts), default=0), min((part.progress for part in parts), default=0.0),
        min((part.saved for part in parts), default=0.0), waiting, submitted_s,
    )  # fmt: skip


def part_environment(part: Part, key: str) -> dict[str, str]:
    return {
        "QIPAN_ROUND_KEY": key,
        "QIPAN_SITE": part.site,
        "QIPAN_ROUNDS": part.coordinator,
        "QIPAN_ROUNDS_TASK": part.of,
        "QIPAN_LINK_BYTES_PER_S": str(part.link_bytes_per_s),
    }


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

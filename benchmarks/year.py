"""A year of eight hubs that share one market: python -m benchmarks.year --json OUT [--days 365] [--tasks 1050000]

Own arrivals (random, by seed) and a placement of its own: every hour each waiting task bids for the devices it still needs, in its own hub
and in up to three others less what moving its data costs; each hub asks its running cost.  Clearing, holds, postings, settlement runs, service
credits, disputes, imbalance, bonds and payouts are the product's, on a real ledger in a file.  Providers fail after the gate, lie (two claim
more than the board measured, and deny what tenants saw), and leave (one, without notice, in the middle of the year).

The same arrivals run again with every hub for itself.  All prices and costs are assumptions that stand below.  It is no run of the boards'
Controller: a year of that at this size takes weeks of CPU."""

import hashlib
import random
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.form import Figure, arguments, write
from qipan.journal import Journal
from qipan.journal.settling import rows_of, run
from qipan.ledger.requests import CaptureHold, PlaceHold, Post, Posted, Request, VoidHold
from qipan.ledger.transfer import move
from qipan.market.combined import Combined, Option, Supply, Want, clear_combined
from qipan.settlement.contracts import Terms, lodge, seize, split
from qipan.settlement.meters import Counters
from qipan.settlement.service import Evidence, Service
from qipan.settlement.settle import Delivery, Period, Ruling, Sale, settle
from qipan.settlement.tariffs import Price, TariffSheet, sign_sheet
from qipan.store.opening import open_database

CNY = 1_000_000
HOUR_S, DAY_H = 3600, 24


@dataclass(frozen=True)
class Hub:
    """`running`: micro-CNY a device-hour while it runs; `fixed`: of every device-hour there is, used or not.  `share` of all tasks are its own.
    `fails`: chance an hour that a tenth to all of its devices are lost for that hour after the gate."""

    name: str
    zone: str
    devices: int
    running: int
    fixed: int
    share: float
    fails: float = 0.002
    lies: bool = False
    leaves_day: int | None = None


HUBS = (
    Hub("jingjinji", "east", 700, 3_600_000, 2_600_000, 0.26),
    Hub("yangtze-delta", "east", 700, 3_900_000, 2_600_000, 0.28, lies=True),
    Hub("greater-bay", "east", 600, 4_000_000, 2_600_000, 0.24),
    Hub("chengdu-chongqing", "west", 600, 2_700_000, 2_300_000, 0.09, leaves_day=240),
    Hub("inner-mongolia", "west", 700, 1_700_000, 2_000_000, 0.04),
    Hub("guizhou", "west", 700, 1_800_000, 2_000_000, 0.04, fails=0.01),
    Hub("gansu", "west", 500, 1_600_000, 1_900_000, 0.02, lies=True),
    Hub("ningxia", "west", 600, 1_500_000, 1_900_000, 0.03),
)
TENANTS = 160
FEE_PPM = 20_000
OPERATION_MICRO_PER_DAY = 12_000_000 * CNY // 365  # people and machines that run the market
MOVE_MICRO_PER_GIB = 120_000  # what a tenant pays the provider for moving its data there once, and what that costs the provider
BOND_MICRO = 500_000 * CNY
SERVICE = Service()


@dataclass(slots=True)
class Task:
    task_id: str
    tenant: str
    home: int
    devices: int
    left: int  # device-hours
    value: int  # micro-CNY a device-hour
    end_h: int
    options: tuple[tuple[int, int], ...]  # (hub, limit there)
    moved_gib: int
    held: int = 0
    moved_to: set[int] = field(default_factory=set)


@dataclass
class Tally:
    """Counted apart from the ledger, by simple sums; micro-CNY."""

    value: int = 0  # to tenants, of what was done
    done_hours: int = 0
    asked_hours: int = 0


def main() -> None:
    given = arguments("year", days=365, tasks=1_050_000, seed=1)
    with tempfile.TemporaryDirectory(prefix="qipan-year-") as folder:
        figures, rows = year(Path(folder), given.days, given.tasks, given.seed)
    write(given.json, figures, rows, days=given.days, seed=given.seed, hubs=len(HUBS), tenants=TENANTS)


def year(folder: Path, days: int, tasks: int, seed: int) -> tuple[list[Figure], list[dict[str, Any]]]:
    began_s, began_cpu_s = time.monotonic(), time.process_time()
    world = World(folder, seed, days, tasks)
    for day in range(days):
        world.day(day)
    world.end()
    found = world.journal.check()
    unaccounted = world.unaccounted()
    alone = isolated(seed, days, tasks)
    took_s, cpu_s = time.monotonic() - began_s, time.process_time() - began_cpu_s
    positions, rows = world.positions(alone)
    figures = [
        Figure("year_tasks", world.submitted, "tasks", ">= 1000000" if days == 365 else ""),
        Figure("year_s", took_s, "s", "<= 1800"),
        Figure("year_cpu_s", cpu_s, "CPU s"),
        Figure("postings", found.transfers, "transfers"),
        Figure("ledger_problems", len(found.problems), "", "<= 0"),
        Figure("unaccounted_micro_cny", unaccounted, "micro-CNY", "<= 0"),
        *(Figure(name, value / CNY, "CNY") for name, value in positions.items()),
    ]
    world.journal.db.close()
    return figures, rows


# ---- arrivals ------------------------------------------------------------------------------------------------------


def arrivals(rng: random.Random, hour: int, rate: float, first: int) -> list[Task]:
    """Tasks of one hour: more by day, fewer at weekends."""
    busy = (1.35 if 1 <= hour % 24 <= 12 else 0.65) * (0.8 if hour // 24 % 7 >= 5 else 1.08)
    whole = int(rate * busy)
    count = whole + (rng.random() < rate * busy - whole)
    made = []
    for i in range(count):
        home = rng.choices(range(len(HUBS)), [hub.share for hub in HUBS])[0]
        devices, hours = rng.choice((1, 2, 4, 8, 8, 16, 32, 64)), rng.randint(1, 5)
        value = round(rng.lognormvariate(2.0, 0.45) * CNY)
        moved_gib = rng.choice((0, 1, 10, 100, 500))
        others = [k for k in range(len(HUBS)) if k != home]
        if rng.random() < 0.3:  # bound to its zone by latency
            others = [k for k in others if HUBS[k].zone == HUBS[home].zone]
        moving = moved_gib * MOVE_MICRO_PER_GIB // (devices * hours)
        options = [(home, value), *((k, value - moving) for k in rng.sample(others, min(3, len(others))))]
        made.append(
            Task(
                f"t{first + i}", f"tenant-{home}-{rng.randrange(TENANTS // len(HUBS))}", home, devices, devices * hours, value,
                hour + hours + rng.choice((0, 2, 6, 24)), tuple(option for option in options if option[1] > 0), moved_gib,
            )
        )  # fmt: skip
    return made


# ---- the shared year -----------------------------------------------------------------------------------------------


class World:
    def __init__(self, folder: Path, seed: int, days: int, tasks: int) -> None:
        self.rate, self.days = tasks / days / 24, days
        self.arrive, self.fate = random.Random(f"{seed}/arrivals"), random.Random(f"{seed}/fate")
        self.journal = Journal(open_database(folder / "ledger.db"))
        self.waiting: list[Task] = []
        self.submitted, self.tally = 0, Tally()
        self.sales: list[Sale] = []
        self.served: dict[tuple[int, str], list[int]] = {}  # (hub, tenant) -> [device-hours, paid, GB]
        self.later: dict[int, Period] = {}
        self.payouts: dict[str, int] = defaultdict(int)
        self.short_hours = self.disputes = 0
        self.ran: dict[str, int] = defaultdict(int)  # device-hours
        self.moved: dict[str, int] = defaultdict(int)  # GiB
        self.gone: set[int] = set()
        self.uncovered = 0
        opening = [
            move(f"open/{tenant}", "opening", "bank/world", f"tenant/{tenant}", 10**9 * CNY)
            for tenant in tenants()
        ]
        for hub in HUBS:
            opening.append(
                move(f"open/{hub.name}", "opening", "bank/world", f"provider/{hub.name}", BOND_MICRO)
            )
            opening.append(lodge(hub.name, BOND_MICRO, f"bond/{hub.name}"))
        opening.append(move("open/platform", "opening", "bank/world", "platform/fee", 20_000_000 * CNY))
        opening.append(move("open/reserve", "opening", "bank/world", "reserve/imbalance", 1_000_000 * CNY))
        self.post([Post(transfer) for transfer in opening], 0)
        prices = tuple(Price("transfer", hub.name, MOVE_MICRO_PER_GIB) for hub in HUBS)
        self.sheet = sign_sheet(
            TariffSheet("year", "market", 0.0, 0.0, 1e9, prices),
            lambda body: hashlib.sha256(body).hexdigest(),
        )

    def post(self, requests: list[Request], hour: int) -> None:
        for start in range(0, len(requests), 2000):
            outcomes = self.journal.submit(requests[start : start + 2000], hour * HOUR_S)
            refused = [outcome for outcome in outcomes if not isinstance(outcome, Posted)]
            assert not refused, refused[:3]

    def day(self, day: int) -> None:
        for hour in range(day * DAY_H, (day + 1) * DAY_H):
            self.hour(day, hour)
        end = (day + 1) * DAY_H
        self.settle_day(day, end)
        self.cover_debts(day, end)
        fee = move(f"operation/{day}", "operation", "platform/fee", "cost/operation", OPERATION_MICRO_PER_DAY)
        self.post([Post(fee, ("platform/fee",))], end)
        if day % 30 == 29 or day == self.days - 1:
            self.pay_out(day, end)

    def hour(self, day: int, hour: int) -> None:
        new = arrivals(self.arrive, hour, self.rate, self.submitted)
        self.submitted += len(new)
        requests: list[Request] = []
        for task in new:
            task.held = task.left * task.value
            self.tally.asked_hours += task.left
            requests.append(
                PlaceHold(
                    f"{hour}/{task.task_id}/hold",
                    task.task_id,
                    task.task_id,
                    f"tenant/{task.tenant}",
                    task.held,
                )
            )
        self.waiting += new
        able = [
            task for task in self.waiting if task.held >= task.value
        ]  # a refund comes after the budget was spent
        wants = [
            Want(task.task_id, tuple(Option(((HUBS[k].name, min(task.devices, task.left, task.held // task.value)),), limit) for k, limit in task.options))
            for task in able
        ]  # fmt: skip
        supplies = [
            Supply(f"ask/{hub.name}", hub.name, hub.devices, hub.running)
            for k, hub in enumerate(HUBS)
            if k not in self.gone
        ]
        cleared = clear_combined(wants, supplies, f"seed {hour}")
        requests += self.trade(day, hour, cleared)
        self.post(requests, hour)

    def trade(self, day: int, hour: int, cleared: Combined) -> list[Request]:
        """Money of what was bought goes into escrow; what is delivered is done; what ended closes its hold."""
        prices = dict(cleared.prices)
        dearest = max((prices[fill.product] for fill in cleared.bought), default=0)
        by_id = {task.task_id: task for task in self.waiting}
        fills: dict[str, list[tuple[Task, int]]] = defaultdict(list)
        requests: list[Request] = []
        for fill in cleared.bought:
            task = by_id[fill.order_id]
            fills[fill.product].append((task, fill.devices))
            price = fill.devices * prices[fill.product]
            if price:
                requests.append(
                    CaptureHold(
                        f"{hour}/{task.task_id}/{fill.product}",
                        task.task_id,
                        task.task_id,
                        f"escrow/{hour}/{fill.product}",
                        price,
                    )
                )
                task.held -= price
        for k, hub in enumerate(HUBS):
            sold = fills.get(hub.name, [])
            if not sold:
                continue
            total = sum(devices for _, devices in sold)
            delivered = self.deliver(k, hub, day, total)
            self.short_hours += total - delivered
            per_tenant: dict[str, int] = defaultdict(int)
            for task, devices in sold:
                per_tenant[task.tenant] += devices
            self.sales.append(
                Sale(
                    f"{hour}/{hub.name}",
                    hub.name,
                    hub.zone,
                    prices[hub.name],
                    tuple(sorted(per_tenant.items())),
                    delivered,
                    dearest,
                )
            )
            self.ran[hub.name] += delivered
            self.work(k, hub, sold, delivered, prices[hub.name])
        still = []
        for task in self.waiting:
            if task.left > 0 and hour + 1 < task.end_h:
                still.append(task)
            elif task.held > 0:
                requests.append(VoidHold(f"{hour}/{task.task_id}/close", task.task_id, task.task_id))
        self.waiting = still
        return requests

    def deliver(self, k: int, hub: Hub, day: int, sold: int) -> int:
        if hub.leaves_day is not None and day >= hub.leaves_day * self.days // 365 and k not in self.gone:
            self.gone.add(k)  # without notice, in the hour for which it sold
            return 0
        if self.fate.random() < hub.fails:
            return round(sold * (1 - self.fate.uniform(0.1, 1.0)))
        return sold

    def work(self, k: int, hub: Hub, sold: list[tuple[Task, int]], delivered: int, price: int) -> None:
        """The shortfall meets the tasks in proportion."""
        parts = split(delivered, [devices for _, devices in sold])
        for (task, _), part in zip(sold, parts, strict=True):
            if not part:
                continue
            task.left -= part
            self.tally.value += part * task.value
            self.tally.done_hours += part
            seen = self.served.setdefault((k, task.tenant), [0, 0, 0])
            seen[0] += part
            seen[1] += part * price
            if k != task.home and k not in task.moved_to:
                task.moved_to.add(k)
                seen[2] += task.moved_gib

    def settle_day(self, day: int, hour: int) -> None:
        deliveries = []
        for (k, tenant), (hours, paid, moved_gib) in sorted(self.served.items()):
            hub = HUBS[k]
            counters = Counters(device_us=0, moved_bytes=moved_gib * 2**30)
            good = Evidence(0.0, 86400.0, 86400.0)
            truth = good
            if hub.lies and self.fate.random() < 0.25:
                truth = Evidence(0.0, 86400.0, 86400.0, delivered_ppm=self.fate.randint(600_000, 890_000))
            self.moved[hub.name] += moved_gib
            deliveries.append(
                Delivery(
                    f"{day}/{hub.name}/{tenant}", f"day {day}", tenant, hub.name, hub.zone, hub.name, "unit", 0.0, counters,
                    hours * 3_600_000_000, good if hub.lies else truth, truth, sold_micro=paid,
                )
            )  # fmt: skip
        terms = Terms(FEE_PPM)
        period = Period(f"day-{day:03d}", tuple(deliveries), tuple(self.sales), self.sheet, terms, SERVICE)
        run(self.journal, period, "provisional", hour * HOUR_S)
        self.later[day] = period
        self.sales, self.served = [], {}
        if day - 7 in self.later:
            self.finish(day - 7, hour)

    def finish(self, day: int, hour: int) -> None:
        """The dispute window is over: the board's own measure decides for the tenant in nine of ten."""
        period = self.later.pop(day)
        disputed = [row.about for row in settle(period) if row.kind == "dispute"]
        self.disputes += len(disputed)
        rulings = tuple(Ruling(lease, 1_000_000 if self.fate.random() < 0.9 else 0) for lease in disputed)
        final = Period(
            period.name,
            period.deliveries,
            period.sales,
            period.sheet,
            period.terms,
            period.service,
            period.penalty_ppm,
            rulings,
        )
        run(self.journal, final, "final", hour * HOUR_S)

    def cover_debts(self, day: int, hour: int) -> None:
        """A provider below zero pays from its bond; what no bond covers, the reserve pays."""
        requests: list[Request] = []
        for hub in HUBS:
            debt, bond = (
                -self.journal.balance(f"provider/{hub.name}"),
                self.journal.balance(f"bond/{hub.name}"),
            )
            if debt > 0 and bond > 0:
                requests.append(
                    Post(
                        seize(
                            hub.name,
                            min(debt, bond),
                            f"provider/{hub.name}",
                            f"seize/{hub.name}/{day}",
                            "owed",
                        )
                    )
                )
            if debt > bond:
                self.uncovered += debt - bond
                requests.append(
                    Post(move(f"cover/{hub.name}/{day}", "bad debt", "reserve/imbalance", f"provider/{hub.name}", debt - bond), ("reserve/imbalance",))
                )  # fmt: skip
        self.post(requests, hour)

    def pay_out(self, day: int, hour: int) -> None:
        for hub in HUBS:
            due = self.journal.balance(f"provider/{hub.name}")
            if due > 0:
                hold = f"payout-{day}-{hub.name}"
                self.post([PlaceHold(f"{hold}/sent", "payout", hold, f"provider/{hub.name}", due)], hour)
                self.post(
                    [CaptureHold(f"{hold}/confirmed", "payout", hold, "bank/world", due, close=True)], hour
                )
                self.payouts[hub.name] += due

    def end(self) -> None:
        hour = self.days * DAY_H
        self.post(
            [
                VoidHold(f"{hour}/{task.task_id}/close", task.task_id, task.task_id)
                for task in self.waiting
                if task.held
            ],
            hour,
        )
        for day in sorted(self.later):
            self.finish(day, hour)
        self.cover_debts(self.days, hour)
        self.pay_out(self.days, hour)

    # ---- what came of it ---------------------------------------------------------------------------------------------

    def unaccounted(self) -> int:
        """Micro-yuan that stand anywhere they should not, or that the rows of all runs and the balances tell differently."""
        balances = {account: amount for account, _, amount in self.journal.balances()}
        wrong = abs(sum(balances.values()))
        wrong += sum(
            abs(amount) for account, amount in balances.items() if account.startswith(("hold/", "escrow/"))
        )
        told: dict[str, int] = defaultdict(int)
        for day in range(self.days):
            for kind in ("provisional", "final"):
                for row in rows_of(self.journal, f"settle/day-{day:03d}/{kind}"):
                    for entry in row.entries:
                        told[entry.account] += entry.amount_micro
        self.told = told
        for hub in HUBS:
            account = f"provider/{hub.name}"
            covered = BOND_MICRO - balances.get(f"bond/{hub.name}", 0)
            given = sum(
                amount
                for _, key, _, amount, _ in self.journal.postings_of(account)
                if key.startswith("cover/")
            )
            wrong += abs(told[account] + covered + given - self.payouts[hub.name] - balances.get(account, 0))
        fee = told["platform/fee"] + 20_000_000 * CNY - self.days * OPERATION_MICRO_PER_DAY
        return wrong + abs(fee - balances["platform/fee"])

    def positions(self, alone: "Alone") -> tuple[dict[str, int], list[dict[str, Any]]]:
        balances = {account: amount for account, _, amount in self.journal.balances()}
        hours = self.days * DAY_H
        paid = sum(10**9 * CNY - balances[f"tenant/{tenant}"] for tenant in tenants())
        tenants_here = self.tally.value - paid
        rows: list[dict[str, Any]] = []
        here = there = 0
        for k, hub in enumerate(HUBS):
            mine = self.told[f"provider/{hub.name}"] - self.run_cost(hub) - hub.fixed * hub.devices * hours
            other = alone.received[k] - alone.running[k] - hub.fixed * hub.devices * hours
            here, there = here + mine, there + other
            rows.append(
                {"provider": hub.name, "shared_cny": mine / CNY, "alone_cny": other / CNY, "gain_cny": (mine - other) / CNY,
                 "lies": hub.lies, "leaves_day": hub.leaves_day, "bond_seized_cny": (BOND_MICRO - balances.get(f"bond/{hub.name}", 0)) / CNY}
            )  # fmt: skip
        fees = self.told["platform/fee"]
        costs = self.days * OPERATION_MICRO_PER_DAY
        rows.append(
            {"tenants_shared_cny": tenants_here / CNY, "tenants_alone_cny": alone.tenants / CNY,
             "device_hours_asked": self.tally.asked_hours, "done_shared": self.tally.done_hours, "done_alone": alone.done,
             "sold_not_delivered": self.short_hours, "disputes": self.disputes, "bad_debt_cny": self.uncovered / CNY,
             "reserve_cny": balances["reserve/imbalance"] / CNY}
        )  # fmt: skip
        return {
            "tenants_gain_cny": tenants_here - alone.tenants,
            "providers_gain_cny": here - there,
            "platform_fees_cny": fees,
            "platform_costs_cny": costs,
            "platform_result_cny": fees - costs - self.uncovered,
        }, rows

    def run_cost(self, hub: Hub) -> int:
        return self.ran[hub.name] * hub.running + self.moved[hub.name] * MOVE_MICRO_PER_GIB


def tenants() -> list[str]:
    return [f"tenant-{k}-{i}" for k in range(len(HUBS)) for i in range(TENANTS // len(HUBS))]


# ---- every hub for itself --------------------------------------------------------------------------------------------


@dataclass
class Alone:
    """Per hub: received, running costs; the tenants' gain of all."""

    received: list[int] = field(default_factory=lambda: [0] * len(HUBS))
    running: list[int] = field(default_factory=lambda: [0] * len(HUBS))
    tenants: int = 0
    done: int = 0


def isolated(seed: int, days: int, tasks: int) -> Alone:
    """The same tasks and outages; each hub serves its own tasks by value at the price that clears it, and nobody pays a fee.  The one that
    leaves the market leaves its own tenants, too."""
    arrive, fate = random.Random(f"{seed}/arrivals"), random.Random(f"{seed}/fate alone")
    alone, waiting, submitted = Alone(), [list[Task]() for _ in HUBS], 0
    for hour in range(days * DAY_H):
        new = arrivals(arrive, hour, tasks / days / 24, submitted)
        submitted += len(new)
        for task in new:
            waiting[task.home].append(task)
        for k, hub in enumerate(HUBS):
            left_market = hub.leaves_day is not None and hour // 24 >= hub.leaves_day * days // 365
            devices = 0 if left_market else hub.devices
            if devices and fate.random() < hub.fails:
                devices = round(devices * (1 - fate.uniform(0.1, 1.0)))
            price, served = hub.running, list[tuple[Task, int]]()
            for task in sorted(waiting[k], key=lambda task: (-task.value, task.task_id)):
                if task.value < hub.running:
                    break
                some = min(task.devices, task.left, devices)
                if some < min(task.devices, task.left):
                    price = max(price, task.value)  # the best that does not get all it wants
                if some:
                    served.append((task, some))
                    devices -= some
                if not devices:
                    break
            for task, some in served:
                price_here = min(price, task.value)
                task.left -= some
                alone.done += some
                alone.tenants += some * (task.value - price_here)
                alone.received[k] += some * price_here
                alone.running[k] += some * hub.running
            waiting[k] = [task for task in waiting[k] if task.left > 0 and hour + 1 < task.end_h]
    return alone


if __name__ == "__main__":
    main()

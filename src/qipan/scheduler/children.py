"""Engines that choose (boards) are asked one at a time, the best first.

Groups of alike tasks are served in the order of their bids.  For each group all seats are valued at once against the
children's ask curves; the best few are kept and valued again when their turn comes, since prices only rise while
orders are given (lazy greedy, Minoux 1978).  Once a group finds no seat, none of its members does.
"""

import heapq
from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qipan.curves import Point
from qipan.leases import EngineId, Offer, TaskId
from qipan.rules import Refusal
from qipan.scheduler.ask_table import ChipAsks, Floats, Ints, ask_tables, in_regions
from qipan.scheduler.asks import SECONDS_PER_HOUR, child_key, engine_key
from qipan.scheduler.backfill import Reservation, ends_of, parks, reserved, reserves, soonest, tell_reserved
from qipan.scheduler.bids import Worth, progress_value, steady, worth_of
from qipan.scheduler.entered import leads_to, shares
from qipan.scheduler.moves import Moves, checkpoint_at, worth_there
from qipan.scheduler.owners import owed_at, refused_by_rule
from qipan.scheduler.state import Draft, State, TaskState
from qipan.scheduler.tasks import Group

#: seats kept of a group at a time
SEATS_KEPT = 64

Rank = tuple[float, float, TaskId]


@dataclass(frozen=True, slots=True)
class ChildSeat:
    engine: EngineId
    point: Point
    offer: Offer
    table: ChipAsks
    row: int


@dataclass(slots=True)
class _Line:
    """A group's members in the order of their bids, and its best seats: (-score, order, seat), best first.  `least`: no
    seat that was left out scored more than that; None: none was left out."""

    group: Group
    members: list[Rank] | None  # of an unsteady group, last first
    seats: list[tuple[float, tuple[int, int, int], ChildSeat]] | None = None
    least: float | None = None


@dataclass(slots=True)
class Children:
    """The children that can be asked, and what they ask, while one tick orders from them."""

    state: State
    draft: Draft
    tables: dict[str, ChipAsks]
    _tariffs: dict[tuple[str, int], tuple[Floats, Floats]] = field(default_factory=dict)

    def seats(
        self, task: TaskState, owner: Worth, most: int
    ) -> tuple[list[tuple[float, tuple[int, int, int], ChildSeat]], float | None]:
        """The best seats of a task at the present asks."""
        found: list[tuple[Floats, Floats, int, ChipAsks]] = []
        moves = Moves(self.state, task)
        refused = tuple(engine for engine, again_s in task.refused if again_s > self.draft.moment.now_s)
        for number, point in enumerate(task.order.curve.points):
            table = self._table_for(task, point)
            if table is None or owner.value * point.rate < table.least(point.devices) / SECONDS_PER_HOUR:
                continue  # nothing is worth more to its owner than its whole progress
            claimed = self._claimed(task, table, point)
            if claimed is not None and claimed.all():
                continue
            score = self._scores(table, point, owner, moves)
            if claimed is not None:
                score = np.where(claimed, -1.0, score)
            if task.order.entered_at:
                score = np.where(
                    score >= 0, score + owner.value * self._shares(table, task.order.entered_at), score
                )
            mask = table.allowed(task.order.regions, refused)
            score = self._open(task, table, point, score)
            rows = np.nonzero(score >= 0 if mask is None else (score >= 0) & mask)[0]
            if len(rows):
                found.append((score[rows], rows, number, table))
        if not found:
            return [], None
        scores = np.concatenate([score for score, _, _, _ in found])
        least = None
        if len(scores) > most:
            least = float(np.partition(scores, len(scores) - most)[len(scores) - most])
        seats = []
        for score, rows, number, table in found:
            kept = range(len(rows)) if least is None else np.nonzero(score >= least)[0][:most]
            for i in kept:
                row = int(rows[i])
                seat = ChildSeat(
                    table.engines[row], task.order.curve.points[number], table.offers[row], table, row
                )
                seats.append((-float(score[i]), (self.order_of[seat.engine], number, row), seat))
        seats.sort(key=lambda entry: entry[:2])
        return seats, least

    order_of: dict[EngineId, int] = field(default_factory=dict)

    def refusal(self, task: TaskState, point: Point) -> Refusal | None:
        """By the rules; what this tick ordered before is counted."""
        return refused_by_rule(self.state, self.draft, task, point, point.devices, self.taken)

    taken: dict[tuple[str, str], int] = field(default_factory=dict)  # (tenant, chip class) -> devices ordered

    def _claimed(self, task: TaskState, table: ChipAsks, point: Point) -> Any:
        """The rows that others have a claim to; None for none.  What a rule keeps lies where devices are free; where some come free for whom
        they are owed to, whoever went there would be grown into them."""
        no = self.refusal(task, point)
        if no is not None and not no.short:
            return np.ones(len(table.offers), dtype=bool)
        owed = self._owed(task, table)
        if no is None:
            return owed
        kept = self._free(table) > point.devices - no.short
        return kept if owed is None else kept | owed

    def _owed(self, task: TaskState, table: ChipAsks) -> Any:
        """The rows where borrowers give devices back for others than the task's tenant; None for none."""
        if not self.state.tasks.owed:
            return None
        chip, tenant, now_s = table.offers[0].chip_class, task.order.tenant, self.draft.moment.now_s
        known = self._owed_to.get((chip, tenant))
        if known is None:
            rows = zip(table.engines, table.offers, strict=True)
            owed = [
                owed_at(self.state, now_s, task, engine_key(engine, chip), offer) for engine, offer in rows
            ]
            known = self._owed_to[chip, tenant] = np.array(owed) > 0
        return known

    def _free(self, table: ChipAsks) -> Ints:
        """Devices per row that this board's tasks do not hold: where there are none, a task takes what cheaper ones give up."""
        chip = table.offers[0].chip_class
        known = self._free_of.get(chip)
        if known is None:
            held: dict[tuple[EngineId, str], int] = {}
            for engine in {*table.engines}:
                for task in self.state.tasks.at_chip(engine_key(engine, chip)):
                    for site in {checkpoint_at(task), ""}:
                        held[engine, site] = held.get((engine, site), 0) + task.devices
            rows = zip(table.engines, table.offers, strict=True)
            here = np.array([held.get((engine, offer.site), 0) for engine, offer in rows], dtype=np.int64)
            known = self._free_of[chip] = table.devices - here
        return known

    _owed_to: dict[tuple[str, str], Any] = field(default_factory=dict)  # (chip class, tenant) -> rows
    _free_of: dict[str, Ints] = field(default_factory=dict)

    def score(self, task: TaskState, seat: ChildSeat, owner: Worth) -> float:
        """What the task's owner gains per second at this point and place, the ask taken off, and what it counts for that it entered
        there; negative when it cannot be had."""
        if self.kept is not None and self.kept.bars(
            self.state, task, child_key(seat.engine, seat.offer), seat.point, self.draft.moment.now_s
        ):
            return -1.0
        if self.state.tasks.lent or self.state.tasks.owed:
            claimed = self._claimed(task, seat.table, seat.point)
            if claimed is not None and claimed[seat.row]:
                return -1.0
        ask = seat.table.price(seat.row, seat.point.devices)
        move = Moves(self.state, task).to(seat.offer.site)
        worth = worth_there(owner, seat.point, seat.offer.tariff_micro_cny_per_device_hour, move)
        if seat.table.blocks:
            worth *= seat.table.nearness_of(seat.row, seat.point.devices)
        score = worth - ask / SECONDS_PER_HOUR
        if task.order.entered_at and score >= 0:
            score += owner.value * float(self._shares(seat.table, task.order.entered_at)[seat.row])
        return score

    kept: Reservation | None = None
    _kept_at: tuple[ChipAsks, int] | None = None  # the row that it is about

    def _open(self, task: TaskState, table: ChipAsks, point: Point, score: Floats) -> Floats:
        """Without the row that is kept for another."""
        if self.kept is None or self._kept_at is None or self._kept_at[0] is not table:
            return score
        if self.kept.bars(self.state, task, self.kept.key, point, self.draft.moment.now_s):
            score = score.copy()
            score[self._kept_at[1]] = -1.0
        return score

    def keep_for(self, task: TaskState, owner: Worth) -> None:
        """For a waiting task that found no seat: where, as those that this board placed end, its devices can be had first."""
        now_s, found = self.draft.moment.now_s, list[Reservation | None]()
        rows: dict[str, tuple[ChipAsks, int]] = {}
        for point in task.order.curve.points:
            table = self._table_for(task, point)
            if table is None or self.refusal(task, point) is not None:
                continue
            for row, (engine, offer) in enumerate(zip(table.engines, table.offers, strict=True)):
                have = int(table.total[row] - table.sent[row])
                if have >= point.devices:
                    return  # it waits for a price, not for devices
                can = offer.devices >= point.devices and in_regions(task.order.regions, offer)
                if not can or owner.of(point, offer.tariff_micro_cny_per_device_hour) <= 0:
                    continue
                chip = engine_key(engine, offer.chip_class)
                there = [
                    one for one in self.state.tasks.at_chip(chip) if offer.site in ("", checkpoint_at(one))
                ]
                ends = ends_of([one for one in there if not parks(self.state, one)], chip, now_s)
                key = child_key(engine, offer)
                rows[key] = (table, row)
                found.append(reserved(task, key, point.devices, have, ends, now_s))
        self.kept = soonest(found)
        self._kept_at = rows[self.kept.key] if self.kept is not None else None
        tell_reserved(self.state, self.draft, self.kept)

    def _shares(self, table: ChipAsks, board: str) -> Floats:
        known = table.shares.get(board)
        if known is None:
            way = leads_to(self.state, board)
            known = table.shares[board] = shares(board, way, table.engines, table.offers)
        return known

    def _table_for(self, task: TaskState, point: Point) -> ChipAsks | None:
        chip = point.needs[0].chip_class
        if len(point.needs) != 1 and len({need.chip_class for need in point.needs}) != 1:
            return None  # points on unlike chips are placed by the mixed form
        parent, vendors = task.parent, task.order.vendors
        if parent is not None and parent.started and parent.points and point.point_id not in parent.points:
            return None
        if vendors and chip.split("/")[0] not in vendors:
            return None
        return self.tables.get(chip)

    def _scores(self, table: ChipAsks, point: Point, owner: Worth, moves: Moves) -> Floats:
        price, near = table.prices(point.devices) / SECONDS_PER_HOUR, table.nearness(point.devices)
        if moves.pieces:
            rows = zip(table.tariff.tolist(), table.offers, strict=True)
            there = np.array(
                [worth_there(owner, point, tariff, moves.to(offer.site)) for tariff, offer in rows]
            )
            return (there if near is None else there * near) - price
        chip = point.needs[0].chip_class
        known = self._tariffs.get((chip, 0))
        if known is None:
            known = self._tariffs[chip, 0] = np.unique(table.tariff, return_inverse=True)
        tariffs, which = known
        worth = np.array([owner.of(point, int(tariff)) for tariff in tariffs])
        each = worth[which] if len(tariffs) > 1 else worth[0]
        score: Floats = (each if near is None else each * near) - price
        return score


def choose(children: Children, groups: Iterable[Group], most: int) -> list[tuple[TaskState, ChildSeat]]:
    """Who is ordered where, dearest bid first; at most `most`.  The devices are taken off the tables."""
    state, now_s = children.state, children.draft.moment.now_s
    small = len(state.tasks) <= state.settings.look_at_all_up_to
    heap: list[tuple[Rank, int, _Line]] = []
    for number, group in enumerate(groups):
        if group.barren is children.tables:
            continue
        line = _Line(group, None if steady_group(state, group) else [*by_bid(state, group, now_s)][::-1])
        _push(heap, state, line, number, now_s)
    chosen: list[tuple[TaskState, ChildSeat]] = []
    while heap and len(chosen) < most:
        rank, number, line = heapq.heappop(heap)
        task = state.tasks[rank[2]]
        owner = worth_of(task.order, task.done_s, now_s, state.settings.policy)
        seat = _best(children, line, task, owner)
        if seat is None and children.kept is None and small and reserves(state, task):
            children.keep_for(task, owner)
        if seat is None and line.members is None:
            if not state.reserves and children.kept is None:
                line.group.barren = (
                    children.tables
                )  # none of the group finds one, until something is asked anew
            continue
        if seat is None:
            if _hopeless(children, task, owner):
                continue
        else:
            seat.table.take(seat.row, seat.point.devices)
            if children.kept is not None:
                children.kept.take(state, task, child_key(seat.engine, seat.offer), seat.point, now_s)
            by = (task.order.tenant, str(seat.offer.chip_class))
            children.taken[by] = children.taken.get(by, 0) + seat.point.devices
            chosen.append((task, seat))
            line.group.members.discard(task.task_id)  # put back by the caller, who orders it
        _push(heap, state, line, number, now_s)
    for task, _ in chosen:
        state.tasks.group_of[task.task_id].members.add(task.task_id)
    return chosen


def steady_group(state: State, group: Group) -> bool:
    return steady(state.tasks[next(iter(group.members))].order, state.settings.policy)


def rank_of(task: TaskState, now_s: float, policy: str) -> Rank:
    value = progress_value(task.order, task.done_s, now_s, policy)
    return (-value, task.order.submitted_s, task.task_id)


def by_bid(state: State, group: Group, now_s: float, most: int = 1_000_000_000) -> Iterator[Rank]:
    """The ranks of its members, dearest bid first; at most `most` of a steady group, whose members are looked up when they are
    asked for."""
    if not steady_group(state, group):
        yield from sorted(
            rank_of(state.tasks[task_id], now_s, state.settings.policy) for task_id in group.members
        )
        return
    first = head_rank(state, group, now_s)
    yield first
    for task_id in group.heads(most)[1:]:
        yield (first[0], state.tasks[task_id].order.submitted_s, task_id)


def head_rank(state: State, group: Group, now_s: float) -> Rank:
    """Of the first member of a steady group: all bid the same."""
    head = group.head()
    assert head is not None
    if group.value is None:
        group.value = rank_of(state.tasks[head], now_s, state.settings.policy)[0]
    return (group.value, state.tasks[head].order.submitted_s, head)


def _push(heap: list[tuple[Rank, int, _Line]], state: State, line: _Line, number: int, now_s: float) -> None:
    if line.members is None:
        rank = head_rank(state, line.group, now_s) if line.group.members else None
    else:
        rank = line.members.pop() if line.members else None
    if rank is not None:
        heapq.heappush(heap, (rank, number, line))


def _best(children: Children, line: _Line, task: TaskState, owner: Worth) -> ChildSeat | None:
    """The group's best seat as things are now; it is taken from the list, and put back while it is good.  Only under rules may a seat become
    better while orders are given: an owner's wish that was met keeps devices from others no more."""
    if line.members is not None or children.state.rules:
        seats, _ = children.seats(task, owner, 1)
        return seats[0][2] if seats else None
    while True:
        if line.seats is None:
            line.seats, line.least = children.seats(task, owner, SEATS_KEPT)
            if not line.seats:
                return None
        if not line.seats:
            if line.least is None:
                return None
            line.seats = None
            continue
        score, order, seat = line.seats[0]
        now = children.score(task, seat, owner)
        if now == -score:
            return seat
        line.seats.pop(0)
        if now >= 0:
            insort(line.seats, (-now, order, seat), key=lambda entry: entry[:2])
        if line.least is not None and (not line.seats or -line.seats[0][0] < line.least):
            line.seats = None  # one that was left out may be better now


def _hopeless(children: Children, task: TaskState, owner: Worth) -> bool:
    """Whether no member with a lower bid can find a seat either: even on time, no point pays the least that is asked."""
    for point in task.order.curve.points:
        table = children._table_for(task, point)
        if table is not None and owner.value * point.rate >= table.least(point.devices) / SECONDS_PER_HOUR:
            return False
    return True


def children_of(state: State, draft: Draft, usable: Iterable[EngineId]) -> Children:
    names = sorted(usable)
    offers = [(engine, state.engines[engine].offers) for engine in names]
    kept = state.tasks.asks
    if kept is None or [*map(_named, kept[0])] != [*map(_named, offers)]:
        state.tasks.asks = kept = (offers, ask_tables(offers, state.sent_down))
    tables = kept[1]
    children = Children(state, draft, tables)
    children.order_of.update((engine, number) for number, engine in enumerate(names))
    return children


def _named(entry: tuple[EngineId, tuple[Offer, ...]]) -> tuple[EngineId, int]:
    """Offers are the same ones when they came in the same report."""
    return entry[0], id(entry[1])

"""What must come to a place before a task can run there, its data and its newest checkpoint: how long that takes, and what it costs.

A task that runs for `left` seconds after `s` seconds of staging gains (worth x left - egress) / (left + s) a second: the devices are
held while the bytes come.  A link that nobody described takes no time and costs nothing, as in the plan.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from qipan.curves import Point
from qipan.network import Link, egress_micro_cny, transfer_s
from qipan.quantities import format_bytes, format_duration, format_money
from qipan.scheduler.bids import Worth, time_left_s
from qipan.scheduler.state import State, TaskState

Pieces = tuple[tuple[str, int], ...]  # (site, bytes lying there)


@dataclass(frozen=True, slots=True)
class Move:
    size_bytes: int = 0
    s: float = 0.0
    egress_micro_cny: int = 0

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.size_bytes)} come over in {format_duration(self.s)} for"
            f" {format_money(self.egress_micro_cny)}"
        )


def link_key(source: str, target: str) -> str:
    return f"{source}|{target}"


def pieces_of(task: TaskState) -> Pieces:
    """The data, and the newest checkpoint at the site where the task ran last."""
    order, last = task.order, checkpoint_at(task)
    if not last or task.saved_s <= 0 or not order.checkpoint_bytes:
        return order.data_bytes_at
    return (*order.data_bytes_at, (last, order.checkpoint_bytes))


def checkpoint_at(task: TaskState) -> str:
    """The leaf board on the path of where it ran last; before it ran here, what the parent said."""
    return "".join(task.place.split("/")[-2:-1]) or task.order.checkpoint_at


def move_to(links: Mapping[str, Link], pieces: Pieces, site: str) -> Move:
    """All of it, one piece after the other."""
    size, seconds, egress = 0, 0.0, 0
    for source, piece_bytes in pieces:
        link = links.get(link_key(source, site))
        if source == site or link is None:
            continue
        size += piece_bytes
        seconds += transfer_s(link, piece_bytes)
        egress += egress_micro_cny(link, piece_bytes)
    return Move(size, seconds, egress)


def worth_there(owner: Worth, point: Point, tariff_micro_cny_per_device_hour: int, move: Move) -> float:
    """Micro-CNY per second of running at `point` where the move is needed first."""
    if not move.size_bytes:
        return owner.of(point, tariff_micro_cny_per_device_hour)
    later = replace(point, start_s=point.start_s + move.s)
    left_s = time_left_s(owner.order, point, owner.done_s)
    worth = owner.of(later, tariff_micro_cny_per_device_hour)
    return (worth * left_s - move.egress_micro_cny) / (left_s + move.s)


class Moves:
    """Those of one task to any site."""

    def __init__(self, state: State, task: TaskState) -> None:
        self._links = state.links
        self.pieces: Pieces = pieces_of(task) if state.links else ()
        self._known: dict[str, Move] = {}

    def to(self, site: str) -> Move:
        known = self._known.get(site)
        if known is None:
            known = self._known[site] = move_to(self._links, self.pieces, site)
        return known


def links_of(links: Iterable[Link]) -> dict[str, Link]:
    return {link_key(link.source, link.target): link for link in links}

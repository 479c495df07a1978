"""Links between sites, and how long bytes take on them."""

from collections.abc import Sequence
from dataclasses import dataclass

from qipan.errors import InvalidInput
from qipan.hardware import BoardId


@dataclass(frozen=True, slots=True)
class Link:
    """A directed network link between two sites.  `price_micro_cny_per_gib` is the egress price; `share`: the part of the
    rate that data of ours may take."""

    source: BoardId
    target: BoardId
    bytes_per_s: float
    latency_s: float
    price_micro_cny_per_gib: int = 0
    share: float = 1.0


def transfer_s(link: Link, payload_bytes: int) -> float:
    """Seconds to move `payload_bytes` over `link`: latency + bytes / bandwidth (the alpha-beta model,
    Hockney 1994).  Raises InvalidInput when payload_bytes < 0."""
    if payload_bytes < 0:
        raise InvalidInput(f"payload_bytes is {payload_bytes}; give zero or more")
    return link.latency_s + payload_bytes / link.bytes_per_s


def egress_micro_cny(link: Link, payload_bytes: int) -> int:
    return round(payload_bytes / 2**30 * link.price_micro_cny_per_gib)


def link_between(links: Sequence[Link], source: Sequence[BoardId], target: Sequence[BoardId]) -> Link | None:
    """The link that bytes take between two boards, each given by its way down from the root: the most specific of those
    between them or boards above them."""
    ends = {(link.source, link.target): link for link in links}
    ways = ((above, below) for above in reversed(source) for below in reversed(target))
    return next((ends[way] for way in ways if way in ends), None)

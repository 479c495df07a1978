"""Links between sites, and how long bytes take on them."""

from dataclasses import dataclass

from qipan.errors import InvalidInput
from qipan.hardware import BoardId


@dataclass(frozen=True, slots=True)
class Link:
    """A directed network link between two sites.  `price_micro_cny_per_gib` is the egress price."""

    source: BoardId
    target: BoardId
    bytes_per_s: float
    latency_s: float
    price_micro_cny_per_gib: int = 0


def transfer_s(link: Link, payload_bytes: int) -> float:
    """Seconds to move `payload_bytes` over `link`: latency + bytes / bandwidth (the alpha-beta model,
    Hockney 1994).  Raises InvalidInput when payload_bytes < 0."""
    if payload_bytes < 0:
        raise InvalidInput(f"payload_bytes is {payload_bytes}; give zero or more")
    return link.latency_s + payload_bytes / link.bytes_per_s

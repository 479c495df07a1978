"""Which ranks hold what: a strategy as rows of stones, one row a pipeline stage, one stone a rank.

Ranks count tensor first, then sequence, then data, then stages, site after site, as the trainer lays them out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RANKS_MAX = 64  # of a stage are drawn; beyond that the row says how many more


@dataclass(frozen=True, slots=True)
class Rank:
    number: int
    replica: int  # which part of the batch it sees
    part: int  # which part of each layer's matrices it holds
    parts: int
    rows: int
    shade: int  # 0 to 3, by part


@dataclass(frozen=True, slots=True)
class StageRow:
    """`layers` as people count, from 1; `held`: what part of the stage's weights one rank holds."""

    site: str
    stage: int
    stages: int
    chip_class: str
    layers: str
    split: str
    held: str
    ranks: tuple[Rank, ...]
    more: int


def stage_rows(strategy: Mapping[str, Any] | None) -> list[StageRow]:
    """Empty for a task whose script splits itself, or not at all."""
    if not strategy:
        return []
    rows, first = [], 0
    for site in strategy["sites"]:
        for number, stage in enumerate(site["stages"], 1):
            tp, cp, dp = stage["tp"], stage["cp"], stage["dp"]
            count = tp * cp * dp
            ranks = tuple(
                Rank(
                    first + rank, rank // (tp * cp), rank % tp, tp,
                    stage["rows_per_dp"][rank // (tp * cp)] if stage["rows_per_dp"] else 0, (rank % tp) % 4,
                )
                for rank in range(min(count, RANKS_MAX))
            )  # fmt: skip
            layers = ", ".join(f"{a + 1}" if b - a == 1 else f"{a + 1}–{b}" for a, b in stage["layers"])
            split = " × ".join(
                f"{name} {size}"
                for name, size in (("tp", tp), ("cp", cp), ("ep", stage["ep"]), ("dp", dp))
                if size > 1
            )
            held = tp * (dp if site["zero"] == 3 else 1)
            rows.append(
                StageRow(
                    site["id"], number, len(site["stages"]), stage["chip_class"], layers, split or "1",
                    f"1/{held}" if held > 1 else "1", ranks, count - len(ranks),
                )
            )  # fmt: skip
            first += count
    return rows

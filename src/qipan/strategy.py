"""How model and data are split over devices, chip classes and sites: one frozen value, made by the planner,
handed to the trainer in `QIPAN_STRATEGY`, kept in every checkpoint and receipt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from qipan.errors import InvalidInput

VERSION = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline stage on one chip class.  `layers` are half-open ranges [a, b); devices = tp * cp * dp
    (ep divides dp).  `rows_per_dp` holds the rows of the global batch each data-parallel rank works on."""

    chip_class: str
    layers: tuple[tuple[int, int], ...]
    tp: int = 1
    sp: bool = False
    cp: int = 1
    ep: int = 1
    dp: int = 1
    rows_per_dp: tuple[int, ...] = ()

    @property
    def devices(self) -> int:
        return self.tp * self.cp * self.dp


@dataclass(frozen=True, slots=True)
class SiteStrategy:
    """The stages at one site.  `micro_batches` is a count, the same on every rank.
    `zero`: 0 plain data parallel (DDP), 1 optimiser, 2 + gradients, 3 + parameters (FSDP2)."""

    id: str
    stages: tuple[Stage, ...]
    micro_batches: int = 1
    schedule: Literal[
        "none", "gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"
    ] = "none"
    zero: Literal[0, 1, 2, 3] = 0
    recompute: Literal["none", "selective", "full"] = "none"
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    offload: bool = False
    replicas: int = 1  # with zero 1 to 3: copies of the sharded state (HSDP); divides dp

    @property
    def devices(self) -> int:
        return sum(stage.devices for stage in self.stages)

    @property
    def rows(self) -> int:
        """Rows of the global batch that this site works on."""
        return sum(self.stages[0].rows_per_dp)


CODEC_BLOCK = 1024  # values that share a scale on the wire
CODEC_BYTES = {"fp32": 4 * CODEC_BLOCK, "bf16": 2 * CODEC_BLOCK, "int8": CODEC_BLOCK + 4}  # of one block


def round_steps(every: int, ramp: int, done: int) -> int:
    """Inner steps of the round that begins after so many: at most one part in `ramp` of them, and `every`."""
    return max(1, min(every, done // ramp)) if ramp else every


@dataclass(frozen=True, slots=True)
class Outer:
    """Exchange between sites every `every` inner steps of the fastest (local SGD, Stich 2019; DiLoCo, Douillard et al.
    2023).  Never exact.  `fragments`: a round exchanges one of so many parts of the model in turn; `overlap`: sites
    train on while they exchange (Streaming DiLoCo, Douillard et al. 2025).  `ramp`: rounds grow up to `every`, each at most one
    part in `ramp` of the steps before it; 0: all alike (the period grows with the training in STL-SGD, Shen et al. 2021, too;
    this rule and its 10 are measured, docs/benchmarks.md).  `moments`: Adam's are averaged with the model, which makes three
    times the bytes (local Adam with averaged states; measured there too)."""

    every: int
    optimizer: Literal["average", "nesterov"] = "average"
    lr: float = 1.0
    momentum: float = 0.0
    codec: Literal["fp32", "bf16", "int8"] = "fp32"
    grace_s: float = 10.0
    min_sites: int = 1
    fragments: int = 1
    overlap: bool = False
    ramp: int = 0
    moments: bool = False

    @property
    def told(self) -> int:
        """Values on the wire for each of the model in the round that exchanges it: its difference, and Adam's two moments."""
        return 3 if self.moments else 1

    @property
    def bytes_per_value(self) -> float:
        """On the wire, for each value of the model in the round that exchanges it."""
        return self.told * CODEC_BYTES[self.codec] / CODEC_BLOCK


@dataclass(frozen=True, slots=True)
class Strategy:
    """`outer` None means exact: the same loss as one device within rounding."""

    seed: int
    seq: int
    global_batch_rows: int
    sites: tuple[SiteStrategy, ...]
    outer: Outer | None = None
    version: int = VERSION

    @property
    def devices(self) -> int:
        return sum(site.devices for site in self.sites)

    @property
    def exact(self) -> bool:
        return self.outer is None

    def site(self, site_id: str = "") -> SiteStrategy:
        """The site of that name; without one, the only site.  Raises InvalidInput."""
        for site in self.sites:
            if site.id == site_id or (not site_id and len(self.sites) == 1):
                return site
        names = ", ".join(site.id for site in self.sites)
        raise InvalidInput(f"no site {site_id!r} in the strategy; it has {names}")

    def rows_before(self, site: SiteStrategy) -> int:
        """Where the site's rows begin in the global batch."""
        return sum(other.rows for other in self.sites[: self.sites.index(site)])

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()

    def label(self) -> str:
        """A short name for tables: `dp4`, `fsdp4`, `tp2xdp2`, `pp2xdp2`, two sites joined by ` + `."""
        return " + ".join(_site_label(site) for site in self.sites)


def parse_strategy(text: str | bytes) -> Strategy:
    """Decode and check.  Raises InvalidInput."""
    try:
        strategy = msgspec.json.decode(text, type=Strategy)
    except msgspec.MsgspecError as error:
        raise InvalidInput(
            f"strategy is not readable: {error}; give the JSON of TRAINING's Strategy value"
        ) from error
    check_strategy(strategy)
    return strategy


def check_strategy(strategy: Strategy) -> None:
    """Refuse by name what the trainer cannot mean.  Raises InvalidInput."""
    if strategy.version != VERSION:
        raise InvalidInput(f"strategy version is {strategy.version}; this trainer reads {VERSION}")
    if not strategy.sites or any(not site.stages for site in strategy.sites):
        raise InvalidInput("strategy has a site without stages; give at least one stage per site")
    outer = strategy.outer
    if outer is not None and (
        min(outer.every, outer.fragments, outer.min_sites, outer.ramp + 1) < 1 or outer.grace_s <= 0
    ):
        raise InvalidInput(
            f"outer needs every, fragments, min_sites of 1 or more, ramp of 0 or more and grace_s above 0, got {outer}"
        )
    if len(strategy.sites) > 1 and strategy.outer is None:
        raise InvalidInput(f"{len(strategy.sites)} sites need `outer`; set how often they exchange")
    rows = 0
    for site in strategy.sites:
        for stage in site.stages:
            if min(stage.tp, stage.cp, stage.ep, stage.dp) < 1:
                raise InvalidInput(f"site {site.id}: tp, cp, ep, dp must be 1 or more, got {stage}")
            if len(stage.rows_per_dp) != stage.dp:
                raise InvalidInput(
                    f"site {site.id}: rows_per_dp has {len(stage.rows_per_dp)} entries for dp={stage.dp}"
                )
            if sum(stage.rows_per_dp) != sum(site.stages[0].rows_per_dp):
                raise InvalidInput(f"site {site.id}: stages disagree on the rows of the batch")
            for count in stage.rows_per_dp:
                if count < site.micro_batches:
                    raise InvalidInput(
                        f"site {site.id}: a data-parallel rank has {count} rows for {site.micro_batches} micro-batches;"
                        " lower micro_batches or dp"
                    )
        rows += sum(site.stages[0].rows_per_dp)
    if rows != strategy.global_batch_rows:
        raise InvalidInput(
            f"rows_per_dp sum to {rows}, global_batch_rows is {strategy.global_batch_rows}; they must be equal"
        )


def share_rows(rates: Sequence[float], rows: int, least: int = 1) -> tuple[int, ...]:
    """Whole numbers n_k >= least with sum `rows` that minimise max n_k / rates_k: the time of a step on unlike chips.
    Floors of the ideal shares first, then each row to whom it delays least.  Raises InvalidInput."""
    if rows < least * len(rates) or min(rates) <= 0:
        raise InvalidInput(
            f"{rows} rows over {len(rates)} ranks of rates {list(rates)}: each needs {least} or more"
        )
    total = sum(rates)
    shares = [max(least, int(rows * rate / total)) for rate in rates]
    while sum(shares) > rows:  # what the least pushed over is taken from the slowest that can give
        k = max((k for k in range(len(rates)) if shares[k] > least), key=lambda k: (shares[k] / rates[k], -k))
        shares[k] -= 1
    while sum(shares) < rows:
        k = min(range(len(rates)), key=lambda k: ((shares[k] + 1) / rates[k], k))
        shares[k] += 1
    return tuple(shares)


def share_layers(layer_s: Sequence[float], extra_s: Sequence[float], layers: int) -> tuple[int, ...]:
    """Layers of each pipeline stage, at least one, that minimise the slowest stage: n_s * layer_s + extra_s (embedding,
    head).  Greedy is exact: a layer more never makes a stage faster."""
    counts = [1] * len(layer_s)
    if layers < len(counts):
        raise InvalidInput(f"{layers} layers for {len(counts)} stages: each needs one")
    while sum(counts) < layers:
        k = min(range(len(counts)), key=lambda k: ((counts[k] + 1) * layer_s[k] + extra_s[k], k))
        counts[k] += 1
    return tuple(counts)


def _site_label(site: SiteStrategy) -> str:
    first = site.stages[0]
    data = (
        "hsdp"
        if site.replicas > 1
        else "fsdp"
        if site.zero == 3
        else "zero" + str(site.zero) + "-dp"
        if site.zero
        else "dp"
    )
    parts = []
    if len(site.stages) > 1:
        parts.append(f"pp{len(site.stages)}")
    if first.tp > 1:
        parts.append(f"tp{first.tp}")
    if first.cp > 1:
        parts.append(f"cp{first.cp}")
    if first.ep > 1:
        parts.append(f"ep{first.ep}")
    if first.dp > 1 or not parts:
        parts.append(f"{data}{first.dp}")
    return "x".join(parts)

"""One pipeline over two pools of unlike chips: stages of each, layers by their speed.  Never tensor parallel across kinds."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from qipan.hardware import ChipClass, Pool
from qipan.planner.block import HALF_BYTES, Split, block
from qipan.planner.cluster import USABLE_MEMORY
from qipan.planner.constants import Constants, Rates, rates
from qipan.planner.memory import memory
from qipan.planner.sizes import Sizes, sizes
from qipan.planner.space import RECOMPUTE, Space
from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.workload.model import Model

TENSOR = (1, 2, 4, 8)
MICRO = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Side:
    """The devices of one pool."""

    pool: Pool
    chip: ChipClass


@dataclass(frozen=True, slots=True)
class Mixed:
    """`layers`, `stages`: of each side, in the pipeline's order; `idle_share`: of the side that waits for the other.  `rows`: of
    each side, where both hold whole replicas; None: one pipeline over both."""

    sides: tuple[Side, Side]
    step_s: float
    tensor: tuple[int, int]
    stages: tuple[int, int]
    layers: tuple[int, int]
    idle_share: float
    memory_bytes: float
    memory_margin: float
    parts_s: dict[str, float]
    strategy: Strategy
    rows: tuple[int, int] | None = None

    @property
    def devices(self) -> int:
        return sum(side.pool.devices for side in self.sides)

    def label(self) -> str:
        if self.rows is None:
            shares = zip(self.stages, self.tensor, self.layers, strict=True)
            return " + ".join(f"pp{stages}xtp{tp} of {layers} layers" for stages, tp, layers in shares)
        pp, tp = self.stages[0], self.tensor[0]
        counts = [side.pool.devices // (pp * tp) for side in self.sides]
        each = f"pp{pp}xtp{tp}" if pp > 1 else f"tp{tp}"
        return " + ".join(f"{n} x {each} of {rows} rows" for n, rows in zip(counts, self.rows, strict=True))


@dataclass(frozen=True, slots=True)
class _Layout:
    tensor: tuple[int, int]
    data: int
    micro: int
    recompute: int
    stages: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Timed:
    """A layout with its layers a stage on each side, and what a step of it takes."""

    layout: _Layout
    layers: tuple[int, int]
    micro_batches: int
    step_s: float
    imbalance: float
    parts: dict[str, float]


def best_mixed(model: Model, one: Side, other: Side, rows: int, seq: int, seed: int) -> Mixed | None:
    """The fastest pipeline over all devices of both; the side with more memory first, where most micro-batches are in
    flight.  None when nothing divides or fits."""
    if model.towers:
        return None  # whose stage is too unlike the others
    sides = (one, other)
    if one.chip.memory_bytes.value < other.chip.memory_bytes.value:
        sides = (other, one)
    shape = sizes(model)
    speeds = (_Speeds(shape, sides[0], seq), _Speeds(shape, sides[1], seq))
    found = [
        timed
        for layout in _layouts(model, sides, rows)
        if (timed := _timed(model, shape, sides, speeds, layout, rows, seq)) is not None
    ]
    for timed in sorted(found, key=lambda timed: timed.step_s):  # stable: the first of equals
        held = _held(shape, sides, speeds, timed, rows, seq)
        if held is not None:
            strategy = _strategy(model, sides, timed, rows, seq, seed)
            return Mixed(
                sides, timed.step_s, timed.layout.tensor, timed.layout.stages, timed.layers, timed.imbalance,
                *held, timed.parts, strategy,
            )  # fmt: skip
    return None


def _layouts(model: Model, sides: tuple[Side, Side], rows: int) -> Iterator[_Layout]:
    data = [2**power for power in range(13) if 2**power <= rows]
    for first in _tensor(model, sides[0]):
        for second in _tensor(model, sides[1]):
            for dp in data:
                shares = [
                    divmod(side.pool.devices, tp * dp)
                    for side, tp in zip(sides, (first, second), strict=True)
                ]
                stages = (shares[0][0], shares[1][0])
                if any(rest for _, rest in shares) or min(stages) < 1 or sum(stages) > model.layers:
                    continue
                for micro in MICRO:
                    if -(-rows // dp) >= micro:
                        for again in range(len(RECOMPUTE)):
                            yield _Layout((first, second), dp, micro, again, stages)


def _tensor(model: Model, side: Side) -> list[int]:
    most = min(side.pool.devices_per_node, side.chip.devices_per_node)
    return [tp for tp in TENSOR if tp <= most and model.kv_heads % tp == 0 and model.ffn_hidden % tp == 0]


class _Speeds:
    """Seconds of a layer on one side, by tensor parallel, micro-batch and recomputation; worked out at once."""

    def __init__(self, shape: Sizes, side: Side, seq: int) -> None:
        self.c = Constants()
        self.rates: Rates = rates(side.chip, self.c)
        tp, micro, again = np.meshgrid(TENSOR, MICRO, range(len(RECOMPUTE)), indexing="ij")
        one = np.ones(1)
        found = block(shape, Split(tp, one, one, micro, tp > 1, again, seq), self.rates, self.c)
        self.layer_s, self.transfer_s = found.layer_s, found.transfer_s
        self.head_s = np.broadcast_to(found.head_s, found.layer_s.shape)

    def of(self, tp: int, micro: int, again: int) -> tuple[float, float, float]:
        at = (TENSOR.index(tp), MICRO.index(micro), again)
        return float(self.layer_s[at]), float(self.transfer_s[at]), float(self.head_s[at])


def _timed(
    model: Model, shape: Sizes, sides: tuple[Side, Side], speeds: tuple[_Speeds, _Speeds], layout: _Layout,
    rows: int, seq: int,
) -> _Timed | None:  # fmt: skip
    """T = m t_max + (sum of stages - t_max) + what goes between them; gradients of the slower side; the optimiser."""
    first = speeds[0].of(layout.tensor[0], layout.micro, layout.recompute)
    second = speeds[1].of(layout.tensor[1], layout.micro, layout.recompute)
    layers = _layers(model.layers, layout.stages, (sum(first[:2]), sum(second[:2])), second[2])
    if layers is None:
        return None
    depth = sum(layout.stages)
    count = math.ceil(math.ceil(rows / layout.data) / layout.micro)
    stage = (layers[0] * sum(first[:2]), layers[1] * sum(second[:2]))
    last = stage[1] + second[2]
    longest = max(stage[0], last)
    through = layout.stages[0] * stage[0] + layout.stages[1] * stage[1] + second[2]
    c = speeds[0].c
    nic = min(float(speed.rates.nic_bytes_per_s) for speed in speeds)
    boundary = 2.0 * HALF_BYTES * layout.micro * seq * model.hidden / nic
    bubble = float(through - longest) + (count + depth - 1) * c.pipeline_exposed * float(boundary)
    weights = [
        share * (shape.near_weights + shape.expert_weights) / tp
        for share, tp in zip(layers, layout.tensor, strict=True)
    ]
    ring = 2 * HALF_BYTES * (layout.data - 1) / layout.data
    data = max(
        float(ring * weight / speed.rates.nic_bytes_per_s)
        for weight, speed in zip(weights, speeds, strict=True)
    )
    optimizer = c.step_floor_s + max(
        float(28.0 * weight / layout.data / speed.rates.memory_bytes_per_s)
        for weight, speed in zip(weights, speeds, strict=True)
    )
    transfer = count * (layers[0] * first[1] if longest == stage[0] else layers[1] * second[1])
    plain = count * longest + bubble + data + optimizer
    devices = sum(side.pool.devices for side in sides)
    straggler = float(plain * c.straggler_per_doubling * np.log2(devices))
    parts = {
        "compute": count * longest - transfer, "links inside a node": transfer, "pipeline bubble": bubble,
        "network between nodes": data, "memory bandwidth": optimizer, "stragglers": straggler,
    }  # fmt: skip
    return _Timed(layout, layers, count, plain + straggler, 1 - min(stage[0], last) / longest, parts)


def _held(
    shape: Sizes, sides: tuple[Side, Side], speeds: tuple[_Speeds, _Speeds], timed: _Timed, rows: int, seq: int
) -> tuple[float, float] | None:  # fmt: skip
    """Bytes of a device on the side with less to spare, and the share that it spares; None where it does not fit."""
    depth = sum(timed.layout.stages)
    peak, margin = 0.0, 1.0
    for side, speed, tp, share in zip(sides, speeds, timed.layout.tensor, timed.layers, strict=True):
        here = _memory(shape, speed.rates, timed.layout, tp, share, depth, rows, seq)
        if here > side.chip.memory_bytes.value * USABLE_MEMORY:
            return None
        if 1 - here / side.chip.memory_bytes.value < margin:
            peak, margin = here, 1 - here / side.chip.memory_bytes.value
    return peak, margin


def _layers(
    layers: int, stages: tuple[int, int], each_s: tuple[float, float], head_s: float
) -> tuple[int, int] | None:
    """Most layers of a stage on each side so that the slowest stage is fastest: the ideal share, and its neighbours."""
    ideal = layers / each_s[0] / (stages[0] / each_s[0] + stages[1] / each_s[1])
    found: list[tuple[float, int, int]] = []
    for first in {int(ideal), int(ideal) + 1, max(1, int(ideal) - 1)}:
        rest = layers - first * stages[0]
        if first < 1 or rest < stages[1]:
            continue
        second = -(-rest // stages[1])
        found.append((max(first * each_s[0], second * each_s[1] + head_s), first, second))
    if not found:
        return None
    _, first, second = min(found)
    return first, second


def _memory(
    shape: Sizes, rate: Rates, layout: _Layout, tp: int, layers: int, depth: int, rows: int, seq: int
) -> float:  # fmt: skip
    """As if every stage were as deep as this one, and the first."""
    tensor, pipeline, data, micro, virtual, zero, again = (
        np.array([value])
        for value in (tp, depth, layout.data, layout.micro, 1, 1 if layout.data > 1 else 0, layout.recompute)
    )
    one = Space(tensor, pipeline, data, micro, virtual, zero, again, rows)
    deep = replace(shape, layers=float(layers * depth))
    return float(memory(deep, one, rate, seq, sequence_parallel=np.array([tp > 1]))[0])


def _strategy(
    model: Model, sides: tuple[Side, Side], timed: _Timed, rows: int, seq: int, seed: int
) -> Strategy:  # fmt: skip
    layout, layers, count = timed.layout, timed.layers, timed.micro_batches
    share, more = divmod(rows, layout.data)
    per_rank = tuple(share + (rank < more) for rank in range(layout.data))
    stages: list[Stage] = []
    edge = 0
    for number, side in enumerate(sides):
        left = layout.stages[number]
        total = layers[0] * layout.stages[0] if number == 0 else model.layers - edge
        for index in range(left):
            size = total // left + (index < total % left)
            stages.append(
                Stage(
                    side.pool.chip_class, ((edge, edge + size),), tp=layout.tensor[number], sp=layout.tensor[number] > 1,
                    dp=layout.data, rows_per_dp=per_rank,
                )
            )  # fmt: skip
            edge += size
    return Strategy(
        seed, seq, rows,
        (SiteStrategy(
            sides[0].pool.site, tuple(stages), micro_batches=min(count, min(per_rank)), schedule="1f1b",
            zero=1 if layout.data > 1 else 0, recompute=RECOMPUTE[layout.recompute],  # type: ignore[arg-type]
            precision="bf16",
        ),),
    )  # fmt: skip

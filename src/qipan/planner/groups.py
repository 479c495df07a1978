"""Data-parallel groups over two pools of unlike chips: replicas of one shape on each, rows by their speed."""

import numpy as np

from qipan.hardware import ChipClass
from qipan.planner.block import HALF_BYTES
from qipan.planner.cluster import PARTS, USABLE_MEMORY
from qipan.planner.constants import Constants, Floats, rates
from qipan.planner.costs import Costs, costs
from qipan.planner.mixed import TENSOR, Mixed, Side
from qipan.planner.space import RECOMPUTE, Ints, Space
from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.workload.model import Model, parameter_count

#: sequences of a micro-batch that are tried on each side
MICRO_MOST = 16


def best_groups(model: Model, sides: tuple[Side, Side], rows: int, seq: int, seed: int) -> Mixed | None:
    """The fastest layout whose replicas have the same tensor and pipeline parallelism on both sides and pass equally many
    micro-batches, larger ones where the chips are faster.  None when nothing divides or fits."""
    tried = _candidates(model, sides, rows)
    if not len(tried):
        return None
    tensor, pipeline, counts, again, *_ = tried.T
    found: list[Costs] = []
    fits = np.ones(len(tried), dtype=bool)
    for number, side in enumerate(sides):
        data, micro = tried[:, 4 + number], tried[:, 6 + number]
        ones = np.ones_like(data)
        one = Space(tensor, pipeline, data, micro, ones, ones, again, data * counts * micro)
        found.append(costs(one, model, side.chip, seq))
        fits &= found[-1].memory_bytes <= side.chip.memory_bytes.value * USABLE_MEMORY
    between = _between_s(model, (sides[0].chip, sides[1].chip), tried)
    step = np.where(fits, np.maximum(found[0].step_s, found[1].step_s) + between, np.inf)
    at = int(np.argmin(step))
    if not np.isfinite(step[at]):
        return None
    times = [float(one.step_s[at]) for one in found]
    slow = found[int(np.argmax(times))]
    parts = {name: float(getattr(slow, field)[at]) for field, name in PARTS.items()}
    parts["network between nodes"] += float(between[at])
    spare = [
        1 - float(one.memory_bytes[at]) / side.chip.memory_bytes.value
        for one, side in zip(found, sides, strict=True)
    ]
    full = int(np.argmin(spare))
    tp, pp = int(tensor[at]), int(pipeline[at])
    shares = _shares(tried[at], rows)
    return Mixed(
        sides, float(step[at]), (tp, tp), (pp, pp), (model.layers, model.layers), 1 - min(times) / max(times),
        float(found[full].memory_bytes[at]), spare[full], parts,
        _strategy(model, sides, tried[at], shares, seq, seed), rows=(sum(shares[0]), sum(shares[1])),
    )  # fmt: skip


def _candidates(model: Model, sides: tuple[Side, Side], rows: int) -> Ints:
    """Columns: tensor, pipeline, micro-batches, recompute, replicas of each side, sequences of the largest micro-batch on each:
    as few on the second side as the batch leaves; some replicas of a side may have one fewer."""
    most = min(min(side.pool.devices_per_node, side.chip.devices_per_node) for side in sides)
    found = []
    for tp in TENSOR:
        if tp > most or model.kv_heads % tp or model.ffn_hidden % tp:
            continue
        for pp in range(1, model.layers + 1):
            if any(side.pool.devices % (tp * pp) for side in sides):
                continue
            one, other = (side.pool.devices // (tp * pp) for side in sides)
            for count in range(pp, rows + 1):
                if rows % count or count * (one + other) > rows:
                    continue
                for micro in range(1, MICRO_MOST + 1):
                    left = max(1, -(-(rows // count - one * micro) // other))
                    if left <= MICRO_MOST:
                        shape = (tp, pp, count), (one, other, micro, left)
                        found += [(*shape[0], again, *shape[1]) for again in range(len(RECOMPUTE))]
    return np.array(found, dtype=np.int64).reshape(-1, 8)


def _between_s(model: Model, chips: tuple[ChipClass, ChipClass], tried: Ints) -> Floats:
    """What the sides exchange once each has summed its own gradients: a share of each shard for each replica of the smaller
    side, both ways at once."""
    c = Constants()
    nic = min(float(rates(chip, c).nic_bytes_per_s) for chip in chips)
    shard = HALF_BYTES * parameter_count(model) / (tried[:, 0] * tried[:, 1])
    return np.asarray(shard / np.minimum(tried[:, 4], tried[:, 5]) / nic)


def _shares(chosen: Ints, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows of each replica of both sides: the first side's whole, as long as the second keeps a micro-batch each."""
    _, _, count, _, one, other, micro, _ = (int(value) for value in chosen)
    units = rows // count
    first = min(one * micro, units - other)

    def spread(total: int, replicas: int) -> tuple[int, ...]:
        share, more = divmod(total, replicas)
        return tuple(count * (share + (i < more)) for i in range(replicas))

    return spread(first, one), spread(units - first, other)


def _strategy(
    model: Model, sides: tuple[Side, Side], chosen: Ints, shares: tuple[tuple[int, ...], tuple[int, ...]],
    seq: int, seed: int,
) -> Strategy:  # fmt: skip
    tp, pp, count, again, one, other, *_ = (int(value) for value in chosen)
    name = "+".join(side.pool.chip_class for side in sides)
    edges = [round(model.layers * stage / pp) for stage in range(pp + 1)]
    share = (*shares[0], *shares[1])
    stages = tuple(
        Stage(name, ((edges[i], edges[i + 1]),), tp=tp, sp=tp > 1, dp=one + other, rows_per_dp=share)
        for i in range(pp)
    )
    return Strategy(
        seed, seq, sum(share),
        (SiteStrategy(
            sides[0].pool.site, stages, micro_batches=count, schedule="1f1b" if pp > 1 else "none", zero=1,
            recompute=RECOMPUTE[again], precision="bf16",  # type: ignore[arg-type]
        ),),
    )  # fmt: skip

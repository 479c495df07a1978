"""A task over several sites becomes parts: one for each (site, chip class), each of them a task with a lease of its own.

Rows go to sites and ranks by measured speed, so that all ends of a step fall together (TRAINING, "rows on unlike chips"): the parts
of one site are one world of ranks, sites meet in outer steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qipan.errors import Infeasible
from qipan.hardware import BoardSpec, Pool
from qipan.network import Link
from qipan.strategy import Outer, SiteStrategy, Stage, Strategy, share_rows
from qipan.workload import Limits, Shape, Task
from qipan.workload.task import Part


def mixed_step_s(rows_per_dp: Sequence[int], rows_per_s: Sequence[float]) -> float:
    """Seconds of a data-parallel step on unlike chips: the slowest rank's."""
    return max(rows / rate for rows, rate in zip(rows_per_dp, rows_per_s, strict=True))


def round_s(
    inner_s: float, every: int, sites: int, values: int, bytes_per_value: float, link: Link, *, overlap: bool, codec_s: float = 0.0
) -> float:  # fmt: skip
    """Seconds of a round of outer steps (TRAINING, formulas): the inner steps, then what of the exchange they do not hide.
    `inner_s`: a step at the slowest site; each site sends to every other (V = S - 1), and control passes the link
    six times.  With overlap a round lasts as long as its steps or its exchange, whichever is longer."""
    exchange_s = (sites - 1) * values * bytes_per_value / link.bytes_per_s + 6 * link.latency_s + codec_s
    steps_s = every * inner_s
    return max(steps_s, exchange_s) if overlap else steps_s + exchange_s


@dataclass(frozen=True, slots=True)
class SitesPlan:
    """`parts`: id -> the task of one part, in the order of the file.  `strategy` is that of all of them."""

    strategy: Strategy
    parts: dict[str, Task]


def plan_sites(
    task: Task,
    task_id: str,
    root: BoardSpec,
    links: tuple[Link, ...],
    coordinator: str,
    endpoints: Mapping[str, str],
) -> SitesPlan:
    """`endpoints`: site -> host:port where the nodes of that site meet.  Raises Infeasible."""
    assert task.sites is not None
    assert task.model is not None
    wanted = [(part.at, chip, count) for part in task.sites.parts for chip, count in part.chips]
    pools = {(at, chip): _pool(root, at, chip, count) for at, chip, count in wanted}
    rows = task.work.global_batch_tokens // task.work.seq
    speeds: dict[str, list[float]] = {}  # site -> of each rank
    for at, chip, count in wanted:
        probe = pools[at, chip].probe
        assert probe is not None
        speeds.setdefault(at, []).extend([probe.train_flops_per_s] * count)
    ranks = sum(len(one) for one in speeds.values())
    if rows < ranks:
        raise Infeasible(
            f"a global batch of {rows} rows leaves none for some of {ranks} devices; raise work.global_batch"
        )
    # Each site needs a row for each rank; what is left goes by speed.
    shares = share_rows([sum(one) for one in speeds.values()], rows, max(len(one) for one in speeds.values()))
    sites = []
    for (at, rates), own in zip(speeds.items(), shares, strict=True):
        classes = "+".join(chip for site, chip, _ in wanted if site == at)
        rows_per_dp = share_rows(rates, own)
        stage = Stage(classes, ((0, task.model.layers),), dp=len(rates), rows_per_dp=rows_per_dp)
        sites.append(SiteStrategy(at, (stage,)))
    asked = task.sites
    outer = Outer(
        asked.every, codec=asked.codec, grace_s=asked.grace_s, min_sites=asked.min_sites, fragments=asked.fragments,
        overlap=asked.overlap,
    )  # fmt: skip
    strategy = Strategy(task.work.seed, task.work.seq, rows, tuple(sites), outer)
    return SitesPlan(strategy, _parts(task, task_id, strategy, wanted, links, coordinator, endpoints))


def _parts(
    task: Task, task_id: str, strategy: Strategy, wanted: list[tuple[str, str, int]], links: tuple[Link, ...], coordinator: str,
    endpoints: Mapping[str, str],
) -> dict[str, Task]:  # fmt: skip
    names = [f"{task_id}.{at}.{chip.replace('/', '-')}" for at, chip, _ in wanted]
    found: dict[str, Task] = {}
    for name, (at, chip, count) in zip(names, wanted, strict=True):
        here = [one for one in wanted if one[0] == at]
        node_rank = here.index((at, chip, count))
        first = sum(devices for _, _, devices in here[:node_rank])
        own = sum(strategy.site(at).stages[0].rows_per_dp[first : first + count])
        share = own / strategy.global_batch_rows
        part = Part(
            task_id, at, node_rank, len(here), endpoints[at], coordinator, tuple(names), task.work,
            min((link.bytes_per_s for link in links if link.source == at and link.target in endpoints), default=0.0),
        )  # fmt: skip
        cost = task.limits.max_cost_micro_cny
        limits = Limits(
            task.limits.deadline_s, round(cost * share) if cost is not None else None, (), (at,), (chip,)
        )
        steps = task.work.tokens // task.work.global_batch_tokens
        work = replace(task.work, tokens=steps * own * task.work.seq, global_batch_tokens=own * task.work.seq)
        found[name] = replace(
            task,
            name=name,
            sites=None,
            part=part,
            work=work,
            limits=limits,
            devices=Shape(count, count),
            elastic=False,
        )
    return found


def _pool(root: BoardSpec, at: str, chip: str, count: int) -> Pool:
    boards = [board for board in root.walk() if board.board == at]
    if not boards:
        names = ", ".join(board.board for board in root.walk() if board.pools)
        raise Infeasible(f"sites.parts names {at!r}; the sites here are {names}")
    pools = [pool for pool in boards[0].pools if pool.chip_class == chip]
    if not pools:
        raise Infeasible(
            f"{at} has no {chip}; it has {', '.join(pool.chip_class for pool in boards[0].pools)}"
        )
    if pools[0].devices < count:
        raise Infeasible(f"{at} has {pools[0].devices} devices of {chip}, sites.parts wants {count}")
    if pools[0].probe is None:
        raise Infeasible(f"the speed of {chip} at {at} was not measured; run `qipan up` without --no-probe")
    return pools[0]

"""A task over several sites becomes parts: one for each (site, chip class), each of them a task with a lease of its own.

Rows go to sites and ranks by measured speed, so that all ends of a step fall together (TRAINING, "rows on unlike chips"): the parts
of one site are one world of ranks, sites meet in outer steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qipan.errors import Infeasible
from qipan.hardware import BoardSpec, Pool
from qipan.network import Link
from qipan.planner.option import Meetings
from qipan.quantities import format_bytes, format_devices, format_duration
from qipan.strategy import Outer, SiteStrategy, Stage, Strategy, round_steps, share_rows
from qipan.workload import Limits, Shape, Task
from qipan.workload.task import Part


def mixed_step_s(rows_per_dp: Sequence[int], rows_per_s: Sequence[float]) -> float:
    """Seconds of a data-parallel step on unlike chips: the slowest rank's."""
    return max(rows / rate for rows, rate in zip(rows_per_dp, rows_per_s, strict=True))


#: of a value, on one core, measured in the trainer at the size of `benchmarks.trainer`: to take it up and put it back, while training stands
#: still; to code it, decode it and sum its bits, which may be hidden
HANDLED_S, CODED_S = 1e-8, 1e-8


def sent_bytes(outer: Outer, sites: int, values: int) -> float:
    """By each site in a round, of a model of so many values: to every other site (V = S - 1)."""
    return (sites - 1) * values / outer.fragments * outer.bytes_per_value


def exchange_s(outer: Outer, sites: int, values: int, link: Link) -> float:
    """Seconds of an exchange over a link: coding, the bytes, and control, which passes it six times."""
    coded_s = CODED_S * outer.told * values / outer.fragments
    return coded_s + sent_bytes(outer, sites, values) / link.bytes_per_s + 6 * link.latency_s


def round_s(outer: Outer, values: int, inner_s: float, exchanged_s: float, every: int = 0) -> float:
    """Seconds of a round of outer steps (TRAINING, formulas): the inner steps and what is taken up and put back, then what of the
    exchange they do not hide.  `inner_s`: a step at the slowest site; `every`: of a round that has not grown yet.  With overlap a
    round lasts as long as its steps or its exchange, whichever is longer."""
    steps_s = (every or outer.every) * inner_s + HANDLED_S * outer.told * values / outer.fragments
    return max(steps_s, exchanged_s) if outer.overlap else steps_s + exchanged_s


def rounds_of(outer: Outer, steps: int) -> list[tuple[int, int]]:
    """(inner steps of a round, how many such rounds follow each other) of a training of so many steps."""
    found: list[tuple[int, int]] = []
    done = 0
    while done < steps:
        every = min(round_steps(outer.every, outer.ramp, done), steps - done)
        grows_at = (every + 1) * outer.ramp if every < outer.every else steps
        count = max(1, -(-(min(steps, grows_at) - done) // every))
        if done + every * count > steps:
            count -= 1  # what is left is a shorter round
        found.append((every, count))
        done += every * count
    return found


def meetings(strategy: Strategy, values: int, steps: int, inner_s: float, links: Sequence[Link]) -> Meetings:
    """Of a training of so many steps.  `inner_s`: of the slowest site; `links`: between the sites, at least one."""
    outer, sites = strategy.outer, len(strategy.sites)
    assert outer is not None
    slowest = max(links, key=lambda one: exchange_s(outer, sites, values, one))
    exchanged_s, size = exchange_s(outer, sites, values, slowest), round(sent_bytes(outer, sites, values))
    rounds = rounds_of(outer, steps)
    number, alone_s = sum(count for _, count in rounds), steps * inner_s
    training_s = max(
        alone_s, sum(count * round_s(outer, values, inner_s, exchanged_s, every) for every, count in rounds)
    )
    use = alone_s / training_s
    what = "differences and Adam's moments" if outer.moments else "differences"
    text = (
        f"{sites} sites meet {number} times, at most every {outer.every} steps of {format_duration(inner_s)}: each sends"
        f" {format_bytes(size)} ({what}, {outer.codec}), {format_duration(exchanged_s)} over the link {slowest.source} -"
        f" {slowest.target}{', while they train on' if outer.overlap else ''}; they train {use:.0%} of the time"
    )
    return Meetings(
        outer.every, inner_s, size, exchanged_s, round_s(outer, values, inner_s, exchanged_s), number, use, training_s - alone_s, text
    )  # fmt: skip


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
            f"a global batch of {rows} rows leaves none for some of {format_devices(ranks)}; raise work.global_batch"
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
        overlap=asked.overlap, ramp=asked.ramp, moments=asked.moments,
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
        raise Infeasible(f"{at} has {format_devices(pools[0].devices)} of {chip}, sites.parts wants {count}")
    if pools[0].probe is None:
        raise Infeasible(f"the speed of {chip} at {at} was not measured; run `qipan up` without --no-probe")
    return pools[0]

"""Rows and layers follow measured speed.  Pure: measurements in, another split out, or nothing."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from qipan.strategy import SiteStrategy, share_layers, share_rows

#: windows of measurement -> a split that is so much faster is taken: a large change at once, a small one when it is sure
GAINS = ((2, 1.2), (6, 1.05))
GAIN = 1.06  # of other layers
STEADY = 1.4  # two windows that agree so well tell a speed; one slow step is noise
LAYERS_AFTER = 5  # windows in a row in which other layers would pay
WINDOW_S = 0.1  # of computation on the slowest rank; shorter steps are measured together


@dataclass(slots=True)
class Balance:
    """What the last windows said."""

    _row_s: list[tuple[float, ...]] = field(default_factory=list)
    _in_a_row: int = 0

    def rows(self, site: SiteStrategy, row_s: Sequence[float]) -> tuple[int, ...] | None:
        """Other rows for each data-parallel rank, given seconds a row took on each; None to keep them."""
        now = site.stages[0].rows_per_dp
        if len(now) < 2 or min(row_s) <= 0:
            return None
        self._row_s = [*self._row_s[-GAINS[-1][0] + 1 :], tuple(row_s)]
        step = site.micro_batches if len(site.stages) > 1 else 1  # a pipeline's micro-batches are all alike
        if sum(now) % step:
            return None
        for windows, gain in GAINS:
            by_rank = list(zip(*self._row_s[-windows:], strict=True))
            if len(by_rank[0]) < windows or any(max(few[-2:]) > STEADY * min(few[-2:]) for few in by_rank):
                return None  # too little is known, or a speed is changing: wait
            seen = [statistics.median(few) for few in by_rank]
            wanted = share_rows(
                [1 / s for s in seen], sum(now) // step, 1 if step > 1 else site.micro_batches
            )
            best = tuple(step * n for n in wanted)
            if _slowest(now, seen) >= gain * _slowest(best, seen):
                self._row_s.clear()
                return best
        return None

    def layers(self, site: SiteStrategy, stage_s: Sequence[float]) -> SiteStrategy | None:
        """Other layers for each stage, given seconds a row took in each; None to keep them."""
        if len(site.stages) < 2 or site.schedule not in ("gpipe", "1f1b") or min(stage_s) <= 0:
            return None
        now = [stage.layers[0][1] - stage.layers[0][0] for stage in site.stages]
        layer_s = [s / n for s, n in zip(stage_s, now, strict=True)]
        best = share_layers(layer_s, [0.0] * len(now), sum(now))
        pays = max(stage_s) >= GAIN * max(s * n for s, n in zip(layer_s, best, strict=True))
        self._in_a_row = self._in_a_row + 1 if pays else 0
        if self._in_a_row < LAYERS_AFTER:
            return None
        self._in_a_row = 0
        return with_layers(site, best)


def with_layers(site: SiteStrategy, counts: Sequence[int]) -> SiteStrategy:
    """The same stages with so many layers each."""
    stages, at = [], 0
    for stage, count in zip(site.stages, counts, strict=True):
        stages.append(replace(stage, layers=((at, at + count),)))
        at += count
    return replace(site, stages=tuple(stages))


def _slowest(rows: Sequence[int], row_s: Sequence[float]) -> float:
    return max(n * s for n, s in zip(rows, row_s, strict=True))

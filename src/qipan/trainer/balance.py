"""Rows and layers follow measured speed.  Pure: measurements in, another split out, or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from qipan.strategy import SiteStrategy, share_layers, share_rows

GAIN = 1.08  # a split that is so much faster is taken
PATIENCE = 2  # a speed must be seen so often: one slow step is noise, and two are soon enough
LAYERS_AFTER = 5  # windows in a row in which other layers would pay
WINDOW_S = 0.1  # of computation on the slowest rank; shorter steps are measured together


@dataclass(slots=True)
class Balance:
    """What the last windows said.  Each change makes the next one harder, so that noise does not chase itself; calm makes
    it easier again."""

    _row_s: list[tuple[float, ...]] = field(default_factory=list)
    _in_a_row: int = 0
    _patience: int = PATIENCE
    _calm: int = 0

    def rows(self, site: SiteStrategy, row_s: Sequence[float]) -> tuple[int, ...] | None:
        """Other rows for each data-parallel rank, given seconds a row took on each; None to keep them."""
        now = site.stages[0].rows_per_dp
        if len(now) < 2 or min(row_s) <= 0:
            return None
        self._row_s = [*self._row_s[-self._patience + 1 :], tuple(row_s)]
        self._calm += 1
        if self._calm > 20:
            self._patience = PATIENCE
        if len(self._row_s) < self._patience:
            return None
        seen = [min(few) for few in zip(*self._row_s, strict=True)]  # noise only slows
        step = site.micro_batches if len(site.stages) > 1 else 1  # a pipeline's micro-batches are all alike
        if sum(now) % step:
            return None
        wanted = share_rows([1 / s for s in seen], sum(now) // step, 1 if step > 1 else site.micro_batches)
        best = tuple(step * n for n in wanted)
        if _slowest(now, seen) < GAIN * _slowest(best, seen):
            return None
        self._row_s.clear()
        self._patience, self._calm = self._patience + 1, 0
        return best

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

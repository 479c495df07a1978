"""Which rank of a gang is slow, from how fast each computes (`forward_rows_per_s` of the trainer's progress: collectives are not in
it, so one slow rank does not make the others look slow).  Pure: reports in, a rank out."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

SLOW = 0.7  # of the speed of the others
SURE_S = 10.0  # over so long, and in at least half of the reports: one long step is noise
REPORTS_MIN = 3
WINDOW_S = 60.0
AVOIDED_S = 3600.0  # a device that was slow is taken last for so long


@dataclass(slots=True)
class Pace:
    """The reports of one attempt in the last minute.  `groups`: ranks that compute alike (one pipeline stage each)."""

    groups: tuple[range, ...]
    _reports: list[tuple[float, tuple[float, ...]]] = field(default_factory=list)

    def slow(self, now_s: float, rates: Sequence[float]) -> dict[int, float]:
        """rank -> its share of the others' speed, of those that are slow.  `rates`: of each rank, in rows or steps a second."""
        self._reports = [(at_s, seen) for at_s, seen in self._reports if at_s > now_s - WINDOW_S]
        self._reports.append((now_s, tuple(rates)))
        lately = [seen for at_s, seen in self._reports if at_s >= now_s - SURE_S]
        if now_s - self._reports[0][0] < SURE_S or len(lately) < REPORTS_MIN:
            return {}
        ranks = min(map(len, lately))
        whole = shares(
            self.groups,
            [statistics.harmonic_mean([max(0.0, seen[rank]) for seen in lately]) for rank in range(ranks)],
        )
        each = [shares(self.groups, seen[:ranks]) for seen in lately]
        return {
            rank: share
            for rank, share in sorted(whole.items())
            if share <= SLOW and 2 * sum(seen.get(rank, 1.0) <= SLOW for seen in each) >= len(each)
        }


def shares(groups: Sequence[range], rates: Sequence[float]) -> dict[int, float]:
    """rank -> its speed over the median of the others of its group; of groups of two the faster one is the measure."""
    found = {}
    for group in groups:
        for rank in group:
            others = [rates[other] for other in group if other != rank and other < len(rates)]
            if others and rank < len(rates) and min(rates[rank], *others) > 0:
                found[rank] = rates[rank] / statistics.median(others)
    return found

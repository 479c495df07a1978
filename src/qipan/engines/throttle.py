"""Tasks held to their shares of the cores where no cgroup does it."""

import os
import signal
import time

from qipan.engines.plain import Path, read_text
from qipan.engines.processes import is_below, outside_of, signal_one, signal_task


class Throttle:
    """A duty cycle by SIGSTOP and SIGCONT: each rank (or the whole group) runs `share` of every period."""

    PERIOD_S = 0.1

    def __init__(self, folder: str, pid: int, shares: list[float], enclosed: bool = False) -> None:
        self._folder, self._pid, self._shares, self._enclosed = folder, pid, shares, enclosed
        self._began_s = time.monotonic()
        self._marked: dict[int, int] = {}  # of a sandbox: what its ranks noted, and
        self._outside: dict[int, int] = {}  # its processes' numbers in there -> ours
        self._goes_on: bool | None = None  # the whole task, since it was told last

    def turn(self) -> float:
        """Stop and continue what is due; returns how long to sleep."""
        at = (time.monotonic() - self._began_s) % self.PERIOD_S / self.PERIOD_S
        ranks = {rank: read_pid(f"{self._folder}/rank-{rank}") for rank in ranks_in(self._folder)}
        if self._enclosed:
            if ranks != self._marked:
                self._marked, self._outside = ranks, outside_of(self._pid)
            ranks = {rank: self._outside.get(pid, 0) for rank, pid in ranks.items()}
        own = {
            rank: pid for rank, pid in ranks.items() if is_below(pid, os.getpid())
        }  # a task may write any number
        if own:
            if self._goes_on is False:  # who waits for the ranks would stay stopped, and never see their end
                self._goes_on = True
                signal_task(self._pid, signal.SIGCONT, self._enclosed)
            for rank, pid in own.items():
                share = self._shares[rank % len(self._shares)]
                signal_one(pid, signal.SIGCONT if at < share else signal.SIGSTOP)
        else:
            goes_on = at < min(1.0, sum(self._shares))
            if (
                not self._enclosed or goes_on is not self._goes_on
            ):  # finding them costs too much for every turn
                signal_task(self._pid, signal.SIGCONT if goes_on else signal.SIGSTOP, self._enclosed)
            self._goes_on = goes_on
        return self.PERIOD_S / 20

    def release(self) -> None:
        signal_task(self._pid, signal.SIGCONT, self._enclosed)


def ranks_in(folder: Path) -> list[int]:
    """Those whose marks (`rank-N`, with the rank's pid) lie in a task's folder: none where the task took that away."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    texts = [name[len("rank-") :] for name in names if name.startswith("rank-")]
    return sorted(
        int(text) for text in texts if text.isdecimal() and text.isascii() and text == str(int(text))
    )


def read_pid(path: str) -> int:
    try:
        return int(read_text(path))
    except (OSError, ValueError):
        return 0  # not written yet

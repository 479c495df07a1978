"""Time and chance, both handed in.  Decisions read neither on their own."""

import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class Clock(Protocol):
    def now_s(self) -> float:
        """Unix seconds, never going back: deadlines and everything people read."""
        ...

    def lease_s(self) -> float:
        """Monotonic seconds since `boot_id` began: lease time."""
        ...

    def boot_id(self) -> str: ...


#: how fast time goes while the wall clock is behind what a store has seen
CATCH_UP = 0.9


class SystemClock:
    """`not_before_s` is the newest time a store has seen; `now_s` never answers less, and never stands still: behind it, a
    wall clock that was set back is let catch up while this one goes on a tenth slower.  `wall_s` is asked for the wall clock."""

    def __init__(self, not_before_s: float = 0.0, wall_s: Callable[[], float] = time.time) -> None:
        self._wall_s = wall_s
        self._latest_s, self._at_s = not_before_s, self.lease_s()

    def now_s(self) -> float:
        at_s = self.lease_s()
        gone_on_s = self._latest_s + CATCH_UP * (at_s - self._at_s)
        self._latest_s, self._at_s = max(gone_on_s, self._wall_s()), at_s
        return self._latest_s

    def lease_s(self) -> float:
        return (
            time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
        )

    def boot_id(self) -> str:
        path = Path("/proc/sys/kernel/random/boot_id")
        return path.read_text().strip() if path.exists() else "unknown-boot"


class ManualClock:
    """The twin's and the tests' clock: moves only when told."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        return self._now_s

    def lease_s(self) -> float:
        return self._now_s

    def boot_id(self) -> str:
        return "manual"

    def advance_to(self, now_s: float) -> None:
        assert now_s >= self._now_s, f"time goes forward: {now_s} < {self._now_s}"
        self._now_s = now_s


def named_random(seed: int, name: str) -> random.Random:
    """A child generator: one more draw from another name moves nothing here."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))

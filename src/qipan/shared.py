"""One answer for many who ask at about the same time: a thousand followers cost one question."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Any


class Shared:
    """Answers by key, asked for again only after `fresh_s`; those who ask meanwhile wait for the same answer."""

    def __init__(self, fresh_s: float) -> None:
        self.fresh_s = fresh_s
        self._known: dict[Hashable, tuple[float, Any]] = {}
        self._locks: dict[Hashable, asyncio.Lock] = {}
        self._swept_s = time.monotonic()

    async def get(self, key: Hashable, ask: Callable[[], Awaitable[Any]]) -> Any:
        found = self._fresh(key)
        if found is None:
            async with self._locks.setdefault(key, asyncio.Lock()):
                found = self._fresh(key)
                if found is None:
                    found = (time.monotonic(), await ask())
                    self._known[key] = found
                    self._sweep()
        return found[1]

    def _fresh(self, key: Hashable) -> tuple[float, Any] | None:
        found = self._known.get(key)
        return found if found is not None and time.monotonic() - found[0] < self.fresh_s else None

    def _sweep(self) -> None:
        """Forget what nobody asked for lately; what failed leaves only its lock, which goes with the rest."""
        now_s = time.monotonic()
        if now_s - self._swept_s < 10 * self.fresh_s:
            return
        self._swept_s = now_s
        for key in [key for key, lock in self._locks.items() if not lock.locked()]:
            if self._fresh(key) is None:
                self._known.pop(key, None)
                del self._locks[key]

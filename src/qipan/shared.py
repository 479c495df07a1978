"""One answer for many who ask at about the same time, one look for many who watch: a thousand followers cost one question."""

import asyncio
import contextlib
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


STILL_HERE_S = 15.0


class Watch:
    """Looks at one thing every `every_s` while somebody watches, and wakes those who do when it changed.  `version` 0: nothing
    was seen yet."""

    def __init__(self, look: Callable[[], Awaitable[Any]], every_s: float) -> None:
        self._look, self._every_s = look, every_s
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self.version, self.seen = 0, None
        self.followers = 0

    async def __aenter__(self) -> "Watch":
        self.followers += 1
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.followers -= 1
        if self.followers == 0 and self._watching is not None:
            self._watching.cancel()
            self._watching = None

    async def after(self, version: int) -> bool:
        """Until there is something newer than `version`; False when nothing came for a while."""
        if self.version != version:
            return True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), STILL_HERE_S)
            return True
        if self._watching is not None and self._watching.done():
            self._watching.result()  # why it looks no more
        return False

    async def _watch(self) -> None:
        while True:
            now = await self._look()
            if self.version == 0 or now != self.seen:
                self.seen = now
                self.version += 1
                self._changed.set()
                self._changed = asyncio.Event()
            await asyncio.sleep(self._every_s)

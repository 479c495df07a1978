"""Following a task by server-sent events.  One look at a task serves all who follow it, and they are woken only when
there is something new: a thousand onlookers of a quiet task cost nothing."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool

from qipan.queries import Queries
from qipan.shared import Shared, Watch

FOLLOW_S = 0.5
OVER = ("done", "failed", "cancelled")


class Followed:
    def __init__(self, queries: Queries) -> None:
        self._queries = queries
        self._shared = Shared(FOLLOW_S / 2)
        self._watches: dict[str, Watch] = {}

    async def follow(self, task_id: str, after: int) -> AsyncGenerator[bytes]:
        """What is new about a task after fact `after`, as it comes, until it is over."""
        watch = self._watches.setdefault(
            task_id, Watch(lambda: run_in_threadpool(self._look, task_id), FOLLOW_S)
        )
        printed, last = 0, b""
        try:
            async with watch:
                while True:
                    version = watch.version
                    view, now = await self._shared.get(
                        (task_id, version), lambda: run_in_threadpool(self._view, task_id)
                    )
                    over = (
                        view.state in OVER
                    )  # then nothing may be missed: what others read a moment ago is too old
                    events, seen, encoded = await self._read(self._events, task_id, after, anew=over)
                    if events:
                        after = seen
                        yield encoded
                    while True:
                        logs, encoded = await self._read(self._logs, task_id, printed, anew=over)
                        if not logs["text"]:
                            break
                        printed = logs["next"]
                        yield encoded
                    if now != last:
                        last = now
                        yield now
                    if over:
                        return
                    while not await watch.after(version):
                        yield b": still here\n\n"
        finally:
            if watch.followers == 0 and self._watches.get(task_id) is watch:
                del self._watches[task_id]

    async def _read(self, read: Callable[[str, int], Any], task_id: str, after: int, *, anew: bool) -> Any:
        if anew:
            return await run_in_threadpool(read, task_id, after)
        key = (read.__name__, task_id, after)
        return await self._shared.get(key, lambda: run_in_threadpool(read, task_id, after))

    def _look(self, task_id: str) -> Any:
        """What tells whether anything is new."""
        return self._queries.task(task_id), self._queries.news(task_id)

    def _view(self, task_id: str) -> Any:
        view = self._queries.task(task_id)
        return view, sent("task", view)

    def _events(self, task_id: str, after: int) -> Any:
        events = self._queries.events(task_id, after)
        seen = events[-1]["fact_id"] if events else after
        return events, seen, b"".join(sent("fact", event, event["fact_id"]) for event in events)

    def _logs(self, task_id: str, printed: int) -> Any:
        logs = self._queries.logs(task_id, printed)
        return logs, sent("logs", logs)


async def until(ended: Callable[[], bool], pieces: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """What comes before `ended`; nothing that was read after."""
    async with aclosing(pieces):
        async for piece in pieces:
            if ended():
                return
            yield piece


def sent(event: str, value: object, number: int | None = None) -> bytes:
    """One server-sent event; JSON holds no line break."""
    name = f"id: {number}\n" if number is not None else ""
    return f"{name}event: {event}\ndata: ".encode() + msgspec.json.encode(value) + b"\n\n"

"""What the pages show, read from the public API.  Many open tabs cost one question a second each kind, not each tab."""

import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from qipan.client import OVER, AsyncClient
from qipan.console.drawing import goban, line, timeline
from qipan.shared import Shared

FRESH_S = 0.9
STORIES_MAX = 64
LOG_CHARACTERS_MAX = 20_000
MOVES = 12
PAGE = 100

Values = dict[str, Any]


@dataclass(slots=True)
class Story:
    """What was read of a task so far: facts are read once."""

    events: list[Values] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    after: int = 0
    log: str = ""
    printed: int = 0

    def take(self, events: list[Values], logs: Values) -> None:
        for event in events:
            self.after = event["fact_id"]
            if event["kind"] in ("task_started", "task_exited"):
                self.events.append(event)
            elif event["kind"] == "task_progress" and event["fact"]["detail"]:
                loss = json.loads(event["fact"]["detail"]).get("loss")
                if isinstance(loss, int | float):
                    self.losses.append(float(loss))
        self.log = (self.log + logs["text"])[-LOG_CHARACTERS_MAX:]
        self.printed = logs["next"]


class Reads:
    def __init__(self, api: AsyncClient) -> None:
        self.api = api
        self._shared = Shared(FRESH_S)
        self._stories: OrderedDict[str, Story] = OrderedDict()

    async def get(self, path: str, **query: Any) -> Any:
        key = (path, *sorted(query.items()))
        return await self._shared.get(key, lambda: self.api.call("GET", path, None, **query))

    async def of(self, page: str, query: Values) -> Values:
        """The values of a live page by its name."""
        readers: dict[str, Callable[[Values], Awaitable[Values]]] = {
            "board": self.board, "tasks": self.tasks, "task": self.task, "supply": self.supply,
            "prices": self.prices, "money": self.money, "decisions": self.decisions,
        }  # fmt: skip
        return await readers[page](query)

    async def board(self, _query: Values) -> Values:
        boards = (await self.get("/boards"))["boards"]
        tasks = (await self.get("/tasks", newest_first=True))["tasks"]
        asks = {
            (price["board"], price["chip_class"]): price for price in (await self.get("/prices"))["prices"]
        }
        live = [task for task in reversed(tasks) if task["state"] not in OVER]
        numbers = {task["task_id"]: number for number, task in enumerate(live, 1)}
        tenants = sorted({task["tenant"] for task in live})
        colours = {tenant: ("black", "white")[number % 2] for number, tenant in enumerate(tenants)}
        by_name = {board["board"]: board for board in boards}
        for board in boards:
            board["squares"] = [
                {**pool, "goban": goban(pool, numbers, colours), "price": asks.get((board["board"], pool["chip_class"]))}
                for pool in board["pools"]
            ]  # fmt: skip
        moves = (await self.get("/decisions", limit=MOVES))["decisions"]
        below = {child for board in boards for child in board["children"]}
        roots = [board for board in boards if board["board"] not in below]
        return {
            "roots": roots,
            "by_name": by_name,
            "live": live,
            "numbers": numbers,
            "colours": colours,
            "moves": moves,
        }

    async def tasks(self, query: Values) -> Values:
        state, cursor = str(query.get("state", "")), str(query.get("cursor", ""))
        more = {"cursor": cursor} if cursor else {}
        answer = await self.get("/tasks", newest_first=True, limit=PAGE, state=state, **more)
        return {"tasks": answer["tasks"], "next": answer["next"], "state": state}

    async def task(self, query: Values) -> Values:
        path = f"/tasks/{query['task_id']}"
        task = await self.get(path)
        story = await self._shared.get(("story", task["task_id"]), lambda: self._read_on(task["task_id"]))
        why = await self.get(f"{path}/why")
        cost, plan = await self.get(f"{path}/cost"), await self.get(f"{path}/plan")
        return {
            "task": task, "why": why, "cost": cost, "plan": plan, "log": story.log, "over": task["state"] in OVER,
            "spans": timeline(story.events, time.time()), "loss": line(story.losses), "error": "",
        }  # fmt: skip

    async def _read_on(self, task_id: str) -> Story:
        story = self._stories.setdefault(task_id, Story())
        self._stories.move_to_end(task_id)
        if len(self._stories) > STORIES_MAX:
            self._stories.popitem(last=False)
        events = await self.api.call("GET", f"/tasks/{task_id}/events", None, after=story.after)
        logs = await self.api.call("GET", f"/tasks/{task_id}/logs", None, after=story.printed)
        story.take(events["events"], logs)
        return story

    async def supply(self, query: Values) -> Values:
        cursor = str(query.get("cursor", ""))
        more = {"cursor": cursor} if cursor else {}
        chips = await self.get("/chips", limit=PAGE, **more)
        return {
            "boards": (await self.get("/boards"))["boards"],
            "chips": chips["chips"],
            "next": chips["next"],
        }

    async def prices(self, _query: Values) -> Values:
        return dict(await self.get("/prices"))

    async def money(self, query: Values) -> Values:
        cursor = str(query.get("cursor", ""))
        more = {"cursor": cursor} if cursor else {}
        bills = await self.get("/bills", limit=PAGE, **more)
        return {"ledger": await self.get("/ledger"), "bills": bills["bills"], "next": bills["next"]}

    async def decisions(self, query: Values) -> Values:
        cursor = str(query.get("cursor", ""))
        more = {"cursor": cursor} if cursor else {}
        return dict(await self.get("/decisions", limit=PAGE, **more))

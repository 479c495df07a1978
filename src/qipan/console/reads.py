"""What the pages show, read from the public API.  Many open tabs cost one question a second each kind, not each tab."""

import itertools
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from qipan.client import OVER, AsyncClient
from qipan.console.charts import chart, money
from qipan.console.drawing import COLOURS, goban, timeline
from qipan.console.geography import world
from qipan.console.ranks import stage_rows
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
    losses: list[tuple[float, float]] = field(default_factory=list)  # (when, nats)
    rates: list[tuple[float, float]] = field(default_factory=list)  # (when, tokens or steps a second)
    rate_unit: str = "steps/s"
    step: tuple[float, float] | None = None  # the newest (when, tokens or steps)
    strategies: dict[str, Values] = field(default_factory=dict)  # point -> strategy
    after: int = 0
    log: str = ""
    printed: int = 0

    def take(self, event: Values) -> None:
        self.after = event["fact_id"]
        if event["kind"] in ("task_started", "task_exited"):
            self.events.append(event)
        elif event["kind"] == "task_progress" and event["fact"]["detail"]:
            self._progress(json.loads(event["fact"]["detail"]), event["at_s"])
        elif event["kind"] == "task_submitted":
            points = event["fact"]["order"]["curve"]["points"]
            self.strategies = {point["point_id"]: point["strategy"] for point in points if point["strategy"]}

    def _progress(self, said: Values, at_s: float) -> None:
        """A step back (another attempt went on from its checkpoint) begins a new measurement of the rate."""
        loss = said.get("loss")
        if isinstance(loss, int | float):
            self.losses.append((at_s, float(loss)))
        unit, now = ("tokens/s", said.get("tokens")) if "tokens" in said else ("steps/s", said.get("step"))
        when = said.get("at_s", at_s)
        if (
            not isinstance(now, int | float)
            or not isinstance(when, int | float)
            or said.get("event") != "progress"
        ):
            return
        if self.step is not None and unit == self.rate_unit and now > self.step[1] and when > self.step[0]:
            self.rates.append((at_s, (now - self.step[1]) / (when - self.step[0])))
        self.rate_unit, self.step = unit, (float(when), float(now))


class Reads:
    def __init__(self, api: AsyncClient) -> None:
        self.api = api
        self._shared = Shared(FRESH_S)
        self._stories: OrderedDict[str, Story] = OrderedDict()
        self._numbers: dict[str, int] = {}
        self._colours: dict[str, str] = {}

    async def get(self, path: str, **query: Any) -> Any:
        key = (path, *sorted(query.items()))
        return await self._shared.get(key, lambda: self.api.call("GET", path, None, **query))

    async def of(self, page: str, query: Values) -> Values:
        """The values of a live page by its name."""
        readers: dict[str, Callable[[Values], Awaitable[Values]]] = {
            "board": self.board, "tasks": self.tasks, "task": self.task, "supply": self.supply,
            "prices": self.prices, "money": self.money, "decisions": self.decisions, "people": self.people,
        }  # fmt: skip
        return await readers[page](query)

    async def board(self, _query: Values) -> Values:
        answer = await self.get("/boards")
        boards = [dict(board) for board in answer["boards"]]
        tasks = (await self.get("/tasks", newest_first=True))["tasks"]
        asks = {
            (price["board"], price["chip_class"]): price for price in (await self.get("/prices"))["prices"]
        }
        live = [task for task in reversed(tasks) if task["state"] not in OVER]
        numbers, colours = self._number(live)
        by_name = {board["board"]: board for board in boards}
        for board in boards:
            board["squares"] = [
                {**pool, "goban": goban(pool, numbers, colours), "price": asks.get((board["board"], pool["chip_class"]))}
                for pool in board["pools"]
            ]  # fmt: skip
        moves = (await self.get("/decisions", limit=MOVES))["decisions"]
        below = {child for board in boards for child in board["children"]}
        return {
            "roots": [board for board in boards if board["board"] not in below],
            "by_name": by_name,
            "live": live,
            "numbers": numbers,
            "colours": colours,
            "moves": moves,
            "map": world(boards, answer["links"], numbers, colours),
        }

    def _number(self, live: list[Values]) -> tuple[dict[str, int], dict[str, str]]:
        """A task keeps its number, and a tenant its colour, as long as it is there."""
        names = {task["task_id"] for task in live}
        self._numbers = {name: number for name, number in self._numbers.items() if name in names}
        free = (number for number in itertools.count(1) if number not in set(self._numbers.values()))
        for task in live:
            if task["task_id"] not in self._numbers:
                self._numbers[task["task_id"]] = next(free)
            self._colours.setdefault(task["tenant"], COLOURS[len(self._colours) % len(COLOURS)])
        return dict(self._numbers), dict(self._colours)

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
        marks = [
            (event["at_s"], f"{event['fact']['attempt']}")
            for event in story.events
            if event["kind"] == "task_started" and event["fact"]["attempt"] > 1
        ]
        point = task["point"] or next(
            (option["point_id"] for option in plan["options"] if option["option_id"] == plan["chosen"]), ""
        )
        return {
            "task": task, "why": why, "cost": cost, "plan": plan, "log": story.log, "over": task["state"] in OVER,
            "line": timeline(story.events, time.time()), "loss": chart(story.losses, marks),
            "rate": chart(story.rates, marks, from_zero=True), "rate_unit": story.rate_unit,
            "stages": stage_rows(story.strategies.get(point)), "point": point,
            "spending": money(cost["spent_micro_cny"], cost["planned_p50_micro_cny"], cost["planned_p90_micro_cny"], cost["hold_micro_cny"]),
            "error": "",
        }  # fmt: skip

    async def _read_on(self, task_id: str) -> Story:
        story = self._stories.setdefault(task_id, Story())
        self._stories.move_to_end(task_id)
        if len(self._stories) > STORIES_MAX:
            self._stories.popitem(last=False)
        async for event in self.api.list(f"/tasks/{task_id}/events", "events", after=story.after):
            story.take(event)
        logs = await self.api.call("GET", f"/tasks/{task_id}/logs", None, after=story.printed)
        if logs["size"] - logs["next"] > LOG_CHARACTERS_MAX:  # only its end is shown
            end = logs["size"] - LOG_CHARACTERS_MAX
            logs = await self.api.call("GET", f"/tasks/{task_id}/logs", None, after=end)
        while logs["text"]:
            story.log = (story.log + logs["text"])[-LOG_CHARACTERS_MAX:]
            story.printed = logs["next"]
            logs = await self.api.call("GET", f"/tasks/{task_id}/logs", None, after=story.printed)
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
        return {**await self.get("/prices"), **await self.get("/market/auctions", limit=PAGE)}

    async def money(self, query: Values) -> Values:
        cursor = str(query.get("cursor", ""))
        more = {"cursor": cursor} if cursor else {}
        bills = await self.get("/bills", limit=PAGE, **more)
        return {"ledger": await self.get("/ledger"), "bills": bills["bills"], "next": bills["next"]}

    async def decisions(self, query: Values) -> Values:
        cursor = str(query.get("cursor", ""))
        more = {"cursor": cursor} if cursor else {}
        return dict(await self.get("/decisions", limit=PAGE, **more))

    async def people(self, _query: Values) -> Values:
        return {**await self.get("/people"), **await self.get("/webhooks")}

"""The client of the public API: what the command line, the console and other people's programs use.

task = qipan.Task.from_yaml("examples/tiny.yaml")
client = qipan.Client()
print(client.plan(task).options[0].cost_p50_micro_cny)
job = client.submit(task)
print(job.wait()["state"], job.cost()["spent_micro_cny"])
"""

import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec

from qipan import sessions
from qipan.disk import has_room, told
from qipan.errors import (
    DiskFull,
    Infeasible,
    InvalidInput,
    NotAllowed,
    NotFound,
    OverLimit,
    QipanError,
    Unreachable,
)

if TYPE_CHECKING:
    from qipan.planner import Plan

ERRORS: dict[int, type[QipanError]] = {
    2: InvalidInput, 102: NotFound, 104: Infeasible, 105: OverLimit, 106: Unreachable, 107: NotAllowed,
}  # fmt: skip
OVER = ("done", "failed", "cancelled")
PAGE = 500
POLL_S = 0.3
UNSENDABLE = (httpx.InvalidURL, ValueError)  # half a character, a zero byte in a path, a number that is none
TIMEOUT_S = 150.0  # longer than the longest answer takes, a what-if


def default_store() -> Path:
    """QIPAN_STORE, then the user's state folder."""
    import platformdirs

    return Path(os.environ.get("QIPAN_STORE") or platformdirs.user_state_path("qipan") / "store")


def socket_path(folder: Path) -> Path:
    """Where a store's server listens.  Unix sockets allow about 100 bytes, so a long folder gets one elsewhere."""
    path = folder.resolve() / "api.sock"
    if len(str(path)) < 100:
        return path
    name = hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()
    return Path(tempfile.gettempdir()) / f"qipan-{name}.sock"


@dataclass(frozen=True, slots=True)
class ServerAt:
    """Where a server listens: on the socket of a store, or at `url`."""

    folder: Path | None
    url: str = ""

    @property
    def name(self) -> str:
        """Under which a session with it is kept."""
        return self.url or f"unix:{self.folder.resolve() if self.folder else ''}"

    def transport(self, kind: type[Any]) -> Any:
        if self.folder is not None:
            return kind(
                uds=str(socket_path(self.folder)), verify=False
            )  # no TLS: no authorities are read for it
        return kind(verify=sessions.trust(self.url))

    def settings(self, token: str | None = None) -> dict[str, Any]:
        """The caller's own token, else a session of `qipan login`, else the store's token."""
        base = f"{self.url or 'http://qipan'}/v1"
        common: dict[str, Any] = {"base_url": base, "timeout": TIMEOUT_S}
        token = token or os.environ.get("QIPAN_TOKEN")
        path = self.folder / "token" if self.folder is not None else None
        if token is None and sessions.kept(self.name) is not None:
            return {**common, "auth": sessions.SessionAuth(self.name, base)}
        if token is None and path is not None and path.exists():
            token = path.read_text().strip()
        if token and not (token.isascii() and token.isprintable()):
            raise InvalidInput(
                f"the token {token[:20]!r} has a character that is none of a token; see QIPAN_TOKEN and `qipan token`"
            )
        return {**common, "headers": {"authorization": f"Bearer {token}"} if token else {}}

    def no_answer(self, error: Exception) -> Unreachable:
        if self.folder is None:
            return Unreachable(f"no server answers at {self.url} ({error})")
        if self.folder.exists() and not has_room(self.folder):
            return DiskFull(f"no server answers for the store {self.folder}: {told(self.folder)}")
        return Unreachable(
            f"no server answers for the store {self.folder} ({error}); start one with `qipan up --store {self.folder}`"
        )


def server_of(folder: str | Path | None = None, url: str = "") -> ServerAt:
    """What was named, then QIPAN_SERVER or QIPAN_STORE, then where `qipan login` was last, then the user's own store."""
    if folder is not None:
        return ServerAt(Path(folder))
    url = url or os.environ.get("QIPAN_SERVER", "")
    if not url and "QIPAN_STORE" not in os.environ:
        url = sessions.current()
    return ServerAt(None, sessions.checked_url(url)) if url else ServerAt(default_store())


@dataclass(frozen=True, slots=True)
class Task:
    """A task file as it is handed in; it was checked when it was read.  `file` and `workdir` say where it stood."""

    text: str
    file: str = "task.yaml"
    workdir: str = ""

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Task":
        """A task file, Qipan's or another tool's.  Raises NotFound, InvalidInput with line and column."""
        from qipan.workload.files import read_file

        path = Path(path)
        read_file(path)
        return cls(path.read_text(encoding="utf-8"), str(path), str(path.resolve().parent))

    @classmethod
    def from_text(cls, text: str, workdir: str | Path = "") -> "Task":
        """Raises InvalidInput."""
        from qipan.workload.files import read_text

        read_text(text, "task.yaml", str(workdir))
        return cls(text, workdir=str(workdir))

    def body(self) -> dict[str, str]:
        return {"text": self.text, "file": self.file, "workdir": self.workdir}


class Client:
    """Speaks to the server of the store in `folder`, else to the one of the last `qipan login`, else to the user's own.  Raises
    the errors the server names, Unreachable when there is none.  `token` stands in for the store's own, such as a tenant's."""

    def __init__(self, folder: str | Path | None = None, token: str | None = None) -> None:
        self._at = server_of(folder)
        self._http = httpx.Client(
            transport=self._at.transport(httpx.HTTPTransport), **self._at.settings(token)
        )

    def call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        **query: Any,
    ) -> Any:
        try:
            response = self._http.request(method, path, json=body, params=query or None, headers=headers)
        except httpx.TransportError as error:
            raise self._at.no_answer(error) from None
        except UNSENDABLE as error:
            raise unsendable(method, path, error) from None
        return value_of(response)

    def list(self, path: str, what: str, **query: Any) -> Iterator[Any]:
        """Every item of a list, page after page."""
        cursor: str | None = None
        while True:
            more = {"cursor": cursor} if cursor is not None else {}
            answer = self.call("GET", path, None, **{"limit": PAGE, **query, **more})
            yield from answer[what]
            cursor = answer.get("next")
            if cursor is None:
                return

    def printed(self, task_id: str, after: int = 0) -> Iterator[Any]:
        """What a task printed until now, from that byte on: `text` and `next`, page after page."""
        while (page := self.call("GET", f"/tasks/{task_id}/logs", after=after))["text"]:
            yield page
            after = page["next"]

    def plan(self, task: Task) -> "Plan":
        """How it could run; nothing starts."""
        from qipan.planner import Plan

        return msgspec.convert(self.call("POST", "/plan", task.body()), type=Plan)

    def submit(self, task: Task, key: str | None = None) -> "Job":
        """Durable when it returns; the same `key` submits once."""
        answer = self.call("POST", "/tasks", {**task.body(), "key": key}, trace_headers())
        return Job(self, answer["task_id"], answer)

    def job(self, task_id: str) -> "Job":
        """A task submitted before.  Raises NotFound."""
        return Job(self, str(self.task(task_id)["task_id"]))

    def task(self, task_id: str) -> Any:
        return self.call("GET", f"/tasks/{task_id}")

    def close(self) -> None:
        self._http.close()


@dataclass(frozen=True, slots=True)
class Job:
    """A submitted task.  `answer` is what the server said to the submission."""

    client: Client
    task_id: str
    answer: dict[str, Any] = field(default_factory=dict)

    def wait(self, limit_s: float | None = None) -> Any:
        """The task once it is over: done, failed or cancelled; after `limit_s` as it is then."""
        began_s = time.monotonic()
        while True:
            view = self.client.task(self.task_id)
            if view["state"] in OVER or (limit_s is not None and time.monotonic() - began_s >= limit_s):
                return view
            time.sleep(POLL_S)

    def logs(self, follow: bool = False) -> Iterator[str]:
        """What it printed, in pieces; with `follow` until it is over."""
        after = 0
        while True:
            over = not follow or self.client.task(self.task_id)["state"] in OVER
            for page in self.client.printed(self.task_id, after):
                after = page["next"]
                yield page["text"]
            if over:
                return
            time.sleep(POLL_S)

    def why(self) -> Any:
        return self.client.call("GET", f"/tasks/{self.task_id}/why")

    def cost(self) -> Any:
        """Spent so far, held, planned; micro-CNY."""
        return self.client.call("GET", f"/tasks/{self.task_id}/cost")

    def bill(self) -> Any:
        return self.client.call("GET", f"/tasks/{self.task_id}/bill")

    def cancel(self) -> None:
        self.client.call("POST", f"/tasks/{self.task_id}/cancel")


class AsyncClient:
    """The same for asyncio."""

    def __init__(
        self,
        folder: str | Path | ServerAt | None = None,
        token: str | None = None,
        auth: httpx.Auth | None = None,
    ) -> None:
        self._at = folder if isinstance(folder, ServerAt) else server_of(folder)
        settings = self._at.settings(token)
        if auth is not None:
            settings = {name: value for name, value in settings.items() if name != "headers"} | {"auth": auth}
        self._http = httpx.AsyncClient(transport=self._at.transport(httpx.AsyncHTTPTransport), **settings)

    def under(self, auth: httpx.Auth) -> "AsyncClient":
        """A client of the same server that shows what `auth` has, in place of the store's token or the session kept here."""
        return AsyncClient(self._at, auth=auth)

    async def call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        **query: Any,
    ) -> Any:
        try:
            response = await self._http.request(
                method, path, json=body, params=query or None, headers=headers
            )
        except httpx.TransportError as error:
            raise self._at.no_answer(error) from None
        except UNSENDABLE as error:
            raise unsendable(method, path, error) from None
        return value_of(response)

    async def list(self, path: str, what: str, **query: Any) -> AsyncIterator[Any]:
        """Every item of a list, page after page."""
        cursor: str | None = None
        while True:
            more = {"cursor": cursor} if cursor is not None else {}
            answer = await self.call("GET", path, None, **{"limit": PAGE, **query, **more})
            for item in answer[what]:
                yield item
            cursor = answer.get("next")
            if cursor is None:
                return

    async def plan(self, task: Task) -> "Plan":
        """How it could run; nothing starts."""
        from qipan.planner import Plan

        return msgspec.convert(await self.call("POST", "/plan", task.body()), type=Plan)

    async def submit(self, task: Task, key: str | None = None) -> "AsyncJob":
        """Durable when it returns; the same `key` submits once."""
        answer = await self.call("POST", "/tasks", {**task.body(), "key": key}, trace_headers())
        return AsyncJob(self, answer["task_id"], answer)

    async def job(self, task_id: str) -> "AsyncJob":
        """A task submitted before.  Raises NotFound."""
        return AsyncJob(self, str((await self.task(task_id))["task_id"]))

    async def task(self, task_id: str) -> Any:
        return await self.call("GET", f"/tasks/{task_id}")

    async def follow(self, task_id: str, after: int = 0) -> AsyncIterator[tuple[str, Any]]:
        """What is new about a task, as it comes, until it is over: ("fact" | "logs" | "task", its value)."""
        path, query = f"/tasks/{task_id}/stream", {"after": after}
        async with self._http.stream(
            "GET", path, params=query, timeout=httpx.Timeout(TIMEOUT_S, read=None)
        ) as stream:
            if not stream.is_success:
                await stream.aread()
                value_of(stream)
            name = ""
            async for line in stream.aiter_lines():
                kind, _, rest = line.partition(": ")
                if kind == "event":
                    name = rest
                elif kind == "data":
                    yield name, json.loads(rest)

    async def close(self) -> None:
        await self._http.aclose()


@dataclass(frozen=True, slots=True)
class AsyncJob:
    """A submitted task, for asyncio."""

    client: AsyncClient
    task_id: str
    answer: dict[str, Any] = field(default_factory=dict)

    async def wait(self) -> Any:
        """The task once it is over: done, failed or cancelled."""
        async for _ in self.client.follow(self.task_id):
            continue
        return await self.client.task(self.task_id)

    async def logs(self) -> AsyncIterator[str]:
        """What it prints, as it comes, until it is over."""
        async for kind, value in self.client.follow(self.task_id):
            if kind == "logs":
                yield value["text"]

    async def why(self) -> Any:
        return await self.client.call("GET", f"/tasks/{self.task_id}/why")

    async def cost(self) -> Any:
        return await self.client.call("GET", f"/tasks/{self.task_id}/cost")

    async def bill(self) -> Any:
        return await self.client.call("GET", f"/tasks/{self.task_id}/bill")

    async def cancel(self) -> None:
        await self.client.call("POST", f"/tasks/{self.task_id}/cancel")


def trace_headers() -> dict[str, str]:
    """Of a submission: it is part of the caller's trace, where TRACEPARENT names one, else of a new one."""
    from qipan.tracing import TRACEPARENT, headers_of

    found = TRACEPARENT.fullmatch(os.environ.get("TRACEPARENT", ""))
    trace_id, above = (found[2], found[3]) if found else (secrets.token_hex(16), "")
    return headers_of(trace_id, secrets.token_hex(8), time.time(), above)


def unsendable(method: str, path: str, error: Exception) -> InvalidInput:
    return InvalidInput(
        f"{method} {path[:100]!r} with what you gave cannot be written as a request: {error}; give plain text and finite numbers"
    )


def value_of(response: httpx.Response) -> Any:
    """Raises the error that a problem names."""
    try:
        value = response.json()
    except json.JSONDecodeError:
        raise QipanError(f"the server answered {response.status_code} without JSON; see its log") from None
    if response.is_success:
        return value
    kind = ERRORS.get(value.get("code", 100), QipanError)
    raise kind(str(value.get("detail", value)))

"""What the API takes and answers, for its OpenAPI document, and how an answer leaves: JSON with an entity tag."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import Query, Request, Response
from starlette.types import Receive, Scope, Send

from qipan.errors import InvalidInput
from qipan.events import PersonNoted
from qipan.journal.exchange import Listed, Placed
from qipan.leases import Receipt
from qipan.login import Session, User
from qipan.money import Account
from qipan.planner import Plan
from qipan.queries import TaskView
from qipan.tracing import Span
from qipan.views import BoardView, BookedTask, LinkView, Price, Told
from qipan.webhooks import Webhook
from qipan.workload.imports import Directive

T = TypeVar("T")
KEY_CHARACTERS_MAX = 200
LIMIT, LIMIT_MAX = 200, 1000
Limit = Annotated[int, Query(ge=1, le=LIMIT_MAX)]
Cursor = Annotated[str | None, Query(max_length=300)]


class Submission(msgspec.Struct, forbid_unknown_fields=True):
    """`text` is the task file; `file` and `workdir` say where it stood; the same `key` submits once."""

    text: str
    file: str = "task.yaml"
    workdir: str = ""
    key: str | None = None


class Command(msgspec.Struct, forbid_unknown_fields=True):
    command: list[str]
    limit_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Executing:
    exec_id: str


@dataclass(frozen=True, slots=True)
class Health:
    status: str
    board: str


@dataclass(frozen=True, slots=True)
class Submitted:
    """`directives`: for another tool's file, what became of each."""

    task_id: str
    plan: Plan
    directives: tuple[Directive, ...]


@dataclass(frozen=True, slots=True)
class Tasks:
    """`next`: give it as `cursor` for what follows; null at the end."""

    tasks: tuple[TaskView, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class Waiting:
    constraint: str
    text: str


@dataclass(frozen=True, slots=True)
class WhyDecision:
    """`task_id`: the task, or the one of its parts that it is about."""

    at_s: float
    board: str
    verdict: str
    text: str
    task_id: str


@dataclass(frozen=True, slots=True)
class Why:
    task_id: str
    state: str
    decisions: tuple[WhyDecision, ...]
    waiting: tuple[Waiting, ...]


@dataclass(frozen=True, slots=True)
class Logs:
    """A page.  `next`: give it as `after` for what follows, until `text` is empty.  `size`: bytes of all that was printed."""

    text: str
    next: int
    size: int


@dataclass(frozen=True, slots=True)
class Event:
    fact_id: int
    at_s: float
    kind: str
    fact: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Events:
    """`next`: give it as `cursor` for what follows; null at the end."""

    events: tuple[Event, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class Trace:
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Cancelled:
    task_id: str


@dataclass(frozen=True, slots=True)
class Woken:
    task_id: str
    state: str


@dataclass(frozen=True, slots=True)
class Budget:
    task_id: str
    budget_micro_cny: int


@dataclass(frozen=True, slots=True)
class Bill:
    receipt: Receipt
    charged_micro_cny: int


@dataclass(frozen=True, slots=True)
class Accounts:
    accounts: tuple[Account, ...]


@dataclass(frozen=True, slots=True)
class Auctions:
    auctions: tuple[Listed, ...]


@dataclass(frozen=True, slots=True)
class Orders:
    orders: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Bills:
    bills: tuple[BookedTask, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class Boards:
    boards: tuple[BoardView, ...]
    links: tuple[LinkView, ...]


@dataclass(frozen=True, slots=True)
class Prices:
    prices: tuple[Price, ...]
    tariff_version: str


@dataclass(frozen=True, slots=True)
class ChipView:
    """Per schedulable device."""

    chip_class: str
    vendor: str
    model: str
    kind: str
    stack: str
    memory_bytes: float
    memory_bytes_per_s: float
    peak_flops_per_s: dict[str, float]
    devices_per_node: int
    confidence: str


@dataclass(frozen=True, slots=True)
class Chips:
    chips: tuple[ChipView, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class Decisions:
    decisions: tuple[Told, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class Ledger:
    balances_micro_cny: dict[str, int]
    sum_micro_cny: int


@dataclass(frozen=True, slots=True)
class Person:
    """A tenant as the caller may know it; `live` tasks of it are on the board now."""

    tenant: str
    balance_micro_cny: int
    held_micro_cny: int
    live: int
    submitted: int


@dataclass(frozen=True, slots=True)
class People:
    people: tuple[Person, ...]
    you: str  # the tenant of the token; empty: the operator


@dataclass(frozen=True, slots=True)
class Key:
    tenant: str
    token: str


@dataclass(frozen=True, slots=True)
class Oidc:
    """Where a person logs in, with the device flow (RFC 8628), for an id_token that is good here."""

    issuer: str
    client_id: str
    scope: str


@dataclass(frozen=True, slots=True)
class Door:
    """`audience`: what access tokens of this board are good for."""

    board: str
    audience: str
    oidc: Oidc | None


@dataclass(frozen=True, slots=True)
class LoggedOut:
    session: str


@dataclass(frozen=True, slots=True)
class WhoAmI:
    """`user` "": whoever holds the store's own token.  `tenant` "": of all."""

    user: str
    tenant: str
    role: str
    board: str


@dataclass(frozen=True, slots=True)
class Users:
    users: tuple[User, ...]
    sessions: tuple[Session, ...]


@dataclass(frozen=True, slots=True)
class UserName:
    user: str


@dataclass(frozen=True, slots=True)
class Ended:
    user: str
    sessions: int


@dataclass(frozen=True, slots=True)
class LogLine:
    fact_id: int
    at_s: float
    fact: PersonNoted


@dataclass(frozen=True, slots=True)
class PeopleLog:
    log: tuple[LogLine, ...]


@dataclass(frozen=True, slots=True)
class Hooks:
    webhooks: tuple[Webhook, ...]


@dataclass(frozen=True, slots=True)
class NewHook:
    """`secret` is told once; what is sent is signed with it."""

    webhook: Webhook
    secret: str


@dataclass(frozen=True, slots=True)
class Removed:
    hook_id: str


@dataclass(frozen=True, slots=True)
class ProblemKind:
    name: str
    code: int
    status: int
    meaning: str


class Answer(Response):
    """A JSON answer with an entity tag: whoever names the tag again gets 304 and no body."""

    def __init__(self, value: object, status: int = 200) -> None:
        super().__init__(msgspec.json.encode(value), status, media_type="application/json")
        self.tag = f'"{hashlib.blake2b(bytes(self.body), digest_size=12).hexdigest()}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET":
            self.headers["etag"] = self.tag
            self.headers["cache-control"] = "private, no-cache"
            known = Request(scope).headers.get("if-none-match", "")
            if self.tag in [tag.strip().removeprefix("W/") for tag in known.split(",")]:
                headers = {"etag": self.tag, "cache-control": "private, no-cache"}
                await Response(status_code=304, headers=headers)(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def read_submission(body: bytes) -> Submission:
    """Raises InvalidInput."""
    found: Submission = read_body(body, Submission)
    if any("\x00" in text for text in (found.file, found.workdir, found.key or "")):
        raise InvalidInput("the body holds a zero byte in file, workdir or key; remove it")
    if found.key is not None:
        check_key(found.key)
    return found


def read_body(body: bytes, kind: Any, bytes_max: int = 1 << 30) -> Any:
    """A struct of texts, numbers and lists of texts.  Raises InvalidInput, also for a key that stands twice and for NaN, which other readers let pass."""
    if len(body) > bytes_max:
        raise InvalidInput(f"the body is larger than {bytes_max} bytes; send less")
    try:
        value = json.loads(body, object_pairs_hook=_once, parse_constant=_no_constant)
        found = msgspec.convert(value, type=kind)
        for one in msgspec.structs.astuple(found):
            "".join(
                one if isinstance(one, list | str) else ()
            ).encode()  # half a character (a lone surrogate) has no UTF-8
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        fields = ", ".join(kind.__struct_fields__)
        raise InvalidInput(f"the body is not as asked for: {str(error)[:300]}; send {{{fields}}}") from None
    return found


def check_key(key: str) -> None:
    """Raises InvalidInput."""
    if not 0 < len(key) <= KEY_CHARACTERS_MAX:
        raise InvalidInput(f"the key has {len(key)} characters; give 1 to {KEY_CHARACTERS_MAX}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice; keep one")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def page(items: Sequence[T], key: str, limit: int, cursor: str | None) -> tuple[Sequence[T], str | None]:
    """The `limit` items after the cursor, and the cursor after them.  `key` names the attribute (a text) by which
    the items are told apart; an item that has gone since ends the list with InvalidInput."""
    start = place_after([getattr(item, key) for item in items], cursor)
    found = items[start : start + limit]
    more = start + limit < len(items)
    return found, write_cursor(getattr(found[-1], key)) if more and found else None


def place_after(names: Sequence[str], cursor: str | None) -> int:
    """Where a list goes on after the cursor.  Raises InvalidInput."""
    if cursor is None:
        return 0
    last = read_cursor(cursor, str)
    if last not in names:
        raise InvalidInput(f"cursor {cursor[:80]!r} names nothing in this list; begin without one")
    return names.index(last) + 1


def write_cursor(value: object) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(value)).decode().rstrip("=")


def read_cursor(cursor: str, kind: Any) -> Any:
    """Raises InvalidInput."""
    try:
        return msgspec.json.decode(
            base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)), type=kind, strict=True
        )
    except ValueError:
        raise InvalidInput(
            f"cursor {cursor[:80]!r} is none of this server; begin the list without one"
        ) from None

"""Facts about tasks sent to people's own addresses, signed as Standard Webhooks 1.0 says: `webhook-id`, `webhook-timestamp`,
`webhook-signature` = v1,base64(HMAC-SHA256(secret, "id.timestamp.body")).  Each arrives at least once and in order; an event
keeps its id however often it is sent, so that a receiver can tell a repeat."""

import base64
import hashlib
import hmac
import logging
import random
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from qipan.controller import fact_of
from qipan.errors import InvalidInput, NotFound, OverLimit, QipanError
from qipan.events import without_launch
from qipan.host import Host
from qipan.outbound import check_url, post

log = logging.getLogger("qipan.webhooks")
KINDS = (
    "task_submitted",
    "task_started",
    "task_exited",
    "budget_reached",
    "cancel_requested",
    "task_progress",
)
USUAL = KINDS[:4]
HOOKS_MAX = 20  # of one tenant
PLACE = "webhooks"  # where a store keeps them
LIMIT_S = 10.0
LOOK_S, LOOK_FACTS = 1.0, 500
WAIT_S, WAIT_S_MAX, TRIES_MAX = 5.0, 3600.0, 30  # more than a day of trying


@dataclass(frozen=True, slots=True)
class Webhook:
    """`tenant` "": the operator's, of everyone's tasks.  `sent`: up to this fact.  `off`: why nothing is sent any more."""

    hook_id: str
    tenant: str
    url: str
    kinds: tuple[str, ...]
    allow_private: bool
    sent: int
    tries: int = 0
    next_s: float = 0.0
    error: str = ""
    off: str = ""


@dataclass(frozen=True, slots=True)
class _Kept:
    hook: Webhook
    secret: str


class Webhooks:
    """Those of a host.  Any thread may use it."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def listed(self, tenant: str) -> list[Webhook]:
        with self._host.lock:
            return [kept.hook for kept in self._kept() if tenant in ("", kept.hook.tenant)]

    def add(self, tenant: str, url: str, kinds: tuple[str, ...], allow_private: bool) -> tuple[Webhook, str]:
        """With its secret, which is told once.  From now on: what was before is not sent.  Raises InvalidInput, OverLimit."""
        check_url(url)
        unknown = sorted(set(kinds) - set(KINDS))
        if unknown:
            raise InvalidInput(f"no kind of fact {unknown[0][:40]!r}; there are: {', '.join(KINDS)}")
        with self._host.lock:
            kept = self._kept()
            if sum(one.hook.tenant == tenant for one in kept) >= HOOKS_MAX:
                raise OverLimit(f"there are {HOOKS_MAX} webhooks already; remove one")
            newest = self._host.store.fact_count()
            hook = Webhook(f"wh-{secrets.token_hex(6)}", tenant, url, kinds or USUAL, allow_private, newest)
            secret = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()
            self._keep([*kept, _Kept(hook, secret)])
        return hook, secret

    def remove(self, tenant: str, hook_id: str) -> None:
        """Raises NotFound."""
        with self._host.lock:
            kept = self._kept()
            left = [one for one in kept if one.hook.hook_id != hook_id or tenant not in ("", one.hook.tenant)]
            if len(left) == len(kept):
                raise NotFound(f"no webhook {hook_id[:40]!r}; `qipan webhook list` shows them")
            self._keep(left)

    # ---- sending ---------------------------------------------------------------------------------------------------

    def send_due(self, now_s: float, chance: random.Random) -> bool:
        """One event of each webhook whose turn it is; returns whether any was sent.  The host is not locked meanwhile."""
        with self._host.lock:
            due = [one for one in self._kept() if not one.hook.off and one.hook.next_s <= now_s]
        any_sent = False
        for kept in due:
            with self._host.lock:
                event, upto = self._next_event(kept.hook)
            if event is None:
                if upto > kept.hook.sent:
                    self._changed(kept.hook, sent=upto)
                continue
            any_sent = self._send(kept, event, upto, now_s, chance) or any_sent
        return any_sent

    def _send(self, kept: _Kept, body: bytes, upto: int, now_s: float, chance: random.Random) -> bool:
        hook = kept.hook
        name = event_id(hook.hook_id, body)
        headers = {
            "content-type": "application/json", "user-agent": "qipan", "webhook-id": name, "webhook-timestamp": str(int(now_s)),
            "webhook-signature": signature(kept.secret, name, int(now_s), body),
        }  # fmt: skip
        try:
            status = post(hook.url, body, headers, LIMIT_S, hook.allow_private)
            error = "" if 200 <= status < 300 else f"the answer was {status}"
        except QipanError as refused:
            status, error = 0, str(refused)
        if not error:
            self._changed(hook, sent=upto, tries=0, next_s=0.0, error="")
            return True
        tries = hook.tries + 1
        off = "410: the receiver wants no more" if status == 410 else ""
        off = off or (f"{tries} tries failed; last: {error}" if tries >= TRIES_MAX else "")
        wait_s = min(WAIT_S_MAX, WAIT_S * 2 ** min(tries - 1, 20)) * chance.uniform(0.8, 1.2)
        self._changed(hook, tries=tries, next_s=now_s + wait_s, error=error, off=off)
        return False

    def _next_event(self, hook: Webhook) -> tuple[bytes | None, int]:
        """The next event's body and its fact; or None and how far there is nothing for it."""
        newest = self._host.store.fact_count()
        found = self._host.store.facts_of_kinds(hook.kinds, hook.sent, LOOK_FACTS)
        for fact_id, at_s, task_id, body in found:
            if hook.tenant and not self._is_of(task_id, hook.tenant):
                continue
            fact = without_launch(fact_of(body))
            event = {"type": fact.kind, "fact_id": fact_id, "task_id": task_id, "at_s": at_s, "fact": fact}
            return msgspec.json.encode(event), fact_id
        return None, found[-1][0] if len(found) == LOOK_FACTS else newest

    def _is_of(self, task_id: str, tenant: str) -> bool:
        try:
            return self._host.queries.task(task_id).tenant == tenant
        except NotFound:
            return False

    # ---- keeping ---------------------------------------------------------------------------------------------------

    def _kept(self) -> list[_Kept]:
        return msgspec.json.decode(self._host.store.get(PLACE) or "[]", type=list[_Kept])

    def _keep(self, kept: list[_Kept]) -> None:
        self._host.store.put(PLACE, msgspec.json.encode(kept).decode())

    def _changed(self, hook: Webhook, **changes: Any) -> None:
        """Nothing when it was removed meanwhile."""
        with self._host.lock:
            self._keep([
                replace(one, hook=replace(one.hook, **changes)) if one.hook.hook_id == hook.hook_id else one
                for one in self._kept()
            ])  # fmt: skip


class Courier:
    """Sends what is due, on a thread of its own, so that no decision waits for anybody's server."""

    def __init__(self, webhooks: Webhooks, now_s: Callable[[], float]) -> None:
        self._webhooks, self._now_s = webhooks, now_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._chance = random.Random()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(LIMIT_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                if self._webhooks.send_due(self._now_s(), self._chance):
                    continue
            except QipanError as error:
                log.warning("webhooks wait: %s", error)
            self._stop.wait(LOOK_S)


def signature(secret: str, event: str, at_s: int, body: bytes) -> str:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    told = hmac.new(key, f"{event}.{at_s}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(told).decode()}"


def event_id(hook_id: str, body: bytes) -> str:
    """Of what is said: the same event has it again after a retry or a restore, another has another."""
    return f"evt_{hashlib.blake2b(f'{hook_id}/'.encode() + body, digest_size=16).hexdigest()}"

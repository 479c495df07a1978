"""What people ask of tasks at the board where they were submitted: how each stands, why, what happened, what it printed, what it cost."""

import codecs
import hashlib
import hmac
import secrets
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from qipan import attempt_folders
from qipan.boards import Boards
from qipan.controller import fact_of
from qipan.errors import NotFound
from qipan.events import TaskExited, TaskProgress, TaskSubmitted, without_launch
from qipan.files import secret_in
from qipan.hardware import BoardId
from qipan.leases import Receipt, TaskId
from qipan.ledger import charged_once, make_receipt
from qipan.planner.stages import stream_text, told_of_stream
from qipan.planning import tenant_of
from qipan.scheduler.limits import why_waiting_text
from qipan.scheduler.why import why_waiting
from qipan.stored import exits_of, facts_of_kind, parts_of, progress_of, seen_in_store, submitted_plan
from qipan.tracing import AtBoard, Context, Span, context_in, joined, spans_of
from qipan.workload import Launch, Task
from qipan.workload.stages import relations_of

LOG_PAGE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class TaskView:
    """One task as people see it."""

    task_id: str
    name: str
    tenant: str
    state: str
    place: str
    point: str
    devices: int
    attempt: int
    progress: float  # share of the work done
    saved: float
    waiting: str
    submitted_s: float


class Queries:
    """Every method may be called from any thread."""

    def __init__(self, boards: Boards) -> None:
        self._boards = boards

    def above(self, _question: str, _task_id: str) -> Any:
        """What the board that keeps the task's account says, as plain values; None where that is this board."""
        return None

    def task_ids(self) -> list[str]:
        """In the order of submission."""
        with self._boards.lock:
            return [task_id for task_id, _ in self._boards.store.submissions()]

    def tasks(self) -> list[TaskView]:
        with self._boards.lock:
            return [self._known_view(task_id) for task_id, _ in self._boards.store.submissions()]

    def task(self, task_id: str) -> TaskView:
        with self._boards.lock:
            found = self._boards.store.submission(task_id)
            if found is None:
                known = ", ".join(name for name, _ in self._boards.store.submissions()[-5:]) or "none"
                raise NotFound(f"no task {task_id!r}; the latest are: {known}")
            return self._view(task_id, found[0], found[1])

    def parts(self, task_id: str) -> list[str]:
        """The ids of a task's parts; itself when it has none."""
        return parts_of(self._boards.store, task_id)

    def _known_view(self, task_id: str) -> TaskView:
        found = self._boards.store.submission(task_id)
        assert found is not None
        return self._view(task_id, found[0], found[1])

    def _view(self, task_id: str, submitted_s: float, submitted: bytes) -> TaskView:
        task = msgspec.json.decode(submitted, type=Task)
        if task.in_parts:
            names = self.parts(task_id)
            views, tenant = [self._known_view(name) for name in names], tenant_of(self._boards.site, task)
            whole = whole_view(task_id, task, tenant, submitted_s, views)
            if task.is_service:
                return self._served_view(whole, task, views)
            return self._staged_view(whole, task, views) if task.stages else whole
        root = self._boards.tree.root.state
        over = root.over.get(TaskId(task_id))
        live = root.tasks.get(TaskId(task_id))
        tenant = tenant_of(self._boards.site, task)
        if live is None:
            done = 1.0 if over == "done" else 0.0
            return TaskView(
                task_id, task.name, tenant, over or "queued", "", "", 0, 0, done, done, "", submitted_s
            )
        work_s = live.order.curve.work_s
        state = "parked" if root.parked and live.phase == "queued" else str(live.phase)
        devices = live.devices if live.engine else 0
        return TaskView(
            task_id, task.name, tenant, state, live.place, live.point_id, devices, live.attempt,
            live.done_s / work_s, live.saved_s / work_s, why_waiting_text(root, live, self._boards.clock.now_s()), submitted_s,
        )  # fmt: skip

    def _served_view(self, whole: TaskView, task: Task, views: list[TaskView]) -> TaskView:
        """How many replicas run of those that the forecast asks for, and what the others wait for."""
        assert task.forecast is not None
        if whole.state in ("done", "failed", "cancelled"):
            return whole
        asked, up = (
            task.forecast.asked_at(self._boards.clock.now_s()),
            sum(view.state == "running" for view in views),
        )
        told = [
            f"{up} replicas run, the forecast asks for {asked}",
            *([whole.waiting] if whole.waiting else []),
        ]
        return replace(whole, waiting="; ".join(told))

    def _staged_view(self, whole: TaskView, task: Task, views: list[TaskView]) -> TaskView:
        """Stages follow each other, so their shares of the work add up.  A feeder that was ended because the stage it fed was done
        belongs to what is done."""
        work = [submitted_plan(self._boards.store, view.task_id).curve for view in views]
        seconds = [curve.work_s if curve is not None else 0.0 for curve in work]

        def share(of: list[float]) -> float:
            return sum(one * part for one, part in zip(of, seconds, strict=True)) / max(sum(seconds), 1e-9)

        state = whole.state
        if state == "cancelled" and all(
            view.state == "done" or (view.state == "cancelled" and relations_of(stage).feeds)
            for view, stage in zip(views, task.stages, strict=True)
        ):
            state = "done"
        done, saved = share([view.progress for view in views]), share([view.saved for view in views])
        return replace(
            whole,
            state=state,
            progress=1.0 if state == "done" else done,
            saved=1.0 if state == "done" else saved,
        )

    def why(self, task_id: str) -> dict[str, Any]:
        """Every decision about the task on every board, and what keeps it waiting now."""
        view = self.task(task_id)
        with self._boards.lock:
            parts = self.parts(task_id)
            told = self._reasons_here(parts)
            told.sort(
                key=lambda entry: (entry["at_s"], [*self._boards.stores].index(BoardId(str(entry["board"]))))
            )
            now_s, lease_s = self._boards.clock.now_s(), self._boards.clock.lease_s()
            waiting = []
            for name in parts:
                of = "" if name == task_id else f"{name}: "
                own = why_waiting(self._boards.tree.root.state, TaskId(name), now_s, lease_s)
                waiting += [{**entry, "text": of + entry["text"]} for entry in own]
                waiting += self._waits_for_samples(name)
        return {"task_id": task_id, "state": view.state, "decisions": told, "waiting": waiting}

    def _reasons_here(self, names: list[str]) -> list[dict[str, Any]]:
        """Of each board here, of each of these tasks.  The lock is held."""
        return [
            {"at_s": at_s, "board": board, "verdict": verdict, "text": text, "task_id": name}
            for board, store in self._boards.stores.items()
            for name in names
            for at_s, verdict, text in store.reasons_of(name)
        ]

    def _waits_for_samples(self, task_id: str) -> list[dict[str, str]]:
        """Of a running stage that another feeds: the share of its time that it waited, and what would end that."""
        live = self._boards.tree.root.state.tasks.get(TaskId(task_id))
        if live is None or live.phase != "running" or not live.order.stages:
            return []
        found = []
        for name in live.order.stages:
            feeder = self._boards.tree.root.state.tasks.get(TaskId(name))
            if feeder is not None and feeder.order.feeds == task_id:
                text = stream_text(task_id, self._told_of_stream(task_id), name, self._told_of_stream(name))
                found += [{"constraint": "stream", "text": text}] if text else []
        return found

    def _told_of_stream(self, task_id: str) -> dict[str, object]:
        told = (told_of_stream(fact) for _, fact in reversed(progress_of(self._boards.store, task_id)))
        return next((one for one in told if one is not None), {})

    def events(self, task_id: str, after: int = 0, most: int | None = None) -> list[dict[str, Any]]:
        """The task's facts at the top board after that one, oldest first; all, or the first `most`."""
        self.task(task_id)
        with self._boards.lock:
            rows = sorted(
                row
                for name in self.parts(task_id)
                for row in self._boards.store.facts_of(name, after=after, most=most)
            )[:most]
        facts = [(fact_id, at_s, without_launch(fact_of(body))) for fact_id, at_s, body in rows]
        return [
            {"fact_id": fact_id, "at_s": at_s, "kind": fact.kind, "fact": msgspec.to_builtins(fact)}
            for fact_id, at_s, fact in facts
        ]

    def news(self, task_id: str) -> tuple[int, int]:
        """(number of the newest fact, bytes printed): one of them grows when there is anything new."""
        with self._boards.lock:
            newest = max((self._boards.store.newest_fact_of(name) for name in self.parts(task_id)), default=0)
        return newest, self.printed_bytes(task_id)

    def progress(self, task_id: str) -> list[tuple[float, TaskProgress]]:
        with self._boards.lock:
            return progress_of(self._boards.store, task_id)

    def exits(self, task_id: str) -> list[TaskExited]:
        with self._boards.lock:
            return exits_of(self._boards.store, task_id)

    def trace(self, task_id: str) -> list[Span]:
        """From its submission to its first step, through every board; one trace."""
        self.task(task_id)
        found = []
        for name in self.parts(task_id):
            seen = self.seen(name)
            context = self._context_of(name)
            found.append(spans_of(name, context, seen) if context is not None else [])
        return joined(found)

    def seen(self, task_id: str) -> list[AtBoard]:
        """What the boards here, and below where they can be asked, stored about a task."""
        above = {str(child.board): str(spec.board) for spec in self._boards.site.root.walk() for child in spec.children}  # fmt: skip
        with self._boards.lock:
            return [seen_in_store(str(board), above.get(str(board), ""), store, task_id) for board, store in self._boards.stores.items()]  # fmt: skip

    def _context_of(self, task_id: str) -> Context | None:
        """As it was submitted; of an earlier release's task, which carries none, one made from its name."""
        with self._boards.lock:
            found = facts_of_kind(self._boards.store, [task_id], TaskSubmitted)
        if not found:
            return None
        order = found[0][1].order
        launch = msgspec.json.decode(order.launch, type=Launch)
        mark = hashlib.blake2b(f"{task_id}/{order.submitted_s}".encode(), digest_size=16).hexdigest()
        return context_in(launch.attempt_env) or Context(mark, order.submitted_s)

    def logs(self, task_id: str, after: int = 0) -> dict[str, Any]:
        """What the task's attempts printed, from byte `after` of all attempts joined: a page of it.  Half a character at its end is
        left to the next one."""
        self.task(task_id)
        body, size = self.printed(task_id, after, LOG_PAGE_BYTES)
        whole = codecs.getincrementaldecoder("utf-8")("replace")
        text = whole.decode(body)
        return {"text": text, "next": after + len(body) - len(whole.getstate()[0]), "size": size}

    def printed(self, task_id: str, first: int, most: int) -> tuple[bytes, int]:
        """(at most `most` bytes from byte `first` on, the size of it all)."""
        return attempt_folders.printed(self._boards.folder, task_id, self.parts(task_id), first, most)

    def printed_bytes(self, task_id: str) -> int:
        return attempt_folders.printed_bytes(self._boards.folder, self.parts(task_id))

    # ---- money -----------------------------------------------------------------------------------------------------

    def bill(self, task_id: str) -> Receipt:
        """The receipt of a task that is over, or of its ended attempts so far."""
        view, exits = self.task(task_id), charged_once(self.exits(task_id))
        lost_s = sum(
            max(0.0, fact.done_s - fact.saved_s)
            for fact in exits
            if fact.outcome in ("lost", "failed", "cancelled")
        )
        return make_receipt(
            TaskId(task_id),
            view.tenant,
            [fact.usage for fact in exits],
            self._boards.tariff.of,
            view.state,
            lost_s,
            self._sign,
        )

    def charged(self, task_id: str) -> int:
        """What the ledger took for the task: must equal the receipt."""
        with self._boards.lock:
            rows = [row for name in self.parts(task_id) for row in self._boards.store.postings_about(name)]
        return sum(amount for _key, account, amount, _currency in rows if account.startswith("provider/"))

    def _sign(self, body: bytes) -> str:
        secret = secret_in(self._boards.folder / "receipt.key", lambda: secrets.token_bytes(32))
        return hmac.new(secret, body, hashlib.sha256).hexdigest()


def whole_view(task_id: str, task: Task, tenant: str, submitted_s: float, parts: list[TaskView]) -> TaskView:
    """A task of several parts is over when all are; until then it is what its busiest part is."""
    states = [part.state for part in parts]
    order = ("failed", "cancelled", "done") if all(s in ("done", "failed", "cancelled") for s in states) else (
        "running", "starting", "resizing", "stopping", "reserved", "reserving", "parked", "queued", "lent", "behind", "done"
    )  # fmt: skip
    state = next((one for one in order if one in states), "queued")
    waiting = "; ".join(f"{part.task_id}: {part.waiting}" for part in parts if part.waiting)
    return TaskView(
        task_id, task.name, tenant, state, " + ".join(sorted({part.place for part in parts if part.place})),
        " + ".join(part.point for part in parts if part.point), sum(part.devices for part in parts),
        max((part.attempt for part in parts), default=0), min((part.progress for part in parts), default=0.0),
        min((part.saved for part in parts), default=0.0), waiting, submitted_s,
    )  # fmt: skip

"""Taking tasks in: planned, paid for, divided into parts, handed to the top board; and what their owners want of them afterwards."""

import secrets
from dataclasses import replace
from fnmatch import fnmatchcase

import msgspec

from qipan.boards import Boards
from qipan.controller import fact_of
from qipan.coordinator import Coordinator
from qipan.errors import Infeasible, InvalidInput, NotFound, OverLimit
from qipan.events import BudgetRaised, CancelRequested, TaskSubmitted, TaskWoken
from qipan.leases import TaskId
from qipan.lessons import Lessons
from qipan.planner import Plan
from qipan.planning import order_of, plan_on, plan_parts, plan_service, plan_staged, tenant_of
from qipan.quantities import format_money
from qipan.queries import Queries
from qipan.stored import part_ids, submitted_plan, submitted_task
from qipan.tracing import Context
from qipan.workload import Launch, Task
from qipan.workload.stages import relations_of, streams_of
from qipan.workload.task import Part


class Intake:
    """Every method may be called from any thread."""

    def __init__(self, boards: Boards, queries: Queries) -> None:
        self._boards, self._queries = boards, queries
        self.coordinator = Coordinator(boards)
        self.lessons = Lessons(boards)

    def take_up(self) -> None:
        """A submission whose fact was not stored before a crash is handed in again: once taken, never lost."""
        state = self._boards.tree.root.state
        for task_id, submitted_s in self._boards.store.submissions():
            if TaskId(task_id) in state.tasks or TaskId(task_id) in state.over:
                continue
            found = self._boards.store.submission(task_id)
            assert found is not None
            task, plan = msgspec.json.decode(found[1], type=Task), msgspec.json.decode(found[2], type=Plan)
            if not task.in_parts:  # its parts are submissions of their own
                self._boards.tree.root.accept(self._submitted(task, TaskId(task_id), plan, submitted_s))

    def plan(self, task: Task) -> Plan:
        return plan_on(
            self._boards.site, self._where_stages_meet(task), self.lessons.learned(), self.lessons.rates
        )

    def submit(
        self, task: Task, key: str | None = None, trace: Context | None = None, entered_at: str = ""
    ) -> tuple[str, Plan]:
        """Plan, hold the money, hand the task to the top board.  Durable when it returns.  The same key submits
        once.  `trace`: what the submission is a part of; `entered_at`: the board below where it was submitted.  Raises Infeasible, OverLimit, InvalidInput when the key was used for another task."""
        with self._boards.lock:
            if key is not None and (known := self._boards.store.submitted_with(key)) is not None:
                if submitted_task(self._boards.store, known) != task:
                    raise InvalidInput(
                        f"the key {key[:80]!r} submitted another task ({known}); use a new key"
                    )
                return known, submitted_plan(self._boards.store, known)
            if task.in_parts:
                return self._submit_parts(task, key, trace, entered_at)
            plan = self.plan(task)
            if plan.curve is None:
                reasons = "; ".join(f"{refused.place}: {refused.why}" for refused in plan.refused)
                raise Infeasible(f"{task.name}: no place can run it: {reasons}")
            task_id = self._new_id(task.name)
            fact = self._submitted(task, TaskId(task_id), plan, self._boards.clock.now_s(), trace, entered_at)
            self._check_funds(fact.order.tenant, fact.hold_micro_cny)
            encoded = msgspec.json.encode(task), msgspec.json.encode(plan)
            self._boards.store.save_submission(task_id, key, fact.order.submitted_s, *encoded)
            self._boards.tree.root.accept(fact)
            self._boards.step()
            return task_id, plan

    def _submit_parts(
        self, task: Task, key: str | None, trace: Context | None, entered_at: str
    ) -> tuple[str, Plan]:
        """Each part is submitted as a task of its own; the whole one is their sum."""
        task_id, now_s = self._new_id(task.name), self._boards.clock.now_s()
        trace = trace or Context(secrets.token_hex(16), now_s)  # one of all parts
        if task.sites is not None:
            parts, plan = plan_parts(self._boards.site, task, task_id, self.coordinator.server().address)
        elif task.is_service:
            parts, plan = plan_service(self._boards.site, task, task_id)
        else:
            parts, plan = self._plan_stages(task, task_id)
        self._check_funds(
            tenant_of(self._boards.site, task), sum(hold_of(part, own) for part, own in parts.values())
        )
        self._boards.store.save_submission(
            task_id, key, now_s, msgspec.json.encode(task), msgspec.json.encode(plan)
        )
        facts = [
            self._submitted(part, TaskId(name), own, now_s, trace, entered_at)
            for name, (part, own) in parts.items()
        ]
        self.coordinator.open(task_id, task)
        for fact, (name, (part, own)) in zip(facts, parts.items(), strict=True):
            self._boards.store.save_submission(
                name, None, now_s, msgspec.json.encode(part), msgspec.json.encode(own)
            )
            self._boards.tree.root.accept(fact)
        self._boards.step()
        return task_id, plan

    def _plan_stages(self, task: Task, task_id: str) -> tuple[dict[str, tuple[Task, Plan]], Plan]:
        made = plan_staged(
            self._boards.site, self._where_stages_meet(task), self.lessons.learned(), self.lessons.rates
        )
        parts = {}
        for name, (stage, plan) in made.parts.items():
            feeders = tuple(one.name for one in task.stages if relations_of(one).feeds == name)
            stage = replace(
                stage, tenant=task.tenant, stage=replace(relations_of(stage), of=task_id, fed_by=feeders)
            )
            parts[f"{task_id}.{name}"] = (stage, plan)
        return parts, made.whole

    def _where_stages_meet(self, task: Task) -> Task:
        """Stages hand each other files, so they run where this process's engines are.  Raises Infeasible."""
        here = {
            pool.site: board.region
            for board in self._boards.site.root.walk()
            for pool in board.pools
            if pool.site in self._boards.engines
        }
        if not task.stages or len(here) == len({pool.site for pool in self._boards.site.pools()}):
            return task
        if not here:
            raise Infeasible(
                f"{task.name}: stages hand each other files on one host, and {self._boards.site.root.board} runs no engine itself;"
                " run `qipan up` at the site that shall run them"
            )
        stages = []
        for stage in task.stages:
            asked = stage.limits.regions or ("*",)
            allowed = tuple(
                site
                for site, region in here.items()
                if any(fnmatchcase(name, one) for name in (site, region) for one in asked)
            )
            if not allowed:
                raise Infeasible(
                    f"{task.name}: stages hand each other files on one host; limits.regions of {stage.name} names none of {', '.join(here)}"
                )
            stages.append(replace(stage, limits=replace(stage.limits, regions=allowed)))
        return replace(task, stages=tuple(stages))

    def _submitted(
        self,
        task: Task,
        task_id: TaskId,
        plan: Plan,
        now_s: float,
        trace: Context | None = None,
        entered_at: str = "",
    ) -> TaskSubmitted:
        assert plan.curve is not None
        order = order_of(self._boards.site, task, task_id, plan.curve, now_s)
        environment = (trace or Context(secrets.token_hex(16), now_s)).environment()
        if task.part is not None:
            environment |= part_environment(task.part, self.coordinator.key(task.part.of))
            order = replace(order, gang=task.part.gang)
        order = replace(order, launch=msgspec.json.encode(Launch(task, environment)), entered_at=entered_at)
        if task.stage is not None:
            whole = submitted_task(self._boards.store, task.stage.of)
            own = {stage.name: relations_of(stage) for stage in whole.stages}
            together = streams_of(whole.stages)[task.name]
            after = sorted({one for name in together for one in own[name].after}, key=list(own).index)
            order = replace(
                order, gang=part_ids(task.stage.of, together) if len(together) > 1 else (),
                after=part_ids(task.stage.of, after), stages=part_ids(task.stage.of, own),
                feeds=f"{task.stage.of}.{task.stage.feeds}" if task.stage.feeds else "",
            )  # fmt: skip
        return TaskSubmitted(order, hold_of(task, plan), task.limits.max_cost_micro_cny)

    def _new_id(self, name: str) -> str:
        taken = set(self._boards.store.submitted_as(name))
        number = 1
        while f"{name}-{number}" in taken:
            number += 1
        return f"{name}-{number}"

    def _check_funds(self, tenant: str, hold: int) -> None:
        balance = self._boards.store.balance(f"tenant/{tenant}")
        if balance is None:
            raise NotFound(f"tenant {tenant!r} has no account; the site file's tenants: "
                           f"{', '.join(known.name for known in self._boards.site.tenants)}")  # fmt: skip
        if balance < hold:
            raise OverLimit(
                f"tenant {tenant} has {format_money(balance)}, the task needs a hold of {format_money(hold)};"
                " lower limits.max_cost or top up"
            )

    # ---- what its owner wants of it afterwards --------------------------------------------------------------------

    def cancel(self, task_id: str, by: str) -> None:
        self._queries.task(task_id)
        with self._boards.lock:
            for name in self._queries.parts(task_id):
                self._boards.tree.root.accept(CancelRequested(TaskId(name), by))
            self._boards.step()

    def raise_budget(self, task_id: str, budget_micro_cny: int, by: str) -> None:
        """A task that was parked because its budget was spent goes on.  Raises NotFound, InvalidInput, OverLimit."""
        view = self._queries.task(task_id)
        with self._boards.lock:
            before = self._budget_of(task_id)
            if (parts := self._queries.parts(task_id)) != [task_id]:
                raise InvalidInput(
                    f"{task_id} has a budget for each of its parts: raise that of one: {', '.join(parts)}"
                )
            if before is None or TaskId(task_id) not in self._boards.tree.root.state.tasks:
                why = "is over" if before is not None else "has no limits.max_cost"
                raise InvalidInput(f"{task_id} {why}: there is no budget to raise; submit it anew")
            if budget_micro_cny <= before:
                raise InvalidInput(
                    f"{task_id} has a budget of {format_money(before)}; give more than that, not {format_money(budget_micro_cny)}"
                )
            self._check_funds(view.tenant, budget_micro_cny - before)
            self._boards.tree.root.accept(BudgetRaised(TaskId(task_id), budget_micro_cny, by))
            self._boards.step()

    def _budget_of(self, task_id: str) -> int | None:
        """What its owner lets it cost now."""
        facts = [
            fact_of(body)
            for _, _, body in self._boards.store.facts_of(task_id, ["task_submitted", "budget_raised"])
        ]
        budgets = [fact.budget_micro_cny for fact in facts if isinstance(fact, TaskSubmitted | BudgetRaised)]
        known = [budget for budget in budgets if budget is not None]
        return max(known) if known else None

    def wake(self, task_id: str, by: str) -> str:
        """The lease of a task that stands idle is not lent, or its devices come back.  Returns its state.  Raises NotFound, InvalidInput."""
        self._queries.task(task_id)
        with self._boards.lock:
            tasks = self._boards.tree.root.state.tasks
            asleep = [
                TaskId(name)
                for name in self._queries.parts(task_id)
                if TaskId(name) in tasks.idle | tasks.lent and tasks[TaskId(name)].order.hours is None
            ]
            if not asleep:
                raise InvalidInput(
                    f"{task_id} does not stand idle: there is nothing to wake; see `qipan why {task_id}`"
                )
            for name in asleep:
                self._boards.tree.root.accept(TaskWoken(name, by))
            self._boards.step()
        return self._queries.task(task_id).state

    def close(self) -> None:
        self.coordinator.close()


def hold_of(task: Task, plan: Plan) -> int:
    """What is set aside when it is submitted."""
    return task.limits.max_cost_micro_cny or plan.options[0].cost_p90_micro_cny


def part_environment(part: Part, key: str) -> dict[str, str]:
    return {
        "QIPAN_ROUND_KEY": key,
        "QIPAN_SITE": part.site,
        "QIPAN_ROUNDS": part.coordinator,
        "QIPAN_ROUNDS_TASK": part.of,
        "QIPAN_LINK_BYTES_PER_S": str(part.link_bytes_per_s),
    }

"""Facts into state.  Each kind of fact has one function; what a parent must hear is reported here."""

from dataclasses import replace

from qipan.events import (
    FINAL,
    BoardStarted,
    BudgetRaised,
    BudgetReached,
    CancelRequested,
    CapacityChanged,
    Command,
    CommandReceived,
    DevicesBusy,
    ElectricityPriced,
    EngineAttached,
    EngineLost,
    EngineOffered,
    Fact,
    LeaseGranted,
    LeaseRefused,
    LinksSet,
    ParkRequested,
    Renew,
    RenewalAsked,
    Reserve,
    Resize,
    RulesSet,
    Start,
    Stop,
    StorageOffered,
    TakeCensus,
    TaskExited,
    TaskProgress,
    TasksHeld,
    TaskStarted,
    TaskSubmitted,
    TaskWoken,
)
from qipan.leases import EngineId, LeaseId, TaskId
from qipan.quantities import format_money
from qipan.scheduler import census
from qipan.scheduler.idle import devices_busy, woken
from qipan.scheduler.moves import links_of
from qipan.scheduler.preemptions import joined
from qipan.scheduler.reshaping import cost_of
from qipan.scheduler.state import (
    RUNS,
    AfterStop,
    Draft,
    EngineState,
    ParentLease,
    Phase,
    State,
    TaskState,
    ToEngine,
    lease_for,
)
from qipan.scheduler.transitions import (
    after_stop,
    begin_behind,
    cancel,
    end,
    give_back,
    order_stop,
    refuse,
    release_stray,
    tell_granted,
    tell_over,
    to_queue,
)

#: a task lost so often in a row without a new checkpoint is taken for broken
LOSSES_MAX = 5
#: a service saves nothing: a replica that served so long is not taken for broken when it is lost
LIVED_S = 600.0


def absorb(state: State, fact: Fact, draft: Draft) -> None:
    match fact:
        case BoardStarted():
            census.board_started(state, fact, draft)
        case EngineAttached():
            census.ask(state, fact.engine, draft)
        case TasksHeld():
            census.count(state, fact, draft)
        case TaskSubmitted():
            _submitted(state, fact, draft)
        case CancelRequested():
            _cancel(state, fact, draft)
        case ParkRequested():
            _park(state, fact, draft)
        case RulesSet():
            state.rules = tuple(rule for rule in fact.rules if rule.board in ("*", state.board))
            draft.anew = True
        case LinksSet():
            state.links, draft.anew = links_of(fact.links), True
            state.tasks.asks = None  # who found no seat may find one over the new links
        case ElectricityPriced():
            known = state.engines.get(fact.engine)
            if known is not None:
                state.engines[fact.engine] = replace(known, electricity=fact.micro_cny_per_device_hour)
                draft.chips |= {chip for chip, _ in fact.micro_cny_per_device_hour}
        case TaskWoken():
            woken(state, fact, draft)
        case DevicesBusy():
            devices_busy(state, fact, draft)
        case BudgetReached():
            _budget_reached(state, fact, draft)
        case BudgetRaised():
            _budget_raised(state, fact, draft)
        case CommandReceived():
            _command(state, fact.command, draft)
        case EngineOffered():
            _offered(state, fact, draft)
        case StorageOffered():
            if fact.engine in state.engines:
                state.engines[fact.engine] = replace(state.engines[fact.engine], room=fact.room)
                draft.anew = True
        case EngineLost():
            _engine_lost(state, fact, draft)
        case RenewalAsked():
            _renewal_asked(state, fact, draft)
        case CapacityChanged():
            _capacity(state, fact, draft)
        case LeaseGranted():
            _granted(state, fact, draft)
        case LeaseRefused():
            _lease_refused(state, fact, draft)
        case TaskStarted():
            _started(state, fact, draft)
        case TaskProgress():
            _progress(state, fact, draft)
        case TaskExited():
            _exited(state, fact, draft)


# ---- from people -------------------------------------------------------------------------------------------------


def _submitted(state: State, fact: TaskSubmitted, draft: Draft) -> None:
    task_id = fact.order.task_id
    if task_id in state.tasks or task_id in state.over:
        return
    order = state.tasks.shared(fact.order)
    state.tasks[task_id] = task = TaskState(
        order,
        Phase.BEHIND if order.after else Phase.QUEUED,
        draft.moment.now_s,
        done_s=order.saved_s,
        saved_s=order.saved_s,
        attempt=order.attempt,
        preempted_s=order.preempted_s,
    )
    if order.after:
        begin_behind(state, task, draft)


def _cancel(state: State, fact: CancelRequested, draft: Draft) -> None:
    task = state.tasks.get(fact.task_id)
    if task is None:
        return
    cancel(state, task, draft, f"cancelled by {fact.by}")


def _park(state: State, fact: ParkRequested, draft: Draft) -> None:
    state.parked, draft.anew = fact.park, True
    if not fact.park:
        return
    for task in list(state.tasks.values()):
        draft.because(
            task.task_id, "parked", f"parked by {fact.by}; continues when the board is taken up again"
        )
        if task.phase not in (Phase.QUEUED, Phase.PARKED, Phase.BEHIND, Phase.LENT, Phase.STOPPING):
            order_stop(state, task, draft, park=True, why=f"parked by {fact.by}", after=AfterStop.QUEUE)


def _budget_reached(state: State, fact: BudgetReached, draft: Draft) -> None:
    task = state.tasks.get(fact.task_id)
    if task is None:
        return
    why = (
        f"{format_money(fact.spent_micro_cny)} of its budget of {format_money(fact.budget_micro_cny)} are spent;"
        f" `qipan budget {fact.task_id}` raises it"
    )
    draft.because(
        fact.task_id, "parked", f"parked with its checkpoint before its budget is overrun: {why}",
        spent_micro_cny=fact.spent_micro_cny, budget_micro_cny=fact.budget_micro_cny,
    )  # fmt: skip
    task = replace(task, lent=())  # a lease that stood idle and was lent is not taken up by `wake` now
    if task.phase in (Phase.QUEUED, Phase.PARKED, Phase.LENT):
        state.tasks[fact.task_id] = replace(task, phase=Phase.PARKED, why_waiting=why)
    elif task.phase is Phase.STOPPING:
        if task.after_stop in (AfterStop.QUEUE, AfterStop.KEEP, AfterStop.LEND):
            state.tasks[fact.task_id] = replace(task, after_stop=AfterStop.KEEP, stop_why=why)
    else:
        order_stop(state, task, draft, park=True, why=why, after=AfterStop.KEEP)


def _budget_raised(state: State, fact: BudgetRaised, draft: Draft) -> None:
    task = state.tasks.get(fact.task_id)
    if task is None:
        return
    draft.because(
        fact.task_id, "budget", f"{fact.by} raised its budget to {format_money(fact.budget_micro_cny)}"
    )
    if task.lent:
        return  # it was not parked for its budget: it sleeps until it is woken, or its forecast asks for it
    task = replace(task, turns_s=None)  # its forecast may not ask for it now
    if task.phase is Phase.PARKED:
        state.tasks[fact.task_id] = replace(to_queue(task, draft), why_waiting="")
    elif task.after_stop is AfterStop.KEEP:
        state.tasks[fact.task_id] = replace(task, after_stop=AfterStop.QUEUE)


# ---- from the parent ---------------------------------------------------------------------------------------------


def _command(state: State, command: Command, draft: Draft) -> None:
    if isinstance(command, TakeCensus):
        state.census_asked_s, state.census_term_seen = command.asked_lease_s, state.parent_term
        state.parent_term = max(state.parent_term, command.term)
        return
    if command.term < state.parent_term:
        return  # an earlier reign
    state.parent_term = command.term
    match command:
        case Reserve():
            _reserve(state, command, draft)
        case Renew():
            _renew(state, command)
        case Start() | Resize():
            task = _addressed(state, command, draft)
            if task is not None and task.parent is not None:
                parent = replace(
                    task.parent,
                    generation=command.generation,
                    started=True,
                    points=tuple(point.point_id for point in command.points),
                )
                state.tasks[task.task_id] = replace(
                    task,
                    parent=parent,
                    generation=max(task.generation, command.generation),
                    attempt=max(task.attempt, command.attempt - 1),
                )
        case Stop():
            task = _addressed(state, command, draft)
            if task is None or task.parent is None:
                return
            task = replace(
                task,
                parent=replace(task.parent, generation=command.generation),
                generation=max(task.generation, command.generation),
            )
            state.tasks[task.task_id] = task
            then = AfterStop.RETURN if command.park else AfterStop.END
            if task.phase is Phase.QUEUED:
                give_back(state, task, draft, command.why, cancelled=not command.park)
            else:
                order_stop(state, task, draft, park=command.park, why=command.why, after=then)


def _reserve(state: State, command: Reserve, draft: Draft) -> None:
    known = state.tasks.get(command.task_id)
    if known is not None and (known.parent is None or command.lease_id == known.parent.lease_id):
        return
    if known is not None:
        # The parent asks anew for a task that is still here (its stop is on the way): refuse, it will ask again.  Whatever the
        # generation: one that was found at a child may have had as high a one there.
        refuse(
            state,
            command.task_id,
            command.lease_id,
            command.generation,
            "the task is still stopping here",
            draft,
        )
        return
    parent = ParentLease(
        command.lease_id, command.term, command.generation, draft.moment.lease_s + command.duration_s
    )
    order = state.tasks.shared(command.order)
    state.over.pop(command.task_id, None)
    state.tasks[command.task_id] = TaskState(
        order,
        Phase.QUEUED,
        draft.moment.now_s,
        parent=parent,
        generation=command.generation,
        attempt=order.attempt,
        done_s=order.saved_s,
        saved_s=order.saved_s,
        preempted_s=order.preempted_s,
    )


def _renew(state: State, command: Renew) -> None:
    if command.asked_lease_s is None:
        return
    until_s = command.asked_lease_s + command.duration_s
    for lease_id in command.lease_ids:
        task_id = state.tasks.from_parent.get(lease_id)
        task = state.tasks[task_id] if task_id is not None else None
        if task is not None and task.parent is not None and until_s > task.parent.until_lease_s:
            state.tasks[task.task_id] = replace(task, parent=replace(task.parent, until_lease_s=until_s))
            state.renewed_s = None  # leases below end with this one: they are renewed in this tick


def _addressed(state: State, command: Start | Resize | Stop, draft: Draft) -> TaskState | None:
    task = state.tasks.get(command.task_id)
    if task is None or task.parent is None or task.parent.lease_id != command.lease_id:
        refuse(state, command.task_id, command.lease_id, command.generation, "no such lease here", draft)
        return None
    return task if command.generation > task.parent.generation else None


# ---- from engines ------------------------------------------------------------------------------------------------


def _offered(state: State, fact: EngineOffered, draft: Draft) -> None:
    before = state.engines.get(fact.engine)
    known = before if before is not None else EngineState((), fact.chooses)
    draft.outs = draft.outs or known.out != fact.out
    state.engines[fact.engine] = replace(
        known, offers=fact.offers, chooses=fact.chooses, lost=False, out=fact.out, in_place=fact.in_place
    )
    if before is None or (before.lost, before.chooses, before.in_place) != (
        False,
        fact.chooses,
        fact.in_place,
    ):
        draft.anew = True
        for task in state.tasks.at(fact.engine):
            state.tasks.lease_due.note(task.task_id, task)
    else:
        draft.chips |= {offer.chip_class for offer in {*fact.offers} ^ {*before.offers}}
    for key in [key for key in state.sent_down if key.startswith(f"{fact.engine}|")]:
        del state.sent_down[key]
        draft.chips.add(key.split("|")[1])
    for task_id in sorted(state.tasks.refusing):
        task = state.tasks[task_id]
        if any(engine == fact.engine for engine, _ in task.refused):
            kept = tuple(entry for entry in task.refused if entry[0] != fact.engine)
            state.tasks[task_id] = replace(task, refused=kept)


def _engine_lost(state: State, fact: EngineLost, draft: Draft) -> None:
    """Nothing more is asked of it.  What was only asked and not answered is asked of another: without this board's
    Start nothing runs there.  What runs there is a matter of its lease."""
    if fact.engine in state.engines:
        state.engines[fact.engine] = replace(state.engines[fact.engine], lost=True)
        draft.anew = True
    again_s = draft.moment.now_s + state.settings.retry_s
    for task in list(state.tasks.values()):
        if task.engine == fact.engine and task.phase is Phase.RESERVING:
            draft.because(
                task.task_id, "refused", f"{fact.engine} does not answer: {fact.why}", engine=fact.engine
            )
            refused = (*task.refused, (fact.engine, again_s))
            state.tasks[task.task_id] = replace(to_queue(task, draft), refused=refused, why_waiting=fact.why)


def _capacity(state: State, fact: CapacityChanged, draft: Draft) -> None:
    draft.chips.add(fact.chip_class)
    if fact.engine in state.engines:
        state.engines[fact.engine] = state.engines[fact.engine].with_more(fact.chip_class, fact.devices)


def _renewal_asked(state: State, fact: RenewalAsked, draft: Draft) -> None:
    """Answer with the child's own stamp; count the lease from now, which is later than the stamp."""
    renewed: dict[float, list[LeaseId]] = {}  # seconds -> leases
    for lease_id in fact.lease_ids:
        task_id = state.tasks.by_lease.get(lease_id)
        if task_id is None:
            continue
        task = state.tasks[task_id]
        if task.engine == fact.engine and task.phase is not Phase.STOPPING:
            duration_s = lease_for(state, task, draft.moment)
            if duration_s <= 0:
                continue
            state.tasks[task_id] = replace(task, lease_until_s=draft.moment.lease_s + duration_s)
            renewed.setdefault(duration_s, []).append(lease_id)
    for duration_s, leases in sorted(renewed.items()):
        command = Renew(tuple(leases), state.term, duration_s, fact.asked_lease_s)
        draft.commands.append(ToEngine(fact.engine, command))


def _granted(state: State, fact: LeaseGranted, draft: Draft) -> None:
    task = _reported(state, fact.task_id, fact.engine, fact.lease_id)
    if task is None:
        if fact.engine not in state.uncounted:  # else its census will say what it still holds
            release_stray(state, fact.engine, fact.task_id, fact.lease_id, fact.generation, draft)
        return
    if task.phase is not Phase.RESERVING:
        return
    task = replace(
        task,
        phase=Phase.RESERVED,
        since_s=draft.moment.now_s,
        generation=max(task.generation, fact.generation),
        lease_until_s=draft.moment.lease_s + state.settings.lease_s,
    )
    if task.parent is not None and not task.parent.answered:
        task = replace(task, parent=replace(task.parent, answered=True))
        tell_granted(state, task, fact.needs, draft)
    state.tasks[task.task_id] = task


def _lease_refused(state: State, fact: LeaseRefused, draft: Draft) -> None:
    task = _reported(state, fact.task_id, fact.engine, fact.lease_id)
    if task is None:
        return
    task = replace(task, generation=max(task.generation, fact.generation))
    if fact.over and not (task.phase is Phase.STOPPING and task.after_stop is AfterStop.END):
        tell_over(state, task, fact.engine, fact.over, draft)
        return
    if task.phase is Phase.STOPPING:  # it never had the lease, or has it no more: that is as good as stopped
        after_stop(state, task, draft)
        return
    if task.phase is Phase.RESIZING:  # it goes on as before
        point = task.point()
        assert point is not None
        state.tasks[task.task_id] = replace(task, phase=Phase.RUNNING, target_id="", needs=point.needs)
        return
    again_s = draft.moment.now_s + state.settings.retry_s
    draft.because(task.task_id, "refused", f"{fact.engine} refused: {fact.why}", engine=fact.engine)
    state.tasks[task.task_id] = replace(
        to_queue(task, draft), refused=(*task.refused, (fact.engine, again_s)), why_waiting=fact.why
    )


def _started(state: State, fact: TaskStarted, draft: Draft) -> None:
    task = _reported(state, fact.task_id, fact.engine, fact.lease_id)
    if task is None:
        return
    place = f"{state.board}/{fact.place}"
    phase = Phase.RUNNING if task.phase in RUNS else task.phase
    task = replace(
        task,
        phase=phase,
        since_s=draft.moment.now_s,
        attempt=max(task.attempt, fact.attempt),
        generation=max(task.generation, fact.generation),
        point_id=fact.point_id,
        target_id="",
        needs=fact.needs,
        place=place,
        why_waiting="",
    )
    state.tasks[task.task_id] = task
    if task.parent is not None:
        draft.reports.append(
            replace(
                fact,
                lease_id=task.parent.lease_id,
                engine=EngineId(state.board),
                generation=task.generation,
                place=place,
            )
        )


def _progress(state: State, fact: TaskProgress, draft: Draft) -> None:
    task = state.tasks.get(fact.task_id)
    if task is None or task.engine != fact.engine:
        return
    if fact.attempt < task.attempt - (task.phase is Phase.RESIZING):  # which goes on until it is resized
        return
    attempt = max(task.attempt, fact.attempt)
    losses = 0 if fact.saved_s > task.saved_s else task.losses
    state.tasks[fact.task_id] = task = replace(
        task, done_s=fact.done_s, saved_s=max(task.saved_s, fact.saved_s), attempt=attempt, losses=losses
    )
    if task.parent is not None:
        draft.reports.append(replace(fact, engine=EngineId(state.board)))


def _exited(state: State, fact: TaskExited, draft: Draft) -> None:
    task = _reported(state, fact.task_id, fact.engine, fact.lease_id)
    if task is None:
        _exited_elsewhere(state, fact, draft)
        return
    lost_s = max(0.0, task.done_s - fact.saved_s) if fact.outcome in ("lost", "failed", "cancelled") else 0.0
    lived = task.order.hours is not None and fact.usage.until_s - fact.usage.started_s >= LIVED_S
    losses = (
        (1 if fact.saved_s > task.saved_s or lived else task.losses + 1)
        if fact.outcome == "lost"
        else task.losses
    )
    if losses >= LOSSES_MAX and fact.final:
        fact = replace(
            fact,
            outcome="failed",
            why=f"lost {losses} times without a checkpoint in between; last: {fact.why}",
        )
    task = replace(
        task,
        losses=losses,
        attempt=max(task.attempt, fact.attempt),
        generation=max(task.generation, fact.generation),
        done_s=fact.done_s if fact.outcome == "done" else fact.saved_s,
        saved_s=max(task.saved_s, fact.saved_s),
        lost_s=task.lost_s + lost_s,
        preempted_s=joined(task.preempted_s, fact.preempted_s, draft.moment.now_s),
    )
    state.tasks[task.task_id] = task
    over = fact.outcome in FINAL
    if task.parent is not None:
        leaves = task.phase is Phase.STOPPING and task.after_stop in (AfterStop.RETURN, AfterStop.END)
        draft.reports.append(
            replace(
                fact,
                lease_id=task.parent.lease_id,
                engine=EngineId(state.board),
                generation=task.generation,
                final=over or (leaves and fact.final),
                preempted_s=task.preempted_s,
            )
        )
    if over:
        end(state, task, fact.outcome, draft, why=fact.why, report=False)
    elif fact.outcome == "resized":
        target = task.target()
        needs = target.needs if target else task.needs
        state.tasks[task.task_id] = replace(task, needs=needs, reshape_s=cost_of(task, fact))
    elif not fact.final:
        if fact.outcome == "lost":
            _say_lost(task, fact, lost_s, draft)
        state.tasks[task.task_id] = task  # the engine tries again inside the same lease
    elif task.phase is Phase.STOPPING:
        after_stop(state, task, draft, reported=True)
    else:
        if fact.outcome == "lost":
            _say_lost(task, fact, lost_s, draft)
        else:
            draft.because(
                task.task_id, "returned", f"{fact.engine} gave it back: {fact.why}", engine=fact.engine
            )
        again_s = draft.moment.now_s + state.settings.retry_s
        refused = task.refused if fact.outcome == "lost" else (*task.refused, (fact.engine, again_s))
        state.tasks[task.task_id] = replace(to_queue(task, draft), refused=refused, why_waiting=fact.why)


def _exited_elsewhere(state: State, fact: TaskExited, draft: Draft) -> None:
    """An attempt under a lease that was given up here ended, and its board was silent until now.  What it used is
    paid for, so the word goes up; and if it finished the task, which only waits here, the task is over."""
    task = state.tasks.get(fact.task_id)
    if not state.top:
        draft.reports.append(replace(fact, engine=EngineId(state.board)))
    if task is not None and fact.preempted_s:
        parked_s = joined(task.preempted_s, fact.preempted_s, draft.moment.now_s)
        state.tasks[fact.task_id] = task = replace(task, preempted_s=parked_s)
    if fact.outcome == "done" and task is not None and task.phase is Phase.QUEUED and task.parent is None:
        draft.because(fact.task_id, "found", f"{fact.engine} had finished it before it fell silent")
        end(state, task, "done", draft)


def _say_lost(task: TaskState, fact: TaskExited, lost_s: float, draft: Draft) -> None:
    draft.because(
        task.task_id,
        "lost",
        f"attempt {fact.attempt} was lost ({fact.why}); {lost_s:.1f} s of work since the last checkpoint is done again,"
        f" {fact.saved_s:.1f} s is kept",
        attempt=fact.attempt,
        lost_work_s=round(lost_s, 3),
        saved_s=round(fact.saved_s, 3),
    )


def _reported(state: State, task_id: TaskId, engine: EngineId, lease_id: str) -> TaskState | None:
    """The live task that this report is about, if the lease is still the one it holds there."""
    task = state.tasks.get(task_id)
    return task if task is not None and task.engine == engine and task.lease_id == lease_id else None

"""Facts into state.  Each kind of fact has one function; what a parent must hear is reported here."""

from dataclasses import replace

from qipan.events import (
    CancelRequested,
    CapacityChanged,
    Command,
    CommandReceived,
    EngineLost,
    EngineOffered,
    Fact,
    LeaseGranted,
    LeaseRefused,
    ParkRequested,
    Renew,
    RenewalAsked,
    Reserve,
    Resize,
    Start,
    Stop,
    TaskExited,
    TaskProgress,
    TaskStarted,
    TaskSubmitted,
)
from qipan.leases import EngineId, LeaseId, TaskId
from qipan.scheduler.state import (
    AfterStop,
    Draft,
    EngineState,
    ParentLease,
    Phase,
    State,
    TaskState,
    ToEngine,
)

#: a task lost so often in a row without a new checkpoint is taken for broken
LOSSES_MAX = 5


def absorb(state: State, fact: Fact, draft: Draft) -> None:
    match fact:
        case TaskSubmitted():
            _submitted(state, fact, draft)
        case CancelRequested():
            _cancel(state, fact, draft)
        case ParkRequested():
            _park(state, fact, draft)
        case CommandReceived():
            _command(state, fact.command, draft)
        case EngineOffered():
            _offered(state, fact)
        case EngineLost():
            if fact.engine in state.engines:
                state.engines[fact.engine] = replace(state.engines[fact.engine], lost=True)
        case RenewalAsked():
            _renewal_asked(state, fact, draft)
        case CapacityChanged():
            _capacity(state, fact)
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
    order = fact.order
    state.tasks[task_id] = TaskState(
        order,
        Phase.QUEUED,
        draft.moment.now_s,
        done_s=order.saved_s,
        saved_s=order.saved_s,
        attempt=order.attempt,
    )


def _cancel(state: State, fact: CancelRequested, draft: Draft) -> None:
    task = state.tasks.get(fact.task_id)
    if task is None:
        return
    draft.because(fact.task_id, "cancelled", f"cancelled by {fact.by}")
    if task.phase is Phase.QUEUED:
        end(state, task, "cancelled", draft)
    else:
        order_stop(state, task, draft, park=False, why=f"cancelled by {fact.by}", after=AfterStop.END)


def _park(state: State, fact: ParkRequested, draft: Draft) -> None:
    state.parked = fact.park
    if not fact.park:
        return
    for task in list(state.tasks.values()):
        draft.because(
            task.task_id, "parked", f"parked by {fact.by}; continues when the board is taken up again"
        )
        if task.phase not in (Phase.QUEUED, Phase.STOPPING):
            order_stop(state, task, draft, park=True, why=f"parked by {fact.by}", after=AfterStop.QUEUE)


# ---- from the parent ---------------------------------------------------------------------------------------------


def _command(state: State, command: Command, draft: Draft) -> None:
    if command.term < state.term and not isinstance(command, Renew):
        return  # an earlier reign
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
            after = AfterStop.RETURN if command.park else AfterStop.END
            if task.phase is Phase.QUEUED:
                give_back(state, task, draft, command.why, cancelled=not command.park)
            else:
                order_stop(state, task, draft, park=command.park, why=command.why, after=after)


def _reserve(state: State, command: Reserve, draft: Draft) -> None:
    known = state.tasks.get(command.task_id)
    if known is not None and (known.parent is None or command.generation <= known.parent.generation):
        return
    if known is not None:
        # The parent asks anew for a task that is still here (its stop is on the way): refuse, it will ask again.
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
    order = command.order
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
    )


def _renew(state: State, command: Renew) -> None:
    if command.asked_lease_s is None:
        return
    until_s = command.asked_lease_s + command.duration_s
    wanted = set(command.lease_ids)
    for task_id, task in state.tasks.items():
        if task.parent is not None and task.parent.lease_id in wanted and until_s > task.parent.until_lease_s:
            state.tasks[task_id] = replace(task, parent=replace(task.parent, until_lease_s=until_s))


def _addressed(state: State, command: Start | Resize | Stop, draft: Draft) -> TaskState | None:
    task = state.tasks.get(command.task_id)
    if task is None or task.parent is None or task.parent.lease_id != command.lease_id:
        refuse(state, command.task_id, command.lease_id, command.generation, "no such lease here", draft)
        return None
    return task if command.generation > task.parent.generation else None


# ---- from engines ------------------------------------------------------------------------------------------------


def _offered(state: State, fact: EngineOffered) -> None:
    state.engines[fact.engine] = EngineState(fact.offers, fact.chooses)
    for key in [key for key in state.sent_down if key.startswith(f"{fact.engine}|")]:
        del state.sent_down[key]
    for task_id, task in state.tasks.items():
        if any(engine == fact.engine for engine, _ in task.refused):
            kept = tuple(entry for entry in task.refused if entry[0] != fact.engine)
            state.tasks[task_id] = replace(task, refused=kept)


def _capacity(state: State, fact: CapacityChanged) -> None:
    engine = state.engines.get(fact.engine)
    if engine is None:
        return
    offers = tuple(
        replace(
            offer,
            devices=max(0, offer.devices + fact.devices),
            largest_gang=max(0, offer.largest_gang + fact.devices),
        )
        if offer.chip_class == fact.chip_class
        else offer
        for offer in engine.offers
    )
    state.engines[fact.engine] = replace(engine, offers=offers)


def _renewal_asked(state: State, fact: RenewalAsked, draft: Draft) -> None:
    """Answer with the child's own stamp; count the lease from now, which is later than the stamp."""
    wanted = set(fact.lease_ids)
    renewed = []
    for task_id, task in state.tasks.items():
        if task.lease_id in wanted and task.engine == fact.engine and task.phase is not Phase.STOPPING:
            if _parent_ran_out(state, task, draft):
                continue
            state.tasks[task_id] = replace(task, lease_until_s=draft.moment.lease_s + state.settings.lease_s)
            renewed.append(task.lease_id)
    if renewed:
        command = Renew(
            tuple(lease for lease in renewed if lease), state.term, state.settings.lease_s, fact.asked_lease_s
        )
        draft.commands.append(ToEngine(fact.engine, command))


def _parent_ran_out(state: State, task: TaskState, draft: Draft) -> bool:
    return task.parent is not None and draft.moment.lease_s >= task.parent.until_lease_s


def _granted(state: State, fact: LeaseGranted, draft: Draft) -> None:
    task = _reported(state, fact.task_id, fact.engine, fact.lease_id)
    if task is None:
        release_stray(state, fact, draft)
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
        assert task.parent is not None
        draft.reports.append(
            LeaseGranted(
                task.task_id, task.parent.lease_id, EngineId(state.board), task.parent.generation, fact.needs
            )
        )
    state.tasks[task.task_id] = task


def _lease_refused(state: State, fact: LeaseRefused, draft: Draft) -> None:
    task = _reported(state, fact.task_id, fact.engine, fact.lease_id)
    if task is None:
        return
    if task.phase is Phase.STOPPING:  # it never had the lease, or has it no more: that is as good as stopped
        _after_stop(state, task, draft)
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
    phase = Phase.RUNNING if task.phase in (Phase.STARTING, Phase.RESIZING, Phase.RUNNING) else task.phase
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
    if task is None or task.engine != fact.engine or fact.attempt < task.attempt:
        return
    state.tasks[fact.task_id] = task = replace(
        task, done_s=fact.done_s, saved_s=max(task.saved_s, fact.saved_s), attempt=fact.attempt
    )
    if task.parent is not None:
        draft.reports.append(replace(fact, engine=EngineId(state.board)))


def _exited(state: State, fact: TaskExited, draft: Draft) -> None:
    task = _reported(state, fact.task_id, fact.engine, fact.lease_id)
    if task is None:
        return
    lost_s = max(0.0, task.done_s - fact.saved_s) if fact.outcome in ("lost", "failed", "cancelled") else 0.0
    losses = (
        (1 if fact.saved_s > task.saved_s else task.losses + 1) if fact.outcome == "lost" else task.losses
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
    )
    state.tasks[task.task_id] = task
    over = fact.outcome in ("done", "failed", "cancelled")
    if task.parent is not None:
        stays = not over and not (task.phase is Phase.STOPPING and task.after_stop is AfterStop.RETURN)
        draft.reports.append(
            replace(
                fact,
                lease_id=task.parent.lease_id,
                engine=EngineId(state.board),
                generation=task.generation,
                final=not stays,
            )
        )
    if over:
        end(state, task, fact.outcome, draft, why=fact.why, report=False)
    elif fact.outcome == "resized":
        target = task.target()
        state.tasks[task.task_id] = replace(task, needs=target.needs if target else task.needs)
    elif not fact.final:
        if fact.outcome == "lost":
            _say_lost(task, fact, lost_s, draft)
        state.tasks[task.task_id] = task  # the engine tries again inside the same lease
    elif task.phase is Phase.STOPPING:
        _after_stop(state, task, draft, reported=True)
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


# ---- transitions used by several facts and by placement --------------------------------------------------------------


def order_stop(
    state: State, task: TaskState, draft: Draft, *, park: bool, why: str, after: AfterStop
) -> None:
    """Tell the engine to stop; asking twice only changes what follows."""
    engine, lease_id = task.engine, task.lease_id
    assert engine is not None
    assert lease_id is not None
    task = replace(
        task,
        phase=Phase.STOPPING,
        since_s=draft.moment.now_s,
        generation=task.generation + 1,
        after_stop=after,
        stop_why=why,
    )
    state.tasks[task.task_id] = task
    command = Stop(task.task_id, lease_id, state.term, task.generation, park, why)
    draft.commands.append(ToEngine(engine, command))


def _after_stop(state: State, task: TaskState, draft: Draft, *, reported: bool = False) -> None:
    match task.after_stop:
        case AfterStop.QUEUE:
            state.tasks[task.task_id] = to_queue(task, draft)
        case AfterStop.RETURN:
            if reported:
                state.tasks.pop(task.task_id)
            else:
                give_back(state, task, draft, task.stop_why)
        case AfterStop.END:
            end(state, task, "cancelled", draft, why=task.stop_why, report=not reported)


def to_queue(task: TaskState, draft: Draft) -> TaskState:
    return replace(
        task,
        phase=Phase.QUEUED,
        since_s=draft.moment.now_s,
        engine=None,
        lease_id=None,
        point_id="",
        target_id="",
        needs=(),
        done_s=task.saved_s,
    )


def give_back(state: State, task: TaskState, draft: Draft, why: str, *, cancelled: bool = False) -> None:
    """Return a task that holds nothing here to the parent."""
    assert task.parent is not None
    parent = task.parent
    state.tasks.pop(task.task_id)
    if cancelled:
        state.over[task.task_id] = "cancelled"
    refuse(state, task.task_id, parent.lease_id, max(task.generation, parent.generation), why, draft)


def refuse(state: State, task_id: TaskId, lease_id: str, generation: int, why: str, draft: Draft) -> None:
    draft.reports.append(LeaseRefused(task_id, LeaseId(lease_id), EngineId(state.board), generation, why))


def end(state: State, task: TaskState, how: str, draft: Draft, *, why: str = "", report: bool = True) -> None:
    state.tasks.pop(task.task_id, None)
    state.over[task.task_id] = how
    draft.ended.append((task.task_id, how))
    if task.parent is not None and report:
        refuse(state, task.task_id, task.parent.lease_id, task.generation, why or how, draft)
    if how == "failed":
        draft.because(task.task_id, "failed", why or "the task failed")


def release_stray(state: State, fact: LeaseGranted, draft: Draft) -> None:
    """A lease that nobody here wants any more is given back at once."""
    command = Stop(
        fact.task_id,
        fact.lease_id,
        state.term,
        fact.generation + 1,
        True,
        "the board no longer wants this lease",
    )
    draft.commands.append(ToEngine(fact.engine, command))

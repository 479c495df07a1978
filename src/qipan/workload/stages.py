"""What stages of a task may say of each other: names, streams, orders."""

from collections.abc import Iterable

from qipan.workload.reader import Value, did_you_mean
from qipan.workload.task import Stage, Task

#: where a stage stands in the file, its entries, and the stage as a task
StageRead = tuple[Value, dict[str, Value], Task]
STAGES_MAX = 32


def check_stages(read: list[StageRead]) -> None:
    """Names, and that what waits for what comes to an end.  Raises InvalidInput where the mistake stands."""
    if len(read) > STAGES_MAX:
        raise read[STAGES_MAX][0].error(f"is one of {len(read)} stages; a task may have {STAGES_MAX}")
    names: list[str] = []
    for _, fields, task in read:
        if task.name in names:
            raise fields["name"].error(f"the stage {task.name!r} stands twice; names are unique in a task")
        names.append(task.name)
    followed = {name for _, _, task in read for name in (*relations_of(task).after, relations_of(task).feeds)}
    for value, fields, task in read:
        stage = relations_of(task)
        for key in ("after", "feeds"):
            for item in fields[key].items() if key in fields else []:
                if item.text() not in names:
                    raise item.error(f"no stage {item.text()[:60]!r}{did_you_mean(item.text(), names)}")
                if item.text() == task.name:
                    raise item.error(f"{task.name} names itself; name another of {', '.join(names)}")
        if not (stage.after or stage.feeds or task.name in followed):
            raise value.error(
                f"{task.name} feeds nothing, is fed by nothing and stands before or after nothing; add `after:` or"
                " `feeds:`, or make it a task of its own"
            )
        for key in ("samples", "ahead"):
            if key in fields and not stage.feeds:
                raise fields[key].error(f"belongs to a stage that feeds another; {task.name} feeds nothing")
        if stage.feeds and not (task.run and stage.samples):
            raise fields["feeds"].error(
                f"{task.name} needs `run` and `samples`, such as `samples: 100k`: what it prepares, and how many"
            )
        fed = next((one for _, _, one in read if one.name == stage.feeds and not one.run), None)
        if fed is not None:
            _check_fed_trainer(
                fields, stage, fed, [one for _, _, one in read if relations_of(one).feeds == fed.name]
            )
        if stage.feeds and stage.ahead_bytes < 1:
            raise fields["ahead"].error("must be more than nothing, such as 64MB")
    _check_order(read)


def _check_fed_trainer(fields: dict[str, Value], stage: Stage, fed: Task, feeders: list[Task]) -> None:
    """The built-in trainer takes one sample a row."""
    rows = fed.work.tokens // fed.work.global_batch_tokens * (fed.work.global_batch_tokens // fed.work.seq)
    if len(feeders) > 1:
        raise fields["feeds"].error(
            f"{fed.name} is run by the built-in trainer, which one stage can feed; {' and '.join(one.name for one in feeders)} do"
        )
    if stage.samples < rows:
        raise fields["samples"].error(
            f"{stage.samples} are fewer than the {rows} rows of seq {fed.work.seq} in work.tokens of {fed.name}"
        )


def _check_order(read: list[StageRead]) -> None:
    """Stages that stream into each other start together, so they count as one when it is asked what comes after what."""
    stages = {task.name: relations_of(task) for _, _, task in read}
    fields_of = {task.name: fields for _, fields, task in read}
    for name in stages:
        path = [name]
        while (following := stages[path[-1]].feeds) and following not in path:
            path.append(following)
        if following == name:
            raise fields_of[name]["feeds"].error(f"a circle: {' feeds '.join([*path, following])}")
    together = streams_of(task for _, _, task in read)
    checked: set[str] = set()

    def before(name: str, waiting: tuple[str, ...]) -> None:
        for member in together[name]:
            for earlier in stages[member].after:
                if earlier in together[name]:
                    raise fields_of[member]["after"].error(
                        f"{member} and {earlier} stream into each other, so they start together; {member} cannot start"
                        f" after {earlier}"
                    )
                if any(one in waiting for one in together[earlier]):
                    raise fields_of[member]["after"].error(
                        f"a circle: {member} starts after {earlier}, which waits for {member}"
                    )
                if earlier not in checked:
                    before(earlier, (*waiting, *together[earlier]))
        checked.update(together[name])

    for name in stages:
        before(name, together[name])


def streams_of(stages: Iterable[Task]) -> dict[str, tuple[str, ...]]:
    """Stage -> the names of all that start together with it, itself among them, in the order of the file."""
    stages = tuple(stages)
    group = {stage.name: {stage.name} for stage in stages}
    for stage in stages:
        fed = relations_of(stage).feeds
        if fed and group[stage.name] is not group[fed]:
            joined = group[stage.name] | group[fed]
            group.update(dict.fromkeys(joined, joined))
    return {
        stage.name: tuple(one.name for one in stages if one.name in group[stage.name]) for stage in stages
    }


def relations_of(task: Task) -> Stage:
    assert task.stage is not None
    return task.stage

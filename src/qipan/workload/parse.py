"""A task file becomes one checked `Task`."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast, get_args

from qipan.files import text_in
from qipan.forecast import DAY_S, Forecast
from qipan.quantities import (
    format_duration,
    parse_bytes,
    parse_count,
    parse_duration_s,
    parse_money_micro_cny,
    parse_utc_offset_s,
)
from qipan.workload.cards import CARDS
from qipan.workload.huggingface import load_config
from qipan.workload.model import Model, Moe
from qipan.workload.reader import Value, did_you_mean, read_yaml
from qipan.workload.stages import StageRead, check_stages
from qipan.workload.task import (
    RESERVED,
    Checkpoint,
    Kind,
    Limits,
    Load,
    Objective,
    Replicas,
    Shape,
    SiteChips,
    Sites,
    Slo,
    Stage,
    Task,
    Work,
)

KEYS = (
    "kind", "name", "model", "data", "work", "objective", "limits", "elastic", "checkpoint", "run", "devices", "env",
    "on_partition", "profile", "slo", "load", "replicas", "forecast", "foreach", "stages", "tenant", "sites",
)  # fmt: skip
#: of a stage: what it is to the others, and what a task of its own could state
STAGE_KEYS = ("after", "feeds", "chips", "samples", "samples_per_s", "ahead")
OF_THE_WHOLE = ("stages", "tenant", "sites", "profile", "slo", "load", "replicas", "forecast")
LIMITS = ("deadline", "max_cost", "vendors", "regions", "chips", "apart", "time")
KINDS = get_args(Kind)
OBJECTIVES = get_args(Objective)
STEP_S_LEAST = 1.0  # of a forecast: a board decides anew at each step
#: profile -> objective, elastic
PROFILES: dict[str, tuple[Objective, bool]] = {
    "realtime": ("time", False),
    "interactive": ("time", False),
    "batch": ("cost", True),
    "large-training": ("balanced", True),
    "private": ("balanced", False),
}
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")


#: the first key of files that are none of a task -> who takes them
OTHERS = {
    "scenario": "give it to qipan twin FILE",
    "site": "give it to qipan up --site FILE, or beside a task: qipan plan TASK --site FILE",
    "quota": "give it to qipan up --rules FILE, or qipan quota check FILE",
}


def load_task(path: str | Path) -> Task:
    """Read and check a task file.  Raises NotFound, InvalidInput."""
    path = Path(path)
    text = text_in(path, "no such file; name a task file such as examples/train-poems.yaml")
    return parse_task(text, str(path), str(path.resolve().parent))


def parse_task(text: str, file: str = "task.yaml", workdir: str = "") -> Task:
    top = read_yaml(text, file)
    for key, takes in OTHERS.items():
        if top.is_mapping and key in {name.value for name, _ in top.node.value}:
            raise top.error(f"has `{key}:`, so it is no task file; {takes}")
    fields = top.fields(KEYS)
    for needed in ("kind", "name"):
        if needed not in fields:
            raise top.error(
                f"has no `{needed}`; add `{needed}: {'train' if needed == 'kind' else 'my-task'}`"
            )
    kind = cast(Kind, fields["kind"].choice(KINDS))
    task = replace(_task(top, fields, workdir, kind), workdir=workdir)
    return replace(task, stages=_stages(fields, task)) if "stages" in fields else task


def _task(top: Value, fields: dict[str, Value], workdir: str, kind: Kind) -> Task:
    objective, elastic, profile = "balanced", False, ""
    if "profile" in fields:
        profile = fields["profile"].choice(tuple(PROFILES))
        objective, elastic = PROFILES[profile]
    task = Task(
        kind,
        _name(fields["name"]),
        model=_model(fields["model"], workdir) if "model" in fields else None,
        data=tuple(_uri(item) for item in fields["data"].items()) if "data" in fields else (),
        work=_work(fields["work"]) if "work" in fields else Work(),
        objective=cast(
            Objective, fields["objective"].choice(OBJECTIVES) if "objective" in fields else objective
        ),
        limits=_limits(fields["limits"]) if "limits" in fields else Limits(),
        devices=_shape(fields["devices"]) if "devices" in fields else Shape(),
        elastic=fields["elastic"].boolean() if "elastic" in fields else elastic,
        checkpoint=_checkpoint(fields["checkpoint"]) if "checkpoint" in fields else Checkpoint(),
        run=fields["run"].text() if "run" in fields else "",
        env=_env(fields["env"]) if "env" in fields else (),
        on_partition="restart"
        if "on_partition" in fields and fields["on_partition"].choice(("wait", "restart")) == "restart"
        else "wait",
        profile=profile,
        tenant=_name(fields["tenant"]) if "tenant" in fields else "",
        slo=_slo(fields["slo"]) if "slo" in fields else None,
        load=_load(fields["load"]) if "load" in fields else None,
        replicas=_replicas(fields["replicas"]) if "replicas" in fields else None,
        forecast=read_forecast(fields["forecast"]) if "forecast" in fields else None,
        foreach=tuple(item.text() for item in fields["foreach"].items()) if "foreach" in fields else (),
        sites=_sites(fields["sites"]) if "sites" in fields else None,
    )
    if task.run and "devices" not in fields and not (task.model is not None and task.work.tokens):
        task = replace(task, devices=Shape(1, 1))
    _check(top, fields, task)
    return _as_service(task) if task.is_service else task


def _as_service(task: Task) -> Task:
    """Without a forecast all its replicas are asked for at all times."""
    stated = task.replicas or Replicas()
    forecast = task.forecast or Forecast(DAY_S, ((0.0, stated.max),))
    return replace(task, forecast=forecast, replicas=task.replicas or Replicas(0, forecast.most()))


def _check(top: Value, fields: dict[str, Value], task: Task) -> None:
    """What must stand together, and what cannot."""
    if task.kind in ("train", "finetune") and not task.run and "stages" not in fields:
        for needed in ("model", "data", "work"):
            if needed not in fields:
                raise top.error(
                    f"a {task.kind} task without `run` needs `{needed}` (the built-in trainer runs it)"
                )
        work = task.work
        if not work.tokens or not work.global_batch_tokens or not work.seq:
            raise fields["work"].error(
                "needs tokens, global_batch (in tokens) and seq, such as {tokens: 2T, global_batch: 4M, seq: 4096}"
            )
        if work.global_batch_tokens % work.seq:
            raise fields["work"].error(
                f"global_batch {work.global_batch_tokens} is not a whole number of rows of seq {work.seq}"
            )
        if work.tokens < work.global_batch_tokens:
            raise fields["work"].error(
                f"tokens {work.tokens} is less than one global_batch of {work.global_batch_tokens}"
            )
    if task.run and task.devices.min < task.devices.max and not task.elastic and "feeds" not in fields:
        raise fields["devices"].error("min below max needs `elastic: true`")
    if task.is_service:
        _check_service(fields, task)
    elif task.kind == "serve":
        for needed in ("slo", "load"):
            if needed not in fields:
                raise top.error(f"a serve task without `run` needs `{needed}`")
        if "forecast" in fields:
            raise fields["forecast"].error("needs `run`, a script that serves; model servers are not run yet")
    elif any(key in fields for key in ("slo", "load", "replicas", "forecast")):
        key = next(key for key in ("slo", "load", "replicas", "forecast") if key in fields)
        raise fields[key].error(f"belongs to `kind: serve`, this is a {task.kind} task")
    if "foreach" in fields and task.kind != "batch":
        raise fields["foreach"].error(f"belongs to `kind: batch`, this is a {task.kind} task")
    if task.sites is not None and (task.kind not in ("train", "finetune") or task.run or "stages" in fields):
        raise fields["sites"].error(
            "belongs to a train or finetune task of the built-in trainer, without `run` and `stages`"
        )
    if task.kind in ("batch", "dev") and not task.run and "stages" not in fields:
        raise top.error(f"a {task.kind} task needs `run`, such as `run: python work.py`")


def _check_service(fields: dict[str, Value], task: Task) -> None:
    if task.devices.min != task.devices.max or task.elastic:
        key = "elastic" if "elastic" in fields else "devices"
        raise fields[key].error(
            "a replica has one shape: write `devices: 1`; the forecast says how many replicas"
        )
    if "deadline" in fields["limits"].fields(LIMITS) if "limits" in fields else False:
        raise fields["limits"].error("a service has no deadline; `time` says how long it is there")
    forecast, stated = task.forecast, task.replicas
    if forecast is None or stated is None:
        return
    for _, replicas in forecast.steps:
        if not stated.min <= replicas <= stated.max:
            raise fields["forecast"].error(
                f"asks for {replicas} replicas, `replicas` has {stated.min} to {stated.max}"
            )


def read_forecast(value: Value) -> Forecast:
    """Raises InvalidInput."""
    fields = value.fields(("every", "replicas", "notice", "start", "utc"))
    if "replicas" not in fields:
        raise value.error("needs `replicas`, such as {0h: 1, 8h: 4, 18h: 6, 23h: 2}")
    every_s = fields["every"].parsed(parse_duration_s) if "every" in fields else DAY_S
    steps: list[tuple[float, int]] = []
    for at, count in fields["replicas"].mapping().items():
        from_s = count.parsed(lambda _, at=at: parse_duration_s(at))  # type: ignore[misc]
        if (steps and from_s <= steps[-1][0]) or (not steps and from_s) or from_s >= every_s:
            raise count.error(
                f"{at[:40]!r}: times begin with 0h, rise, and are before the end of the period, {format_duration(every_s)}"
            )
        if (steps and from_s - steps[-1][0] < STEP_S_LEAST) or every_s - from_s < STEP_S_LEAST:
            raise count.error(f"{at[:40]!r}: what is asked for stands for a second at least")
        steps.append((from_s, count.whole(0, 10_000)))
    if not steps or not any(replicas for _, replicas in steps):
        raise fields["replicas"].error("asks for no replica at any time")
    made = Forecast(every_s, tuple(steps))
    made = replace(
        made,
        notice_s=fields["notice"].parsed(parse_duration_s) if "notice" in fields else made.notice_s,
        start_s=fields["start"].parsed(parse_duration_s) if "start" in fields else made.start_s,
        utc_offset_s=fields["utc"].parsed(parse_utc_offset_s) if "utc" in fields else made.utc_offset_s,
    )
    if made.notice_s + made.start_s >= every_s:
        raise value.error(
            f"`start` and `notice` take {format_duration(made.notice_s + made.start_s)}, as long as a period; make them shorter"
        )
    return made


def _stages(fields: dict[str, Value], whole: Task) -> tuple[Task, ...]:
    """Each stage as a task, with what the whole one states for all.  Raises InvalidInput."""
    for key in ("run", "devices", "foreach", "checkpoint"):
        if key in fields:
            raise fields[key].error("belongs to one of the `stages`; move it there")
    values = fields["stages"].items()
    if len(values) < 2:
        raise fields["stages"].error("needs two or more stages; a single one is a task without `stages`")
    read = [_stage(value, fields, whole) for value in values]
    check_stages(read)
    return tuple(task for _, _, task in read)


def _stage(value: Value, of_the_whole: dict[str, Value], whole: Task) -> StageRead:
    fields = value.fields((*STAGE_KEYS, *(key for key in KEYS if key not in OF_THE_WHOLE)))
    if "name" not in fields:
        raise value.error("has no `name`; add `name: prepare`")
    if "run" not in fields:
        stated: dict[str, Value] = {
            key: of_the_whole[key] for key in ("model", "data", "work") if key in of_the_whole
        }
        fields = {**stated, **fields}
    if "kind" in fields:
        kind = fields["kind"].choice(("train", "finetune", "batch"))
    else:
        kind = "batch" if "run" in fields else whole.kind
    task = _task(value, fields, whole.workdir, cast(Kind, kind))
    if "chips" in fields:
        names = tuple("cpu/*" if item.text() == "cpu" else item.text() for item in fields["chips"].items())
        task = replace(task, limits=replace(task.limits, chips=names))
    stage = Stage(
        tuple(item.text() for item in fields["after"].items()) if "after" in fields else (),
        fields["feeds"].text() if "feeds" in fields else "",
        fields["samples"].parsed(parse_count) if "samples" in fields else 0,
        _per_s(fields["samples_per_s"], "samples") if "samples_per_s" in fields else 0.0,
        fields["ahead"].parsed(parse_bytes) if "ahead" in fields else Stage().ahead_bytes,
    )
    if stage.feeds and "devices" not in fields:
        task = replace(task, devices=Shape())  # the planner chooses: as many as keep the fed stage busy
    limits, of_all = task.limits, whole.limits
    limits = replace(
        limits, vendors=limits.vendors or of_all.vendors, regions=limits.regions or of_all.regions,
        chips=limits.chips or of_all.chips, apart=limits.apart or of_all.apart,
        deadline_s=limits.deadline_s or of_all.deadline_s,
    )  # fmt: skip
    task = replace(
        task, stage=stage, limits=limits, tenant=whole.tenant, workdir=whole.workdir,
        objective=task.objective if "objective" in fields else whole.objective,
        on_partition=task.on_partition if "on_partition" in fields else whole.on_partition,
        env=tuple({**dict(whole.env), **dict(task.env)}.items()),
    )  # fmt: skip
    return value, fields, task


def _name(value: Value) -> str:
    text = value.text()
    if not NAME.fullmatch(text):
        raise value.error(
            f"{text[:80]!r} is no name; use lower case letters, digits, `-`, `.`, `_`, at most 63"
        )
    return text


def _env(value: Value) -> tuple[tuple[str, str], ...]:
    for name, one in value.mapping().items():
        if name.startswith(RESERVED):
            raise one.error(f"names that begin with {RESERVED} are set by Qipan; choose another")
    return tuple((name, one.text()) for name, one in value.mapping().items())


def _uri(value: Value) -> str:
    text = value.text()
    if not re.fullmatch(r"[a-z0-9]+:.+", text):
        raise value.error(
            f"{text[:80]!r} is no source; write fortunes:tang300, file:PATH or s3://bucket/prefix"
        )
    return text


def _work(value: Value) -> Work:
    fields = value.fields(("tokens", "global_batch", "seq", "seed", "precision"))
    sizes = {
        key: fields[key].parsed(parse_count) for key in ("tokens", "global_batch", "seq") if key in fields
    }
    for key, count in sizes.items():
        if count == 0:
            raise fields[key].error("must be 1 or more")
    return Work(
        sizes.get("tokens", 0),
        sizes.get("global_batch", 0),
        sizes.get("seq", 0),
        fields["seed"].whole(0, 2**31) if "seed" in fields else 0,
        fields["precision"].choice(("bf16", "fp8")) if "precision" in fields else "bf16",  # type: ignore[arg-type]
    )


def _limits(value: Value) -> Limits:
    fields = value.fields(LIMITS)

    def names(key: str) -> tuple[str, ...]:
        found = tuple(item.text() for item in fields[key].items()) if key in fields else ()
        return () if found == ("any",) else found

    def positive(key: str) -> float | None:
        if key not in fields:
            return None
        seconds = fields[key].parsed(parse_duration_s)
        if seconds <= 0:
            raise fields[key].error("must be longer than nothing, such as 30d")
        return seconds

    return Limits(
        positive("deadline"),
        fields["max_cost"].parsed(parse_money_micro_cny) if "max_cost" in fields else None,
        names("vendors"),
        names("regions"),
        names("chips"),
        _name(fields["apart"]) if "apart" in fields else "",
        positive("time"),
    )


def _shape(value: Value) -> Shape:
    if not value.is_mapping:
        count = value.whole(1, 1_000_000)
        return Shape(count, count)
    fields = value.fields(("min", "max", "per_node"))
    least = fields["min"].whole(1, 1_000_000) if "min" in fields else 1
    most = fields["max"].whole(1, 1_000_000) if "max" in fields else least
    if most < least:
        raise value.error(f"max {most} is below min {least}")
    per_node = fields["per_node"].whole(1, 1_000_000) if "per_node" in fields else 0
    if per_node and (least % per_node or most % per_node):
        raise fields["per_node"].error(f"{per_node} on a node does not divide min {least} and max {most}")
    return Shape(least, most, per_node)


def _sites(value: Value) -> Sites:
    fields = value.fields(
        ("parts", "every", "codec", "overlap", "fragments", "grace", "min_sites", "ramp", "moments")
    )
    parts = [_site_chips(item) for item in fields["parts"].items()] if "parts" in fields else []
    names = [part.at for part in parts]
    if len(parts) < 2 or len(set(names)) < len(names):
        raise value.error(
            "needs `parts` at two or more sites, each once, such as [{at: shanghai, chips: {sim/yan-1: 2}}, ...]"
        )
    codec = fields["codec"].choice(("fp32", "bf16", "int8")) if "codec" in fields else "int8"
    grace_s = fields["grace"].parsed(parse_duration_s) if "grace" in fields else 10.0
    if grace_s <= 0:
        raise fields["grace"].error("must be longer than nothing, such as 10s")
    return Sites(
        tuple(parts), fields["every"].whole(1, 100_000) if "every" in fields else 50,
        cast(Literal["fp32", "bf16", "int8"], codec), fields["overlap"].boolean() if "overlap" in fields else True,
        fields["fragments"].whole(1, 1000) if "fragments" in fields else 1, grace_s,
        fields["min_sites"].whole(1, len(parts)) if "min_sites" in fields else 1,
        fields["ramp"].whole(0, 100_000) if "ramp" in fields else 10,
        fields["moments"].boolean() if "moments" in fields else True,
    )  # fmt: skip


def _site_chips(value: Value) -> SiteChips:
    fields = value.fields(("at", "chips"))
    if "at" not in fields or "chips" not in fields:
        raise value.error("needs `at` (a site) and `chips`, such as {sim/yan-1: 2}")
    chips = tuple((chip, count.whole(1, 100_000)) for chip, count in fields["chips"].mapping().items())
    if not chips:
        raise fields["chips"].error("names no chip class")
    return SiteChips(fields["at"].text(), chips)


def _checkpoint(value: Value) -> Checkpoint:
    fields = value.fields(("to", "every", "size", "keep", "longest"))
    every_s = None
    if "every" in fields and fields["every"].text() != "auto":
        every_s = fields["every"].parsed(parse_duration_s)
        if every_s <= 0:
            raise fields["every"].error("must be longer than nothing, such as 10m, or auto")
    longest_s = fields["longest"].parsed(parse_duration_s) if "longest" in fields else None
    if longest_s is not None and longest_s < (every_s or 1.0):
        raise fields["longest"].error(f"must be no shorter than `every`, {format_duration(every_s or 1.0)}")
    return Checkpoint(
        fields["to"].text() if "to" in fields else "",
        every_s,
        fields["size"].parsed(parse_bytes) if "size" in fields else None,
        fields["keep"].whole(1, 1000) if "keep" in fields else 3,
        longest_s,
    )


def _slo(value: Value) -> Slo:
    fields = value.fields(("ttft", "tpot", "latency_p99"))
    if not fields:
        raise value.error("needs ttft and tpot, or latency_p99")
    seconds = {key: field.parsed(parse_duration_s) for key, field in fields.items()}
    return Slo(seconds.get("ttft"), seconds.get("tpot"), seconds.get("latency_p99"))


def _load(value: Value) -> Load:
    fields = value.fields(("requests_per_s", "input", "output"))
    if "requests_per_s" not in fields:
        raise value.error("needs requests_per_s")
    return Load(
        _per_s(fields["requests_per_s"], "requests"),
        fields["input"].parsed(parse_count) if "input" in fields else 0,
        fields["output"].parsed(parse_count) if "output" in fields else 0,
    )


def _per_s(value: Value, what: str) -> float:
    text = value.text()
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or (what == "samples" and not float(text)):
        raise value.error(f"{text[:40]!r} is not a number of {what} per second, such as 20")
    return float(text)


def _replicas(value: Value) -> Replicas:
    if not value.is_mapping:
        count = value.whole(1, 10_000)
        return Replicas(count, count)
    fields = value.fields(("min", "max"))
    least = fields["min"].whole(0, 10_000) if "min" in fields else 1
    most = fields["max"].whole(1, 10_000) if "max" in fields else max(1, least)
    if most < least:
        raise value.error(f"max {most} is below min {least}")
    return Replicas(least, most)


ARCHITECTURE = (
    "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn_hidden", "vocab", "gated_mlp", "tied_embeddings", "experts",
    "experts_per_token", "expert_ffn_hidden",
)  # fmt: skip


def _model(value: Value, workdir: str) -> Model:
    if not value.is_mapping:
        name = value.text()
        if name.endswith(".json"):
            return value.parsed(lambda path: load_config(Path(workdir, path)))
        if name not in CARDS:
            raise value.error(
                f"no model card {name[:60]!r}{did_you_mean(name, tuple(CARDS))} (or a path to a config.json, or a mapping)"
            )
        return CARDS[name]
    fields = value.fields(ARCHITECTURE)
    for needed in ("layers", "hidden", "heads", "ffn_hidden"):
        if needed not in fields:
            raise value.error(f"needs `{needed}`")
    size = {
        key: fields[key].parsed(parse_count) for key in fields if key not in ("gated_mlp", "tied_embeddings")
    }
    for key, count in size.items():
        if count == 0 and key != "vocab":
            raise fields[key].error("must be 1 or more")
        if count > 10_000_000:
            raise fields[key].error(f"{count} is no size of a model's part")
    head_dim = size.get("head_dim") or size["hidden"] // size["heads"]
    if "head_dim" not in size and size["hidden"] % size["heads"]:
        raise fields["heads"].error(f"{size['heads']} does not divide hidden {size['hidden']}; give head_dim")
    kv_heads = size.get("kv_heads", size["heads"])
    if size["heads"] % kv_heads:
        raise fields["kv_heads"].error(f"{kv_heads} does not divide heads {size['heads']}")
    moe = None
    if "experts" in size:
        moe = Moe(
            size["experts"],
            size.get("experts_per_token", 2),
            size.get("expert_ffn_hidden", size["ffn_hidden"]),
        )
    return Model(
        "inline", size["layers"], size["hidden"], size["heads"], kv_heads, head_dim, size["ffn_hidden"],
        size.get("vocab", 0), fields["gated_mlp"].boolean() if "gated_mlp" in fields else True,
        fields["tied_embeddings"].boolean() if "tied_embeddings" in fields else False, moe,
    )  # fmt: skip

"""A task file becomes one checked `Task`."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast, get_args

from qipan.errors import InvalidInput, NotFound
from qipan.quantities import parse_bytes, parse_count, parse_duration_s, parse_money_micro_cny
from qipan.workload.cards import CARDS
from qipan.workload.huggingface import load_config
from qipan.workload.model import Model, Moe
from qipan.workload.reader import Value, did_you_mean, read_yaml
from qipan.workload.task import (
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
    Task,
    Work,
)

KEYS = (
    "kind", "name", "model", "data", "work", "objective", "limits", "elastic", "checkpoint", "run", "devices", "env",
    "on_partition", "profile", "slo", "load", "replicas", "foreach", "stages", "tenant", "sites",
)  # fmt: skip
KINDS = get_args(Kind)
OBJECTIVES = get_args(Objective)
#: profile -> objective, elastic
PROFILES: dict[str, tuple[Objective, bool]] = {
    "realtime": ("time", False),
    "interactive": ("time", False),
    "batch": ("cost", True),
    "large-training": ("balanced", True),
    "private": ("balanced", False),
}
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")


def load_task(path: str | Path) -> Task:
    """Read and check a task file.  Raises NotFound, InvalidInput."""
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"{path}: no such file; name a task file such as examples/train-poems.yaml")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise InvalidInput(f"cannot be read as UTF-8 text: {error}", str(path)) from None
    return parse_task(text, str(path), str(path.resolve().parent))


def parse_task(text: str, file: str = "task.yaml", workdir: str = "") -> Task:
    task = _task(read_yaml(text, file), workdir)
    return replace(task, workdir=workdir)


def _task(top: Value, workdir: str) -> Task:
    fields = top.fields(KEYS)
    for needed in ("kind", "name"):
        if needed not in fields:
            raise top.error(
                f"has no `{needed}`; add `{needed}: {'train' if needed == 'kind' else 'my-task'}`"
            )
    kind = cast(Kind, fields["kind"].choice(KINDS))
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
        env=tuple((key, value.text()) for key, value in fields["env"].mapping().items())
        if "env" in fields
        else (),
        on_partition="restart"
        if "on_partition" in fields and fields["on_partition"].choice(("wait", "restart")) == "restart"
        else "wait",
        profile=profile,
        tenant=_name(fields["tenant"]) if "tenant" in fields else "",
        slo=_slo(fields["slo"]) if "slo" in fields else None,
        load=_load(fields["load"]) if "load" in fields else None,
        replicas=_replicas(fields["replicas"]) if "replicas" in fields else None,
        foreach=tuple(item.text() for item in fields["foreach"].items()) if "foreach" in fields else (),
        sites=_sites(fields["sites"]) if "sites" in fields else None,
        stages=tuple(_task(item, workdir) for item in fields["stages"].items()) if "stages" in fields else (),
    )
    if task.run and "devices" not in fields and not (task.model is not None and task.work.tokens):
        task = replace(task, devices=Shape(1, 1))
    _check(top, fields, task)
    return task


def _check(top: Value, fields: dict[str, Value], task: Task) -> None:
    """What must stand together, and what cannot."""
    if task.kind in ("train", "finetune") and not task.run and not task.stages:
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
    if task.run and task.devices.min < task.devices.max and not task.elastic:
        raise fields["devices"].error("min below max needs `elastic: true`")
    if task.kind == "serve":
        for needed in ("slo", "load"):
            if needed not in fields:
                raise top.error(f"a serve task needs `{needed}`")
    elif "slo" in fields or "load" in fields or "replicas" in fields:
        key = next(key for key in ("slo", "load", "replicas") if key in fields)
        raise fields[key].error(f"belongs to `kind: serve`, this is a {task.kind} task")
    if "foreach" in fields and task.kind != "batch":
        raise fields["foreach"].error(f"belongs to `kind: batch`, this is a {task.kind} task")
    stages = [stage.name for stage in task.stages]
    if len(set(stages)) < len(stages):
        raise fields["stages"].error(f"a stage name stands twice among {', '.join(stages)}; keep one of each")
    if task.sites is not None and (task.kind not in ("train", "finetune") or task.run or task.stages):
        raise fields["sites"].error(
            "belongs to a train or finetune task of the built-in trainer, without `run` and `stages`"
        )
    if task.kind in ("batch", "dev") and not task.run:
        raise top.error(f"a {task.kind} task needs `run`, such as `run: python work.py`")


def _name(value: Value) -> str:
    text = value.text()
    if not NAME.fullmatch(text):
        raise value.error(
            f"{text[:80]!r} is no name; use lower case letters, digits, `-`, `.`, `_`, at most 63"
        )
    return text


def _uri(value: Value) -> str:
    text = value.text()
    if not re.fullmatch(r"[a-z0-9]+:.+", text):
        raise value.error(
            f"{text[:80]!r} is no source; write fortunes:tang300, file:PATH or s3://bucket/prefix"
        )
    return text


def _work(value: Value) -> Work:
    fields = value.fields(("tokens", "global_batch", "seq", "seed", "precision"))
    return Work(
        fields["tokens"].parsed(parse_count) if "tokens" in fields else 0,
        fields["global_batch"].parsed(parse_count) if "global_batch" in fields else 0,
        fields["seq"].parsed(parse_count) if "seq" in fields else 0,
        fields["seed"].whole(0, 2**31) if "seed" in fields else 0,
        fields["precision"].choice(("bf16", "fp8")) if "precision" in fields else "bf16",  # type: ignore[arg-type]
    )


def _limits(value: Value) -> Limits:
    fields = value.fields(("deadline", "max_cost", "vendors", "regions", "chips", "apart", "time"))

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
    fields = value.fields(("min", "max"))
    least = fields["min"].whole(1, 1_000_000) if "min" in fields else 1
    most = fields["max"].whole(1, 1_000_000) if "max" in fields else least
    if most < least:
        raise value.error(f"max {most} is below min {least}")
    return Shape(least, most)


def _sites(value: Value) -> Sites:
    fields = value.fields(("parts", "every", "codec", "overlap", "fragments", "grace", "min_sites"))
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
    fields = value.fields(("to", "every", "size", "keep"))
    every_s = None
    if "every" in fields and fields["every"].text() != "auto":
        every_s = fields["every"].parsed(parse_duration_s)
        if every_s <= 0:
            raise fields["every"].error("must be longer than nothing, such as 10m, or auto")
    return Checkpoint(
        fields["to"].text() if "to" in fields else "",
        every_s,
        fields["size"].parsed(parse_bytes) if "size" in fields else None,
        fields["keep"].whole(1, 1000) if "keep" in fields else 3,
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
    text = fields["requests_per_s"].text()
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise fields["requests_per_s"].error(
            f"{text[:40]!r} is not a number of requests per second, such as 20"
        )
    rate = float(text)
    return Load(
        rate,
        fields["input"].parsed(parse_count) if "input" in fields else 0,
        fields["output"].parsed(parse_count) if "output" in fields else 0,
    )


def _replicas(value: Value) -> Replicas:
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

"""The form and the task file are two views of one text: a changed field is written into the YAML, and the fields are
read from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from qipan.errors import InvalidInput

#: dotted path in the task file -> what may stand there ("text", "check", or the choices)
FIELDS: dict[str, str | tuple[str, ...]] = {
    "name": "text", "kind": ("train", "finetune", "batch", "serve", "dev"), "tenant": "text",
    "model": "text", "data": "text", "run": "text",
    "work.tokens": "text", "work.global_batch": "text", "work.seq": "text",
    "devices": "text", "objective": ("balanced", "cost", "time"), "elastic": "check",
    "limits.deadline": "text", "limits.max_cost": "text", "limits.time": "text", "limits.regions": "text",
}  # fmt: skip
EXAMPLE = """kind: train
name: poems
model: {layers: 4, hidden: 96, heads: 6, ffn_hidden: 256, tied_embeddings: true}
data: fortunes:tang300+song100
work: {tokens: 500k, global_batch: 2048, seq: 64}
objective: balanced
elastic: true
limits: {deadline: 30m, max_cost: 0.25 CNY}
checkpoint: {every: 12s}
"""
TEXT_CHARACTERS_MAX = 1 << 20


def read_draft(text: str) -> dict[str, Any]:
    """Raises InvalidInput when it is no YAML mapping."""
    if len(text) > TEXT_CHARACTERS_MAX:
        raise InvalidInput(f"the text has {len(text)} characters; give at most {TEXT_CHARACTERS_MAX}")
    with _told("not yet YAML"):
        found = yaml.safe_load(text)
    if not isinstance(found, dict):
        raise InvalidInput("a task file is a mapping such as `kind: train`")
    return found


def fields_of(text: str) -> dict[str, str]:
    """Dotted path -> text of the field; what is no plain value is shown as inline YAML."""
    top, shown = read_draft(text), {}
    for path in FIELDS:
        value: Any = top
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        with _told(f"{path} cannot be shown"):
            shown[path] = "" if value is None else _inline(value)
    return shown


def with_field(text: str, path: str, value: str) -> str:
    """The text with one field changed; an empty value takes the key out.  Raises InvalidInput."""
    if path not in FIELDS:
        raise InvalidInput(f"no field {path[:40]!r}; the fields are {', '.join(FIELDS)}")
    top = read_draft(text)
    *above, last = path.split(".")
    place = top
    for key in above:
        if not isinstance(place.get(key), dict):
            place[key] = {}
        place = place[key]
    with _told(f"{path} cannot be {value.strip()[:40]!r}"):
        if value.strip():
            place[last] = _value(value.strip(), free=FIELDS[path] == "text")
        else:
            place.pop(last, None)
        for key in above:
            if top.get(key) == {}:
                del top[key]
        return yaml.safe_dump(top, allow_unicode=True, sort_keys=False, default_flow_style=None, width=100)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever the library makes of a text that it cannot read or write becomes InvalidInput."""
    try:
        yield
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InvalidInput(f"{what}: {error}") from None


def _inline(value: Any) -> str:
    if isinstance(value, dict | list):
        return yaml.safe_dump(
            value, allow_unicode=True, default_flow_style=True, sort_keys=False, width=1 << 20
        ).strip()
    return "true" if value is True else "false" if value is False else str(value)


def _value(text: str, *, free: bool) -> Any:
    """Mappings, lists, numbers and true/false as YAML reads them; anything else is plain text."""
    if not free or text[0] in "[{" or (text.isascii() and text.isdigit()):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text

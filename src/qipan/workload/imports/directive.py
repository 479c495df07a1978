"""What became of each directive of a foreign file.  Whatever a translator does not name is ignored, and says so."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from qipan.errors import InvalidInput
from qipan.workload.reader import Value, read_yaml

Fate = Literal["used", "approximated", "ignored"]
DEVICES_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class Directive:
    """`name` is the dotted path or the flag as written; `line` counts from 1."""

    name: str
    value: str
    line: int
    fate: Fate
    why: str


@dataclass(slots=True)
class Source:
    """One document: its values as plain text, mappings and lists, and a fate for every leaf."""

    file: str
    root: dict[str, Any] = field(default_factory=dict)
    #: dotted path -> (text, line), in the order of the file; a list of plain values is one leaf
    leaves: dict[str, tuple[str, int]] = field(default_factory=dict)
    #: dotted path -> (fate, why); the longest path that leads a leaf's wins
    marks: dict[str, tuple[Fate, str]] = field(default_factory=dict)

    def get(self, path: str) -> Any:
        """The value at a dotted path (`a.b[0].c`), None where it is absent or empty."""
        found: Any = self.root
        for step in _steps(path):
            if isinstance(step, int):
                found = found[step] if isinstance(found, list) and step < len(found) else None
            else:
                found = found.get(step) if isinstance(found, dict) else None
        return None if found == "" else found

    def text(self, path: str, default: str = "") -> str:
        found = self.get(path)
        if found is None:
            return default
        if not isinstance(found, str):
            raise self.error(path, "must be plain text")
        return found

    def whole(self, path: str, default: int = 1, least: int = 0) -> int:
        text = self.text(path, str(default))
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= DEVICES_MAX:
            raise self.error(path, f"{text[:40]!r} is not a whole number from {least} to {DEVICES_MAX}")
        return int(text)

    def mapping(self, path: str) -> Mapping[str, Any]:
        found = self.get(path)
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise self.error(path, "must be a mapping")
        return found

    def items(self, path: str) -> list[Any]:
        found = self.get(path)
        if found is None:
            return []
        if not isinstance(found, list):
            raise self.error(path, "must be a list")
        return found

    def words(self, path: str) -> list[str]:
        found = self.items(path)
        if not all(isinstance(word, str) for word in found):
            raise self.error(path, "must be a list of plain texts")
        return found

    def mark(self, fate: Fate, path: str, why: str) -> None:
        self.marks[path] = (fate, why)

    def error(self, path: str, message: str) -> InvalidInput:
        line = next((at for name, (_, at) in self.leaves.items() if _leads(path, name)), 1)
        return InvalidInput(f"{path}: {message}", f"{self.file}:{line}:1")

    def directives(self) -> list[Directive]:
        rows = []
        for path, (text, line) in self.leaves.items():
            leading = max((mark for mark in self.marks if _leads(mark, path)), key=len, default=None)
            fate, why = (
                self.marks[leading] if leading is not None else ("ignored", "Qipan has nothing like it")
            )
            rows.append(Directive(path, text, line, fate, why))
        return rows


def read_documents(text: str, file: str) -> list[Source]:
    """The documents of a YAML file, bounded like a task file.  Raises InvalidInput."""
    sources, line = [], 0
    for part in re.split(r"(?m)^---[ \t]*(?:#.*)?\n", text):
        if any(row.strip() and not row.lstrip().startswith("#") for row in part.splitlines()):
            value = read_yaml("\n" * line + part, file)
            source = Source(file)
            root = _walk(value, "", source)
            if not isinstance(root, dict):
                raise value.error("must be a mapping")
            source.root = root
            sources.append(source)
        line += part.count("\n") + 1
    if not sources:
        raise InvalidInput("is empty; begin with `kind: train`", f"{file}:1:1")
    return sources


def task_name(text: str, fallback: str = "job") -> str:
    """A foreign name in the letters of a task's."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:63].rstrip("._-")
    return name or fallback


def _walk(value: Value, path: str, source: Source) -> Any:
    node = value.node
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        found = {
            key: _walk(item, f"{path}.{key}" if path else key, source)
            for key, item in value.mapping().items()
        }
        if not found and path:
            source.leaves[path] = ("{}", line)
        return found
    if isinstance(node, yaml.SequenceNode):
        items = value.items()
        if all(isinstance(item.node, yaml.ScalarNode) for item in items):
            words = [_scalar(item) for item in items]
            source.leaves[path] = (", ".join(words)[:200], line)
            return words
        return [_walk(item, f"{path}[{i}]", source) for i, item in enumerate(items)]
    text = _scalar(value)
    source.leaves[path] = (text[:200], line)
    return text


def _scalar(value: Value) -> str:
    return "" if value.node.tag == "tag:yaml.org,2002:null" else value.text()


def _steps(path: str) -> list[str | int]:
    """Keys hold dots in Kubernetes (`nvidia.com/gpu`): such a last step is written in quotes, `limits."nvidia.com/gpu"`."""
    return [
        quoted or (int(index) if index else plain)
        for quoted, index, plain in re.findall(r'"([^"]+)"|\[(\d+)\]|([^.\[\]"]+)', path)
    ]


def _leads(path: str, leaf: str) -> bool:
    plain = path.replace('"', "")
    return leaf == plain or leaf.startswith((f"{plain}.", f"{plain}[")) or plain == ""

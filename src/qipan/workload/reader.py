"""YAML with positions: every error names file, line and column, and what was probably meant.

Built on yaml.compose (nodes keep their marks).  Size, depth and aliases are bounded before anything is built.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import yaml

from qipan.errors import InvalidInput

SIZE_MAX = 1 << 20
DEPTH_MAX = 20
#: libyaml reads twelve times as fast: a mebibyte keeps a board busy for 2 s, not 15
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Value:
    """One YAML node and where it stands.  `path` reads like `limits.deadline`."""

    node: yaml.Node
    file: str
    path: str

    @property
    def where(self) -> str:
        mark = self.node.start_mark
        return f"{self.file}:{mark.line + 1}:{mark.column + 1}"

    def error(self, message: str) -> InvalidInput:
        return InvalidInput(f"{self.path}: {message}" if self.path else message, self.where)

    def fields(self, known: Sequence[str]) -> "dict[str, Value]":
        """The entries of a mapping; an unknown or repeated key is an error."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error(f"must be a mapping with {', '.join(known[:6])} ..., found {self._kind()}")
        found: dict[str, Value] = {}
        for key_node, value_node in self.node.value:
            key = Value(key_node, self.file, self.path)
            if not isinstance(key_node, yaml.ScalarNode):
                raise key.error("a key must be plain text")
            name = key_node.value
            if name not in known:
                raise key.error(f"unknown key {name[:60]!r}{did_you_mean(name, known)}")
            if name in found:
                raise key.error(f"key {name!r} stands twice; keep one")
            if value_node.tag == "tag:yaml.org,2002:null":
                raise Value(value_node, self.file, self._below(name)).error(
                    "is empty; give a value or leave the key out"
                )
            found[name] = Value(value_node, self.file, self._below(name))
        return found

    def mapping(self) -> "dict[str, Value]":
        """The entries of a mapping with free keys."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.error(f"must be a mapping, found {self._kind()}")
        found: dict[str, Value] = {}
        for key_node, value_node in self.node.value:
            key = Value(key_node, self.file, self.path)
            name = key.text()
            if name in found:
                raise key.error(f"key {name[:60]!r} stands twice; keep one")
            found[name] = Value(value_node, self.file, self._below(name))
        return found

    def items(self) -> "list[Value]":
        """A sequence's entries; one plain value counts as a sequence of one."""
        if isinstance(self.node, yaml.ScalarNode):
            return [self]
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.error(f"must be a list, found {self._kind()}")
        return [Value(node, self.file, f"{self.path}[{i}]") for i, node in enumerate(self.node.value)]

    def text(self) -> str:
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.error(f"must be plain text, found {self._kind()}")
        value = str(self.node.value)
        if "\x00" in value:
            raise self.error("holds a zero byte; remove it")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise self.error("holds half of a character (a lone surrogate); remove it")
        return value

    def parsed(self, parse: Callable[[str], T]) -> T:
        """`parse` of the text, its error placed here."""
        try:
            return parse(self.text())
        except InvalidInput as error:
            if error.where:
                raise
            raise self.error(str(error)) from None

    def choice(self, allowed: Sequence[str]) -> str:
        text = self.text()
        if text not in allowed:
            raise self.error(f"{text[:60]!r} is not one of {', '.join(allowed)}{did_you_mean(text, allowed)}")
        return text

    def boolean(self) -> bool:
        return self.choice(("true", "false")) == "true"

    def whole(self, least: int, most: int) -> int:
        text = self.text()
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise self.error(f"{text[:40]!r} is not a whole number from {least} to {most}")
        return int(text)

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.node, yaml.MappingNode)

    def _below(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def _kind(self) -> str:
        kinds = {yaml.MappingNode: "a mapping", yaml.SequenceNode: "a list", yaml.ScalarNode: "plain text"}
        return kinds.get(type(self.node), "something else")


def read_yaml(text: str, file: str) -> Value:
    """The whole document.  Raises InvalidInput for what is no YAML, too large, too deep, or uses aliases."""
    if len(text.encode()) > SIZE_MAX:
        raise InvalidInput(f"is {len(text.encode())} bytes; a file may have {SIZE_MAX}", file)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=LOADER):
            if isinstance(event, yaml.AliasEvent):
                raise InvalidInput(
                    "aliases (*name) are not read; write the value out", _position(file, event)
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH_MAX:
                raise InvalidInput(f"is nested deeper than {DEPTH_MAX}", _position(file, event))
        node = yaml.compose(text, Loader=LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InvalidInput(f"is not YAML: {problem}", where) from None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"is not YAML: {error}", file) from None
    if node is None:
        raise InvalidInput("is empty; begin with `kind: train`", f"{file}:1:1")
    return Value(node, file, "")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.55)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _position(file: str, event: yaml.Event) -> str:
    mark = event.start_mark
    return f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file

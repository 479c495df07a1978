"""A state as bytes and back.  Tasks go as rows, each distinct curve once: a million tasks of a thousand classes take some
hundred bytes each."""

from dataclasses import MISSING, fields
from operator import attrgetter
from typing import Any, get_type_hints

import msgspec
from msgspec import defstruct
from msgspec.structs import astuple

from qipan.curves import Curve, CurveSource, Point
from qipan.leases import Order, TaskId
from qipan.scheduler.state import State, TaskState

_ORDER = tuple(field.name for field in fields(Order) if field.name != "curve")
_TASK = tuple(field.name for field in fields(TaskState) if field.name != "order")
_REST = tuple(field.name for field in fields(State) if field.name != "tasks")
_order_row, _task_row = attrgetter(*_ORDER), attrgetter(*_TASK)


def _row(kind: type, names: tuple[str, ...]) -> Any:
    """A row of these fields; one that an earlier release wrote ends sooner, and has the defaults of what it lacks."""
    hints = get_type_hints(kind)
    defaults = {field.name: field.default for field in fields(kind)}
    columns = [
        (name, hints[name]) if defaults[name] is MISSING else (name, hints[name], defaults[name])
        for name in names
    ]
    return defstruct(kind.__name__ + "Row", columns, array_like=True)


#: (number of its curve, work, source, the rest of the order, the rest of the task)
_OrderRow: Any = _row(Order, _ORDER)
_TaskRow: Any = _row(TaskState, _TASK)
_Row = tuple[int, float, CurveSource, _OrderRow, _TaskRow]


class _Saved(msgspec.Struct, array_like=True):
    rest: dict[str, msgspec.Raw]
    curves: list[tuple[Point, ...]]
    tasks: list[_Row]


def encode_state(state: State) -> bytes:
    numbers: dict[int, int] = {}
    curves: list[tuple[Point, ...]] = []
    rows = []
    for task in state.tasks.values():
        order = task.order
        points = order.curve.points
        number = numbers.get(id(points))
        if number is None:
            number = numbers[id(points)] = len(curves)
            curves.append(points)
        rows.append((number, order.curve.work_s, order.curve.source, _order_row(order), _task_row(task)))
    rest = {name: msgspec.Raw(msgspec.msgpack.encode(getattr(state, name))) for name in _REST}
    return msgspec.msgpack.encode(_Saved(rest, curves, rows))


def decode_state(body: bytes) -> State:
    """Also of the first form, a map in which every task had its own curve."""
    hints = get_type_hints(State)
    if not body.startswith(_ARRAY_OF_3):
        old = msgspec.msgpack.decode(body)
        tasks = msgspec.convert(old.pop("tasks"), dict[TaskId, TaskState])
        rest = {name: msgspec.convert(value, hints[name]) for name, value in old.items()}
        return State(tasks=tasks, **rest)  # type: ignore[arg-type]
    saved = msgspec.msgpack.decode(body, type=_Saved)
    rest = {name: msgspec.msgpack.decode(raw, type=hints[name]) for name, raw in saved.rest.items()}
    tasks = {}
    for number, work_s, source, order_row, task_row in saved.tasks:
        curve = Curve(saved.curves[number], work_s, source)
        order = Order(curve=curve, **dict(zip(_ORDER, astuple(order_row), strict=True)))
        tasks[order.task_id] = TaskState(order=order, **dict(zip(_TASK, astuple(task_row), strict=True)))
    return State(tasks=tasks, **rest)  # type: ignore[arg-type]


_ARRAY_OF_3 = b"\x93"

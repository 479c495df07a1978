"""Which of a node's devices a task's process sees: the variables of its vendor's software, from the vendor stacks."""

import functools
from collections.abc import Mapping

from qipan.catalogue import site_catalogue
from qipan.catalogue.stacks import Stack
from qipan.hardware import ChipClassId, Pool


def visible(pool: Pool, devices: str, given: object = ()) -> dict[str, str]:
    """`devices`: numbers such as "0,3".  `given`: variables that the queue set itself; where one of them is the vendor's own
    nothing is added, for a second one would count within the first."""
    numbers = [int(word) for word in devices.split(",") if word.strip().isdigit()]
    stack = _stacks().get(pool.chip_class)
    if stack is None or stack.stack == "cpu" or pool.cpu_share or not numbers:
        return {}
    if isinstance(given, list) and set(given) & {*stack.visible, *stack.environment([])}:
        return {}
    return stack.environment(numbers)


@functools.cache
def _stacks() -> Mapping[ChipClassId, Stack]:
    found = site_catalogue()
    return {
        name: found.stacks[chip.stack] for name, chip in found.chips.items() if chip.stack in found.stacks
    }

"""A vendor's software stack as data: variables, torch device, collectives, container and scheduler names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from qipan.errors import InvalidInput

#: libyaml's where it is there: ten times as fast
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Stack:
    """`visible`: variables with which a process is given devices; the first is set, the others name the same.  `backend` is
    what torch.distributed calls the collective library; key on the stack, never on it: several share one name.
    `image`: the site's container image or environment for this vendor, "" when it stated none."""

    stack: str
    visible: tuple[str, ...] = ()
    container_visible: tuple[str, ...] = ()
    torch_device: str | None = None
    torch_package: str | None = None
    collective: str = ""
    backend: str | None = None
    tuning_prefixes: tuple[str, ...] = ()
    kubernetes: tuple[str, ...] = ()
    runtime_class: str | None = None
    slurm_gres: str | None = None
    ray_resource: str | None = None
    container: str | None = None
    device_nodes: tuple[str, ...] = ()
    image: str = ""
    notes: str = ""
    held_against: Literal["hardware", "recordings", "documents"] = "documents"
    held_against_notes: str = ""
    unconfirmed: tuple[str, ...] = ()

    def environment(self, devices: Sequence[int]) -> dict[str, str]:
        """What a process is given to see these devices and no others.  Intel's two variables are both set: frameworks
        read one or the other."""
        numbers = ",".join(str(device) for device in devices)
        if self.stack == "cpu":
            return {"OMP_NUM_THREADS": str(max(1, len(devices)))}
        if self.stack == "intel_gpu":
            return {"ZE_AFFINITY_MASK": numbers, "ONEAPI_DEVICE_SELECTOR": f"level_zero:{numbers}"}
        return {self.visible[0]: numbers} if self.visible else {}


KEYS = tuple(field.name for field in fields(Stack) if field.name != "stack")


@cache
def shipped_stacks() -> Mapping[str, Stack]:
    """Read once: what ships does not change while a process runs."""
    text = resources.files("qipan.catalogue").joinpath("stacks.yaml").read_text(encoding="utf-8")
    return {
        name: changed(Stack(name), facts, "the shipped stacks")
        for name, facts in yaml.load(text, Loader=LOADER)["stacks"].items()
    }


def overridden(stacks: Mapping[str, Stack], changes: object, file: str) -> dict[str, Stack]:
    """With a site's own values over them; an unknown name is a new stack.  Raises InvalidInput."""
    if not isinstance(changes, dict):
        raise InvalidInput("`stacks:` needs a mapping of stack to its keys", file)
    made = dict(stacks)
    for name, facts in changes.items():
        made[str(name)] = changed(made.get(str(name), Stack(str(name))), facts, file)
    return dict(sorted(made.items()))


def changed(stack: Stack, facts: Any, file: str) -> Stack:
    unknown = sorted(set(facts) - set(KEYS)) if isinstance(facts, dict) else ["its value"]
    if unknown:
        raise InvalidInput(
            f"stack {stack.stack}: unknown {', '.join(unknown)}; a stack has {', '.join(KEYS)}", file
        )
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()
    }
    return replace(stack, **values)

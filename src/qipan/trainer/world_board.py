"""Where an attempt's folder says which ranks train, and under which strategy: orders for a reshape in the same processes.

`world.json` (written by worker 0): where worlds are agreed. `reshape.json` (written by whoever orders): the next generation,
its strategy and members. `worker-N.ready`: a new process has done its imports and waits to be taken in.

Engines write here, trainers read: nothing here needs torch.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qipan.strategy import Strategy


@dataclass(frozen=True, slots=True)
class WorldOrder:
    generation: int
    strategy: Strategy
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WorldBoard:
    folder: Path

    def write(self, order: WorldOrder) -> None:
        part = self.folder / "reshape.part"
        part.write_bytes(msgspec.json.encode(order))
        part.rename(self.folder / "reshape.json")

    def withdraw(self) -> None:
        """No order stands; one that is being carried out is carried out.  The folder is the task's: what that made of it (no folder, a
        folder in the file's place) holds no order, and stops nobody."""
        with contextlib.suppress(OSError):
            (self.folder / "reshape.json").unlink()

    def order(self) -> WorldOrder | None:
        try:
            body = (self.folder / "reshape.json").read_bytes()
        except FileNotFoundError:
            return None
        return msgspec.json.decode(body, type=WorldOrder)

    def waiting(self, generation: int, members: Sequence[int]) -> WorldOrder | None:
        """What is ordered after this generation of these members, and can be done now."""
        order = self.order()
        if order is None or order.generation <= generation or self.refusal(order.generation):
            return None
        new = set(order.members) - set(members)
        return order if all(self.ready(worker).exists() for worker in new) else None

    def ready(self, worker: int) -> Path:
        return self.folder / f"worker-{worker}.ready"

    def refuse(self, order: WorldOrder, why: str) -> None:
        (self.folder / f"refused-{order.generation}").write_text(why)

    def refusal(self, generation: int) -> str:
        path = self.folder / f"refused-{generation}"
        return path.read_text() or "refused" if path.exists() else ""

    def put_address(self) -> None:
        told = {"address": os.environ.get("MASTER_ADDR", ""), "port": int(os.environ.get("MASTER_PORT", "0"))}
        (self.folder / "world.json").write_text(json.dumps(told))

    def address(self) -> tuple[str, int]:
        """Where worker 0 keeps the store of worlds."""
        told = json.loads((self.folder / "world.json").read_text())
        return told["address"], told["port"]

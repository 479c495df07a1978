"""Where an attempt's folder says which ranks train, and under which strategy: orders for a reshape in the same processes.

`world.json` (written by worker 0): where worlds are agreed. `reshape.json` (written by whoever orders): the next generation,
its strategy and members. `worker-N.ready`: a new process has done its imports and waits to be taken in.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qipan.strategy import Strategy
from qipan.trainer.world import World


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

    def order(self, after: int) -> WorldOrder:
        order = msgspec.json.decode((self.folder / "reshape.json").read_bytes(), type=WorldOrder)
        assert order.generation > after, "orders count upward"
        return order

    def waiting(self, world: World) -> int:
        """The generation that is ordered and can be made now; 0 for none."""
        path = self.folder / "reshape.json"
        if not path.exists():
            return 0
        order = msgspec.json.decode(path.read_bytes(), type=WorldOrder)
        new = set(order.members) - set(world.members)
        ready = all((self.folder / f"worker-{worker}.ready").exists() for worker in new)
        refused = (self.folder / f"refused-{order.generation}").exists()
        return order.generation if order.generation > world.generation and ready and not refused else 0

    def refuse(self, order: WorldOrder, why: str) -> None:
        (self.folder / f"refused-{order.generation}").write_text(why)

    def put_address(self) -> None:
        told = {"address": os.environ.get("MASTER_ADDR", ""), "port": int(os.environ.get("MASTER_PORT", "0"))}
        (self.folder / "world.json").write_text(json.dumps(told))

    def join(self, worker: int, vendors: int) -> World:
        """The next world, for a process that is new in it."""
        order = self.order(0)
        told = json.loads((self.folder / "world.json").read_text())
        (self.folder / f"worker-{worker}.ready").touch()
        return World.joining(worker, order.members, order.generation, told["address"], told["port"], vendors)

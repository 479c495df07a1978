"""The ranks of one site that train together now.  The world is made anew when ranks join or leave; processes stay."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from qipan.trainer.device import backend
from qipan.trainer.layout import forget_groups

JOIN = timedelta(seconds=120)  # whoever is not there by then is taken for lost, and the attempt ends


class World:
    """`worker` is a process for life, `rank` its number in the present world.  Worker 0 holds the store where worlds are
    agreed, so it belongs to every world."""

    def __init__(
        self, worker: int, workers: Sequence[int], address: str, port: int, vendors: int = 1
    ) -> None:
        self.worker = worker
        self.members = list(workers)
        self.generation = 0
        self._vendors = vendors
        self._store: Any = None
        if len(self.members) > 1 or port:
            self._store = dist.TCPStore(  # type: ignore[attr-defined]

                address, port, is_master=worker == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
                wait_for_workers=False, timeout=JOIN,
            )  # fmt: skip

    @staticmethod
    def from_environment(vendors: int = 1) -> "World":
        size = int(os.environ.get("WORLD_SIZE", "1"))
        port = int(os.environ.get("MASTER_PORT", "0")) if "RANK" in os.environ else 0
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        return World(int(os.environ.get("RANK", "0")), range(size), address, port, vendors)

    @staticmethod
    def joining(
        worker: int, members: Sequence[int], generation: int, address: str, port: int, vendors: int = 1
    ) -> "World":
        """A process that enters a world which is about to be made."""
        world = World(worker, sorted(members), address, port, vendors)
        world.generation = generation
        return world

    @property
    def rank(self) -> int:
        return self.members.index(self.worker)

    @property
    def size(self) -> int:
        return len(self.members)

    def open(self) -> None:
        if self.size == 1:
            return
        assert self._store is not None, "a world of several ranks has a store"
        dist.init_process_group(
            backend(self._vendors), store=dist.PrefixStore(f"world-{self.generation}", self._store),  # type: ignore[attr-defined]
            rank=self.rank, world_size=self.size,
        )  # fmt: skip

    def change(self, generation: int, members: Sequence[int]) -> bool:
        """Leave this world for the next.  False when this process is not in it."""
        assert 0 in members, "worker 0 keeps the store"
        self.close()
        self.generation, self.members = generation, sorted(members)
        if self.worker not in members:
            return False
        self.open()
        return True

    def close(self) -> None:
        forget_groups()
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still reads from it
            dist.destroy_process_group()

"""Which engine a site file's board stands on: the one place where `engine: slurm` becomes an object."""

import hashlib
from pathlib import Path

from qipan.clock import Clock
from qipan.engines.kubernetes import Kubernetes
from qipan.engines.leaf import LeafEngine
from qipan.engines.local import LocalEngine
from qipan.engines.queue import Queue, QueueLauncher
from qipan.engines.ray import Ray
from qipan.engines.slurm import Slurm
from qipan.errors import InvalidInput
from qipan.hardware import BoardSpec, Pool
from qipan.leases import EngineId
from qipan.quantities import parse_duration_s
from qipan.transfer import Stager

#: between looks at a queue.  What a job says of itself comes by files at once; Ray's dashboard is dear to ask
POLL_S = {"ray": 5.0}


def leaf_engine(
    board: BoardSpec, folder: Path, clock: Clock, checkpoints: Path, stager: Stager | None = None
) -> LeafEngine:
    """`folder` holds what the engine knows; with `engine_options: folder`, a place that the nodes see too, it is a link
    to there.  With a `stager` checkpoints lie in it; without one in `checkpoints`, which all sites see."""
    name = EngineId(f"{board.board}-{board.engine}")
    if board.engine == "local":
        own = folder / "checkpoints" if stager is not None else checkpoints
        return LocalEngine(name, board, folder, clock, own, stager=stager)
    shared = board.engine_options.get("folder")
    if shared:
        mark = hashlib.blake2b(str(folder.absolute()).encode(), digest_size=4).hexdigest()
        own = Path(shared) / f"{board.board}-{mark}"  # two boards may use one shared folder
        own.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.is_symlink():
            folder.symlink_to(own, target_is_directory=True)
    wait_s = parse_duration_s(board.engine_options.get("wait", "20s"))
    return LeafEngine(
        name,
        board,
        folder.resolve(),
        clock,
        folder.resolve() / "checkpoints" if stager is not None else checkpoints,
        QueueLauncher(_queue(board, folder.resolve()), POLL_S.get(board.engine, 2.0)),
        wait_s,
        stager=stager,
    )


def inside(board: BoardSpec, pool: Pool, command: list[str]) -> list[str]:
    """A local command that runs `command` on all devices of a pool of the board's, and waits for it."""
    return _queue(board, Path()).inside(pool, min(pool.devices, pool.devices_per_node), command)


def _queue(board: BoardSpec, folder: Path) -> Queue:
    if board.engine == "slurm":
        return Slurm(board)
    if board.engine == "ray":
        return Ray(board, folder)
    if board.engine == "kubernetes":
        return Kubernetes(board)
    raise InvalidInput(f"board {board.board}: no engine {board.engine!r} runs tasks here")

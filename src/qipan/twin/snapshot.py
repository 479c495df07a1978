"""A moment of a scenario in one file, from which others start: with another policy, or with other faults from then on.

It is as after a power cut of every board at that moment: boards start again from their stores, messages on the way are lost, engines
have gone on.  Two runs from one snapshot with the same file are the same, byte for byte.
"""

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qipan.engines.simulated_lease import SimulatedState
from qipan.errors import InvalidInput, NotFound
from qipan.hardware import BoardId, BoardSpec
from qipan.leases import Order, TaskId
from qipan.quantities import format_duration
from qipan.release import RELEASE
from qipan.store import Store
from qipan.twin.world import World


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`site` and `came`: digests of the boards with what they have, and of the tasks that had come; `finished`: task -> when it was over;
    `stores`: SQLite files."""

    release: str
    seed: int
    at_s: float
    site: str
    came: str
    finished: dict[TaskId, float]
    engines: dict[BoardId, SimulatedState]
    stores: dict[BoardId, bytes]


def save(
    path: Path,
    world: World,
    seed: int,
    at_s: float,
    orders: Sequence[Order],
    finished: Mapping[TaskId, float],
) -> None:
    engines = {board: world.simulated(board).saved() for board in sorted(world.tree.engines)}
    stores = {}
    for board, controller in sorted(world.tree.controllers.items()):
        controller.snapshot(keep=True)  # nothing is decided again, so another policy may take over
        stores[board] = _bytes_of(world.tree.stores[board])
    site, came = _digest(world.tree.spec), _digest(_came(orders, at_s))
    snapshot = Snapshot(RELEASE, seed, at_s, site, came, dict(finished), engines, stores)
    path.write_bytes(msgspec.msgpack.encode(snapshot))


def load(path: Path) -> Snapshot:
    """Raises NotFound, InvalidInput."""
    if not path.is_file():
        raise NotFound(
            f"{path}: no such snapshot; `qipan twin SCENARIO --snapshot-at 6h --out FILE` writes one"
        )
    try:
        snapshot = msgspec.msgpack.decode(path.read_bytes(), type=Snapshot)
    except msgspec.MsgspecError as error:
        raise InvalidInput(
            f"is no snapshot of this release ({RELEASE}): {error}; write it anew", str(path)
        ) from None
    if snapshot.release != RELEASE:
        raise InvalidInput(
            f"was written by release {snapshot.release}, this is {RELEASE}; write it anew", str(path)
        )
    return snapshot


def store_in(snapshot: Snapshot, board: BoardId) -> Store:
    """In memory, as the twin's are."""
    with tempfile.TemporaryDirectory(prefix="qipan-twin-") as folder:
        path = Path(folder) / "board.db"
        path.write_bytes(snapshot.stores[board])
        there = Store(path)
        try:
            return there.copy_to(None)
        finally:
            there.close()


def check_fits(snapshot: Snapshot, root: BoardSpec, orders: Sequence[Order]) -> None:
    """Raises InvalidInput when the scenario is not one that could have come to the snapshot."""
    boards = sorted(board.board for board in root.walk())
    if boards != sorted(snapshot.stores):
        here, there = ", ".join(boards), ", ".join(sorted(snapshot.stores))
        raise InvalidInput(
            f"the scenario has the boards {here}, the snapshot {there}; start it from the same `site`"
        )
    if _digest(root) != snapshot.site:
        raise InvalidInput(
            "its boards have other devices, tariffs or storages than those of the snapshot, which go on; start it from the same `site`"
        )
    if _digest(_came(orders, snapshot.at_s)) != snapshot.came:
        raise InvalidInput(
            f"other tasks would have come by {format_duration(snapshot.at_s)} than did in the snapshot; keep `hours`, `tasks`,"
            " `speeds`, `mean_work`, `tide` and `trace` of the scenario as they were"
        )


def _came(orders: Sequence[Order], at_s: float) -> list[Order]:
    return [order for order in orders if order.submitted_s <= at_s]


def _digest(value: BoardSpec | list[Order]) -> str:
    return hashlib.blake2b(msgspec.msgpack.encode(value), digest_size=16).hexdigest()


def _bytes_of(store: Store) -> bytes:
    with tempfile.TemporaryDirectory(prefix="qipan-twin-") as folder:
        path = Path(folder) / "board.db"
        store.copy_to(path).close()
        return path.read_bytes()

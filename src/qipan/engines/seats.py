"""Which devices of a leaf are free, which of them a gang gets, what is offered of them and what must be given back, and whether the
storage has room for one more lease."""

from collections.abc import Callable, Mapping

from qipan.clock import Clock
from qipan.curves import Need
from qipan.engines.held import Held, Places
from qipan.engines.journal import Journal
from qipan.engines.launcher import Launcher
from qipan.engines.pace import AVOIDED_S
from qipan.engines.topology import free_blocks, holders, nearest, tiers_of
from qipan.hardware import BoardSpec, ChipClassId, Pool
from qipan.leases import Block, Holders, Offer, Order, Out, TaskId, room_of
from qipan.quantities import format_bytes

Sick = Mapping[ChipClassId, Mapping[int, str]]  # chip class -> device -> why it is to be drained


class Seats:
    """`sick`: what runs there is parked, and nothing more is put there."""

    def __init__(
        self,
        board: BoardSpec,
        launcher: Launcher,
        clock: Clock,
        journal: Journal,
        places: Places,
        sick: Callable[[], Sick],
    ) -> None:
        self._board = board
        self._launcher = launcher
        self._clock = clock
        self._journal = journal
        self._places = places
        self._sick = sick
        self._pools = {pool.chip_class: pool for pool in board.pools}
        #: (class, device) -> until when it is taken last (lease clock)
        self._slow: dict[tuple[ChipClassId, int], float] = {}

    def free(self, chip_class: ChipClassId) -> list[int]:
        if chip_class not in self._pools:
            return []
        leases = [held for held in self._journal.held.values() if held.chip_class == chip_class]
        used = {device for held in leases for device in held.devices}
        leaving = {
            device for held in leases if self.leaves(held) for device in held.devices
        }  # their nodes are no longer counted among the usable
        usable = min(self._pools[chip_class].devices, self._usable().get(chip_class, 0) + len(leaving))
        sick = set(self._sick().get(chip_class, {}))
        usable -= len(sick - used)  # of those in use the tasks are called in
        free = [device for device in range(self._pools[chip_class].devices) if device not in used | sick]
        return free[: max(0, usable - len(used))]

    def near(
        self, chip_class: ChipClassId, count: int, free: list[int], beside: tuple[int, ...] = ()
    ) -> tuple[int, ...]:
        """Devices near each other; those that were slow only where the others are too few."""
        tiers, now_s = tiers_of(self._pools[chip_class]), self._clock.lease_s()
        slow = {
            device for (chip, device), until_s in self._slow.items() if chip == chip_class and until_s > now_s
        }
        good = [device for device in free if device not in slow]
        if len(good) >= count:
            return nearest(good, count, tiers, beside)
        return (
            *good,
            *nearest([device for device in free if device in slow], count - len(good), tiers, beside),
        )

    def avoid(self, chip_class: ChipClassId, device: int, now_s: float) -> bool:
        """It was slow, and is taken last from now on (lease clock).  Returns whether that is news."""
        known_until_s = self._slow.get((chip_class, device), 0.0)
        self._slow[chip_class, device] = now_s + AVOIDED_S
        return known_until_s < now_s

    # ---- what is offered, what must go -----------------------------------------------------------------------------

    def offers(self) -> tuple[Offer, ...]:
        """What can be had now, by leases that are held too."""
        usable, sick = self._usable(), self._sick()
        return tuple(
            Offer(
                pool.chip_class, here, (), here, pool.tariff_micro_cny_per_device_hour, self._board.board,
                self._board.region, *self._blocks(pool, here),
            )
            for pool in self._board.pools
            for here in [min(pool.devices - len(sick.get(pool.chip_class, {})), usable.get(pool.chip_class, 0))]
        )  # fmt: skip

    def known(self) -> bool:
        """Whether what is below has told its devices since the engine began."""
        return self._launcher.devices() is not None

    def _usable(self) -> Mapping[ChipClassId, int]:
        """As what is below tells, until it does as was offered last."""
        usable, before = self._launcher.devices(), self._journal.offered
        if usable is None:
            return {offer.chip_class: offer.devices for offer in before.offers} if before is not None else {}
        return usable

    def out(self) -> tuple[Out, ...]:
        """What there is and is not offered: nodes that are to go, devices that are to be repaired."""
        sick = [
            Out(chip_class, 1, f"device {device} is drained: {why}")
            for chip_class, devices in sorted(self._sick().items())
            for device, why in sorted(devices.items())
        ]
        return (*self._launcher.out(), *sick)

    def leaves(self, held: Held) -> str:
        """Why the node of its devices is to go; empty: it stays, or holds none."""
        return "" if held.staging else self._launcher.draining(self._places.hold(held))

    def to_go(self) -> list[tuple[TaskId, str]]:
        """Leases on devices that are drained or whose node is to go, and why."""
        found, sick = [], self._sick()
        for task_id, held in sorted(self._journal.held.items()):
            bad = sick.get(held.chip_class, {})
            why = "; ".join(
                f"device {device} is drained: {bad[device]}"
                for device in sorted(bad)
                if device in held.devices
            )
            why = why or self.leaves(held)
            if why and not held.stop_outcome:
                found.append((task_id, why))
        return found

    def too_many(self, offer: Offer) -> list[TaskId]:
        """Of the leases on more devices than are offered the newest, which must go."""
        stay = [(task_id, held) for task_id, held in self._journal.held.items() if not self.leaves(held)]
        newest_first = sorted(stay, key=lambda item: (-item[1].asked_s, item[0]))
        over = sum(_counts(held, offer.chip_class) for _, held in newest_first) - offer.devices
        found = []
        for task_id, held in newest_first:
            if over <= 0:
                break
            over -= _counts(held, offer.chip_class)
            if held.chip_class == offer.chip_class and not held.stop_outcome:
                found.append(task_id)
        return found

    def _blocks(self, pool: Pool, devices: int) -> tuple[tuple[Block, ...], tuple[Holders, ...]]:
        tiers = tiers_of(pool)
        if self._launcher.picks or all(size >= devices for size in tiers):
            return (), ()
        free = self.free(pool.chip_class)
        seats = {
            task_id: held.devices
            for task_id, held in self._journal.held.items()
            if held.chip_class == pool.chip_class and held.devices
        }
        return free_blocks(free, tiers, devices), holders(free, seats, tiers, devices)

    # ---- storage ---------------------------------------------------------------------------------------------------

    def full(self, order: Order, needs: tuple[Need, ...]) -> str:
        """Why the storage has no room for a lease's checkpoints: a lease holds their space and rate as it holds devices, from its
        being asked for to its end.  Empty: there is room, or none is counted."""
        room = room_of(self._board.stores)
        more_bytes, more_rate = _storage_of(order, needs)
        if room is None or not (more_bytes or more_rate):
            return ""
        taken = {task_id: _storage_of(held.order, held.needs) for task_id, held in self._journal.held.items()}
        space = sum(one for one, _ in taken.values()), room.space_bytes, more_bytes, ""
        rate = sum(one for _, one in taken.values()), room.write_bytes_per_s, more_rate, "/s"
        for used, whole, more, unit in (space, rate):
            fits = room.writes(used + more) if unit else used + more <= whole
            if whole and more and not fits:
                return (
                    f"{room.storage_id} has {format_bytes(int(max(0, whole - used)))}{unit} of {format_bytes(int(whole))}{unit} left,"
                    f" its checkpoints need {format_bytes(int(more))}{unit}; leases of {', '.join(sorted(taken)) or 'nobody'} hold the rest"
                )
        return ""


def _counts(held: Held, chip_class: ChipClassId) -> int:
    return held.needs[0].devices if held.chip_class == chip_class and not held.staging else 0


def _storage_of(order: Order, needs: tuple[Need, ...]) -> tuple[float, float]:
    """Bytes and bytes/s of the storage that a lease for these needs holds."""
    points = [point for point in order.curve.points if point.needs == needs]
    return (
        min((float(point.storage_bytes) for point in points), default=0.0),
        min((point.storage_bytes_per_s for point in points), default=0.0) / order.checkpoint_longer,
    )

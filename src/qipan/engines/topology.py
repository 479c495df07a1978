"""Which of the free devices a gang gets: those that are nearest to each other.

Devices are numbered so that `size` neighbours make a block: a node, then what hangs on one fast switch (`per_block`).  A gang gets
the smallest kind of block that has room for it whole, there the fullest one, so that whole blocks stay free for larger gangs; one
that fits no block takes as few blocks as can be.
"""

from collections.abc import Mapping, Sequence

from qipan.hardware import Pool
from qipan.leases import Block, Holders, TaskId

#: blocks of one size of which an offer tells who holds them
CLEAREST = 8


def tiers_of(pool: Pool) -> tuple[int, ...]:
    """Devices of a node, then of a block."""
    return tuple(size for size in (pool.devices_per_node, pool.devices_per_block) if size > 0)


def free_blocks(free: Sequence[int], tiers: Sequence[int], devices: int) -> tuple[Block, ...]:
    """What an offer of `devices` in all says of them; of tiers that hold all of them there is nothing to say."""
    return tuple(
        Block(size, max((len(block) for block in _blocks(free, size)), default=0))
        for size in tiers
        if size < devices
    )


def holders(
    free: Sequence[int], seats: Mapping[TaskId, Sequence[int]], tiers: Sequence[int], devices: int
) -> tuple[Holders, ...]:
    """Of each kind of block that some task holds a part of, the CLEAREST with the most free devices.  `seats`: task -> its devices."""
    found: list[Holders] = []
    for size in tiers:
        if size >= devices:
            continue
        empty = {block[0] // size: len(block) for block in _blocks(free, size)}
        held: dict[int, dict[TaskId, int]] = {}
        for task_id, own in seats.items():
            for block in _blocks(own, size):
                held.setdefault(block[0] // size, {})[task_id] = len(block)
        clearest = sorted(held, key=lambda number: (-empty.get(number, 0), number))[:CLEAREST]
        found += [
            Holders(size, empty.get(number, 0), tuple(sorted(held[number].items()))) for number in clearest
        ]
    return tuple(found)


def nearest(
    free: Sequence[int], count: int, tiers: Sequence[int], beside: Sequence[int] = ()
) -> tuple[int, ...]:
    """`count` of the `free` devices, at least so many of which there are; of a gang that grows, near those it has (`beside`)."""
    for at in range(len(tiers)):
        own = {device // tiers[at] for device in beside}
        blocks = [block for block in _blocks(free, tiers[at]) if len(block) >= count]
        if beside:
            blocks = [block for block in blocks if block[0] // tiers[at] in own]
        if blocks:
            return _fewest(min(blocks, key=lambda block: (len(block), block)), count, tiers[:at])
    if beside and tiers:
        own = {device // tiers[-1] for device in beside}
        here = [device for device in free if device // tiers[-1] in own][:count]
        there = [device for device in free if device not in here]
        return (*here, *nearest(there, count - len(here), tiers))
    return _fewest(free, count, tiers)


def seated(
    holds: Mapping[TaskId, int], before: Mapping[TaskId, tuple[int, ...]], devices: int, tiers: Sequence[int]
) -> tuple[dict[TaskId, tuple[int, ...]], list[int]]:
    """Which of `devices` each task that holds some has: those it had `before`, the first of them where it shrank, and what is nearest
    to them where it grew.  Then which are free."""
    seats = {task_id: seat[: holds[task_id]] for task_id, seat in before.items() if task_id in holds}
    free = sorted({*range(devices)} - {device for seat in seats.values() for device in seat})
    for task_id, count in holds.items():
        have = seats.get(task_id, ())
        if len(have) < count:
            seats[task_id] = (*have, *nearest(free, count - len(have), tiers, have))
            free = [device for device in free if device not in seats[task_id]]
    return seats, free


def straddles(seat: Sequence[int], tiers: Sequence[int]) -> int:
    """Over how many kinds of blocks it lies though one of them could hold it."""
    return sum(len(seat) <= size and len({device // size for device in seat}) > 1 for size in tiers)


def _fewest(free: Sequence[int], count: int, tiers: Sequence[int]) -> tuple[int, ...]:
    """From the emptiest blocks, and the rest from where it fits."""
    if not tiers or count <= 0:
        return tuple(free[:count])
    block = max(_blocks(free, tiers[-1]), key=lambda block: (len(block), [-device for device in block]))
    if len(block) > count:
        return nearest(free, count, tiers)
    rest = [device for device in free if device not in block]
    return (*block, *_fewest(rest, count - len(block), tiers))


def _blocks(free: Sequence[int], size: int) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for device in free:
        found.setdefault(device // size, []).append(device)
    return list(found.values())

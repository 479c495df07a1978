"""Which of the free devices a gang gets: those that are nearest to each other.

Devices are numbered so that `size` neighbours make a block: a node, then what hangs on one fast switch (`per_block`).  A gang gets
the smallest kind of block that has room for it whole, there the fullest one, so that whole blocks stay free for larger gangs; one
that fits no block takes as few blocks as can be.
"""

from collections.abc import Sequence

from qipan.hardware import Pool


def tiers_of(pool: Pool) -> tuple[int, ...]:
    """Devices of a node, then of a block."""
    return tuple(size for size in (pool.devices_per_node, pool.devices_per_block) if size > 0)


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

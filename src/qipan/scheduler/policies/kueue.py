"""Our model of Kueue's admission (kubernetes-sigs/kueue, documentation of ClusterQueue, release 0.10).

A workload has one fixed shape.  Each tenant is a cluster queue with an equal nominal quota in one cohort.  In a cycle the
heads are ordered by whether they fit their own quota, then by age; a head takes the first flavour (pool, cheapest first) where it
fits; what others leave may be borrowed; a tenant within its quota takes borrowed devices back from the newest borrower.
BestEffortFIFO: a head that does not fit does not hold up its queue.  Running workloads are never resized.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qipan.scheduler.policies.contender import Choice, Contender, Option


@dataclass(frozen=True, slots=True)
class Kueue:
    """`flavours`: pools in the order they are tried."""

    flavours: tuple[str, ...] = ()

    def choose(self, contenders: Sequence[Contender], capacity: Mapping[str, int], now_s: float) -> Choice:
        flavours = self.flavours or tuple(sorted(capacity))
        tenants = sorted({one.tenant for one in contenders})
        quota = {pool: devices / max(1, len(tenants)) for pool, devices in capacity.items()}
        free, chosen = dict(capacity), {}
        used: dict[tuple[str, str], int] = {}

        def move(one: Contender, option: Option, sign: int) -> None:
            for pool, devices in option.needs:
                free[pool] -= sign * devices
                used[one.tenant, pool] = used.get((one.tenant, pool), 0) + sign * devices
            if sign > 0:
                chosen[one.task_id] = option.point_id
            else:
                del chosen[one.task_id]

        def within(one: Contender, option: Option) -> bool:
            return all(
                used.get((one.tenant, pool), 0) + devices <= quota[pool] for pool, devices in option.needs
            )

        running = {one.task_id: one for one in contenders if one.current is not None}
        for one in running.values():
            assert one.current is not None
            move(one, one.option(one.current), 1)
        waiting = [(one, shape_of(one, flavours)) for one in contenders if one.current is None]
        waiting.sort(
            key=lambda item: (
                not any(within(item[0], own) for own in item[1]),
                item[0].submitted_s,
                item[0].task_id,
            )
        )
        for one, shapes in waiting:
            for option in shapes:
                ((pool, devices),) = option.needs
                if devices > free[pool] and within(one, option):
                    borrowers = [
                        other
                        for other in running.values()
                        if other.task_id in chosen
                        and not other.pinned
                        and other.option(chosen[other.task_id]).needs[0][0] == pool
                        and used[other.tenant, pool] > quota[pool]
                    ]
                    for other in sorted(borrowers, key=lambda other: (-other.submitted_s, other.task_id)):
                        if devices > free[pool] and used[other.tenant, pool] > quota[pool]:
                            move(other, other.option(chosen[other.task_id]), -1)
                if devices <= free[pool]:
                    move(one, option, 1)
                    break
        return chosen


def shape_of(one: Contender, flavours: Sequence[str]) -> list[Option]:
    """Its fixed shape on each flavour: the most devices that any option names, or the next fewer there is."""
    shapes = []
    for pool in flavours:
        own = [option for option in one.options if option.rate > 0 and option.needs[0][0] == pool]
        if own:
            shapes.append(max(own, key=lambda option: (option.devices, option.point_id)))
    return shapes

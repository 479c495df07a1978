"""What a store's submissions would have become under another policy."""

import pytest

from qipan.console.app import POLICIES as offered
from qipan.console.words import WORDS
from qipan.errors import InvalidInput, NotFound
from qipan.events import CancelRequested
from qipan.leases import TaskId
from qipan.scheduler import Settings
from qipan.store import Store
from qipan.twin import build_world
from qipan.twin.whatif import POLICIES, causes_of, what_if
from qipan.twin.world import Happening, arrivals
from worlds import leaf, order


def played() -> tuple[Store, object]:
    """Six tasks on four devices: a long one that may shrink, then dearer ones; one is cancelled."""
    spec = leaf("dc", 4)
    world = build_world(spec, seed=1, settings=Settings())
    orders = [
        order("long", work_s=400.0, counts=(1, 2, 4), bid=2_000_000),
        *(order(f"dear-{n}", work_s=50.0, counts=(2,), bid=9_000_000, submitted_s=20.0 + 60 * n, deadline_s=110.0 + 60 * n) for n in range(4)),
        order("gone", work_s=1e5, counts=(1,), bid=1, submitted_s=30.0),
    ]  # fmt: skip
    world.happenings = arrivals(orders)
    world.happenings.append(
        Happening(40.0, "cancel", lambda world: world.tree.root.accept(CancelRequested(TaskId("gone"), "me")))
    )
    for one in orders:
        world.tree.root.store.save_submission(one.task_id, None, one.submitted_s, b"{}", b"{}")
    world.run(until_s=1e6)
    assert world.all_over()
    return world.tree.root.store, spec


def test_without_shrinking_the_dearer_tasks_are_late():
    store, spec = played()
    told = what_if(store, spec, Settings(), "rigid")
    assert told.as_it_was.tasks == told.other.tasks == 6
    assert told.as_it_was.done == told.other.done == 5
    assert told.as_it_was.late < told.other.late <= told.other.with_deadline == 4
    assert {task.task_id for task in told.tasks} == {"long", "dear-0", "dear-1", "dear-2", "dear-3", "gone"}
    same = what_if(store, spec, Settings(), "as-it-was")
    assert (same.as_it_was.mean_s, same.as_it_was.cost_micro_cny) == (
        same.other.mean_s,
        same.other.cost_micro_cny,
    )


def test_the_causes_are_what_came_from_outside_in_order():
    store, _ = played()
    causes = causes_of(store)
    assert [type(fact).__name__ for _, fact in causes].count("CancelRequested") == 1
    assert [at_s for at_s, _ in causes] == sorted(at_s for at_s, _ in causes)


def test_what_cannot_be_asked():
    store, spec = played()
    with pytest.raises(InvalidInput, match="as-it-was"):
        what_if(store, spec, Settings(), "magic")
    with pytest.raises(NotFound, match="nothing was submitted"):
        what_if(Store(None), spec, Settings(), "rigid")


def test_every_policy_can_be_tried_and_the_console_offers_each():
    store, spec = played()
    for policy in POLICIES:
        told = what_if(store, spec, Settings(), policy)
        assert told.other.tasks == 6
        assert told.other.done >= 1, policy
    assert set(offered) == set(POLICIES) - {"as-it-was"}
    assert {f"p.{policy}" for policy in POLICIES} <= set(WORDS)

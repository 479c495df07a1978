from qipan.clock import named_random
from qipan.leases import TaskId
from qipan.twin import arrivals, build_world, check_end, check_world
from worlds import nation, order, random_orders


def test_a_task_submitted_at_the_top_runs_at_a_leaf_and_ends():
    world = build_world(nation(), seed=1)
    world.after_step.append(check_world)
    world.happenings = arrivals([order("a")])
    world.run(until_s=1000)
    assert world.tree.root.state.over == {TaskId("a"): "done"}


def test_forty_tasks_on_three_levels_end():
    world = build_world(nation(), seed=2)
    world.after_step.append(check_world)
    orders = random_orders(named_random(2, "orders"), 40, 300.0)
    world.happenings = arrivals(orders)
    world.run(until_s=20000)
    check_end(world, {o.task_id for o in orders})
    assert set(world.tree.root.state.over.values()) == {"done"}, world.tree.root.state.tasks

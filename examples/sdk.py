"""Plan a task, submit it, follow it, and read why and what it cost.  Needs `qipan up`; the store is the one named by
QIPAN_STORE, else the user's own.

    python examples/sdk.py examples/tiny.yaml
"""

import sys

import qipan
from qipan.quantities import format_duration, format_money


def main(path: str) -> int:
    task = qipan.Task.from_yaml(path)
    client = qipan.Client()
    best = client.plan(task).options[0]
    print(
        f"planned: {best.devices} x {best.chip_class} at {best.place}, {format_duration(best.finish_p50_s)}"
    )
    job = client.submit(task)
    for piece in job.logs(follow=True):
        print(piece, end="")
    view = job.wait()
    for decision in job.why()["decisions"]:
        print(f"{decision['board']}: {decision['verdict']}: {decision['text']}")
    print(f"{job.task_id} is {view['state']} and cost {format_money(job.cost()['spent_micro_cny'])}")
    return 0 if view["state"] == "done" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

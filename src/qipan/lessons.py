"""What the tasks that ended at a board taught its planner: how fast steps and stages really were."""

from qipan.boards import Boards
from qipan.events import TaskProgress
from qipan.planner.experience import Place, beliefs, seen_in
from qipan.planner.learn import Belief, Seen
from qipan.planner.stages import rate_in
from qipan.stored import progress_of, submitted_plan, submitted_task
from qipan.workload import Task

#: so many of the newest ends of tasks correct the planner, looked for among so many facts
LESSONS, LESSON_FACTS = 200, 200_000


class Lessons:
    def __init__(self, boards: Boards) -> None:
        self._boards = boards
        self.rates: dict[
            tuple[str, str, str], float
        ] = {}  # (task, stage, chip class) -> samples/s of a device
        self._lessons: dict[str, list[tuple[Place, Seen]]] = {}  # of each task that ended
        self._beliefs: dict[Place, Belief] = {}
        self._learned_to = 0

    def learned(self) -> dict[Place, Belief]:
        """What tasks that ended taught, by site and chip class; the newest LESSONS of them."""
        with self._boards.lock:
            newest = self._boards.store.fact_count()
            after = max(self._learned_to, newest - LESSON_FACTS)
            ended = self._boards.store.newest_of_kind("task_exited", after, LESSONS) if newest > after else []
            for _, task_id in reversed(ended):
                if self._boards.store.submission(task_id) is not None:
                    facts = [fact for _, fact in progress_of(self._boards.store, task_id)]
                    self._lessons.pop(task_id, None)
                    self._lessons[task_id] = seen_in(submitted_plan(self._boards.store, task_id), facts)
                    self._learn_rates(submitted_task(self._boards.store, task_id), facts)
            for task_id in list(self._lessons)[:-LESSONS]:
                del self._lessons[task_id]
            if ended:
                self._beliefs = beliefs(one for lessons in self._lessons.values() for one in lessons)
            self._learned_to = newest  # last, so that what was cut off is read again
            return self._beliefs

    def _learn_rates(self, task: Task, facts: list[TaskProgress]) -> None:
        if task.stage is not None:
            whole = task.stage.of.rpartition("-")[0]
            for chip, rate in rate_in(facts).items():
                self.rates[whole, task.name, chip] = rate

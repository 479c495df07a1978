"""The coordinator of tasks over several sites, at the board where they were submitted: none until the first one is."""

import hmac
import secrets

from qipan.boards import Boards
from qipan.files import secret_in, write_whole
from qipan.round_server import RoundServer
from qipan.rounds import Rules
from qipan.stored import submitted_task
from qipan.workload import Task


class Coordinator:
    def __init__(self, boards: Boards) -> None:
        self._boards = boards
        self._server: RoundServer | None = None
        if (boards.folder / "rounds.port").exists():
            self.server()

    def server(self) -> RoundServer:
        """It keeps its port, for the tasks that run on know it."""
        if self._server is None:
            path = self._boards.folder / "rounds.port"
            port = int(path.read_text() or 0) if path.exists() else 0
            self._server = RoundServer(
                self._boards.site.address, self._boards.folder / "rounds", port=port, key=self.key
            )
            write_whole(path, self._server.address.rpartition(":")[2].encode())
            for task_id, _ in self._boards.store.submissions():
                self.open(task_id, submitted_task(self._boards.store, task_id))
        return self._server

    def sweep(self) -> None:
        """Forget the rounds of tasks of which no part is live."""
        if self._server is None or not (known := self._server.tasks()):
            return
        prefixes = tuple(f"{task_id}." for task_id in known)
        live = [name for name in self._boards.tree.root.state.tasks if name.startswith(prefixes)]
        for task_id in known:
            if not any(name.startswith(f"{task_id}.") for name in live):
                self._server.forget(task_id)

    def key(self, task_id: str) -> str:
        """What the sites of one task, and nobody else, can show its coordinator and each other."""
        secret = secret_in(self._boards.folder / "rounds.key", lambda: secrets.token_hex(32).encode())
        return hmac.new(secret, task_id.encode(), "sha256").hexdigest()

    def open(self, task_id: str, task: Task) -> None:
        if task.sites is not None and self._server is not None:
            sites = task.sites
            names = tuple(part.at for part in sites.parts)
            rules = Rules(
                sites.every, sites.grace_s, sites.min_sites, names, ramp=sites.ramp,
                batch_tokens=task.work.global_batch_tokens,
            )  # fmt: skip
            self._server.open(task_id, rules)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

"""What people submitted, at the board where they did."""

from collections.abc import Sequence

from qipan.store.database import Database


class Submissions:
    db: Database

    def save_submission(
        self, task_id: str, key: str | None, submitted_s: float, task: bytes, plan: bytes
    ) -> None:
        self.save_submissions([(task_id, key, submitted_s, task, plan)])

    def save_submissions(self, rows: Sequence[tuple[str, str | None, float, bytes, bytes]]) -> None:
        """(task, idempotency key, submitted_s, task JSON, plan JSON) of each, all or none."""
        with self.db.transaction():
            self.db.run_many("INSERT INTO submissions VALUES (?,?,?,?,?)", rows)

    def submission(self, task_id: str) -> tuple[float, bytes, bytes] | None:
        """(submitted_s, task JSON, plan JSON)."""
        row = self.db.row("SELECT submitted_s, task, plan FROM submissions WHERE task_id = ?", (task_id,))
        return (row[0], row[1], row[2]) if row else None

    def submitted_with(self, key: str) -> str | None:
        row = self.db.row("SELECT task_id FROM submissions WHERE idempotency_key = ?", (key,))
        return row[0] if row else None

    def submissions(self) -> list[tuple[str, float]]:
        rows = self.db.rows("SELECT task_id, submitted_s FROM submissions ORDER BY submitted_s, task_id")
        return [(task_id, submitted_s) for task_id, submitted_s in rows]

    def submitted_as(self, name: str) -> list[str]:
        """The ids `NAME-...` that are taken."""
        rows = self.db.rows(
            "SELECT task_id FROM submissions WHERE task_id >= ? AND task_id < ?", (f"{name}-", f"{name}.")
        )  # "." follows "-"
        return [task_id for (task_id,) in rows]

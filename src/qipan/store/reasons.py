"""Why things were decided, as `qipan why` and the console show it."""

from collections.abc import Sequence

from qipan.leases import Reason
from qipan.store.database import Database


class Reasons:
    db: Database

    def _number_reasons(self) -> None:
        row = self.db.row("SELECT max(reason_id) FROM reasons")
        self._last_reason = int((row and row[0]) or 0)

    def _add_reasons(self, reasons: Sequence[Reason], tick: int, now_s: float) -> None:
        rows = [
            (number, tick, now_s, reason.task_id, reason.verdict, reason.text, repr(reason.values))
            for number, reason in enumerate(reasons, self._last_reason + 1)
        ]
        if rows:
            self.db.run_many("INSERT INTO reasons VALUES (?,?,?,?,?,?,?)", rows)

    def reasons_of(self, task_id: str) -> list[tuple[float, str, str]]:
        """(now_s, verdict, text), oldest first."""
        rows = self.db.rows(
            "SELECT now_s, verdict, text FROM reasons WHERE task_id = ? ORDER BY reason_id", (task_id,)
        )
        return [(now_s, verdict, text) for now_s, verdict, text in rows]

    def reasons_before(self, now_s: float, row: int, most: int) -> list[tuple[int, float, str, str, str]]:
        """(row, now_s, task, verdict, text), newest first: those earlier than `now_s`, or then with a smaller row."""
        rows = self.db.rows(
            "SELECT reason_id, now_s, task_id, verdict, text FROM reasons"
            " WHERE now_s < ? OR (now_s = ? AND reason_id < ?) ORDER BY reason_id DESC LIMIT ?",
            (now_s, now_s, row, most),
        )
        return [(number, at_s, task_id, verdict, text) for number, at_s, task_id, verdict, text in rows]

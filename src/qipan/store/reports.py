"""Reports to the parent board, kept until it has them.  A number is never given twice."""

from collections.abc import Sequence

from qipan.store.database import Database


class Reports:
    db: Database

    def _number_reports(self) -> None:
        row = self.db.row("SELECT value FROM board WHERE key = ?", ("last_report",))
        self._last_report = int(row[0]) if row else 0

    def _add_reports(self, reports: Sequence[bytes]) -> list[int]:
        numbers = list(range(self._last_report + 1, self._last_report + 1 + len(reports)))
        if numbers:
            self.db.run_many("INSERT INTO reports VALUES (?,?)", list(zip(numbers, reports, strict=True)))
            self._note_last(numbers[-1])
        return numbers

    def reports_after(self, seq: int, most: int = 1000) -> list[tuple[int, bytes]]:
        rows = self.db.rows("SELECT seq, body FROM reports WHERE seq > ? ORDER BY seq LIMIT ?", (seq, most))
        return [(number, body) for number, body in rows]

    def number_reports_after(self, seq: int) -> None:
        """The next report is numbered above `seq` (the parent took so many from an earlier life of this store)."""
        if seq > self._last_report:
            self._note_last(seq)
            self._last_report = seq

    def forget_reports(self, up_to: int) -> None:
        """The parent has them."""
        if up_to > self._forgotten_report:
            self.db.run("DELETE FROM reports WHERE seq <= ?", (up_to,))
            self._forgotten_report = up_to

    _forgotten_report = 0

    def _note_last(self, seq: int) -> None:
        self.db.run(
            "INSERT INTO board VALUES (?,?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            ("last_report", str(seq)),
        )

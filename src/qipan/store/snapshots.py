"""A board's state at a tick.  The newest serves the next start; a kept one is where replay may begin."""

from dataclasses import dataclass

from qipan.store.database import Database

#: of tasks long over these stay: bills and time lines are made of them
LASTING_KINDS = ("task_submitted", "task_started", "task_exited")


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    tick: int
    now_s: float
    kept: bool
    body: bytes


class Snapshots:
    db: Database

    def save_snapshot(self, tick: int, body: bytes, now_s: float = 0.0, *, keep: bool = False) -> None:
        """Takes the place of those before that are not kept."""
        with self.db.transaction():
            self.db.run(
                "INSERT INTO snapshots VALUES (?,?,?,?) ON CONFLICT (tick) DO UPDATE SET body = excluded.body",
                (tick, now_s, keep, body),
            )
            if keep:
                self.db.run("UPDATE snapshots SET kept = ? WHERE tick = ?", (True, tick))
            self.db.run("DELETE FROM snapshots WHERE tick < ? AND NOT kept", (tick,))

    def snapshot(self) -> tuple[int, bytes] | None:
        """The newest: (tick, body)."""
        row = self.db.row("SELECT tick, body FROM snapshots ORDER BY tick DESC LIMIT 1")
        return (row[0], row[1]) if row else None

    def snapshots(self) -> list[StoredSnapshot]:
        """Kept ones and the newest, oldest first."""
        rows = self.db.rows("SELECT tick, now_s, kept, body FROM snapshots ORDER BY tick")
        return [StoredSnapshot(tick, now_s, bool(kept), body) for tick, now_s, kept, body in rows]

    def forget_before(self, now_s: float) -> int:
        """Ticks, their reasons, and most facts from before the newest kept snapshot that is older than `now_s`.  What
        stays: submissions, the ledger, each source's newest fact, what bills are made of.  Returns the ticks that went."""
        row = self.db.row("SELECT max(tick) FROM snapshots WHERE kept AND now_s <= ?", (now_s,))
        if row is None or row[0] is None:
            return 0
        tick = row[0]
        marks = ",".join("?" * len(LASTING_KINDS))
        with self.db.transaction():
            self.db.run(
                f"DELETE FROM facts WHERE tick <= ? AND kind NOT IN ({marks})"
                " AND fact_id NOT IN (SELECT max(fact_id) FROM facts GROUP BY source)",
                (tick, *LASTING_KINDS),
            )
            self.db.run("DELETE FROM reasons WHERE tick <= ?", (tick,))
            self.db.run("DELETE FROM snapshots WHERE tick < ?", (tick,))
            return self.db.run("DELETE FROM ticks WHERE tick <= ?", (tick,))

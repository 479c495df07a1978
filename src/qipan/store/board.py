"""A board's store: facts, ticks, reports to the parent, reasons, snapshots, submissions, the ledger.  One writer.

The SQL of each noun stands in its own file; here is what joins them: one tick, stored whole or not at all."""

from collections.abc import Sequence
from pathlib import Path

from qipan.leases import Reason
from qipan.ledger import Transfer
from qipan.release import RELEASE
from qipan.store.copying import copy_rows
from qipan.store.database import Database
from qipan.store.facts import Facts, StoredFact, StoredTick
from qipan.store.ledger import Ledger
from qipan.store.opening import Place, open_database
from qipan.store.reasons import Reasons
from qipan.store.reports import Reports
from qipan.store.snapshots import Snapshots
from qipan.store.submissions import Submissions


class Store(Facts, Reasons, Reports, Snapshots, Submissions, Ledger):
    """`where` None keeps everything in memory (the twin).  `writer` False: others may write meanwhile, this one does
    not.  Not safe for several threads at once: the host holds one lock around each board."""

    def __init__(self, where: Path | Place | None, *, writer: bool = True) -> None:
        self.path = where if isinstance(where, Path) else None
        self.db: Database = open_database(where, writer=writer)
        self._read_numbers()

    def _read_numbers(self) -> None:
        self._number_facts()
        self._number_reasons()
        self._number_reports()

    def close(self) -> None:
        self.db.close()

    def record(
        self,
        facts: Sequence[StoredFact],
        tick: StoredTick,
        reports: Sequence[bytes],
        reasons: Sequence[Reason],
        transfers: Sequence[Transfer] = (),
    ) -> list[int]:
        """Store one tick whole or not at all.  Returns the numbers given to the reports.  `tick.facts` is not
        read.  A fact already stored (same source and number) must not be given again."""
        with self.db.transaction():
            last_fact = self._add_tick(facts, tick, RELEASE)
            numbers = self._add_reports(reports)
            self._add_reasons(reasons, tick.tick, tick.now_s)
            self._add_transfers(transfers, tick.tick, tick.now_s)
        self._counted(facts, last_fact)
        self._last_report += len(numbers)
        self._last_reason += len(reasons)
        return numbers

    def copy_to(self, where: Path | Place | None) -> "Store":
        """A whole copy in an empty place, consistent while this one is in use."""
        target = Store(where)
        copy_rows(self.db, target.db)
        target._read_numbers()
        return target

    def get(self, key: str) -> str | None:
        row = self.db.row("SELECT value FROM board WHERE key = ?", (key,))
        return row[0] if row else None

    def put(self, key: str, value: str) -> None:
        self.db.run(
            "INSERT INTO board VALUES (?,?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (key, value),
        )

    def items(self, prefix: str) -> list[tuple[str, str]]:
        """(key, value) of the keys that begin with `prefix`, in order."""
        return [(str(key), str(value)) for key, value in self.db.rows(
            "SELECT key, value FROM board WHERE key >= ? AND key < ? ORDER BY key", (prefix, prefix + "\U0010ffff")
        )]  # fmt: skip

    def drop(self, key: str) -> None:
        self.db.run("DELETE FROM board WHERE key = ?", (key,))

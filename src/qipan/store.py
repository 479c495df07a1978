"""A board's store: facts, ticks, reports to the parent, snapshots.  SQLite in WAL mode, one writer process."""

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from qipan.errors import InvalidInput, QipanError
from qipan.leases import Reason
from qipan.ledger import Transfer

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class StoredFact:
    """`source_seq` is the source's own number."""

    source: str
    source_seq: int
    kind: str
    task_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class StoredTick:
    tick: int
    now_s: float
    lease_s: float
    boot_id: str
    decision: bytes
    facts: tuple[bytes, ...]


class Store:
    """`path` None keeps everything in memory (the twin).  Not safe for several threads at once: the host holds
    one lock around each board."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._db = sqlite3.connect(
            str(path) if path else ":memory:",
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;")
        self._db.executescript(resources.files("qipan").joinpath("schema.sql").read_text())
        self._check_version()
        if path is not None:
            path.chmod(0o600)
        self._read_numbers()

    def _read_numbers(self) -> None:
        row = self._db.execute("SELECT max(fact_id) FROM facts").fetchone()
        self._last_fact = int(row[0] or 0)
        rows = self._db.execute("SELECT source, max(source_seq) FROM facts GROUP BY source")
        self._cursors: dict[str, int] = dict(rows.fetchall())

    def _check_version(self) -> None:
        found = self.get("schema_version")
        if found is None:
            self.put("schema_version", str(SCHEMA_VERSION))
        elif int(found) != SCHEMA_VERSION:
            raise QipanError(
                f"{self.path} has schema version {found}, this release reads {SCHEMA_VERSION};"
                " run the release that wrote it, or start with an empty --store"
            )

    def close(self) -> None:
        self._db.close()

    # ---- one tick ------------------------------------------------------------------------------------------------

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
        db = self._db
        first = self._last_fact + 1
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany(
                "INSERT INTO facts VALUES (?,?,?,?,?,?,?,?)",
                [
                    (
                        first + i,
                        tick.tick,
                        fact.source,
                        fact.source_seq,
                        fact.kind,
                        fact.task_id,
                        tick.now_s,
                        fact.body,
                    )
                    for i, fact in enumerate(facts)
                ],
            )
            last = self._last_fact + len(facts)
            db.execute(
                "INSERT INTO ticks VALUES (?,?,?,?,?,?,?)",
                (tick.tick, first, last, tick.now_s, tick.lease_s, tick.boot_id, tick.decision),
            )
            numbers = [
                int(db.execute("INSERT INTO reports (body) VALUES (?)", (body,)).lastrowid or 0)
                for body in reports
            ]
            db.executemany(
                "INSERT INTO reasons VALUES (?,?,?,?,?,?)",
                [
                    (tick.tick, tick.now_s, reason.task_id, reason.verdict, reason.text, repr(reason.values))
                    for reason in reasons
                ],
            )
            for transfer in transfers:
                self._post(transfer, tick.tick, tick.now_s)
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise
        self._last_fact = last
        for fact in facts:
            self._cursors[fact.source] = max(self._cursors.get(fact.source, 0), fact.source_seq)
        return numbers

    def post(self, transfer: Transfer, now_s: float) -> bool:
        """Post outside a tick (opening balances, top-ups).  The same key with the same body is posted once; with
        another body it is refused.  Returns whether it was new."""
        found = self._db.execute("SELECT body_hash FROM transfers WHERE key = ?", (transfer.key,)).fetchone()
        if found is not None:
            if found[0] != transfer.body_hash:
                raise InvalidInput(
                    f"transfer {transfer.key} was posted before with other entries; use a new key"
                )
            return False
        self._db.execute("BEGIN IMMEDIATE")
        self._post(transfer, 0, now_s)
        self._db.execute("COMMIT")
        return True

    def _post(self, transfer: Transfer, tick: int, now_s: float) -> None:
        row = self._db.execute(
            "INSERT INTO transfers (key, body_hash, tick, cause, now_s) VALUES (?,?,?,?,?)",
            (transfer.key, transfer.body_hash, tick, transfer.cause, now_s),
        )
        self._db.executemany(
            "INSERT INTO entries VALUES (?,?,?,?)",
            [
                (row.lastrowid, entry.account, entry.amount_micro, entry.currency)
                for entry in transfer.entries
            ],
        )

    def cursor(self, source: str) -> int:
        """The highest number stored from `source`; 0 when none was."""
        return self._cursors.get(source, 0)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def ticks(self, after: int = 0) -> Iterator[StoredTick]:
        for tick, first, last, now_s, lease_s, boot_id, decision in self._db.execute(
            "SELECT * FROM ticks WHERE tick > ? ORDER BY tick", (after,)
        ):
            rows = self._db.execute(
                "SELECT body FROM facts WHERE fact_id BETWEEN ? AND ? ORDER BY fact_id", (first, last)
            )
            yield StoredTick(tick, now_s, lease_s, boot_id, decision, tuple(row[0] for row in rows))

    def facts_of(
        self, task_id: str, kinds: Sequence[str] = (), after: int = 0
    ) -> list[tuple[int, float, bytes]]:
        """(fact id, now_s, body) of one task's facts, in order."""
        marks = ",".join("?" * len(kinds))
        where = f" AND kind IN ({marks})" if kinds else ""
        return self._db.execute(
            f"SELECT fact_id, now_s, body FROM facts WHERE task_id = ? AND fact_id > ?{where} ORDER BY fact_id",
            (task_id, after, *kinds),
        ).fetchall()

    def fact_count(self) -> int:
        return int(self._last_fact)

    def latest_now_s(self) -> float:
        return float(self._db.execute("SELECT coalesce(max(now_s), 0) FROM ticks").fetchone()[0])

    def reasons_of(self, task_id: str) -> list[tuple[float, str, str]]:
        """(now_s, verdict, text), oldest first."""
        return self._db.execute(
            "SELECT now_s, verdict, text FROM reasons WHERE task_id = ? ORDER BY tick, rowid", (task_id,)
        ).fetchall()

    def reasons_before(self, now_s: float, row: int, most: int) -> list[tuple[int, float, str, str, str]]:
        """(row, now_s, task, verdict, text), newest first: those earlier than `now_s`, or then with a smaller row."""
        return self._db.execute(
            "SELECT rowid, now_s, task_id, verdict, text FROM reasons WHERE now_s < ? OR (now_s = ? AND rowid < ?)"
            " ORDER BY rowid DESC LIMIT ?",
            (now_s, now_s, row, most),
        ).fetchall()

    def reports_after(self, seq: int, most: int = 1000) -> list[tuple[int, bytes]]:
        return self._db.execute(
            "SELECT seq, body FROM reports WHERE seq > ? ORDER BY seq LIMIT ?", (seq, most)
        ).fetchall()

    def number_reports_after(self, seq: int) -> None:
        """The next report is numbered above `seq` (the parent took so many from an earlier life of this store)."""
        found = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'reports'").fetchone()
        if found is None:
            self._db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('reports', ?)", (seq,))
        elif found[0] < seq:
            self._db.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'reports'", (seq,))

    def copy_to(self, path: Path | None) -> "Store":
        """A whole copy, consistent while this one is in use."""
        target = Store(path)
        self._db.backup(target._db)
        target._read_numbers()
        return target

    def forget_reports(self, up_to: int) -> None:
        """The parent has them."""
        self._db.execute("DELETE FROM reports WHERE seq <= ?", (up_to,))

    # ---- snapshots, submissions, ledger ----------------------------------------------------------------------------

    def save_snapshot(self, tick: int, body: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO snapshots VALUES (?,?)", (tick, body))
        self._db.execute("DELETE FROM snapshots WHERE tick < ?", (tick,))

    def snapshot(self) -> tuple[int, bytes] | None:
        row = self._db.execute("SELECT tick, body FROM snapshots ORDER BY tick DESC LIMIT 1").fetchone()
        return (row[0], row[1]) if row else None

    def save_submission(
        self, task_id: str, key: str | None, submitted_s: float, task: bytes, plan: bytes
    ) -> None:
        self._db.execute(
            "INSERT INTO submissions VALUES (?,?,?,?,?)", (task_id, key, submitted_s, task, plan)
        )

    def submission(self, task_id: str) -> tuple[float, bytes, bytes] | None:
        """(submitted_s, task JSON, plan JSON)."""
        row = self._db.execute(
            "SELECT submitted_s, task, plan FROM submissions WHERE task_id = ?", (task_id,)
        ).fetchone()
        return (row[0], row[1], row[2]) if row else None

    def submitted_with(self, key: str) -> str | None:
        row = self._db.execute("SELECT task_id FROM submissions WHERE idempotency_key = ?", (key,)).fetchone()
        return row[0] if row else None

    def submissions(self) -> list[tuple[str, float]]:
        return self._db.execute(
            "SELECT task_id, submitted_s FROM submissions ORDER BY submitted_s, task_id"
        ).fetchall()

    def balances(self) -> list[tuple[str, str, int]]:
        """(account, currency, balance in 1e-6), by account."""
        return self._db.execute(
            "SELECT account, currency, sum(amount_micro) FROM entries GROUP BY account, currency ORDER BY account, currency"
        ).fetchall()

    def postings_about(self, cause: str) -> list[tuple[str, str, int, str]]:
        """(key, account, amount, currency) of the transfers with this cause, in order."""
        return self._db.execute(
            "SELECT key, account, amount_micro, currency FROM transfers JOIN entries USING (transfer_id)"
            " WHERE cause = ? ORDER BY transfer_id, entries.rowid",
            (cause,),
        ).fetchall()

    def get(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM board WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO board VALUES (?,?)", (key, value))

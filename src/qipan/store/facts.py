"""Facts and the ticks that took them in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qipan.store.database import Database, Row

PAGE = 500


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
    """`written_by`: the release that decided it; empty for this one, before it is stored."""

    tick: int
    now_s: float
    lease_s: float
    boot_id: str
    decision: bytes
    facts: tuple[bytes, ...]
    written_by: str = ""


class Facts:
    db: Database

    def _number_facts(self) -> None:
        row = self.db.row("SELECT max(fact_id) FROM facts")
        self._last_fact = int((row and row[0]) or 0)
        self._cursors: dict[str, int] = dict(
            self.db.rows("SELECT source, max(source_seq) FROM facts GROUP BY source")
        )

    def _add_tick(self, facts: Sequence[StoredFact], tick: StoredTick, written_by: str) -> int:
        """Returns the number of the last fact; `_counted` takes it over once the transaction holds."""
        first = self._last_fact + 1
        rows = [
            (number, tick.tick, fact.source, fact.source_seq, fact.kind, fact.task_id, tick.now_s, fact.body)
            for number, fact in enumerate(facts, first)
        ]
        if rows:
            self.db.run_many("INSERT INTO facts VALUES (?,?,?,?,?,?,?,?)", rows)
        last = self._last_fact + len(rows)
        self.db.run(
            "INSERT INTO ticks VALUES (?,?,?,?,?,?,?,?)",
            (tick.tick, first, last, tick.now_s, tick.lease_s, tick.boot_id, tick.decision, written_by),
        )
        return last

    def _counted(self, facts: Sequence[StoredFact], last: int) -> None:
        self._last_fact = last
        for fact in facts:
            self._cursors[fact.source] = max(self._cursors.get(fact.source, 0), fact.source_seq)

    def cursor(self, source: str) -> int:
        """The highest number stored from `source`; 0 when none was."""
        return self._cursors.get(source, 0)

    def fact_count(self) -> int:
        """The number of the newest fact."""
        return self._last_fact

    def ticks(self, after: int = 0) -> Iterator[StoredTick]:
        """In order, a page at a time, so that a long history needs no memory."""
        while True:
            page = self.db.rows("SELECT * FROM ticks WHERE tick > ? ORDER BY tick LIMIT ?", (after, PAGE))
            if not page:
                return
            facts = self._facts_between(page[0][1], page[-1][2])
            for tick, first, last, now_s, lease_s, boot_id, decision, written_by in page:
                bodies = tuple(facts[number] for number in range(first, last + 1))
                yield StoredTick(tick, now_s, lease_s, boot_id, decision, bodies, written_by)
            after = page[-1][0]

    def _facts_between(self, first: int, last: int) -> dict[int, bytes]:
        return dict(
            self.db.rows("SELECT fact_id, body FROM facts WHERE fact_id BETWEEN ? AND ?", (first, last))
        )

    def facts_of(
        self, task_id: str, kinds: Sequence[str] = (), after: int = 0, most: int | None = None
    ) -> list[tuple[int, float, bytes]]:
        """(fact id, now_s, body) of one task's facts, in order; all, or the first `most`."""
        marks = ",".join("?" * len(kinds))
        where = f" AND kind IN ({marks})" if kinds else ""
        limit = " LIMIT ?" if most is not None else ""
        return _triples(
            self.db.rows(
                f"SELECT fact_id, now_s, body FROM facts WHERE task_id = ? AND fact_id > ?{where} ORDER BY fact_id{limit}",
                (task_id, after, *kinds, *(() if most is None else (most,))),
            )
        )

    def facts_of_kinds(
        self, kinds: Sequence[str], after: int | None, most: int
    ) -> list[tuple[int, float, str, bytes]]:
        """(fact id, now_s, task, body) of everyone's facts of these kinds, in order: the first ones after a fact id, or the newest
        of all."""
        rows = self.db.rows(
            f"SELECT fact_id, now_s, task_id, body FROM facts WHERE fact_id > ? AND kind IN ({','.join('?' * len(kinds))})"
            f" ORDER BY fact_id {'DESC' if after is None else 'ASC'} LIMIT ?",
            (after or 0, *kinds, most),
        )
        if after is None:
            rows = rows[::-1]
        return [(int(fact_id), at_s, task_id, bytes(body)) for fact_id, at_s, task_id, body in rows]

    def newest_of_kind(self, kind: str, after: int, most: int) -> list[tuple[int, str]]:
        """(fact id, task) of the newest facts of one kind, newest first."""
        rows = self.db.rows(
            "SELECT fact_id, task_id FROM facts WHERE kind = ? AND fact_id > ? ORDER BY fact_id DESC LIMIT ?",
            (kind, after, most),
        )
        return [(fact_id, task_id) for fact_id, task_id in rows]

    def newest_fact_of(self, task_id: str) -> int:
        """The number of the task's newest fact; 0 when there is none."""
        row = self.db.row("SELECT max(fact_id) FROM facts WHERE task_id = ?", (task_id,))
        return int((row and row[0]) or 0)

    def facts_since(self, after: int, most: int = PAGE) -> list[tuple[int, float, bytes]]:
        """(fact id, now_s, body) of every task's facts and of those about none, in order."""
        return _triples(
            self.db.rows(
                "SELECT fact_id, now_s, body FROM facts WHERE fact_id > ? ORDER BY fact_id LIMIT ?",
                (after, most),
            )
        )

    def first_tick(self) -> int:
        """1 unless ticks were forgotten."""
        row = self.db.row("SELECT min(tick) FROM ticks")
        return int((row and row[0]) or 1)

    def first_now_s(self) -> float:
        row = self.db.row("SELECT now_s FROM ticks ORDER BY tick LIMIT 1")
        return float(row[0]) if row else 0.0

    def last_release(self) -> str:
        """Which release decided the newest tick; empty when there is none."""
        row = self.db.row("SELECT written_by FROM ticks ORDER BY tick DESC LIMIT 1")
        return str(row[0]) if row else ""

    def latest_now_s(self) -> float:
        row = self.db.row("SELECT now_s FROM ticks ORDER BY tick DESC LIMIT 1")
        return float(row[0]) if row else 0.0


def _triples(rows: list[Row]) -> list[tuple[int, float, bytes]]:
    return [(fact_id, now_s, body) for fact_id, now_s, body in rows]

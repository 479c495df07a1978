"""The log of a store: every committed change with its number, so that a standby's store becomes the same, change by change."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from qipan.store.database import Database, Row, Values

#: (SQL, the values of each row)
Statement = tuple[str, list[list[Any]]]
PUT = "INSERT INTO board VALUES (?,?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
NUMBER = "changes"


class Watched:
    """A database that tells of each committed transaction: (number, its statements encoded).  The number stands in the store,
    so a copy knows where it is."""

    def __init__(self, inner: Database, tell: Callable[[int, bytes], None]) -> None:
        self.inner, self._tell = inner, tell
        self.dialect = inner.dialect
        self.number = number_of(inner)
        self._made: list[Statement] | None = None

    def run(self, sql: str, values: Values = ()) -> int:
        if self._made is None:
            with self.transaction():
                return self.run(sql, values)
        self._made.append((sql, [list(values)]))
        return self.inner.run(sql, values)

    def run_many(self, sql: str, rows: Iterable[Values]) -> None:
        if self._made is None:
            with self.transaction():
                self.run_many(sql, rows)
            return
        kept = [list(row) for row in rows]
        self._made.append((sql, kept))
        self.inner.run_many(sql, kept)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        made: list[Statement] = []
        with self.inner.transaction():
            self._made = made
            try:
                yield
                if made:
                    self.run(PUT, (NUMBER, str(self.number + 1)))
            finally:
                self._made = None
        if made:
            self.number += 1
            self._tell(self.number, msgspec.msgpack.encode(made))

    def rows(self, sql: str, values: Values = ()) -> list[Row]:
        return self.inner.rows(sql, values)

    def row(self, sql: str, values: Values = ()) -> Row | None:
        return self.inner.row(sql, values)

    def batches(self, sql: str, size: int) -> Iterator[list[Row]]:
        return self.inner.batches(sql, size)

    def script(self, sql: str) -> None:
        self.inner.script(sql)

    def frozen(self) -> Any:
        return self.inner.frozen()

    def has_table(self, name: str) -> bool:
        return self.inner.has_table(name)

    def close(self) -> None:
        self.inner.close()


def number_of(database: Database) -> int:
    """Of the newest change; 0 where none was counted."""
    row = database.row("SELECT value FROM board WHERE key = ?", (NUMBER,))
    return int(row[0]) if row else 0


def apply(database: Database, change: bytes) -> None:
    """Make one change of another store here, whole or not at all."""
    with database.transaction():
        for sql, rows in msgspec.msgpack.decode(change, type=list[Statement]):
            database.run_many(sql, rows)

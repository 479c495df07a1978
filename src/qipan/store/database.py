"""One small door to SQLite and PostgreSQL.  SQL is plain and the same for both: `?` for values, upserts by
`ON CONFLICT`, no row ids that the database makes up.  One connection, one writer; the caller keeps threads apart."""

import itertools
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

from qipan.disk import full
from qipan.errors import InvalidInput, QipanError, Unreachable

Row = tuple[Any, ...]
Values = Sequence[Any]
WAIT_S = 10.0
CURSORS = itertools.count(1)  # several queries may be read at once
CLAIM_S = 3.0


class Database(Protocol):
    """Outside of `transaction` every statement stands for itself."""

    dialect: Literal["sqlite", "postgresql"]

    def run(self, sql: str, values: Values = ()) -> int:
        """Returns the number of rows written."""
        ...

    def run_many(self, sql: str, rows: Iterable[Values]) -> None:
        """The statement once for each of the rows, in one go."""
        ...

    def rows(self, sql: str, values: Values = ()) -> list[Row]: ...

    def row(self, sql: str, values: Values = ()) -> Row | None: ...

    def batches(self, sql: str, size: int) -> Iterator[list[Row]]:
        """All rows of a query that is too large for memory; inside of `frozen` only."""
        ...

    def script(self, sql: str) -> None:
        """Many statements without values."""
        ...

    def transaction(self) -> Any:
        """`with database.transaction():` whole or not at all."""
        ...

    def frozen(self) -> Any:
        """`with database.frozen():` reads see the store as it is now, whatever others write meanwhile."""
        ...

    def has_table(self, name: str) -> bool: ...

    def close(self) -> None: ...


class Sqlite:
    """`path` None: in memory.  Writing raises DiskFull where there is no room, and then nothing of it is stored."""

    dialect: Literal["sqlite", "postgresql"] = "sqlite"

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._db = sqlite3.connect(
            str(path) if path else ":memory:",
            timeout=WAIT_S,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=128,
        )
        if path is not None:
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;")
            path.chmod(0o600)

    def run(self, sql: str, values: Values = ()) -> int:
        try:
            return self._db.execute(sql, values).rowcount
        except sqlite3.OperationalError as error:
            raise self._meant(error) from error

    def run_many(self, sql: str, rows: Iterable[Values]) -> None:
        try:
            self._db.executemany(sql, rows)
        except sqlite3.OperationalError as error:
            raise self._meant(error) from error

    def _meant(self, error: sqlite3.OperationalError) -> Exception:
        return (full(self.path, error) if self.path is not None else None) or error

    def rows(self, sql: str, values: Values = ()) -> list[Row]:
        return self._db.execute(sql, values).fetchall()

    def row(self, sql: str, values: Values = ()) -> Row | None:
        found: Row | None = self._db.execute(sql, values).fetchone()
        return found

    def batches(self, sql: str, size: int) -> Iterator[list[Row]]:
        cursor = self._db.execute(sql)
        while batch := cursor.fetchmany(size):
            yield batch

    def script(self, sql: str) -> None:
        self._db.executescript(sql)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.run("BEGIN IMMEDIATE")
        try:
            yield
            self.run("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk has rolled back by itself
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self._db.execute("BEGIN")
        self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()  # the read that pins the snapshot
        try:
            yield
        finally:
            self._db.execute("ROLLBACK")

    def has_table(self, name: str) -> bool:
        return self.row("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,)) is not None

    def close(self) -> None:
        self._db.close()


class Postgres:
    """One PostgreSQL schema of the database at `url`.  `writer`: nobody else may write it meanwhile."""

    dialect: Literal["sqlite", "postgresql"] = "postgresql"

    def __init__(self, url: str, schema: str, *, writer: bool = True) -> None:
        try:
            import psycopg
        except ImportError:
            raise QipanError(
                "PostgreSQL needs psycopg; install the extra: pip install 'qipan[postgres]'"
            ) from None
        self.url, self.schema = url, schema
        try:
            self._db = psycopg.connect(
                url, autocommit=True, connect_timeout=round(WAIT_S), options=search_path(schema)
            )  # fmt: skip
        except psycopg.Error as error:
            raise Unreachable(
                f"no PostgreSQL answers ({str(error).strip()[:300]}); check --database"
            ) from None
        if writer:
            self._claim()
            self._db.execute(f"CREATE SCHEMA IF NOT EXISTS {_quoted(schema)}".encode())

    def _claim(self) -> None:
        """Held until this connection ends, however it ends; one that just ended may hold it for a moment more."""
        end_s = time.monotonic() + CLAIM_S
        while not self.rows("SELECT pg_try_advisory_lock(hashtext(?))", (f"qipan {self.schema}",))[0][0]:
            if time.monotonic() > end_s:
                self.close()
                raise InvalidInput(
                    f"the store {self.schema} in PostgreSQL is run by another process; stop that one, or name another"
                )
            time.sleep(0.05)

    def run(self, sql: str, values: Values = ()) -> int:
        return self._db.execute(_marks(sql), values or None).rowcount

    def run_many(self, sql: str, rows: Iterable[Values]) -> None:
        with self._db.cursor() as cursor:
            cursor.executemany(_marks(sql), rows)

    def rows(self, sql: str, values: Values = ()) -> list[Row]:
        return self._db.execute(_marks(sql), values or None).fetchall()

    def row(self, sql: str, values: Values = ()) -> Row | None:
        return self._db.execute(_marks(sql), values or None).fetchone()

    def batches(self, sql: str, size: int) -> Iterator[list[Row]]:
        with self._db.cursor(f"batches{next(CURSORS)}") as cursor:
            cursor.execute(_marks(sql))
            while batch := cursor.fetchmany(size):
                yield batch

    def script(self, sql: str) -> None:
        self._db.execute(sql.encode())

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._db.transaction():
            yield

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self._db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        self._db.execute("SELECT count(*) FROM pg_class")  # the read that pins the snapshot
        try:
            yield
        finally:
            self._db.execute("ROLLBACK")

    def has_table(self, name: str) -> bool:
        found = self.row(
            "SELECT 1 FROM pg_tables WHERE schemaname = ? AND tablename = ?", (self.schema, name)
        )
        return found is not None

    def close(self) -> None:
        self._db.close()


@lru_cache(256)
def _marks(sql: str) -> bytes:
    """`?` as psycopg writes it; our SQL holds no `?` or `%` inside of texts."""
    assert "%" not in sql, f"no % in SQL that both databases read: {sql}"
    return sql.replace("?", "%s").encode()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def search_path(schema: str) -> str:
    """libpq's `options` for a connection whose names mean this schema; spaces and backslashes are escaped there."""
    return "-c search_path=" + _quoted(schema).replace("\\", "\\\\").replace(" ", "\\ ")

"""One small interface over SQLite and PostgreSQL: `?` marks values in every statement."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from qipan.errors import Unreachable


class Database(Protocol):
    """`lock` is what a SELECT ends with so that no other writer changes its rows before the transaction's end."""

    lock: str

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[Any]: ...

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> None: ...

    def numbers(self, count: int) -> list[int]:
        """New transfer ids, growing, given to nobody else."""
        ...

    def transaction(self) -> Any:
        """A context: all or nothing.  Inside another one it is part of that."""
        ...

    def again(self, error: Exception) -> bool:
        """Whether another writer was the reason, so that the transaction may be done again."""
        ...

    def close(self) -> None: ...


class SqliteDatabase:
    """One writer.  `connection` has isolation_level None."""

    lock = ""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self._last: int | None = None

    @classmethod
    def open(cls, path: Path | None) -> "SqliteDatabase":
        connection = sqlite3.connect(
            str(path) if path else ":memory:", isolation_level=None, check_same_thread=False, timeout=30
        )
        connection.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-65536;"
        )
        if path is not None:
            path.chmod(0o600)
        return cls(connection)

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        return self.connection.execute(sql, values).fetchall()

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        self.connection.executemany(sql, rows)

    def numbers(self, count: int) -> list[int]:
        row = self.connection.execute("SELECT max(transfer_id) FROM transfers").fetchone()
        first = int(row[0] or 0) + 1
        return list(range(first, first + count))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        if self.connection.in_transaction:
            yield
            return
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    def again(self, error: Exception) -> bool:
        return False

    def close(self) -> None:
        self.connection.close()


class PostgresDatabase:
    """Several writers, each with its own connection."""

    lock = " FOR UPDATE"

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        with self.transaction():
            self.execute("SELECT pg_advisory_xact_lock(20261125)")  # so that two do not create it at once
            self.execute("CREATE SEQUENCE IF NOT EXISTS transfer_ids")

    @classmethod
    def open(cls, url: str) -> "PostgresDatabase":
        """Raises Unreachable."""
        import psycopg

        try:
            return cls(psycopg.connect(url, autocommit=True))
        except psycopg.OperationalError as error:
            raise Unreachable(
                f"no PostgreSQL answers at {url.rpartition('@')[2]}: {error}; start it"
            ) from None

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        cursor = self.connection.execute(sql.replace("?", "%s"), values)
        return list(cursor.fetchall()) if cursor.description else []

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            with self.connection.cursor() as cursor:
                cursor.executemany(sql.replace("?", "%s"), rows)

    def numbers(self, count: int) -> list[int]:
        rows = self.execute("SELECT nextval('transfer_ids') FROM generate_series(1, ?)", (count,))
        return [int(row[0]) for row in rows]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self.connection.transaction():
            yield

    def again(self, error: Exception) -> bool:
        import psycopg

        return isinstance(
            error,
            psycopg.errors.UniqueViolation
            | psycopg.errors.DeadlockDetected
            | psycopg.errors.SerializationFailure,
        )

    def close(self) -> None:
        self.connection.close()

"""The tables of the first release (SQLite only; PostgreSQL gets the same, so that the next step runs on both)."""

from pathlib import Path

from alembic import op

revision, down_revision = "0001", None


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    text = (Path(__file__).parents[1] / "v1.sqlite.sql").read_text()
    if dialect == "postgresql":
        text = text.replace("INTEGER PRIMARY KEY AUTOINCREMENT", "BIGINT PRIMARY KEY").replace(
            "INTEGER", "BIGINT"
        )
        text = text.replace("REAL", "DOUBLE PRECISION").replace("BLOB", "BYTEA")
    lines = [line.partition("--")[0] for line in text.splitlines()]
    for statement in "\n".join(lines).split(";"):
        if statement.strip():
            op.execute(statement)
    op.execute("INSERT INTO board VALUES ('schema_version', '1')")

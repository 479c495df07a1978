"""Opening a board's store: a new one is made from a file, an earlier one is brought here step by step."""

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qipan.errors import QipanError
from qipan.store.database import Database, Postgres, Sqlite, search_path

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

SCHEMA = 3  #: the newest step in migrations/versions
HERE = Path(__file__).parent


def open_database(where: "Path | Place | None", *, writer: bool = True) -> Database:
    """Made or migrated when needed, if `writer`.  None: in memory.  Raises QipanError for a store of a later release."""
    if isinstance(where, Place):
        database: Database = Postgres(where.url, where.schema, writer=writer)
    else:
        database = Sqlite(where)
    found = version_of(database)
    if found == SCHEMA:
        return database
    named = where or "the store"
    if found is not None and found > SCHEMA:
        database.close()
        raise QipanError(
            f"{named} has schema version {found}, this release reads up to {SCHEMA}; run the release that wrote it"
        )
    if not writer:
        database.close()
        raise QipanError(
            f"{named} has schema version {found}, this release reads {SCHEMA}; `qipan up` brings it there"
            if found is not None
            else f"{named} is empty"
        )
    if found is None:
        create(database)
    else:
        migrate(where)
    return database


def version_of(database: Database) -> int | None:
    """None: nothing is there yet."""
    if not database.has_table("board"):
        return None
    row = database.row("SELECT value FROM board WHERE key = ?", ("schema_version",))
    return int(row[0]) if row else None


def create(database: Database) -> None:
    file = resources.files("qipan.store").joinpath(f"new.{database.dialect}.sql")
    database.script(file.read_text())
    database.run("INSERT INTO board VALUES (?,?)", ("schema_version", str(SCHEMA)))


class Place:
    """A board's store in PostgreSQL: a schema in the database at `url`."""

    def __init__(self, url: str, schema: str) -> None:
        self.url, self.schema = url, schema

    def __str__(self) -> str:
        return f"{self.schema} in PostgreSQL"


def migrate(where: "Path | Place | None", to: int = SCHEMA) -> None:
    """Each step whole or not at all; a store that fails stays as it was."""
    assert where is not None, "a store in memory is never old"
    try:
        from alembic import command
        from alembic.config import Config
    except ImportError:
        raise QipanError(
            f"{where} was written by an earlier release; bringing it here needs the extra: pip install 'qipan[server]'"
        ) from None
    config = Config()
    config.set_main_option("script_location", str(HERE / "migrations"))
    engine = sqlalchemy_engine(where)
    try:
        with engine.connect() as connection:
            config.attributes["connection"] = connection
            _adopt(connection)
            command.upgrade(config, f"{to:04}")
    finally:
        engine.dispose()


def sqlalchemy_engine(where: "Path | Place") -> "Engine":
    """With transactions that hold changes of tables, too (sqlite3 would begin them late)."""
    from sqlalchemy import create_engine, event

    if isinstance(where, Place):
        url = where.url.replace("postgres://", "postgresql://", 1).replace(
            "postgresql://", "postgresql+psycopg://", 1
        )
        return create_engine(url, connect_args={"options": search_path(where.schema)})  # fmt: skip
    engine = create_engine(f"sqlite:///{where}")

    @event.listens_for(engine, "connect")
    def plain(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: "Connection") -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _adopt(connection: "Connection") -> None:
    """A store of the first release knows its version but not Alembic's table of it."""
    from sqlalchemy import inspect, text

    tables = inspect(connection).get_table_names()
    connection.rollback()
    if "board" not in tables or "alembic_version" in tables:
        return
    with connection.begin():
        found = connection.execute(text("SELECT value FROM board WHERE key = 'schema_version'")).scalar_one()
        connection.execute(
            text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)")
        )
        connection.execute(text("INSERT INTO alembic_version VALUES (:v)"), {"v": f"{int(found):04}"})

"""Every test of the store on SQLite and on PostgreSQL."""

import itertools
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from sqlalchemy import inspect

import qipan.store
from qipan.boards import verify_store
from qipan.controller import verify
from qipan.errors import InvalidInput, NotFound, QipanError, Unreachable
from qipan.events import KINDS, READERS, VERSIONS, CapacityChanged, decode, encode
from qipan.hardware import BoardId
from qipan.leases import EngineId, Reason, TaskId
from qipan.ledger.transfer import Entry, Transfer, check_balances, move
from qipan.scheduler import Settings
from qipan.store import SCHEMA, Place, Store, StoredFact, StoredTick, StoreFolder
from qipan.store.copying import TABLES, copy_frozen
from qipan.store.database import Sqlite
from qipan.store.opening import migrate, sqlalchemy_engine, version_of
from qipan.store.schema import ddl, metadata

HERE = Path(__file__).parent
numbers = itertools.count(1)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request, tmp_path) -> Path | Place:
    """Where nothing is yet."""
    if request.param == "sqlite":
        return tmp_path / "a.db"
    return Place(request.getfixturevalue("postgres"), f'test/{next(numbers)} 棋 "盘"')


@pytest.fixture
def store(place) -> Store:
    return Store(place)


def tick(number: int, now_s: float = 1.0) -> StoredTick:
    return StoredTick(number, now_s, 1.0, "boot", b"decision", ())


def fact(number: int, task: str = "t", kind: str = "kind", source: str = "here") -> StoredFact:
    return StoredFact(source, number, kind, task, b"x%d" % number)


def test_a_tick_is_stored_whole_or_not_at_all(store):
    store.record([fact(1)], tick(1), [b"report"], [])
    with pytest.raises(Exception, match=r"(?i)unique"):
        store.record([fact(1)], tick(2), [b"report"], [], [move("k", "t", "a", "b", 5)])
    assert [stored.tick for stored in store.ticks()] == [1]
    assert store.reports_after(0) == [(1, b"report")]
    assert store.balances() == []
    assert store.record([fact(2)], tick(2), [b"again"], []) == [2]


def test_a_store_opened_again_knows_where_each_source_stood(place):
    store = Store(place)
    reason = Reason(TaskId("t"), "placed", "because", (("a", "1"),))
    store.record([fact(7, source="engine")], tick(1), [b"r"], [reason], [move("k", "t", "a", "b", 5)])
    store.close()
    again = Store(place)
    assert again.cursor("engine") == 7
    assert again.fact_count() == 1
    assert again.record([fact(1)], tick(2), [b"r2"], [reason], [move("k2", "t", "a", "b", 1)]) == [2]
    assert [row[0] for row in again.reasons_before(9.0, 0, 9)] == [2, 1]
    assert again.balances() == [("a", "CNY", -6), ("b", "CNY", 6)]


def test_ticks_come_back_with_their_facts_however_many(store):
    for number in range(1, 1202):
        facts = [fact(number)] if number % 3 else []
        store.record(facts, tick(number, float(number)), [], [])
    ticks = list(store.ticks())
    assert [stored.tick for stored in ticks] == list(range(1, 1202))
    assert [stored.facts for stored in ticks[:4]] == [(b"x1",), (b"x2",), (), (b"x4",)]
    assert [stored.tick for stored in store.ticks(after=1200)] == [1201]
    assert store.latest_now_s() == 1201.0


def test_facts_of_a_task_by_kind_and_of_all_by_number(store):
    store.record([fact(1, "t", "a"), fact(2, "u", "a"), fact(3, "t", "b")], tick(1), [], [])
    assert [number for number, _, _ in store.facts_of("t")] == [1, 3]
    assert [number for number, _, _ in store.facts_of("t", ["b"])] == [3]
    assert [number for number, _, _ in store.facts_of("t", after=1)] == [3]
    assert store.facts_since(1, 1) == [(2, 1.0, b"x2")]


def test_a_number_of_a_report_is_never_given_twice(place):
    store = Store(place)
    assert store.record([], tick(1), [b"a", b"b"], []) == [1, 2]
    store.forget_reports(2)
    assert store.reports_after(0) == []
    store.close()
    again = Store(place)
    assert again.record([], tick(2), [b"c"], []) == [3]
    again.number_reports_after(10)
    assert again.record([], tick(3), [b"d"], []) == [11]


def test_a_transfer_is_posted_once_and_another_body_under_its_key_is_refused(store):
    assert store.post(move("k", "t", "a", "b", 5), 0.0)
    assert not store.post(move("k", "t", "a", "b", 5), 0.0)
    with pytest.raises(InvalidInput, match="posted before"):
        store.post(move("k", "t", "a", "b", 6), 0.0)
    assert sum(balance for _, _, balance in store.balances()) == 0
    assert store.balance("b") == 5
    assert store.balance("nobody") is None
    assert store.postings_about("t") == [("k", "a", -5, "CNY"), ("k", "b", 5, "CNY")]


def test_balances_are_the_sums_of_their_entries(store):
    for number in range(20):
        store.record(
            [], tick(number + 1), [], [], [move(f"k{number}", "t", "a", f"b{number % 3}", number + 2**40)]
        )
    assert store.wrong_balances() == []
    store.db.run("UPDATE balances SET balance_micro = balance_micro + 1 WHERE account = ?", ("a",))
    assert [(account, sums - balance) for account, _, balance, sums in store.wrong_balances()] == [("a", -1)]


def test_a_transfer_that_does_not_sum_to_zero_cannot_be_made():
    with pytest.raises(InvalidInput, match="does not sum to zero"):
        Transfer("k", "t", (Entry("a", 1), Entry("b", 1)))


def test_submissions_by_id_by_key_and_by_name(store):
    store.save_submission("a-1", "key", 2.0, b"task", b"plan")
    store.save_submissions([("a-2", None, 1.0, b"t", b"p"), ("ab-1", None, 3.0, b"t", b"p")])
    assert store.submission("a-1") == (2.0, b"task", b"plan")
    assert store.submission("a-9") is None
    assert store.submitted_with("key") == "a-1"
    assert store.submissions() == [("a-2", 1.0), ("a-1", 2.0), ("ab-1", 3.0)]
    assert store.submitted_as("a") == ["a-1", "a-2"]
    with pytest.raises(Exception, match=r"(?i)unique"):
        store.save_submissions([("b-1", None, 1.0, b"", b""), ("b-2", "key", 1.0, b"", b"")])
    assert store.submission("b-1") is None


def test_the_newest_snapshot_takes_the_place_of_those_not_kept(store):
    store.save_snapshot(1, b"one", 1.0, keep=True)
    store.save_snapshot(5, b"five", 5.0)
    store.save_snapshot(9, b"nine", 9.0)
    assert store.snapshot() == (9, b"nine")
    assert [(one.tick, one.kept, one.body) for one in store.snapshots()] == [
        (1, True, b"one"),
        (9, False, b"nine"),
    ]


def test_what_is_forgotten_leaves_money_submissions_and_what_bills_are_made_of(store):
    reason = Reason(TaskId("t"), "placed", "because")
    store.save_submission("t", None, 1.0, b"task", b"plan")
    for number in range(1, 11):
        kind = "task_exited" if number == 2 else "task_progress"
        transfer = move(f"k{number}", "t", "a", "b", 1)
        store.record([fact(number, kind=kind)], tick(number, float(number)), [], [reason], [transfer])
        if number == 5:
            store.save_snapshot(5, b"five", 5.0, keep=True)
    assert store.forget_before(4.9) == 0
    assert store.forget_before(100.0) == 5
    assert [stored.tick for stored in store.ticks()] == [6, 7, 8, 9, 10]
    assert [number for number, _, _ in store.facts_of("t")] == [2, 6, 7, 8, 9, 10]
    assert len(store.reasons_of("t")) == 5
    assert store.submission("t") is not None
    assert store.balance("b") == 10
    assert store.cursor("here") == 10


def test_a_source_whose_facts_are_all_forgotten_is_still_known(place):
    store = Store(place)
    store.record([fact(4, source="engine")], tick(1), [], [])
    store.save_snapshot(1, b"", 1.0, keep=True)
    store.record([], tick(2, 2.0), [], [])
    store.forget_before(2.0)
    store.close()
    assert Store(place).cursor("engine") == 4


def test_a_copy_is_whole_and_of_one_moment_while_the_store_is_written(place, tmp_path):
    store = Store(place)
    for number in range(1, 4):
        store.record([fact(number)], tick(number), [b"r"], [], [move(f"k{number}", "t", "a", "b", 1)])
    reader = Store(place, writer=False)
    with reader.db.frozen():
        store.record([fact(4)], tick(4), [b"r"], [], [move("k4", "t", "a", "b", 1)])
        target = Store(None)
        copy_frozen(reader.db, target.db)
    target._read_numbers()
    assert [stored.tick for stored in target.ticks()] == [1, 2, 3]
    assert target.balances() == [("a", "CNY", -3), ("b", "CNY", 3)]
    assert target.record([fact(4)], tick(4), [b"r"], []) == [4]
    whole = store.copy_to(tmp_path / "copy.db")
    assert [stored.tick for stored in whole.ticks()] == [1, 2, 3, 4]
    for table in TABLES:
        assert sorted(whole.db.rows(f"SELECT * FROM {table}")) == sorted(
            store.db.rows(f"SELECT * FROM {table}")
        )


def test_a_later_schema_is_refused(place):
    store = Store(place)
    store.put("schema_version", "99")
    store.close()
    with pytest.raises(QipanError, match="schema version 99"):
        Store(place)


def test_a_reader_makes_nothing(place):
    with pytest.raises(QipanError, match="empty"):
        Store(place, writer=False)


# ---- schemas -------------------------------------------------------------------------------------------------------


def test_new_stores_are_made_from_what_the_tables_say():
    folder = Path(qipan.store.__file__).parent
    for dialect in ("sqlite", "postgresql"):
        assert (folder / f"new.{dialect}.sql").read_text() == ddl(dialect), (
            "run: python -m qipan.store.schema"
        )
    assert {table.name: len(table.columns) for table in metadata.sorted_tables} == TABLES


def shape(place: Path | Place) -> dict[str, list[tuple[str, str, bool]]]:
    """Table -> (column, type, nullable), and its indexes by what they index."""
    engine = sqlalchemy_engine(place)
    seen = inspect(engine)
    found = {
        table: [
            *((one["name"], str(one["type"]).partition(" COLLATE")[0], one["nullable"] and one["name"] not in keys(seen, table)) for one in seen.get_columns(table)),
            ("primary key", ",".join(keys(seen, table)), False),
            *sorted((f"index {','.join(map(str, one['column_names']))}", "", bool(one["unique"])) for one in seen.get_indexes(table)),
        ]
        for table in TABLES
    }  # fmt: skip
    engine.dispose()
    return found


def keys(seen, table: str) -> list[str]:
    """SQLite calls a key of text nullable where the table does not say otherwise; it is none of the two for us."""
    return seen.get_pk_constraint(table)["constrained_columns"]


def old_store(place: Path | Place, board: str, tmp_path: Path) -> None:
    """The sample store of the first schema, its rows as that release wrote them."""
    with tarfile.open(HERE / "stores" / "v1.tar.xz") as samples:
        samples.extractall(tmp_path / "old", filter="data")
    sample = tmp_path / "old" / "v1" / f"{board}.db"
    if isinstance(place, Path):
        sample.rename(place)
        return
    Store(place).close()  # makes the PostgreSQL schema; its tables go again
    engine = sqlalchemy_engine(place)
    with engine.begin() as connection:
        for table in (*TABLES, "alembic_version"):
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS {table} CASCADE")
    engine.dispose()
    migrate(place, to=1)
    rows = Sqlite(sample)
    engine = sqlalchemy_engine(place)
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM board")
        for table in (
            "board",
            "facts",
            "ticks",
            "reports",
            "reasons",
            "snapshots",
            "submissions",
            "transfers",
            "entries",
        ):
            for row in rows.rows(f"SELECT * FROM {table} ORDER BY rowid"):
                marks = ",".join(["%s"] * len(row))
                connection.exec_driver_sql(f"INSERT INTO {table} VALUES ({marks})", row)
    engine.dispose()
    rows.close()


@pytest.mark.parametrize("board", ["cn", "east", "dc1", "dc2"])
def test_a_store_of_the_first_schema_keeps_facts_ledger_and_replay(place, board, tmp_path):
    old_store(place, board, tmp_path)
    with tarfile.open(HERE / "stores" / "v1.tar.xz") as samples:
        samples.extractall(tmp_path / "kept", filter="data")
    before = Sqlite(tmp_path / "kept" / "v1" / f"{board}.db")
    assert version_of(before) == 1
    with pytest.raises(QipanError, match="qipan up"):
        Store(place, writer=False)
    store = Store(place)
    assert store.get("schema_version") == str(SCHEMA)
    assert store.db.rows("SELECT * FROM facts ORDER BY fact_id") == before.rows(
        "SELECT * FROM facts ORDER BY fact_id"
    )
    columns = "tick, first_fact, last_fact, now_s, lease_s, boot_id, decision"
    assert store.db.rows(f"SELECT {columns} FROM ticks ORDER BY tick") == before.rows(
        "SELECT * FROM ticks ORDER BY tick"
    )
    assert store.db.rows(
        "SELECT tick, task_id, verdict, text FROM reasons ORDER BY reason_id"
    ) == before.rows("SELECT tick, task_id, verdict, text FROM reasons ORDER BY rowid")
    sums = before.rows(
        "SELECT account, currency, sum(amount_micro) FROM entries GROUP BY account, currency ORDER BY account, currency"
    )
    assert store.balances() == sums
    assert store.wrong_balances() == []
    assert all(total == 0 for total in check_balances(store.balances()).values())
    assert bool(sums) == (board == "cn")
    given = before.row("SELECT seq FROM sqlite_sequence WHERE name = 'reports'")
    if given is not None and isinstance(place, Path):  # only SQLite counts by itself
        assert store._last_report == given[0] > 0
    count = len(list(store.ticks()))
    assert 0 < verify(store, BoardId(board), Settings(lease_s=30.0), top=board == "cn") <= count
    store.record(
        [fact(store.cursor("here") + 1)], tick(count + 1, 9e9), [b"r"], [], [move("new", "t", "a", "b", 1)]
    )
    store.close()
    assert Store(place).fact_count() == before.row("SELECT max(fact_id) FROM facts")[0] + 1


def test_migrated_stores_and_new_ones_have_the_same_tables(place, tmp_path):
    old_store(place, "cn", tmp_path)
    Store(place).close()
    fresh = tmp_path / "fresh.db" if isinstance(place, Path) else Place(place.url, f"{place.schema} fresh")
    Store(fresh).close()
    assert shape(place) == shape(fresh)


def test_a_migration_that_fails_leaves_the_store_as_it_was(tmp_path):
    place = tmp_path / "cn.db"
    old_store(place, "cn", tmp_path)
    broken = Sqlite(place)
    broken.script("CREATE TABLE balances (x)")  # the last step of the migration will meet it
    rows = broken.rows("SELECT * FROM facts")
    broken.close()
    with pytest.raises(Exception, match="balances"):
        Store(place)
    after = Sqlite(place)
    assert version_of(after) == 1
    assert after.rows("SELECT * FROM facts") == rows
    assert after.has_table("entries")
    assert not after.has_table("old_entries")


def test_a_whole_folder_of_the_first_schema_verifies(tmp_path):
    with tarfile.open(HERE / "stores" / "v1.tar.xz") as samples:
        samples.extractall(tmp_path, filter="data")
    stores = StoreFolder(tmp_path / "v1")
    for board in stores.boards():
        stores.open(board).close()
    assert sum(verify_store(tmp_path / "v1").values()) > 0


# ---- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_in_postgresql_is_found_again_and_run_by_one_process(postgres, tmp_path):
    made = StoreFolder(tmp_path / "s", postgres)
    store = made.open("cn")
    assert StoreFolder(tmp_path / "s").boards() == ["cn"]
    assert (tmp_path / "s" / "database").stat().st_mode & 0o077 == 0
    with pytest.raises(InvalidInput, match="another process"):
        StoreFolder(tmp_path / "s").open("cn")
    StoreFolder(tmp_path / "s").open("cn", writer=False).close()
    store.close()
    StoreFolder(tmp_path / "s", postgres).open("cn").close()
    with pytest.raises(InvalidInput, match="qipan restore"):
        StoreFolder(tmp_path / "s", "postgresql://elsewhere/db")
    assert StoreFolder(tmp_path / "t", postgres)._database != made._database


def test_what_is_no_database_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="postgresql://"):
        StoreFolder(tmp_path, "mysql://x/y")
    with pytest.raises(NotFound):
        StoreFolder(tmp_path).boards()
    with pytest.raises(Unreachable, match="PostgreSQL"):
        Store(Place("postgresql://nobody@127.0.0.1:1/none", "x"))


def test_opening_a_store_that_is_up_to_date_needs_no_sqlalchemy(tmp_path):
    code = (
        "import sys; from pathlib import Path; from qipan.store import Store; Store(Path(sys.argv[1])).close();"
        " sys.exit('sqlalchemy' in sys.modules or 'alembic' in sys.modules)"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.db")]).returncode == 0


# ---- versions of facts ---------------------------------------------------------------------------------------------


def test_a_fact_of_an_earlier_version_is_read_through_its_readers():
    now = CapacityChanged(EngineId("e"), "sim/a", -2, "broken")
    first = b'["capacity_changed",1,"c",{"engine":"e","lost":2}]'
    readers = {
        ("capacity_changed", 1): lambda body: {"engine": body["engine"], "devices": -body["lost"]},
        ("capacity_changed", 2): lambda body: {**body, "chip_class": "sim/a", "why": "broken"},
    }
    assert decode(first, {"capacity_changed": 3}, readers) == now
    assert decode(encode(now)) == now
    with pytest.raises(InvalidInput, match="version 4"):
        decode(first.replace(b"1", b"4", 1), {"capacity_changed": 3}, readers)


def test_every_kind_of_every_version_has_its_reader():
    for kind, version in VERSIONS.items():
        assert kind in KINDS
        assert all((kind, earlier) in READERS for earlier in range(1, version))

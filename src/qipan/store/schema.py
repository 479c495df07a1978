"""The tables of a board's store, as they are now.  `python -m qipan.store.schema` writes the two files from which a new
store is made, so that making one needs no SQLAlchemy; earlier stores come here by the steps in `migrations/`.

To change a table: change it here, write the step, run the module; tests/test_store.py holds the three together."""

from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

HERE = Path(__file__).parent
Words = Text().with_variant(Text(collation="C"), "postgresql")  # ordered by bytes in both
Whole = BigInteger().with_variant(sqlite.INTEGER(), "sqlite")
Real = Float(53).with_variant(sqlite.REAL(), "sqlite")

metadata = MetaData()


def table(name: str, *columns: Column[object] | UniqueConstraint | Index) -> Table:
    return Table(name, metadata, *columns)


def column(name: str, kind: object, **more: object) -> "Column[object]":
    return Column(name, kind, nullable=bool(more.pop("nullable", False)), **more)  # type: ignore[arg-type]


board = table("board", column("key", Words, primary_key=True), column("value", Words))
# source: engine, "parent", or "here"; source_seq: its own number, so that a repeated fact is stored once
facts = table(
    "facts",
    column("fact_id", Whole, primary_key=True, autoincrement=False),
    column("tick", Whole),
    column("source", Words),
    column("source_seq", Whole),
    column("kind", Words),
    column("task_id", Words),
    column("now_s", Real),
    column("body", LargeBinary),
    UniqueConstraint("source", "source_seq"),
    Index("facts_by_task", "task_id", "fact_id"),
)
# facts first_fact .. last_fact, in order; empty when last < first.  written_by: the release that decided it
ticks = table(
    "ticks",
    column("tick", Whole, primary_key=True, autoincrement=False),
    column("first_fact", Whole),
    column("last_fact", Whole),
    column("now_s", Real),
    column("lease_s", Real),
    column("boot_id", Words),
    column("decision", LargeBinary),
    column("written_by", Words),
)
# to the parent, kept until it has them
reports = table(
    "reports", column("seq", Whole, primary_key=True, autoincrement=False), column("body", LargeBinary)
)
reasons = table(
    "reasons",
    column("reason_id", Whole, primary_key=True, autoincrement=False),
    column("tick", Whole),
    column("now_s", Real),
    column("task_id", Words),
    column("verdict", Words),
    column("text", Words),
    column("vals", Words),
    Index("reasons_by_task", "task_id", "reason_id"),
)
# kept: replay may begin here (what was before is forgotten, or was decided by another release)
snapshots = table(
    "snapshots",
    column("tick", Whole, primary_key=True, autoincrement=False),
    column("now_s", Real),
    column("kept", Boolean),
    column("body", LargeBinary),
)
# what people submitted, at the board where they did
submissions = table(
    "submissions",
    column("task_id", Words, primary_key=True),
    column("idempotency_key", Words, nullable=True, unique=True),
    column("submitted_s", Real),
    column("task", LargeBinary),
    column("plan", LargeBinary),
)
# the ledger, in its owner's topmost board; balances are the sums of the entries
transfers = table(
    "transfers",
    column("transfer_id", Whole, primary_key=True, autoincrement=False),
    column("key", Words, unique=True),
    column("body_hash", Words),
    column("tick", Whole),
    column("cause", Words),
    column("now_s", Real),
    Index("transfers_by_cause", "cause", "transfer_id"),
)
entries = table(
    "entries",
    Column("transfer_id", Whole, ForeignKey("transfers.transfer_id"), primary_key=True, autoincrement=False),
    column("position", Whole, primary_key=True, autoincrement=False),
    column("account", Words),
    column("amount_micro", Whole),
    column("currency", Words),
    Index("entries_by_account", "account"),
)
balances = table(
    "balances",
    column("account", Words, primary_key=True),
    column("currency", Words, primary_key=True),
    column("balance_micro", Whole),
)
# money set aside, closed once
holds = table(
    "holds",
    column("hold_id", Words, primary_key=True),
    column("account", Words),
    column("currency", Words),
    column("amount_micro", Whole),
    column("left_micro", Whole),
    column("expires_s", Real, nullable=True),
    column("state", Words),
    Index("holds_by_end", "state", "expires_s"),
)
# settlement runs that go on where they were ended; inputs and bodies are JSON
settlement_runs = table(
    "settlement_runs",
    column("run_id", Words, primary_key=True),
    column("period", Words),
    column("kind", Words),
    column("inputs_hash", Words),
    column("inputs", Words),
    column("state", Words),
    column("line_count", Whole),
)
settlement_rows = table(
    "settlement_rows",
    column("run_id", Words, primary_key=True),
    column("line", Whole, primary_key=True, autoincrement=False),
    column("body", Words),
)
# the market: an auction's seed is secret until its gate is closed; clearing and order bodies are JSON
auctions = table(
    "auctions",
    column("product", Words, primary_key=True),
    column("gate_s", Real),
    column("seed", Words),
    column("state", Words),
    column("body", Words),
    Index("auctions_by_gate", "state", "gate_s"),
)
market_orders = table(
    "market_orders",
    column("order_id", Words, primary_key=True),
    column("product", Words),
    column("trader", Words),
    column("sequence", Whole),
    column("body", Words),
    Index("orders_by_product", "product", "sequence"),
)


def ddl(dialect: str) -> str:
    """All statements, in the order of the tables."""
    speaks = {"sqlite": sqlite.dialect, "postgresql": postgresql.dialect}[dialect]()
    made = [f"-- Written by `python -m qipan.store.schema`; the tables are in schema.py.  {dialect}."]
    for one in metadata.sorted_tables:
        made.append(str(CreateTable(one).compile(dialect=speaks)).strip() + ";")
        made += [
            str(CreateIndex(index).compile(dialect=speaks)) + ";"
            for index in sorted(one.indexes, key=lambda index: str(index.name))
        ]
    lines = [line.replace("\t", "  ").rstrip() for text in made for line in text.splitlines() if line.strip()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name in ("sqlite", "postgresql"):
        (HERE / f"new.{name}.sql").write_text(ddl(name))

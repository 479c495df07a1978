"""All rows of a store into an empty one, from either database into either."""

from qipan.store.database import Database

#: parents of foreign keys first
TABLES = {
    "board": 2, "facts": 8, "ticks": 8, "reports": 2, "reasons": 7, "snapshots": 4, "submissions": 5, "transfers": 6,
    "entries": 5, "balances": 3, "holds": 7, "settlement_runs": 7, "settlement_rows": 3, "auctions": 5, "market_orders": 5,
}  # fmt: skip
ORDER = {"board": "key", "facts": "fact_id", "ticks": "tick", "reports": "seq", "reasons": "reason_id", "snapshots": "tick",
         "submissions": "task_id", "transfers": "transfer_id", "entries": "transfer_id, position", "balances": "account, currency",
         "holds": "hold_id", "settlement_runs": "run_id", "settlement_rows": "run_id, line", "auctions": "product",
         "market_orders": "order_id"}  # fmt: skip
PAGE = 5000


def copy_rows(source: Database, target: Database) -> None:
    """As `source` stood at one moment.  `target` has the present schema and nothing else."""
    with source.frozen():
        copy_frozen(source, target)


def copy_frozen(source: Database, target: Database) -> None:
    """The same, when the caller holds the moment."""
    with target.transaction():
        target.run("DELETE FROM board")
        for table, columns in TABLES.items():
            marks = ",".join("?" * columns)
            for rows in source.batches(f"SELECT * FROM {table} ORDER BY {ORDER[table]}", PAGE):
                if table == "snapshots" and target.dialect == "postgresql":
                    rows = [(tick, now_s, bool(kept), body) for tick, now_s, kept, body in rows]
                target.run_many(f"INSERT INTO {table} VALUES ({marks})", rows)

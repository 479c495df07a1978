"""Settlement runs in the ledger's database.  A run can be ended anywhere and begun again: its inputs are stored first, rows are
computed from them and stored in batches, then posted in batches under keys of their own, then the run is marked as over."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import msgspec

from qipan.errors import InvalidInput, QipanError
from qipan.journal import Journal
from qipan.ledger.requests import Post, Refused
from qipan.settlement.settle import Period, Row, differences, settle

BATCH = 200
Kind = Literal["provisional", "final"]


def run(journal: Journal, period: Period, kind: Kind, now_s: float) -> tuple[Row, ...]:
    """Do the run, or go on with one that was interrupted; a finished one is only read.  Returns its rows.
    Raises InvalidInput when it was begun with other inputs, or a final run has no finished provisional one."""
    run_id = f"settle/{period.name}/{kind}"
    state, count = _begin(journal, run_id, period, kind)
    if state == "rows":
        count = _store_rows(journal, run_id, _rows_of(journal, period, kind))
        state = "posting"
    if state == "posting":
        _post_rows(journal, run_id, count, now_s)
    return rows_of(journal, run_id)


def begun(journal: Journal, name: str, kind: Kind) -> Period | None:
    """What the run of this period was begun with; None when it was not."""
    row = journal.db.row("SELECT inputs FROM settlement_runs WHERE run_id = ?", (f"settle/{name}/{kind}",))
    return None if row is None else msgspec.json.decode(row[0], type=Period)


def rows_of(journal: Journal, run_id: str) -> tuple[Row, ...]:
    found = journal.db.rows("SELECT body FROM settlement_rows WHERE run_id = ? ORDER BY line", (run_id,))
    return tuple(msgspec.json.decode(row[0], type=Row) for row in found)


def runs(journal: Journal) -> list[tuple[str, str, str, int]]:
    """(run id, period, state, rows)."""
    return [
        (row[0], row[1], row[2], int(row[3]))
        for row in journal.db.rows("SELECT run_id, period, state, line_count FROM settlement_runs ORDER BY run_id")
    ]  # fmt: skip


def _begin(journal: Journal, run_id: str, period: Period, kind: Kind) -> tuple[str, int]:
    """(state, rows)."""
    inputs = msgspec.json.encode(period).decode()
    digest = hashlib.blake2b(inputs.encode(), digest_size=16).hexdigest()
    with journal.db.transaction():
        found = journal.db.rows(
            "SELECT inputs_hash, state, line_count FROM settlement_runs WHERE run_id = ?", (run_id,)
        )
        if found:
            if found[0][0] != digest:
                raise InvalidInput(f"{run_id} was begun with other inputs; late ones belong into the final run, or a dispute")  # fmt: skip
            return found[0][1], int(found[0][2])
        if kind == "final":
            first = journal.db.rows(
                "SELECT state FROM settlement_runs WHERE run_id = ?", (f"settle/{period.name}/provisional",)
            )
            if not first or first[0][0] != "over":
                raise InvalidInput(f"{period.name} has no finished provisional run; do that first")
        journal.db.run(
            "INSERT INTO settlement_runs (run_id, period, kind, inputs_hash, inputs, state, line_count) VALUES (?,?,?,?,?,?,?)",
            (run_id, period.name, kind, digest, inputs, "rows", 0),
        )
    return "rows", 0


def _rows_of(journal: Journal, period: Period, kind: Kind) -> Sequence[Row]:
    rows = settle(period)
    if kind == "final":
        return differences(rows_of(journal, f"settle/{period.name}/provisional"), rows)
    return rows


def _store_rows(journal: Journal, run_id: str, rows: Sequence[Row]) -> int:
    db = journal.db
    have = int(db.rows("SELECT count(*) FROM settlement_rows WHERE run_id = ?", (run_id,))[0][0])
    for start in range(have, len(rows), BATCH):
        some = rows[start : start + BATCH]
        with db.transaction():
            db.run_many(
                "INSERT INTO settlement_rows (run_id, line, body) VALUES (?,?,?)",
                [(run_id, start + i, msgspec.json.encode(row).decode()) for i, row in enumerate(some)],
            )
    with db.transaction():
        db.run(
            "UPDATE settlement_runs SET state = 'posting', line_count = ? WHERE run_id = ?", (len(rows), run_id)
        )  # fmt: skip
    return len(rows)


def _post_rows(journal: Journal, run_id: str, count: int, now_s: float) -> None:
    """Rows that were posted before are known by their keys.  What the rules say is owed may put an account below its floor."""
    rows = rows_of(journal, run_id)
    if len(rows) != count:
        raise QipanError(f"{run_id} has {len(rows)} of {count} rows; restore the store from a backup")
    for start in range(0, len(rows), BATCH):
        asked = [
            Post(row.transfer(run_id), tuple({entry.account: 0 for entry in row.entries}))
            for row in rows[start : start + BATCH]
        ]
        for outcome in journal.submit(asked, now_s):
            if isinstance(outcome, Refused):
                raise QipanError(f"{run_id}: {outcome.key} was refused ({outcome.clause}): {outcome.why}")
    with journal.db.transaction():
        journal.db.run("UPDATE settlement_runs SET state = 'over' WHERE run_id = ?", (run_id,))

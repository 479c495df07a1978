"""Numbers of our own instead of SQLite's row ids, sums of accounts beside their entries, ticks that name the release
that decided them, snapshots that are kept."""

from alembic import op

revision, down_revision = "0002", "0001"

BEFORE = "schema 1"  # ticks did not name their release


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        row, text, whole, real, blob, no = "rowid", "TEXT", "INTEGER", "REAL", "BLOB", "0"
    else:
        row, whole, real, blob, no = (
            "row_number() OVER (ORDER BY ctid)",
            "BIGINT",
            "FLOAT(53)",
            "BYTEA",
            "false",
        )
        text = 'TEXT COLLATE "C"'
    op.execute(f"ALTER TABLE ticks ADD COLUMN written_by {text} NOT NULL DEFAULT '{BEFORE}'")
    op.execute("ALTER TABLE reasons RENAME TO old_reasons")
    op.execute("DROP INDEX reasons_by_task")
    op.execute(f"""CREATE TABLE reasons (
        reason_id {whole} NOT NULL, tick {whole} NOT NULL, now_s {real} NOT NULL, task_id {text} NOT NULL,
        verdict {text} NOT NULL, text {text} NOT NULL, vals {text} NOT NULL, PRIMARY KEY (reason_id))""")
    op.execute(
        f"INSERT INTO reasons SELECT {row}, tick, now_s, task_id, verdict, text, vals FROM old_reasons"
    )
    op.execute("DROP TABLE old_reasons")
    op.execute("CREATE INDEX reasons_by_task ON reasons (task_id, reason_id)")

    # the highest number ever given to a report outlives the reports
    top = "(SELECT max(seq) FROM reports)"
    if row == "rowid":
        top = (
            f"max(coalesce({top}, 0), coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'reports'), 0))"
        )
    op.execute(f"INSERT INTO board SELECT 'last_report', CAST(coalesce({top}, 0) AS TEXT)")
    op.execute("ALTER TABLE reports RENAME TO old_reports")
    op.execute(f"CREATE TABLE reports (seq {whole} NOT NULL, body {blob} NOT NULL, PRIMARY KEY (seq))")
    op.execute("INSERT INTO reports SELECT seq, body FROM old_reports")
    op.execute("DROP TABLE old_reports")

    op.execute("ALTER TABLE snapshots RENAME TO old_snapshots")
    kind = "BOOLEAN"
    op.execute(f"""CREATE TABLE snapshots (
        tick {whole} NOT NULL, now_s {real} NOT NULL, kept {kind} NOT NULL, body {blob} NOT NULL, PRIMARY KEY (tick))""")
    op.execute(f"""INSERT INTO snapshots SELECT s.tick, coalesce(t.now_s, 0), {no}, s.body
        FROM old_snapshots s LEFT JOIN ticks t ON t.tick = s.tick""")
    op.execute("DROP TABLE old_snapshots")

    op.execute("DROP INDEX entries_by_account")
    op.execute("ALTER TABLE entries RENAME TO old_entries")
    op.execute("ALTER TABLE transfers RENAME TO old_transfers")
    op.execute(f"""CREATE TABLE transfers (
        transfer_id {whole} NOT NULL, key {text} NOT NULL, body_hash {text} NOT NULL, tick {whole} NOT NULL,
        cause {text} NOT NULL, now_s {real} NOT NULL, PRIMARY KEY (transfer_id), UNIQUE (key))""")
    op.execute(
        "INSERT INTO transfers SELECT transfer_id, key, body_hash, tick, cause, now_s FROM old_transfers"
    )
    op.execute("CREATE INDEX transfers_by_cause ON transfers (cause, transfer_id)")
    op.execute(f"""CREATE TABLE entries (
        transfer_id {whole} NOT NULL, position {whole} NOT NULL, account {text} NOT NULL, amount_micro {whole} NOT NULL,
        currency {text} NOT NULL, PRIMARY KEY (transfer_id, position),
        FOREIGN KEY(transfer_id) REFERENCES transfers (transfer_id))""")
    order = "rowid" if row == "rowid" else "ctid"
    op.execute(f"""INSERT INTO entries SELECT transfer_id, row_number() OVER (PARTITION BY transfer_id ORDER BY {order}) - 1,
        account, amount_micro, currency FROM old_entries""")
    op.execute("CREATE INDEX entries_by_account ON entries (account)")
    op.execute("DROP TABLE old_entries")
    op.execute("DROP TABLE old_transfers")
    op.execute(f"""CREATE TABLE balances (
        account {text} NOT NULL, currency {text} NOT NULL, balance_micro {whole} NOT NULL, PRIMARY KEY (account, currency))""")
    op.execute(f"""INSERT INTO balances SELECT account, currency, CAST(sum(amount_micro) AS {whole})
        FROM entries GROUP BY account, currency""")
    op.execute("UPDATE board SET value = '2' WHERE key = 'schema_version'")

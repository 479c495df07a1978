"""Holds, settlement runs, auctions and their orders."""

from alembic import op

revision, down_revision = "0003", "0002"


def upgrade() -> None:
    sqlite = op.get_bind().dialect.name == "sqlite"
    text, whole, real = ("TEXT", "INTEGER", "REAL") if sqlite else ('TEXT COLLATE "C"', "BIGINT", "FLOAT(53)")
    op.execute(f"""CREATE TABLE holds (
        hold_id {text} NOT NULL, account {text} NOT NULL, currency {text} NOT NULL, amount_micro {whole} NOT NULL,
        left_micro {whole} NOT NULL, expires_s {real}, state {text} NOT NULL, PRIMARY KEY (hold_id))""")
    op.execute("CREATE INDEX holds_by_end ON holds (state, expires_s)")
    op.execute(f"""CREATE TABLE settlement_runs (
        run_id {text} NOT NULL, period {text} NOT NULL, kind {text} NOT NULL, inputs_hash {text} NOT NULL, inputs {text} NOT NULL,
        state {text} NOT NULL, line_count {whole} NOT NULL, PRIMARY KEY (run_id))""")
    op.execute(f"""CREATE TABLE settlement_rows (
        run_id {text} NOT NULL, line {whole} NOT NULL, body {text} NOT NULL, PRIMARY KEY (run_id, line))""")
    op.execute(f"""CREATE TABLE auctions (
        product {text} NOT NULL, gate_s {real} NOT NULL, seed {text} NOT NULL, state {text} NOT NULL, body {text} NOT NULL,
        PRIMARY KEY (product))""")
    op.execute("CREATE INDEX auctions_by_gate ON auctions (state, gate_s)")
    op.execute(f"""CREATE TABLE market_orders (
        order_id {text} NOT NULL, product {text} NOT NULL, trader {text} NOT NULL, sequence {whole} NOT NULL, body {text} NOT NULL,
        PRIMARY KEY (order_id))""")
    op.execute("CREATE INDEX orders_by_product ON market_orders (product, sequence)")
    op.execute("UPDATE board SET value = '3' WHERE key = 'schema_version'")

-- Written by `python -m qipan.store.schema`; the tables are in schema.py.  sqlite.
CREATE TABLE auctions (
  product TEXT NOT NULL,
  gate_s REAL NOT NULL,
  seed TEXT NOT NULL,
  state TEXT NOT NULL,
  body TEXT NOT NULL,
  PRIMARY KEY (product)
);
CREATE INDEX auctions_by_gate ON auctions (state, gate_s);
CREATE TABLE balances (
  account TEXT NOT NULL,
  currency TEXT NOT NULL,
  balance_micro INTEGER NOT NULL,
  PRIMARY KEY (account, currency)
);
CREATE TABLE board (
  "key" TEXT NOT NULL,
  value TEXT NOT NULL,
  PRIMARY KEY ("key")
);
CREATE TABLE facts (
  fact_id INTEGER NOT NULL,
  tick INTEGER NOT NULL,
  source TEXT NOT NULL,
  source_seq INTEGER NOT NULL,
  kind TEXT NOT NULL,
  task_id TEXT NOT NULL,
  now_s REAL NOT NULL,
  body BLOB NOT NULL,
  PRIMARY KEY (fact_id),
  UNIQUE (source, source_seq)
);
CREATE INDEX facts_by_task ON facts (task_id, fact_id);
CREATE TABLE holds (
  hold_id TEXT NOT NULL,
  account TEXT NOT NULL,
  currency TEXT NOT NULL,
  amount_micro INTEGER NOT NULL,
  left_micro INTEGER NOT NULL,
  expires_s REAL,
  state TEXT NOT NULL,
  PRIMARY KEY (hold_id)
);
CREATE INDEX holds_by_end ON holds (state, expires_s);
CREATE TABLE market_orders (
  order_id TEXT NOT NULL,
  product TEXT NOT NULL,
  trader TEXT NOT NULL,
  sequence INTEGER NOT NULL,
  body TEXT NOT NULL,
  PRIMARY KEY (order_id)
);
CREATE INDEX orders_by_product ON market_orders (product, sequence);
CREATE TABLE reasons (
  reason_id INTEGER NOT NULL,
  tick INTEGER NOT NULL,
  now_s REAL NOT NULL,
  task_id TEXT NOT NULL,
  verdict TEXT NOT NULL,
  text TEXT NOT NULL,
  vals TEXT NOT NULL,
  PRIMARY KEY (reason_id)
);
CREATE INDEX reasons_by_task ON reasons (task_id, reason_id);
CREATE TABLE reports (
  seq INTEGER NOT NULL,
  body BLOB NOT NULL,
  PRIMARY KEY (seq)
);
CREATE TABLE settlement_rows (
  run_id TEXT NOT NULL,
  line INTEGER NOT NULL,
  body TEXT NOT NULL,
  PRIMARY KEY (run_id, line)
);
CREATE TABLE settlement_runs (
  run_id TEXT NOT NULL,
  period TEXT NOT NULL,
  kind TEXT NOT NULL,
  inputs_hash TEXT NOT NULL,
  inputs TEXT NOT NULL,
  state TEXT NOT NULL,
  line_count INTEGER NOT NULL,
  PRIMARY KEY (run_id)
);
CREATE TABLE snapshots (
  tick INTEGER NOT NULL,
  now_s REAL NOT NULL,
  kept BOOLEAN NOT NULL,
  body BLOB NOT NULL,
  PRIMARY KEY (tick)
);
CREATE TABLE submissions (
  task_id TEXT NOT NULL,
  idempotency_key TEXT,
  submitted_s REAL NOT NULL,
  task BLOB NOT NULL,
  "plan" BLOB NOT NULL,
  PRIMARY KEY (task_id),
  UNIQUE (idempotency_key)
);
CREATE TABLE ticks (
  tick INTEGER NOT NULL,
  first_fact INTEGER NOT NULL,
  last_fact INTEGER NOT NULL,
  now_s REAL NOT NULL,
  lease_s REAL NOT NULL,
  boot_id TEXT NOT NULL,
  decision BLOB NOT NULL,
  written_by TEXT NOT NULL,
  PRIMARY KEY (tick)
);
CREATE TABLE transfers (
  transfer_id INTEGER NOT NULL,
  "key" TEXT NOT NULL,
  body_hash TEXT NOT NULL,
  tick INTEGER NOT NULL,
  cause TEXT NOT NULL,
  now_s REAL NOT NULL,
  PRIMARY KEY (transfer_id),
  UNIQUE ("key")
);
CREATE INDEX transfers_by_cause ON transfers (cause, transfer_id);
CREATE TABLE entries (
  transfer_id INTEGER NOT NULL,
  position INTEGER NOT NULL,
  account TEXT NOT NULL,
  amount_micro INTEGER NOT NULL,
  currency TEXT NOT NULL,
  PRIMARY KEY (transfer_id, position),
  FOREIGN KEY(transfer_id) REFERENCES transfers (transfer_id)
);
CREATE INDEX entries_by_account ON entries (account);

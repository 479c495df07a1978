-- Written by `python -m qipan.store.schema`; the tables are in schema.py.  postgresql.
CREATE TABLE auctions (
  product TEXT COLLATE "C" NOT NULL,
  gate_s FLOAT(53) NOT NULL,
  seed TEXT COLLATE "C" NOT NULL,
  state TEXT COLLATE "C" NOT NULL,
  body TEXT COLLATE "C" NOT NULL,
  PRIMARY KEY (product)
);
CREATE INDEX auctions_by_gate ON auctions (state, gate_s);
CREATE TABLE balances (
  account TEXT COLLATE "C" NOT NULL,
  currency TEXT COLLATE "C" NOT NULL,
  balance_micro BIGINT NOT NULL,
  PRIMARY KEY (account, currency)
);
CREATE TABLE board (
  key TEXT COLLATE "C" NOT NULL,
  value TEXT COLLATE "C" NOT NULL,
  PRIMARY KEY (key)
);
CREATE TABLE facts (
  fact_id BIGINT NOT NULL,
  tick BIGINT NOT NULL,
  source TEXT COLLATE "C" NOT NULL,
  source_seq BIGINT NOT NULL,
  kind TEXT COLLATE "C" NOT NULL,
  task_id TEXT COLLATE "C" NOT NULL,
  now_s FLOAT(53) NOT NULL,
  body BYTEA NOT NULL,
  PRIMARY KEY (fact_id),
  UNIQUE (source, source_seq)
);
CREATE INDEX facts_by_task ON facts (task_id, fact_id);
CREATE TABLE holds (
  hold_id TEXT COLLATE "C" NOT NULL,
  account TEXT COLLATE "C" NOT NULL,
  currency TEXT COLLATE "C" NOT NULL,
  amount_micro BIGINT NOT NULL,
  left_micro BIGINT NOT NULL,
  expires_s FLOAT(53),
  state TEXT COLLATE "C" NOT NULL,
  PRIMARY KEY (hold_id)
);
CREATE INDEX holds_by_end ON holds (state, expires_s);
CREATE TABLE market_orders (
  order_id TEXT COLLATE "C" NOT NULL,
  product TEXT COLLATE "C" NOT NULL,
  trader TEXT COLLATE "C" NOT NULL,
  sequence BIGINT NOT NULL,
  body TEXT COLLATE "C" NOT NULL,
  PRIMARY KEY (order_id)
);
CREATE INDEX orders_by_product ON market_orders (product, sequence);
CREATE TABLE reasons (
  reason_id BIGINT NOT NULL,
  tick BIGINT NOT NULL,
  now_s FLOAT(53) NOT NULL,
  task_id TEXT COLLATE "C" NOT NULL,
  verdict TEXT COLLATE "C" NOT NULL,
  text TEXT COLLATE "C" NOT NULL,
  vals TEXT COLLATE "C" NOT NULL,
  PRIMARY KEY (reason_id)
);
CREATE INDEX reasons_by_task ON reasons (task_id, reason_id);
CREATE TABLE reports (
  seq BIGINT NOT NULL,
  body BYTEA NOT NULL,
  PRIMARY KEY (seq)
);
CREATE TABLE settlement_rows (
  run_id TEXT COLLATE "C" NOT NULL,
  line BIGINT NOT NULL,
  body TEXT COLLATE "C" NOT NULL,
  PRIMARY KEY (run_id, line)
);
CREATE TABLE settlement_runs (
  run_id TEXT COLLATE "C" NOT NULL,
  period TEXT COLLATE "C" NOT NULL,
  kind TEXT COLLATE "C" NOT NULL,
  inputs_hash TEXT COLLATE "C" NOT NULL,
  inputs TEXT COLLATE "C" NOT NULL,
  state TEXT COLLATE "C" NOT NULL,
  line_count BIGINT NOT NULL,
  PRIMARY KEY (run_id)
);
CREATE TABLE snapshots (
  tick BIGINT NOT NULL,
  now_s FLOAT(53) NOT NULL,
  kept BOOLEAN NOT NULL,
  body BYTEA NOT NULL,
  PRIMARY KEY (tick)
);
CREATE TABLE submissions (
  task_id TEXT COLLATE "C" NOT NULL,
  idempotency_key TEXT COLLATE "C",
  submitted_s FLOAT(53) NOT NULL,
  task BYTEA NOT NULL,
  plan BYTEA NOT NULL,
  PRIMARY KEY (task_id),
  UNIQUE (idempotency_key)
);
CREATE TABLE ticks (
  tick BIGINT NOT NULL,
  first_fact BIGINT NOT NULL,
  last_fact BIGINT NOT NULL,
  now_s FLOAT(53) NOT NULL,
  lease_s FLOAT(53) NOT NULL,
  boot_id TEXT COLLATE "C" NOT NULL,
  decision BYTEA NOT NULL,
  written_by TEXT COLLATE "C" NOT NULL,
  PRIMARY KEY (tick)
);
CREATE TABLE transfers (
  transfer_id BIGINT NOT NULL,
  key TEXT COLLATE "C" NOT NULL,
  body_hash TEXT COLLATE "C" NOT NULL,
  tick BIGINT NOT NULL,
  cause TEXT COLLATE "C" NOT NULL,
  now_s FLOAT(53) NOT NULL,
  PRIMARY KEY (transfer_id),
  UNIQUE (key)
);
CREATE INDEX transfers_by_cause ON transfers (cause, transfer_id);
CREATE TABLE entries (
  transfer_id BIGINT NOT NULL,
  position BIGINT NOT NULL,
  account TEXT COLLATE "C" NOT NULL,
  amount_micro BIGINT NOT NULL,
  currency TEXT COLLATE "C" NOT NULL,
  PRIMARY KEY (transfer_id, position),
  FOREIGN KEY(transfer_id) REFERENCES transfers (transfer_id)
);
CREATE INDEX entries_by_account ON entries (account);

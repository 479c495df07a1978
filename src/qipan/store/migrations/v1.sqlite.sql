-- One file per board.  Facts are stored before they are acted on; a tick is one call of `decide`.
CREATE TABLE IF NOT EXISTS board (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS facts (
  fact_id INTEGER PRIMARY KEY,
  tick INTEGER NOT NULL,
  source TEXT NOT NULL,        -- engine, "parent", or "here"
  source_seq INTEGER NOT NULL, -- the source's own number: a repeated fact is stored once
  kind TEXT NOT NULL,
  task_id TEXT NOT NULL,
  now_s REAL NOT NULL,
  body BLOB NOT NULL,
  UNIQUE (source, source_seq)
);
CREATE INDEX IF NOT EXISTS facts_by_task ON facts (task_id, fact_id);
CREATE TABLE IF NOT EXISTS ticks (
  tick INTEGER PRIMARY KEY,
  first_fact INTEGER NOT NULL, -- facts first_fact .. last_fact, in order; empty when last < first
  last_fact INTEGER NOT NULL,
  now_s REAL NOT NULL,
  lease_s REAL NOT NULL,
  boot_id TEXT NOT NULL,
  decision BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS reports ( -- to the parent, kept until it has them
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  body BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS reasons (
  tick INTEGER NOT NULL, now_s REAL NOT NULL, task_id TEXT NOT NULL, verdict TEXT NOT NULL,
  text TEXT NOT NULL, vals TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS reasons_by_task ON reasons (task_id, tick);
CREATE TABLE IF NOT EXISTS snapshots (tick INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS submissions ( -- what people submitted, at the board where they did
  task_id TEXT PRIMARY KEY, idempotency_key TEXT UNIQUE, submitted_s REAL NOT NULL, task BLOB NOT NULL, plan BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS transfers ( -- the ledger, in its owner's topmost board
  transfer_id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, body_hash TEXT NOT NULL, tick INTEGER NOT NULL, cause TEXT NOT NULL,
  now_s REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS entries (
  transfer_id INTEGER NOT NULL REFERENCES transfers, account TEXT NOT NULL, amount_micro INTEGER NOT NULL, currency TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS entries_by_account ON entries (account);

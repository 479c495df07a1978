-- The ledger's tables: the same text on SQLite and PostgreSQL.  Rows of `transfers` and `entries` are only ever added.
CREATE TABLE IF NOT EXISTS transfers (
  transfer_id BIGINT PRIMARY KEY, key TEXT NOT NULL UNIQUE, body_hash TEXT NOT NULL, tick BIGINT NOT NULL, cause TEXT NOT NULL,
  now_s DOUBLE PRECISION NOT NULL
);
CREATE TABLE IF NOT EXISTS entries (
  transfer_id BIGINT NOT NULL, position BIGINT NOT NULL, account TEXT NOT NULL, amount_micro BIGINT NOT NULL,
  currency TEXT NOT NULL, PRIMARY KEY (transfer_id, position)
);
CREATE INDEX IF NOT EXISTS entries_by_account ON entries (account);
CREATE TABLE IF NOT EXISTS balances (
  account TEXT NOT NULL, currency TEXT NOT NULL, balance_micro BIGINT NOT NULL, PRIMARY KEY (account, currency)
);
CREATE TABLE IF NOT EXISTS holds (
  hold_id TEXT PRIMARY KEY, account TEXT NOT NULL, currency TEXT NOT NULL, amount_micro BIGINT NOT NULL,
  left_micro BIGINT NOT NULL, expires_s DOUBLE PRECISION, state TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS holds_by_end ON holds (state, expires_s);

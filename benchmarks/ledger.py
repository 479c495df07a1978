"""What posting costs: python -m benchmarks.ledger --json OUT

One posting is one transfer of two entries, with its key, body hash and kept balances.  SQLite figures are postings a CPU second,
beside a floor: the same three inserts with nothing decided.  PostgreSQL figures are postings a second of wall time of 8 writer
processes against a server that this command starts in a folder of its own."""

import multiprocessing
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.form import Figure, arguments, write
from qipan.journal import Journal
from qipan.ledger.requests import Post, Posted
from qipan.ledger.transfer import move
from qipan.store import Place
from qipan.store.database import Postgres
from qipan.store.opening import open_database

BATCH, BATCHES, SINGLES = 1000, 30, 2000
WRITERS, PER_WRITER, PG_BATCH = 8, 2000, 50
SCHEMA = "ledger"


def main() -> None:
    given = arguments("ledger")
    figures, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        batched = [sqlite_rate(Path(folder) / f"b{i}.db", BATCH, BATCHES) for i in range(5)]
        single = [sqlite_rate(Path(folder) / f"s{i}.db", 1, SINGLES) for i in range(5)]
        floor = [floor_rate(Path(folder) / f"f{i}.db") for i in range(5)]
        recompute = [recompute_s(Path(folder) / "b0.db") for _ in range(1)]
        rows.append(
            {"floor_postings_per_cpu_s": statistics.median(floor), "batched": batched, "single": single}
        )
        figures += [
            Figure(
                "sqlite_batched_postings_per_s", statistics.median(batched), "postings per CPU s", ">= 30000"
            ),
            Figure("sqlite_single_postings_per_s", statistics.median(single), "postings per CPU s"),
        ]
        spread, hot, one = postgres_rates(Path(folder) / "pg")
        figures += [
            Figure("postgres_8_writers_postings_per_s", spread, "postings per s", ">= 1000"),
            Figure("postgres_hot_account_postings_per_s", hot, "postings per s"),
            Figure("recompute_1e6_entries_s", recompute[0], "CPU s"),
        ]
        rows.append({"postgres_8_writers_one_posting_a_transaction_per_s": one})
    write(given.json, figures, rows, batch=BATCH, postgres_batch=PG_BATCH, writers=WRITERS, accounts=1000)


def postings(seed: int, count: int, hot: bool = False) -> list[Post]:
    rng = random.Random(seed)
    return [
        Post(move(f"k{seed}/{i}", f"task-{i}", "bank/world",
                  "tenant/hot" if hot else f"tenant/{rng.randrange(1000)}", rng.randint(1, 10**6)))
        for i in range(count)
    ]  # fmt: skip


def sqlite_rate(path: Path, batch: int, batches: int) -> float:
    journal = Journal(open_database(path))
    asked = postings(1, batch * batches)
    began_s = time.process_time()
    for i in range(batches):
        outcomes = journal.submit(asked[i * batch : (i + 1) * batch], 1.0)
        assert all(isinstance(outcome, Posted) for outcome in outcomes)
    rate = batch * batches / (time.process_time() - began_s)
    journal.db.close()
    return rate


def floor_rate(path: Path) -> float:
    open_database(path).close()
    db = sqlite3.connect(path, isolation_level=None)
    db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;")
    count = BATCH * BATCHES
    transfers = [(i, f"k1/{i}", "0" * 32, 0, f"task-{i}", 1.0) for i in range(count)]
    entries = [(i, j, f"tenant/{i % 1000}", 1, "CNY") for i in range(count) for j in range(2)]
    began_s = time.process_time()
    for i in range(BATCHES):
        db.execute("BEGIN")
        db.executemany("INSERT INTO transfers VALUES (?,?,?,?,?,?)", transfers[i * BATCH : (i + 1) * BATCH])
        db.executemany("INSERT INTO entries VALUES (?,?,?,?,?)", entries[2 * i * BATCH : 2 * (i + 1) * BATCH])
        db.execute("COMMIT")
    rate = count / (time.process_time() - began_s)
    db.close()
    return rate


def recompute_s(path: Path) -> float:
    """The auditor over a ledger grown to 1e6 entries."""
    journal = Journal(open_database(path))
    have = journal.db.rows("SELECT count(*) FROM entries")[0][0]
    asked = postings(2, (1_000_000 - have) // 2)
    for i in range(0, len(asked), 5000):
        journal.submit(asked[i : i + 5000], 1.0)
    del asked
    began_s = time.process_time()
    found = journal.check()
    took_s = time.process_time() - began_s
    assert (found.entries, found.problems) == (1_000_000, ()), found.problems[:3]
    journal.db.close()
    return took_s


def postgres_rates(folder: Path) -> tuple[float, float, float]:
    with Server(folder) as url:
        open_database(Place(url, SCHEMA)).close()
        spread = many_writers(url, 100, False, PG_BATCH)
        hot = many_writers(url, 200, True, PG_BATCH)
        one = many_writers(url, 300, False, 1)
        found = Journal(Postgres(url, SCHEMA, writer=False)).check()
        assert not found.problems, found.problems[:3]
        return spread, hot, one


def many_writers(url: str, seed: int, hot: bool, batch: int) -> float:
    context = multiprocessing.get_context("spawn")
    ready, go = context.Semaphore(0), context.Event()
    count = PER_WRITER if batch > 1 else PER_WRITER // 4
    writers = [
        context.Process(target=writer, args=(url, seed + i, count, hot, batch, ready, go))
        for i in range(WRITERS)
    ]
    for process in writers:
        process.start()
    for _ in writers:
        ready.acquire()
    began_s = time.monotonic()
    go.set()
    for process in writers:
        process.join()
    took_s = time.monotonic() - began_s
    assert all(process.exitcode == 0 for process in writers)
    return WRITERS * count / took_s


def writer(url: str, seed: int, count: int, hot: bool, batch: int, ready: object, go: object) -> None:
    journal = Journal(Postgres(url, SCHEMA, writer=False))
    asked = postings(seed, count, hot)
    ready.release()  # type: ignore[attr-defined]
    go.wait()  # type: ignore[attr-defined]
    for i in range(0, count, batch):
        outcomes = journal.submit(asked[i : i + batch], 1.0)
        assert all(isinstance(outcome, Posted) for outcome in outcomes), outcomes[0]
    journal.db.close()


class Server:
    """A PostgreSQL of its own on a Unix socket.  Root may not run one: then as `postgres` or `nobody`."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="qipan-pg-"))
        self.found = find_postgres()

    def __enter__(self) -> str:
        data = self.folder / "data"
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres")
        self.run(f"{self.found}/initdb -D {data} -U qipan -A trust")
        self.run(
            f"{self.found}/pg_ctl -D {data} -w -l {self.folder}/log -o \"-k {self.folder} -c listen_addresses=''\" start"
        )
        return f"postgresql://qipan@/postgres?host={self.folder}"

    def __exit__(self, *_: object) -> None:
        self.run(f"{self.found}/pg_ctl -D {self.folder}/data -w -m immediate stop")
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, command: str) -> None:
        as_user: Callable[[str], list[str]] = (
            (lambda text: ["su", "postgres", "-s", "/bin/sh", "-c", text])
            if os.getuid() == 0
            else lambda text: ["sh", "-c", text]
        )
        subprocess.run(as_user(command), check=True, stdout=subprocess.DEVNULL, cwd="/")


def find_postgres() -> str:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return str(found[-1].parent)
    which = shutil.which("initdb")
    if which is None:
        raise SystemExit("this benchmark starts PostgreSQL: install it (Debian: postgresql)")
    return str(Path(which).parent)


if __name__ == "__main__":
    main()

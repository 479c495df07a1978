"""A board's store, sent change by change over a `Link` to a standby.  A tick counts as stored only when the standby has it too, while
the standby keeps up; one that does not is waited for no more until it has caught up again."""

import logging
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qipan.channel import Link
from qipan.channel.network import NetworkCarrier
from qipan.errors import InvalidInput
from qipan.store import Store
from qipan.store.changes import Watched, apply, number_of
from qipan.store.database import Database
from qipan.store.opening import open_database

log = logging.getLogger("qipan.standby")

WAIT_S = 2.0  # for a standby that keeps up
BEHIND_BYTES_MAX = 64 << 20  # of changes kept for it; one further behind takes a whole copy
CHANGE_BYTES_MAX = 2 << 20  # of one change; a carrier drops what does not fit its queue
PIECE_BYTES = 1 << 20
COPY_S = 600.0  # to make a whole copy
TAKE_A_COPY = b""  # in place of a change
LINEAGE = "lineage"


class Shipping:
    """The leader's end.  `lineage`: one run of the leader's process, so that two stores with the same number of changes are
    not taken for the same."""

    def __init__(
        self, store: Store, carrier: NetworkCarrier, incarnation: int, open_reader: Callable[[], Store]
    ) -> None:
        self.carrier = carrier
        self._link = Link(carrier, incarnation)
        self._lock = threading.Lock()
        self._open_reader = open_reader
        self._bytes = 0
        self._copy: Path | None = None
        self._copying = threading.Lock()
        self.keeps_up = False
        self._watched = Watched(store.db, self._made)
        store.db = self._watched
        store.put(LINEAGE, secrets.token_hex(8))

    def _made(self, number: int, change: bytes) -> None:
        with self._lock:
            if len(change) > CHANGE_BYTES_MAX or self._bytes + len(change) > BEHIND_BYTES_MAX:
                self._link.forget()
                self._bytes, self.keeps_up, change = 0, False, TAKE_A_COPY
            self._link.push(change, number)
            self._bytes += len(change)

    @property
    def behind(self) -> int:
        """How many changes the standby has not said to have."""
        return self._watched.number - self._link.acknowledged

    def flush(self) -> None:
        with self._lock:
            self._link.receive()
            self._link.flush(time.monotonic())
            if not self._link.unacknowledged:
                self._bytes = 0
            caught_up = self.carrier.connected and self._link.heard_from() > 0 and self.behind <= 0
            self.keeps_up = caught_up or (self.keeps_up and self.carrier.connected)

    def settle(self) -> None:
        """Returns when the standby has all, or does not keep up."""
        end_s = time.monotonic() + WAIT_S
        self.flush()
        while self.keeps_up and self.behind > 0:
            if time.monotonic() > end_s:
                log.warning("the standby is %d changes behind; it is not waited for", self.behind)
                self.keeps_up = False
            time.sleep(0.001)
            self.flush()

    # ---- a whole copy --------------------------------------------------------------------------------------------------

    def copy(self) -> int:
        """Make one, in place of that before, to be fetched in pieces; returns its size."""
        with self._copying:
            self._drop_copy()
            self._copy = Path(tempfile.mkdtemp(prefix="qipan-copy-")) / "copy.db"
            reader = self._open_reader()
            try:
                reader.copy_to(self._copy).close()
            finally:
                reader.close()
            return self._copy.stat().st_size

    def piece(self, offset: int) -> bytes:
        with self._copying:
            if self._copy is None:
                raise InvalidInput("no copy was asked for")
            with self._copy.open("rb") as file:
                file.seek(offset)
                body = file.read(PIECE_BYTES)
            if offset + len(body) >= self._copy.stat().st_size:
                self._drop_copy()
            return body

    def _drop_copy(self) -> None:
        if self._copy is not None:
            shutil.rmtree(self._copy.parent, ignore_errors=True)
            self._copy = None


class Following:
    """The standby's end: `path` becomes and stays the leader's store."""

    def __init__(self, path: Path, carrier: NetworkCarrier, ask: Callable[[str, Any, float], Any]) -> None:
        self.path, self._carrier, self._ask = path, carrier, ask
        self.database: Database | None = open_database(path) if path.exists() else None
        self._link = self._new_link()

    def _new_link(self) -> Link:
        return Link(self._carrier, round(time.time() * 1e6))

    @property
    def number(self) -> int:
        return number_of(self.database) if self.database is not None else 0

    def lineage(self) -> str:
        row = (
            self.database.row("SELECT value FROM board WHERE key = ?", (LINEAGE,)) if self.database else None
        )
        return str(row[0]) if row else ""

    def begin(self, lineage: str) -> None:
        """The leader was met.  A copy is taken unless this store follows this run of it."""
        if self.lineage() != lineage:
            self.take_copy()

    def take_copy(self) -> None:
        """Until all of it is here the store stays as it is; the link begins anew first, so that nothing counts as taken."""
        self._link = self._new_link()
        part = self.path.with_suffix(".part")
        size = int(self._ask("copy", None, COPY_S))
        with part.open("wb") as file:
            while file.tell() < size:
                file.write(self._ask("piece", file.tell(), COPY_S))
        part.chmod(0o600)
        self.close()
        for old in self.path.parent.glob(f"{self.path.name}-*"):
            old.unlink()
        part.rename(self.path)
        self.database = open_database(self.path)
        log.info("took a copy of %d bytes, up to change %d", size, self.number)

    def take_in(self) -> int:
        """Apply what arrived; acknowledged after it is stored.  Returns how many changes."""
        if self.database is None:
            return 0
        number, taken = self.number, 0
        for seq, change in self._link.receive():
            if seq <= number:
                continue
            if seq != number + 1 or change == TAKE_A_COPY:
                log.warning("change %d cannot be made after %d: a copy is taken", seq, number)
                self.take_copy()
                return taken
            apply(self.database, change)
            number, taken = seq, taken + 1
        self._link.flush(time.monotonic())
        return taken

    def close(self) -> None:
        if self.database is not None:
            self.database.close()
            self.database = None

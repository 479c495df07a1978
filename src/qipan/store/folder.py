"""A store directory: tokens, what engines keep, and the stores of its boards, which lie in it as files or, when it holds
a file `database`, in PostgreSQL."""

import json
import re
import secrets
from pathlib import Path

from qipan.errors import InvalidInput, NotFound
from qipan.files import write_whole
from qipan.store.board import Store
from qipan.store.database import Postgres
from qipan.store.opening import Place

DATABASE = "database"
URL = re.compile(r"postgres(ql)?://\S+")


class StoreFolder:
    """`url` names the PostgreSQL database of a new folder; one that was made keeps its own."""

    def __init__(self, path: Path, url: str | None = None) -> None:
        self.path = path
        known = self._read()
        if url is None or (known is not None and known[0] == url):
            self._database = known
            return
        if not URL.fullmatch(url):
            raise InvalidInput(f"{url[:60]!r} is no database; give postgresql://USER@HOST:PORT/NAME")
        if known is not None or any(path.glob("*.db")):
            raise InvalidInput(
                f"{path} has its stores elsewhere already; move them: qipan backup FILE, then qipan restore FILE --database"
            )
        path.mkdir(parents=True, exist_ok=True)
        self._database = (url, f"qipan_{secrets.token_hex(4)}")
        write_whole(path / DATABASE, json.dumps({"url": url, "prefix": self._database[1]}).encode())

    def _read(self) -> tuple[str, str] | None:
        file = self.path / DATABASE
        text = file.read_text() if file.exists() else ""
        if not text:  # empty: left by a release that could stop half way, before it opened a database
            return None
        found = json.loads(text)
        return found["url"], found["prefix"]

    def place(self, board: str) -> Path | Place:
        if self._database is None:
            return self.path / f"{board}.db"
        url, prefix = self._database
        return Place(url, f"{prefix}/{board}")

    def open(self, board: str, *, writer: bool = True) -> Store:
        return Store(self.place(board), writer=writer)

    def boards(self) -> list[str]:
        """By name.  Raises NotFound when there is none."""
        if self._database is None:
            found = sorted(path.stem for path in self.path.glob("*.db"))
        else:
            url, prefix = self._database
            database = Postgres(url, "public", writer=False)
            rows = database.rows(
                "SELECT nspname FROM pg_namespace WHERE starts_with(nspname, ?) ORDER BY nspname",
                (f"{prefix}/",),
            )
            database.close()
            found = [name.removeprefix(f"{prefix}/") for (name,) in rows]
        if not found:
            raise NotFound(f"{self.path} holds no board's store; name the --store of a run")
        return found

"""`qipan up`: all boards in this process, the API on the store's socket, until Ctrl-C."""

import json
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from qipan.api import Server
from qipan.client import socket_path
from qipan.console.serve import ConsoleProcess
from qipan.errors import InvalidInput
from qipan.host import Host
from qipan.quota import QuotaRule
from qipan.webhooks import Courier, Webhooks
from qipan.workload.site import Site

PARK_S = 10.0


class Running:
    """A host with its loop and its server, started and ended together."""

    def __init__(
        self,
        site: Site,
        folder: Path,
        database: str | None = None,
        keep_s: float | None = None,
        make_host: "Callable[[Site, Path, str | None, float | None], Host]" = Host,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._claim()
        token = folder / "token"
        if not token.exists():
            token.touch(0o600)
            token.write_text(secrets.token_urlsafe(32))
        self.host = make_host(site, folder, database, keep_s)
        self.server = Server(self.host, socket_path(folder), token.read_text().strip())
        self._loop = threading.Thread(target=self.host.run, daemon=True)
        self._courier = Courier(Webhooks(self.host), self.host.clock.now_s)

    def _claim(self) -> None:
        """One process per store: its pid stands in the folder."""
        claim = self.folder / "pid"
        if claim.exists():
            other = claim.read_text().strip()
            if other.isdigit() and other != str(os.getpid()) and b"qipan" in _command(int(other)):
                raise InvalidInput(
                    f"the store {self.folder} is run by process {other}; stop that one, or name another --store"
                )
        claim.write_text(str(os.getpid()))

    def start(self) -> None:
        self._loop.start()
        self.server.start()
        self._courier.start()

    def end(self, *, park: bool) -> bool:
        """Park what runs, end everything.  Returns whether all tasks were parked in time."""
        self.host.stop()
        self._courier.stop()
        self._loop.join(5)
        parked = self.host.park(PARK_S) if park else True
        self.server.stop()
        self.host.close()
        (self.folder / "pid").unlink(missing_ok=True)
        return parked


def _command(pid: int) -> bytes:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes() if path.exists() else b""


def run_up(
    site: Site,
    folder: Path,
    json_: bool,
    console: bool = True,
    database: str | None = None,
    keep_s: float | None = None,
    rules: tuple[QuotaRule, ...] | None = None,
) -> int:
    running = Running(site, folder, database, keep_s)
    if rules is not None:
        running.host.set_rules(rules)
    running.start()
    ended = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    beside = ConsoleProcess(folder) if console else None
    url = beside.address() if beside is not None else ""
    if json_:
        told = {"event": "up", "board": site.root.board, "store": str(folder), "console": url or None}
        print(json.dumps(told), flush=True)
    else:
        print(
            f"qipan: board {site.root.board} is up, store {folder}; submit with: qipan submit TASK.yaml --store {folder}",
            flush=True,
        )
        if url:
            print(f"qipan: console: {url}", flush=True)
    ended.wait()
    print("qipan: asking the tasks for a checkpoint (10 s)", file=sys.stderr, flush=True)
    if beside is not None:
        beside.end()
    return _after_park(running.end(park=True), folder)


def _after_park(parked: bool, folder: Path) -> int:
    if not parked:
        print(
            "qipan: not every task stopped in time; what runs is taken up again by the next start",
            file=sys.stderr,
        )
    print(f"qipan: parked; continue with: qipan up --store {folder}", file=sys.stderr, flush=True)
    return 130

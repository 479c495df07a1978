"""`qipan up`: all boards in this process, the API on the store's socket, until Ctrl-C."""

import json
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from qipan.api import Server
from qipan.api.listen import Listen, listen_of
from qipan.client import socket_path
from qipan.console.serve import ConsoleProcess
from qipan.disk import is_full, takes_a_file, told
from qipan.errors import InvalidInput, QipanError
from qipan.files import secret_in
from qipan.host import Host
from qipan.login import People, Signer
from qipan.login.oidc import Issuer, Provider, read_provider
from qipan.quota import QuotaRule
from qipan.webhooks import Courier, Webhooks
from qipan.workload.site import Site

PARK_S = 10.0
LOOK_S = 0.5
FULL_S = 1.0  # between two tries on a full disk, whatever the disk says
log = logging.getLogger("qipan.run")


@dataclass(frozen=True, slots=True)
class Door:
    """How people on other hosts come in: the port, the OpenID provider whose word is taken, and where metrics are served."""

    listen: Listen | None = None
    provider: Provider | None = None
    metrics: Listen | None = None


def door_of(api: str, certificate: Path | None, key: Path | None, login: Path | None, metrics: str) -> Door:
    """From the options of the command line.  Raises InvalidInput, NotFound."""
    listen = listen_of(api, certificate, key) if api else None
    provider = read_provider(login) if login is not None else None
    return Door(listen, provider, listen_of(metrics, None, None) if metrics else None)


def operator_token(folder: Path) -> str:
    """Made once, whole or not at all."""
    return secret_in(folder / "token", lambda: secrets.token_urlsafe(32).encode()).decode().strip()


class Running:
    """A host with its loop and its server, started and ended together."""

    def __init__(
        self,
        site: Site,
        folder: Path,
        database: str | None = None,
        keep_s: float | None = None,
        make_host: "Callable[[Site, Path, str | None, float | None], Host]" = Host,
        door: Door = Door(),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._claim()
        token = operator_token(folder)
        self.host = make_host(site, folder, database, keep_s)
        try:
            issuer = Issuer(door.provider) if door.provider is not None else None
            people = People(self.host, Signer(folder / "login.key", self.host.audience), issuer)
            self.server = Server(self.host, socket_path(folder), token, people, door.listen)
            if door.metrics is not None:
                self.server.metrics.serve(door.metrics.host, door.metrics.port)
            self._courier = Courier(Webhooks(self.host), self.host.clock.now_s)
        except BaseException:
            self.host.close()
            raise
        self._loop = threading.Thread(target=self._run, daemon=True)
        self.failed: Exception | None = None

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

    def _run(self) -> None:
        try:
            self.host.run()
        except Exception as error:
            log.log(
                logging.ERROR, "the boards cannot go on; their running tasks do", exc_info=not is_full(error)
            )
            self.failed = error

    def wait(self, ended: threading.Event) -> None:
        """Until `ended`.  Raises what the boards cannot go on with (a full disk, a broken store)."""
        while not ended.wait(LOOK_S):
            if self.failed is not None:
                failed = self.failed
                self.end(park=False)
                raise (
                    failed
                    if is_full(failed)
                    else QipanError(
                        f"the boards cannot go on ({type(failed).__name__}: {failed}); what runs goes on under its supervisors"
                    )
                ) from failed

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


def while_disk_is_full(folder: Path, ended: threading.Event, act: Callable[[], int]) -> int:
    """What `act` returns; where it fails for want of room it waits for room, and begins anew from what is stored."""
    while True:
        try:
            return act()
        except Exception as error:
            if not is_full(error):
                raise
        print(f"qipan: {folder} decides and takes nothing: {told(folder)}", file=sys.stderr, flush=True)
        while not ended.wait(FULL_S) and not takes_a_file(folder):
            pass
        if ended.is_set():
            return 130
        print(f"qipan: a file finds room again: {folder} goes on", file=sys.stderr, flush=True)


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
    door: Door = Door(),
) -> int:
    ended = on_signals()

    def up() -> int:
        running = Running(site, folder, database, keep_s, door=door)
        if rules is not None:
            running.host.set_rules(rules)
        running.start()
        beside = ConsoleProcess(folder) if console else None
        try:
            _tell_up(site, folder, beside.address() if beside is not None else "", running.server.url, json_)
            running.wait(ended)
            print("qipan: asking the tasks for a checkpoint (10 s)", file=sys.stderr, flush=True)
        finally:
            if beside is not None:
                beside.end()
        return _after_park(running.end(park=True), folder)

    return while_disk_is_full(folder, ended, up)


def on_signals() -> threading.Event:
    """Set by Ctrl-C and by SIGTERM."""
    ended = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return ended


def _tell_up(site: Site, folder: Path, url: str, api: str, json_: bool) -> None:
    if json_:
        words = {
            "event": "up",
            "board": site.root.board,
            "store": str(folder),
            "console": url or None,
            "api": api or None,
        }
        print(json.dumps(words), flush=True)
        return
    print(
        f"qipan: board {site.root.board} is up, store {folder}; submit with: qipan submit TASK.yaml --store {folder}",
        flush=True,
    )
    if url:
        print(f"qipan: console: {url}", flush=True)
    if api:
        print(f"qipan: API: {api}", flush=True)


def _after_park(parked: bool, folder: Path) -> int:
    if not parked:
        print(
            "qipan: not every task stopped in time; what runs is taken up again by the next start",
            file=sys.stderr,
        )
    print(f"qipan: parked; continue with: qipan up --store {folder}", file=sys.stderr, flush=True)
    return 130

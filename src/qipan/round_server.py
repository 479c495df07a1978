"""The coordinator of rounds on the wire: JSON lines over TCP, one fact in, the task's view out.

With a `key`, lines are encrypted, and only who knows a task's own is answered.  State is written before an answer that follows from it leaves, so a coordinator that was killed goes on where it was.
"""

import contextlib
import hmac
import json
import logging
import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from qipan.errors import Infeasible, InvalidInput, NotFound
from qipan.identity.lines import HANDSHAKE_S, line_context, line_name
from qipan.rounds import (
    HungUp,
    RoundCommand,
    RoundFact,
    Rounds,
    Rules,
    Seen,
    View,
    decide_round,
    decode_fact,
    same_view,
    view,
)

TICK_S = 0.25
NEWS_S = 0.5  # a beat waits so long for news
VERSIONS_APART = 1_000_000_000
LINE_BYTES_MAX = 1 << 20

log = logging.getLogger("qipan.rounds")


class RoundServer:
    """`say` hears every command, by task.  `folder` keeps the state of each task."""

    def __init__(
        self,
        host: str,
        folder: Path | None = None,
        say: Callable[[str, RoundCommand], None] = lambda _task, _command: None,
        port: int = 0,
        key: Callable[[str], str] | None = None,
    ) -> None:
        self._folder, self._say, self._key = folder, say, key
        self._tasks: dict[str, Rounds] = {}
        self._changed = threading.Condition()
        self._closed = threading.Event()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.json")):
                state = msgspec.json.decode(path.read_bytes(), type=Rounds)
                self._tasks[path.stem] = replace(state, version=state.version + VERSIONS_APART)
        outer = self

        lines = ssl.SSLContext(
            ssl.PROTOCOL_TLS_SERVER
        )  # without a certificate of its own: that is the task's
        lines.minimum_version, lines.verify_mode = ssl.TLSVersion.TLSv1_3, ssl.CERT_REQUIRED
        lines.num_tickets = 0
        lines.sni_callback = self._choose

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = allow_reuse_address = True

            def handle_error(self, request: object, address: object) -> None:
                if not isinstance(sys.exception(), OSError):  # a stranger whose handshake failed is no news
                    super().handle_error(request, address)  # type: ignore[arg-type]

        class Handler(socketserver.StreamRequestHandler):
            def setup(self) -> None:
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if key is not None:
                    self.request.settimeout(HANDSHAKE_S)
                    self.request = lines.wrap_socket(self.request, server_side=True)
                    self.request.settimeout(None)
                super().setup()

            def handle(self) -> None:
                outer._serve(self)

            def finish(self) -> None:
                super().finish()
                self.request.close()

        self._server = Server((host, port), Handler, bind_and_activate=False)
        try:
            self._server.server_bind()
        except OSError as error:
            self._server.server_close()
            raise Infeasible(
                f"the coordinator of rounds cannot listen on {host}:{port} ({error}); "
                "the site file's `address` must be one of this machine's"
            ) from None
        self._server.server_activate()
        self.address = f"{host}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        threading.Thread(target=self._tick, daemon=True).start()

    def open(self, task: str, rules: Rules) -> None:
        """Begin, or go on; other rules than before are taken from now on."""
        with self._changed:
            known = self._tasks.get(task, Rounds(rules))
            self._tasks[task] = replace(known, rules=rules)

    def tasks(self) -> list[str]:
        with self._changed:
            return sorted(self._tasks)

    def state(self, task: str) -> Rounds:
        with self._changed:
            if task not in self._tasks:
                raise NotFound(f"no rounds of task {task} here")
            return self._tasks[task]

    def forget(self, task: str) -> None:
        """It is over: its lines are closed, and nothing of it is kept."""
        with self._changed:
            if self._folder is not None:
                (self._folder / f"{task}.json").unlink(missing_ok=True)
            self._tasks.pop(task, None)
            self._changed.notify_all()

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def _tick(self) -> None:
        said = ""
        while not self._closed.wait(TICK_S):
            for task in list(self._tasks):
                try:
                    self._decide(task, Seen(0.0))
                except NotFound:
                    continue  # forgotten meanwhile
                except Exception as error:  # nothing was decided: that is done at the next tick; without this thread nobody is missed
                    if repr(error) != said:
                        said = repr(error)
                        log.exception("rounds of %s cannot go on", task)

    def _decide(self, task: str, fact: RoundFact) -> View:
        """Raises NotFound once the task is forgotten."""
        with self._changed:
            before = self.state(task)
            after, commands = decide_round(before, replace(fact, at_s=time.monotonic()))
            if commands or after.members != before.members:
                # raises where there is no room: then the fact was not heard, and is said again
                self._keep(task, after)
            self._tasks[task] = after
            shown = view(after)
            if not same_view(view(before), shown):
                self._changed.notify_all()
        for command in commands:
            self._say(task, command)
        return shown

    def _keep(self, task: str, state: Rounds) -> None:
        if self._folder is not None:
            part = self._folder / f"{task}.part"
            part.write_bytes(msgspec.json.encode(state))
            part.rename(self._folder / f"{task}.json")

    def _choose(self, line: ssl.SSLObject | ssl.SSLSocket, name: str | None, _context: object) -> int | None:
        """The task whose line this is to be."""
        assert self._key is not None
        for task in list(self._tasks):
            if line_name(task) == name:
                line.context = line_context(self._key(task), answers=True)
                return None
        return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    def _serve(self, stream: socketserver.StreamRequestHandler) -> None:
        beats = [("", "")]
        with contextlib.suppress(NotFound):
            with contextlib.suppress(OSError):  # reset: as good as closed
                self._answer(stream, beats)
            task, site = beats[0]
            if site and not self._closed.is_set():
                self._decide(task, HungUp(site, 0.0))

    def _answer(self, stream: socketserver.StreamRequestHandler, beats: list[tuple[str, str]]) -> None:
        """Until the line closes.  Raises NotFound once the task is forgotten.  Leaves in `beats` the (task, site) whose beat it carries."""
        shown: View | None = None
        while line := stream.rfile.readline(LINE_BYTES_MAX):
            try:
                request = json.loads(line)
                task, fact = str(request["task"]), decode_fact(request["fact"])
                own = self._key(task) if self._key is not None else ""
                known = hmac.compare_digest(own, str(request.get("key", "")))
                if task not in self._tasks or not known:
                    break
            except (ValueError, KeyError, TypeError, InvalidInput):
                break  # not one of ours
            now = self._decide(task, fact)
            if request.get("wait"):
                beats[0] = (task, fact.site)
                if shown is not None and same_view(now, shown):
                    now = self._news(task, shown)
            shown = now
            stream.wfile.write(msgspec.json.encode(now) + b"\n")

    def _news(self, task: str, shown: View) -> View:
        """The view once it differs from what was shown, or after a while."""
        with self._changed:
            self._changed.wait_for(lambda: not same_view(view(self.state(task)), shown), NEWS_S)
            return view(self.state(task))

"""The sockets that a host is served on, each with a server behind it."""

import socket
import threading
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from qipan import money, views
from qipan.api.app import make_app
from qipan.api.listen import Listen, bound, certificate_for
from qipan.host import Host
from qipan.login import People, Signer
from qipan.metrics import Metrics


class Server:
    """Serves a host on `path`, and where `listen` says by HTTPS too, each in a thread of its own.  Raises
    InvalidInput for a port or a certificate that cannot be."""

    def __init__(
        self, host: Host, path: Path, token: str, people: People | None = None, listen: Listen | None = None
    ) -> None:
        if listen is not None:  # first, for here is most that can be wrong
            certificate, key = certificate_for(listen, host.folder)
            secure = bound(listen)
        people = people or People(host, Signer(host.folder / "login.key", host.audience))
        self.metrics = Metrics(host)
        host.answers |= {"cost": partial(views.cost, host), "explained": partial(money.explained, host)}
        path.unlink(missing_ok=True)
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        line.bind(str(path))
        path.chmod(0o600)
        line.listen(2048)  # from now on a caller waits instead of being refused
        self._lines = [_Line(line, make_app(host, token, people=people, metrics=self.metrics))]
        self.url = ""
        if listen is not None:
            self.url = f"https://{listen.host}:{secure.getsockname()[1]}"
            more = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
            self._lines.append(
                _Line(secure, make_app(host, token, people=people, metrics=self.metrics), **more)
            )

    def start(self) -> None:
        for line in self._lines:
            line.thread.start()

    def stop(self) -> None:
        self.metrics.close()
        for line in self._lines:
            line.server.should_exit = True
        for line in self._lines:
            line.thread.join(5)
            line.socket.close()


class _Line:
    """One socket with the server behind it."""

    def __init__(self, line: socket.socket, app: FastAPI, **more: Any) -> None:
        self.socket = line
        config = uvicorn.Config(
            app, log_level="warning", lifespan="off", timeout_graceful_shutdown=2, server_header=False, **more
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([line],), daemon=True)

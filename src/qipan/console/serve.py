"""The console's process: a port on 127.0.0.1, a random key, and an end when its parent ends."""

import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import uvicorn

from qipan.client import AsyncClient
from qipan.console.app import make_console
from qipan.errors import InvalidInput

ADDRESS = "127.0.0.1"
START_LIMIT_S = 20.0


def run_console(store: Path, port: int, say: Callable[[str], None], *, with_parent: bool = False) -> None:
    """Serve the console of a store until a signal; `say` is told its address.  `port` 0: any free one.
    `with_parent`: end as well when standard input is closed.  Raises InvalidInput when the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
    except OSError as error:
        raise InvalidInput(f"port {port} cannot be used ({error}); give another --port, or 0") from None
    authority, key = f"{ADDRESS}:{listener.getsockname()[1]}", secrets.token_urlsafe(24)
    config = uvicorn.Config(
        make_console(AsyncClient(store), key, authority), log_level="warning", lifespan="off", server_header=False,
        timeout_graceful_shutdown=1, access_log=False,
    )  # fmt: skip
    server = uvicorn.Server(config)
    if with_parent:
        threading.Thread(target=_end_with_parent, args=(server,), daemon=True).start()
    listener.listen(128)
    say(f"http://{authority}/enter#{key}")
    server.run([listener])


def _end_with_parent(server: uvicorn.Server) -> None:
    sys.stdin.read()
    server.should_exit = True


class ConsoleProcess:
    """A console beside `qipan up`: its own process, ended with it however that ends."""

    def __init__(self, store: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "qipan.cli",
            "console",
            "--store",
            str(store),
            "--port",
            "0",
            "--with-parent",
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )  # fmt: skip

    def address(self) -> str:
        """Empty when the console did not start (its error is on standard error)."""
        timer = threading.Timer(START_LIMIT_S, self._process.kill)
        timer.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        timer.cancel()
        return line

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

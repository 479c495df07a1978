"""Sockets between the ranks of different sites: frames go out on one connection a pair, and lie here until wanted."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qipan.identity.lines import HANDSHAKE_S, line_context

KEEP = 8  # rounds; older frames are dropped
HEAD = struct.Struct("!II")
FRAME_BYTES_MAX = 1 << 31


def own_address(peer: str) -> str:
    """This host's address on the way to `peer` (host:port); nothing is sent."""
    host, _, port = peer.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])


@dataclass(frozen=True, slots=True)
class Frame:
    """`head`: round, generation, site, what, blocks ...; `data`: bytes as a uint8 tensor."""

    head: dict[str, Any]
    data: Tensor


class Mailbox:
    """Listens on `host`.  `address` is what twins connect to.  Only frames with the right `key` are taken in; with a
    `secret`, lines are encrypted and only its holders are let in."""

    def __init__(self, host: str, key: str, bytes_per_s: float = 0.0, secret: str = "") -> None:
        self._key, self._secret = key, secret
        self._bytes_per_s = bytes_per_s  # what goes out is held to this; 0: not held
        self._free_s = 0.0
        self._listener = socket.create_server((host, 0))
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._frames: list[Frame] = []
        self._changed = threading.Condition()
        self._out: dict[str, socket.socket] = {}
        self._locks: dict[str, threading.Lock] = {}
        self.sent_bytes = 0
        self.heard_s: dict[str, float] = {}  # site -> when bytes last came
        self.closed_s: dict[str, float] = {}  # site -> when a line of it closed
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, address: str, head: dict[str, Any], data: Tensor, timeout_s: float) -> None:
        """Raises OSError when nothing moves for `timeout_s`."""
        lock = self._locks.setdefault(address, threading.Lock())
        with lock:
            out = self._out.get(address)
            try:
                if out is None:
                    host, _, port = address.rpartition(":")
                    out = socket.create_connection((host, int(port)), timeout_s)
                    out.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    if self._secret:
                        out = line_context(self._secret, answers=False).wrap_socket(out)
                    self._out[address] = out
                out.settimeout(timeout_s)
                body = json.dumps({**head, "key": self._key}).encode()
                view = memoryview(data.reshape(-1).numpy().data)
                out.sendall(HEAD.pack(len(body), len(view)) + body)
                self._send_paced(out, view)
                self.sent_bytes += len(body) + len(view) + HEAD.size
            except OSError:
                broken = self._out.pop(address, None)
                if broken is not None:
                    broken.close()
                raise

    def _send_paced(self, out: socket.socket, view: memoryview) -> None:
        """All frames of this rank together keep to the rate: the link is shared with others."""
        step = len(view) if not self._bytes_per_s else max(4096, int(self._bytes_per_s * 0.02))
        for at in range(0, len(view), max(1, step)):
            piece = view[at : at + step]
            if self._bytes_per_s:
                begins_s = max(time.monotonic(), self._free_s)
                self._free_s = begins_s + len(piece) / self._bytes_per_s
                time.sleep(max(0.0, self._free_s - time.monotonic()))
            out.sendall(piece)

    def wait(self, enough: Callable[[list[Frame]], bool], give_up: Callable[[], bool]) -> list[Frame] | None:
        """The frames once they are `enough`; None when told to give up."""
        with self._changed:
            while True:
                if enough(self._frames):
                    return list(self._frames)
                if give_up():
                    return None
                self._changed.wait(0.1)

    def of(self, key: tuple[int, int], site: str, what: str) -> list[Frame]:
        """Frames of one (round, generation) from one site."""
        with self._changed:
            return [
                frame for frame in self._frames
                if (frame.head["round"], frame.head["generation"]) == key
                and frame.head["site"] == site and frame.head["what"] == what
            ]  # fmt: skip

    def forget(self, before_round: int) -> None:
        with self._changed:
            self._frames = [frame for frame in self._frames if frame.head["round"] >= before_round]

    def close(self) -> None:
        self._listener.close()
        for out in self._out.values():
            out.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        site = ""
        if self._secret:
            connection.settimeout(HANDSHAKE_S)
            try:
                connection = line_context(self._secret, answers=True).wrap_socket(
                    connection, server_side=True
                )
            except OSError:
                connection.close()
                return  # a stranger
            connection.settimeout(None)
        with connection:
            while True:
                try:
                    sizes = self._read(connection, HEAD.size, site)
                    head_bytes, data_bytes = HEAD.unpack(sizes)
                    if head_bytes > 1 << 20 or data_bytes > FRAME_BYTES_MAX:
                        return
                    head = json.loads(bytes(self._read(connection, head_bytes, site)))
                    if head.pop("key", None) != self._key:
                        return  # a stranger
                    site = head["site"]
                    data = self._read(connection, data_bytes, site)
                except (OSError, ValueError, EOFError):
                    self.closed_s[site] = time.monotonic()
                    return  # the sender left; it comes back on a new connection
                with self._changed:
                    self._frames.append(
                        Frame(
                            head,
                            torch.frombuffer(data, dtype=torch.uint8)
                            if data
                            else torch.empty(0, dtype=torch.uint8),
                        )
                    )
                    newest = head["round"]
                    self._frames = [frame for frame in self._frames if frame.head["round"] > newest - KEEP]
                    self._changed.notify_all()

    def _read(self, connection: socket.socket, count: int, site: str) -> bytearray:
        buffer = bytearray(count)
        view = memoryview(buffer)
        at = 0
        while at < count:
            got = connection.recv_into(view[at:], min(count - at, 1 << 18))
            if not got:
                raise EOFError
            at += got
            self.heard_s[site] = time.monotonic()
        return buffer

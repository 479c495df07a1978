"""How a link is opened: the address of a board, hello and the words of welcome; `ask_once` opens one for that alone."""

import socket
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec
from websockets.client import ClientProtocol
from websockets.exceptions import WebSocketException
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.uri import parse_uri

from qipan.errors import InvalidInput, QipanError, Unreachable

MESSAGE_BYTES_MAX = 64 << 20
OPENING_S = 20.0  # from the first packet to `welcome`


def ask_once(
    url: str, context: ssl.SSLContext, check: Callable[[bytes], None], hello: Any, path: str = "join", limit_s: float = OPENING_S
) -> Any:  # fmt: skip
    """Connect, say hello, return the words of welcome: how a board joins, and how a child asks a standby.  It is over in `limit_s`,
    whatever the other side does: one thread reads and writes, as a thread inside a read of TLS is not woken by a close beside it.
    Raises Unreachable, QipanError with the other side's words."""
    host, port = address_of(url)
    end_s = time.monotonic() + limit_s
    try:
        with socket.create_connection((host, port), timeout=limit_s) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # hello follows the request at once
            sock.settimeout(_left_s(end_s))
            with context.wrap_socket(sock) as tls:
                check(tls.getpeercert(binary_form=True) or b"")
                protocol = ClientProtocol(
                    parse_uri(f"wss://{host}:{port}/{path}"), max_size=MESSAGE_BYTES_MAX
                )
                kind, body = _welcome(tls, protocol, hello, end_s)
    except (OSError, WebSocketException) as error:
        raise Unreachable(f"{url} does not answer ({tls_words(error)}); is the board served there?") from None
    if kind != "welcome":
        raise QipanError(f"{url} {kind}: {body}")
    return body


def _welcome(tls: ssl.SSLSocket, protocol: ClientProtocol, hello: Any, end_s: float) -> tuple[str, Any]:
    """(kind, body) of the other side's first message, or ("refused", why).  Raises OSError, WebSocketException."""
    parts: list[bytes] = []
    protocol.send_request(protocol.connect())
    while True:
        _send_all(tls, protocol, end_s)
        tls.settimeout(_left_s(end_s))
        data = tls.recv(65536)
        if data:
            protocol.receive_data(data)
        else:
            protocol.receive_eof()
        for event in protocol.events_received():
            if isinstance(event, Response):
                if protocol.handshake_exc is not None:
                    raise protocol.handshake_exc
                protocol.send_binary(msgspec.msgpack.encode(("hello", hello)))
            elif isinstance(event, Frame) and event.opcode in (Opcode.BINARY, Opcode.TEXT, Opcode.CONT):
                parts.append(bytes(event.data))
                if event.fin:
                    protocol.send_close()
                    _send_all(tls, protocol, end_s)
                    return _first_message(b"".join(parts))
            elif isinstance(event, Frame) and event.opcode is Opcode.CLOSE and protocol.close_reason:
                return "refused", protocol.close_reason
        if not data:
            raise ConnectionResetError("it closed the connection without a word")


def _first_message(payload: bytes) -> tuple[str, Any]:
    try:
        kind, body = msgspec.msgpack.decode(payload, type=tuple[str, Any])
    except msgspec.MsgspecError:
        return "answered", "an unreadable message"
    return (kind, body) if kind == "welcome" else ("answered", repr(kind[:40]))


def _send_all(tls: ssl.SSLSocket, protocol: ClientProtocol, end_s: float) -> None:
    for data in protocol.data_to_send():
        while data:
            tls.settimeout(_left_s(end_s))
            data = data[tls.send(data) :]


def _left_s(end_s: float) -> float:
    """For a socket's next call.  Raises TimeoutError."""
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("no answer in time")
    return left_s


def address_of(url: str) -> tuple[str, int]:
    """(host, port) of `grid://host:port`.  Raises QipanError."""
    try:
        parts = urlsplit(url if "://" in url else f"grid://{url}")
        host, port = parts.hostname, parts.port or 8443
    except ValueError:
        host, port = None, 0
    if not host:
        raise InvalidInput(f"{url[:100]!r} is no address of a board; it looks like grid://host:8443")
    return host, port


def tls_words(error: Exception) -> str:
    """What OpenSSL or the kernel said, without the source line."""
    reason = getattr(error, "verify_message", None) or getattr(error, "reason", None)
    return str(reason or error)

"""Bodies of chunks over HTTP: read every few milliseconds, not with every packet, which costs a third less of the processor."""

import http.client
import select
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path

from qipan.errors import NotAllowed, Unreachable

PIECE_BYTES = 2**19
NAP_S = 0.008  # eight connections fill 1 Gbit/s with 128 KiB each in that time: less than a socket's buffer
SMALL_BYTES = 2**17  # the end of a chunk is not waited for


class HttpReader:
    """One connection a thread, kept open.  `url` is http or https, with TLS 1.3 and `ca_file` or what the machine trusts."""

    def __init__(
        self, name: str, url: str, headers: Mapping[str, str], ca_file: Path | None, limit_s: float
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        self._name, self._path, self._headers, self._limit_s = name, parts.path.rstrip("/"), headers, limit_s
        self._address = (parts.hostname or "", parts.port)
        self._context = None
        if parts.scheme == "https":
            self._context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
            self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._kept = threading.local()

    def pieces(self, path: str) -> Iterator[memoryview]:
        """A piece is good until the next is asked for.  Raises FileNotFoundError, NotAllowed, Unreachable."""
        try:
            yield from self._pieces(path)
        except (http.client.HTTPException, OSError) as error:
            self._forget()
            if isinstance(error, FileNotFoundError):
                raise
            raise Unreachable(
                f"storage {self._name} does not answer ({type(error).__name__} {error})"
            ) from None
        except GeneratorExit:  # whoever reads had enough: the rest of the body is still to come on that line
            self._forget()
            raise

    def _pieces(self, path: str) -> Iterator[memoryview]:
        answer, link = self._asked(path)
        room, left = self._room(), answer.length
        if left is None:
            raise http.client.HTTPException("a body without a length")
        while left:
            if left > SMALL_BYTES:
                time.sleep(NAP_S)
            piece = room[: min(left, PIECE_BYTES)]
            filled = 0
            while not filled or (filled < len(piece) and _more(link)):
                came = answer.fp.readinto1(piece[filled:])
                if not came:
                    raise http.client.HTTPException(f"the body ended {left - filled} bytes early")
                filled += came
            left -= filled
            yield piece[:filled]
        answer.length = 0
        answer.read()

    def _asked(self, path: str) -> tuple[http.client.HTTPResponse, socket.socket]:
        for fresh in (False, True):
            link = self._link()
            try:
                link.request("GET", f"{self._path}/{path}", headers=dict(self._headers))
                line = link.sock  # the connection lets go of it when the answer says that it is the last
                answer = link.getresponse()
            except (http.client.RemoteDisconnected, ConnectionError):
                self._forget()  # it was closed while nobody used it
                if fresh:
                    raise
                continue
            if answer.status == 200:
                return answer, line
            answer.read()
            if answer.status == 404:
                raise FileNotFoundError(path)
            if answer.status in (401, 403):
                raise NotAllowed(
                    f"storage {self._name} refuses us ({answer.status}); look at its token or keys"
                )
            raise http.client.HTTPException(f"answer {answer.status}")
        raise AssertionError

    def _link(self) -> http.client.HTTPConnection:
        link: http.client.HTTPConnection | None = getattr(self._kept, "link", None)
        if link is None:
            host, port = self._address
            if self._context is None:
                link = http.client.HTTPConnection(host, port, timeout=self._limit_s)
            else:
                link = http.client.HTTPSConnection(host, port, timeout=self._limit_s, context=self._context)
            self._kept.link = link
        return link

    def _room(self) -> memoryview:
        if not hasattr(self._kept, "room"):
            self._kept.room = memoryview(bytearray(PIECE_BYTES))
        return self._kept.room  # type: ignore[no-any-return]

    def _forget(self) -> None:
        link = getattr(self._kept, "link", None)
        self._kept.link = None
        if link is not None:
            link.close()


def _more(link: socket.socket) -> bool:
    """Is there something to read at once?"""
    if isinstance(link, ssl.SSLSocket) and link.pending():
        return True
    look = select.poll()  # which takes file numbers beyond 1023, as select does not
    look.register(link, select.POLLIN)
    return bool(look.poll(0))

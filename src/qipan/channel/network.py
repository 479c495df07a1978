"""The network form of a channel: one websocket a link, TLS on every one, all sockets of a process on one thread.

The child connects outward and connects again after a cut.  Frames wait in a queue of bounded size; what does not fit is
dropped like a frame that was lost on the way, and `Link` sends it again: that is the whole of back-pressure.  Each
message is a batch: (kind, body), with these kinds:

    hello    who I am (the child, first)          welcome  the answer, or the close of the connection says why not
    frames   a list of a `Link`'s frames          ask      (number, name, body): answered once, for questions beside the
    answer   (number, ok, body)                            protocol of facts and commands (logs, renewal of a certificate)
"""

import contextlib
import itertools
import logging
import os
import queue
import random
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoAnswer
from dataclasses import dataclass
from typing import Any

import msgspec
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from qipan.channel.opening import MESSAGE_BYTES_MAX, OPENING_S, address_of, tls_words
from qipan.errors import QipanError, Unreachable

log = logging.getLogger("qipan.channel")

QUEUE_BYTES_MAX = 4 << 20  # of frames that wait for a slow or absent link
BATCH_BYTES_MAX = 1 << 18
HEARTBEAT_S = 8.0
SILENT_S = 20.0  # a connection without a sign of life for so long is closed
RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0, 3.0)
JITTER = 0.5  # of a wait, so that a thousand children do not come back as one
CONNECTIONS_MAX = 4096
ANSWER_S = 20.0
WORKERS = 4  # that answer, or ask what the board itself wants to know
FIRST = (
    "lead",
    "parents",
)  # who leads is asked and answered beside all else, which may wait for a slow board


class NetworkCarrier:
    """One end of a link between processes; it outlives its connections.  Any thread may use it.

    `heard_s` is when something last came from the other side (monotonic), None before the first time."""

    def __init__(self, wake: "Callable[[_Connection], None]", arrived: Callable[[], None]) -> None:
        self._wake, self._arrived = wake, arrived
        self._lock = threading.Lock()
        self._out: deque[bytes] = deque()
        self._out_bytes = 0
        self._in: deque[bytes] = deque()
        self.dropped = 0
        self.bytes_in = self.bytes_out = 0  # of frames
        self.connection: _Connection | None = None
        self.heard_s: float | None = None

    @property
    def connected(self) -> bool:
        return self.connection is not None

    def send(self, frame: bytes) -> None:
        with self._lock:
            if self.connection is None or self._out_bytes + len(frame) > QUEUE_BYTES_MAX:
                self.dropped += 1
                return
            self._out.append(frame)
            self._out_bytes += len(frame)
            connection = self.connection
        self._wake(connection)

    def receive(self) -> list[bytes]:
        if not self._in:
            return []
        with self._lock:
            frames = list(self._in)
            self._in.clear()
        return frames

    def ask(self, name: str, body: Any, limit_s: float = ANSWER_S) -> Any:
        """A question to the other side.  Raises Unreachable, or QipanError with the other side's words."""
        connection = self.connection
        if connection is None:
            raise Unreachable("the board at the other end of the link is not connected; try again when it is")
        return connection.ask(name, body, limit_s)

    def take_batch(self) -> list[bytes]:
        """At most BATCH_BYTES_MAX of what waits."""
        with self._lock:
            batch: list[bytes] = []
            size = 0
            while self._out and (not batch or size + len(self._out[0]) <= BATCH_BYTES_MAX):
                frame = self._out.popleft()
                size += len(frame)
                batch.append(frame)
            self._out_bytes -= size
            self.bytes_out += size
        return batch

    def take_in(self, frames: list[bytes]) -> None:
        with self._lock:
            self._in.extend(frames)
            self.bytes_in += sum(map(len, frames))
        self._arrived()

    def waiting(self) -> bool:
        return bool(self._out)

    def cut(self) -> None:
        """The connection is gone; what waited in it is lost, as on a wire."""
        with self._lock:
            self.connection = None
            self._out.clear()
            self._out_bytes = 0
        self._arrived()


@dataclass(frozen=True, slots=True)
class Admitted:
    """Whom a listener let in: the carrier that its frames go to, the words of welcome, and who answers its
    questions."""

    carrier: NetworkCarrier
    welcome: Any
    answer: Callable[[str, Any], Any]
    until_s: float = float("inf")  # when its certificate ends (Unix time)


#: (peer's certificate in DER or None, the path of the request, hello) -> admitted; raises QipanError to refuse
Admit = Callable[[bytes | None, str, Any], Admitted]


class Network:
    """All sockets of a process.  `refused` hears of every identity that was turned away: (address, why)."""

    def __init__(self, refused: Callable[[str, str], None] = lambda _address, _why: None) -> None:
        self.refused = refused
        self._selector = selectors.DefaultSelector()
        self._bell, self._ring = os.pipe()
        os.set_blocking(self._bell, False)
        os.set_blocking(self._ring, False)
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        self._todo: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._rung = False
        self._news: deque[_Connection] = deque()
        self._connections: set[_Connection] = set()
        self._listeners: list[_Listener] = []
        self._stopped = threading.Event()
        self.bytes_in = self.bytes_out = 0  # of websockets, before TLS
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="qipan-answers")
        self._first = ThreadPoolExecutor(WORKERS, thread_name_prefix="qipan-leads")
        self._thread = threading.Thread(target=self._run, name="qipan-network", daemon=True)
        self._thread.start()

    # ---- used by others ------------------------------------------------------------------------------------------------

    def carrier(self, arrived: Callable[[], None] = lambda: None) -> NetworkCarrier:
        return NetworkCarrier(self.has_news, arrived)

    def listen(self, host: str, port: int, context: Callable[[], ssl.SSLContext], admit: Admit) -> int:
        """Returns the port.  `context` is asked for each connection, so that a renewed certificate is used."""
        listener = _Listener(socket.create_server((host, port), backlog=1024), context, admit)
        listener.socket.setblocking(False)
        self._do(lambda: self._add_listener(listener))
        return int(listener.socket.getsockname()[1])

    def dial(
        self, url: str, context: Callable[[], ssl.SSLContext], check: Callable[[bytes], None], hello: Callable[[], Any],
        carrier: NetworkCarrier, answer: Callable[[str, Any], Any], welcomed: Callable[[Any], None] = lambda _words: None,
    ) -> "Dialer":  # fmt: skip
        """Keep a connection to `url` up.  `check` gets the server's certificate and raises to refuse it."""
        return Dialer(self, url, context, check, hello, carrier, answer, welcomed)

    def has_news(self, connection: "_Connection") -> None:
        """There is something to send on it."""
        self._news.append(connection)
        self.wake()

    def wake(self) -> None:
        if not self._rung:
            self._rung = True
            with contextlib.suppress(BlockingIOError):
                os.write(self._ring, b"!")

    def close(self) -> None:
        self._stopped.set()
        self.wake()
        self._thread.join(5)
        for workers in (self._workers, self._first):
            workers.shutdown(wait=False, cancel_futures=True)

    # ---- the loop ------------------------------------------------------------------------------------------------------

    def _do(self, act: Callable[[], None]) -> None:
        self._todo.put(act)
        self._rung = False
        self.wake()

    def _add_listener(self, listener: "_Listener") -> None:
        self._listeners.append(listener)
        self._selector.register(listener.socket, selectors.EVENT_READ, listener)

    def add(self, connection: "_Connection") -> None:
        """Called from any thread."""
        self._do(lambda: self._begin(connection))

    def _begin(self, connection: "_Connection") -> None:
        self._connections.add(connection)
        self._selector.register(connection.socket, connection.registered, connection)
        self._turn(connection)

    def _run(self) -> None:
        next_look_s = 0.0
        while not self._stopped.is_set():
            for key, _ in self._selector.select(1.0):
                if key.data is None:
                    os.read(self._bell, 4096)
                    self._rung = False  # after the read, which else takes the ring of who comes between
                elif isinstance(key.data, _Listener):
                    self._accept(key.data)
                else:
                    self._turn(key.data)
            while not self._todo.empty():
                self._todo.get()()
            now_s = time.monotonic()
            while self._news:
                self._turn(self._news.popleft())
            if now_s >= next_look_s:
                next_look_s = now_s + 1.0
                for connection in list(self._connections):
                    self._turn(connection, look_s=now_s)
        for connection in list(self._connections):
            connection.close("the board stops")
        for listener in self._listeners:
            listener.socket.close()
        self._selector.close()

    def _turn(self, connection: "_Connection", look_s: float | None = None) -> None:
        """One connection's failure is never the others'."""
        if connection.closed:
            return
        try:
            if look_s is None or connection.look(look_s):
                connection.turn()
        except Exception:
            log.exception("a connection failed")
            connection.close("an error on this side")
        if not connection.closed:
            wants = connection.wants()
            if wants != connection.registered:
                connection.registered = wants
                self._selector.modify(connection.socket, wants, connection)

    def _accept(self, listener: "_Listener") -> None:
        while True:
            try:
                sock, address = listener.socket.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as error:  # no more file descriptors: the next turn tries again
                log.warning("cannot accept a connection: %s", error)
                return
            if len(self._connections) >= CONNECTIONS_MAX:
                sock.close()
                continue
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                tls = listener.context().wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            except (OSError, ssl.SSLError) as error:
                log.warning("cannot begin TLS: %s", error)
                sock.close()
                continue
            name = f"{address[0]}:{address[1]}"
            self._begin(
                _Connection(self, tls, ServerProtocol(max_size=MESSAGE_BYTES_MAX), name, listener.admit)
            )

    def forget(self, connection: "_Connection") -> None:
        self._connections.discard(connection)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)

    def work(self, act: Callable[[], None], first: bool = False) -> None:
        """`first`: by workers kept for who leads, who never wait for what the others do."""
        if not self._stopped.is_set():
            (self._first if first else self._workers).submit(self._worked, act)

    def _worked(self, act: Callable[[], None]) -> None:
        """Nobody waits for it: what fails is said here."""
        try:
            act()
        except Exception:
            log.exception("what was asked of a worker failed")
            raise


@dataclass(frozen=True, slots=True)
class _Listener:
    socket: socket.socket
    context: Callable[[], ssl.SSLContext]
    admit: Admit


class _Connection:
    """One socket: TLS, then the websocket's opening, then messages.  Only the network's thread touches it, but for
    `ask`, `say` and `drop`."""

    def __init__(
        self, network: Network, sock: ssl.SSLSocket, protocol: ServerProtocol | ClientProtocol, address: str,
        admit: Admit | None = None, hello: Any = None, dialer: "Dialer | None" = None,
    ) -> None:  # fmt: skip
        self.network, self.socket, self.protocol, self.address = network, sock, protocol, address
        self._admit, self._hello, self._dialer = admit, hello, dialer
        self._path = ""
        self.carrier: NetworkCarrier | None = None
        self._answer: Callable[[str, Any], Any] | None = None
        self._shaken = dialer is not None  # TLS is up
        self._out = bytearray()
        self._blocked = False
        self.registered = selectors.EVENT_READ
        self.closed = False
        self._began_s = self._heard_s = self._said_s = time.monotonic()
        self._parts: list[bytes] = []
        self._asked: dict[int, Future[Any]] = {}
        self._numbers = itertools.count(1)  # many threads ask
        self._posts: deque[tuple[str, Any]] = deque()
        self.until_s = float("inf")  # the peer's certificate ends (Unix time)

    # ---- any thread ----------------------------------------------------------------------------------------------------

    def ask(self, name: str, body: Any, limit_s: float) -> Any:
        answer: Future[Any] = Future()
        number = next(self._numbers)
        self._asked[number] = answer
        self._post("ask", (number, name, body))
        try:
            if self.closed:  # the cut may have looked for questions before this one was noted
                raise Unreachable("the link was cut; try again")
            return answer.result(limit_s)
        except NoAnswer:
            raise Unreachable(f"no answer from the other board in {limit_s:g} s; try again") from None
        finally:
            self._asked.pop(number, None)

    def _post(self, kind: str, body: Any) -> None:
        self._posts.append((kind, body))
        self.network.has_news(self)

    def drop(self, why: str) -> None:
        self.network._do(lambda: self.close(why))

    # ---- the network's thread ------------------------------------------------------------------------------------------

    def wants(self) -> int:
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._blocked else 0)

    def turn(self) -> None:
        if not self._shaken and not self._shake():
            return
        self._read()
        self._write()

    def _shake(self) -> bool:
        try:
            self.socket.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLWantWriteError:
            self._blocked = True
            return False
        except (OSError, ssl.SSLError) as error:
            self._refuse(tls_words(error))
            return False
        self._blocked = False
        self._shaken = True
        return True

    def _read(self) -> None:
        while not self.closed:
            try:
                data = self.socket.recv(65536)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except (OSError, ssl.SSLError) as error:
                if self.carrier is None and self._dialer is not None:
                    self._dialer.refused(tls_words(error))
                self.close(tls_words(error))
                return
            self._heard_s = time.monotonic()
            self.network.bytes_in += len(data)
            if self.carrier is not None:
                self.carrier.heard_s = self._heard_s
            if data:
                self.protocol.receive_data(data)
            else:
                self.protocol.receive_eof()
            for event in self.protocol.events_received():
                self._event(event)
            if not data:
                self.close(self.protocol.close_reason or "the other side closed")
                return

    def _event(self, event: Any) -> None:
        if isinstance(event, Request):
            assert isinstance(self.protocol, ServerProtocol)
            self._path = event.path[:200]
            self.protocol.send_response(self.protocol.accept(event))
        elif isinstance(event, Response):
            if self.protocol.state is State.OPEN:
                self._send("hello", self._hello)
        elif isinstance(event, Frame) and event.opcode in (Opcode.BINARY, Opcode.TEXT, Opcode.CONT):
            self._parts.append(bytes(event.data))
            if event.fin:
                whole, self._parts = b"".join(self._parts), []
                self._message(whole)
        elif isinstance(event, Frame) and event.opcode is Opcode.CLOSE:
            why = self.protocol.close_reason or "the other side closed"
            if self._dialer is not None and self.carrier is None:
                self._dialer.refused(why)
            self.close(why)

    def _message(self, payload: bytes) -> None:
        try:
            kind, body = msgspec.msgpack.decode(payload, type=tuple[str, Any])
        except msgspec.MsgspecError:
            self._refuse("an unreadable message")
            return
        if self.carrier is None:
            self._open(kind, body)
        elif kind == "frames" and isinstance(body, list):
            self.carrier.take_in([frame for frame in body if isinstance(frame, bytes)])
        elif kind == "ask" and isinstance(body, list) and len(body) == 3:
            self.network.work(lambda: self._reply(*body), first=body[1] in FIRST)
        elif kind == "answer" and isinstance(body, list) and len(body) == 3:
            asked = self._asked.get(body[0])
            if asked is not None and not asked.done():
                if body[1]:
                    asked.set_result(body[2])
                else:
                    asked.set_exception(error_of(body[2]))
        else:
            log.warning("%s sent %r, which this release does not know", self.address, kind[:40])

    def _open(self, kind: str, body: Any) -> None:
        """The first message: a child's hello at the parent, the parent's welcome at the child."""
        if self._admit is not None and kind == "hello":
            try:
                admitted = self._admit(self.socket.getpeercert(binary_form=True), self._path, body)
            except QipanError as error:
                self._refuse(str(error))
                return
            self._send("welcome", admitted.welcome)
            self._answer, self.until_s = admitted.answer, admitted.until_s
            self._joined(admitted.carrier)
        elif self._dialer is not None and kind == "welcome":
            self._answer = self._dialer.answer
            try:
                self._dialer.up(body)
            except QipanError as error:
                self._refuse(str(error))
                return
            self._joined(self._dialer.carrier)
        else:
            self._refuse(f"began with {kind[:40]!r}")

    def _joined(self, carrier: NetworkCarrier) -> None:
        before = carrier.connection
        if before is not None and before is not self:
            before.close("the same board connected again")
        carrier.connection, self.carrier = self, carrier
        carrier.heard_s = time.monotonic()
        carrier._arrived()

    def _reply(self, number: int, name: str, body: Any) -> None:
        try:
            assert self._answer is not None
            ok, answer = True, self._answer(name, body)
        except QipanError as error:
            ok, answer = False, (error.exit_code, str(error))
        except Exception as error:
            log.exception("cannot answer %s", name)
            ok, answer = False, (100, f"{type(error).__name__}: {error}")
        self._post("answer", (number, ok, answer))

    def _send(self, kind: str, body: Any) -> None:
        self._said_s = time.monotonic()
        self.protocol.send_binary(msgspec.msgpack.encode((kind, body)))

    def _write(self) -> None:
        if self.closed:
            return
        self._collect()
        while not self.closed:
            while self._out:
                try:
                    sent = self.socket.send(self._out)
                except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    self._blocked = True
                    return
                except (OSError, ssl.SSLError) as error:
                    self.close(tls_words(error))
                    return
                del self._out[:sent]
                self.network.bytes_out += sent
            self._blocked = False
            if not (self._posts or (self.carrier is not None and self.carrier.waiting())):
                return
            self._collect()

    def _collect(self) -> None:
        """Fill the buffer: what the protocol wants to say, then one batch of frames."""
        if self.protocol.state is State.OPEN:
            while self._posts:
                self._send(*self._posts.popleft())
            if self.carrier is not None and (batch := self.carrier.take_batch()):
                self._send("frames", batch)
        for data in self.protocol.data_to_send():
            self._out += data

    def look(self, now_s: float) -> bool:
        """Once a second: heartbeats, and connections that went silent.  Returns whether there is something to send."""
        if self.carrier is None and now_s > self._began_s + OPENING_S:
            self._refuse(f"no hello in {OPENING_S:g} s")
        elif now_s > self._heard_s + SILENT_S:
            self.close(f"silent for {SILENT_S:g} s")
        elif time.time() > self.until_s:
            self.close("its certificate has expired")
        elif (
            self._dialer is not None
            and self.protocol.state is State.OPEN
            and now_s > self._said_s + HEARTBEAT_S - 1
        ):
            self._said_s = now_s
            self.protocol.send_ping(b"")
            return True
        return False

    def _refuse(self, why: str) -> None:
        if self._dialer is None:
            self.network.refused(self.address, why)
        else:
            self._dialer.refused(why)
        self.close(why)

    def close(self, why: str) -> None:
        if self.closed:
            return
        self.closed = True
        if self._shaken and self.protocol.state is State.OPEN:
            with contextlib.suppress(OSError, ssl.SSLError):
                self.protocol.send_close(1008, why.encode()[:120].decode(errors="ignore"))
                for data in self.protocol.data_to_send():
                    self._out += data
                self.socket.send(self._out)
        self.network.forget(self)
        with contextlib.suppress(OSError):
            self.socket.close()
        for asked in list(self._asked.values()):
            if not asked.done():
                asked.set_exception(Unreachable(f"the link was cut ({why}); try again"))
        if self.carrier is not None and self.carrier.connection is self:
            self.carrier.cut()
        if self._dialer is not None:
            self._dialer.down(why)


class Dialer:
    """Keeps the child's connection up: connects, and connects again, on a thread of its own."""

    def __init__(
        self, network: Network, url: str, context: Callable[[], ssl.SSLContext], check: Callable[[bytes], None],
        hello: Callable[[], Any], carrier: NetworkCarrier, answer: Callable[[str, Any], Any], welcomed: Callable[[Any], None],
    ) -> None:  # fmt: skip
        self._network, self._context, self._check, self._hello = network, context, check, hello
        self.urls = (url,)
        self.carrier, self.answer, self._welcomed = carrier, answer, welcomed
        self.last_refusal = ""
        self._tries = 0
        self._need = threading.Event()
        self._need.set()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="qipan-dial", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._need.wait()
            if self._ended:
                return
            self._need.clear()
            if self.carrier.connected:
                continue
            url = self.urls[self._tries % len(self.urls)]
            try:
                self._network.add(self._connect(url))
            except (QipanError, OSError, ssl.SSLError, ValueError) as error:
                self.refused(tls_words(error) if isinstance(error, OSError) else str(error))
                self.down(str(error))

    def _connect(self, url: str) -> _Connection:
        host, port = address_of(url)
        sock = socket.create_connection((host, port), timeout=OPENING_S)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls = self._context().wrap_socket(sock, server_side=False)
        except BaseException:
            sock.close()
            raise
        try:
            shown = tls.getpeercert(binary_form=True)
            self._check(shown or b"")
            tls.setblocking(False)
            protocol = ClientProtocol(parse_uri(f"wss://{host}:{port}/link"), max_size=MESSAGE_BYTES_MAX)
            protocol.send_request(protocol.connect())
            return _Connection(
                self._network, tls, protocol, f"{host}:{port}", hello=self._hello(), dialer=self
            )
        except BaseException:
            tls.close()
            raise

    def refused(self, why: str) -> None:
        if why != self.last_refusal:
            log.warning("link to %s: %s", self.urls[self._tries % len(self.urls)], why)
        self.last_refusal = why

    def up(self, words: Any) -> None:
        """Raises QipanError when what the other side says of itself is not accepted."""
        self._welcomed(words)
        self._tries, self.last_refusal = 0, ""

    def down(self, _why: str) -> None:
        wait_s = RETRY_S[min(self._tries, len(RETRY_S) - 1)]
        self._tries += 1
        timer = threading.Timer(wait_s * (1 + JITTER * random.random()), self._need.set)
        timer.daemon = True
        timer.start()

    def again(self) -> None:
        """Connect anew, with the certificate that is there now."""
        connection = self.carrier.connection
        if connection is not None:
            connection.drop("a new certificate")

    def turn_to(self, url: str) -> None:
        """From now on another address, at once."""
        self.urls, self._tries = (url,), 0
        connection = self.carrier.connection
        if connection is not None:
            connection.drop(f"{url} leads now")
        self._need.set()

    def end(self) -> None:
        self._ended = True
        self._need.set()


def error_of(told: Any) -> QipanError:
    from qipan.errors import Infeasible, InvalidInput, NotAllowed, NotFound, OverLimit

    kinds: dict[int, type[QipanError]] = {
        kind.exit_code: kind
        for kind in (InvalidInput, NotFound, Infeasible, OverLimit, Unreachable, NotAllowed)
    }
    code, text = told
    return kinds.get(code, QipanError)(text)

"""A site's line to the coordinator of its rounds: facts out, the newest view back."""

import json
import socket
import threading
import time
from typing import Any

import msgspec

from qipan.identity.lines import line_context, line_name
from qipan.rounds import RoundFact, Seen, View, encode_fact, same_view

BEAT_S = 0.3


class Desk:
    """With a `key`, over encrypted lines.  Three connections: one for the beat, which also waits for news, one for what must be said now, one for what is said
    while training goes on.  A coordinator that cannot be reached is tried again; meanwhile the last view holds."""

    def __init__(self, address: str, task: str, site: str, key: str = "") -> None:
        self._address, self._task, self._site, self._key = address, task, site, key
        self._view: View | None = None
        self._changed = threading.Condition()
        self._lines: dict[str, Any] = {}
        self._posted: RoundFact | None = None
        self._closed = False
        threading.Thread(target=self._beat, daemon=True).start()

    def tell(self, fact: RoundFact) -> None:
        self._ask("now", fact)

    def post(self, fact: RoundFact) -> None:
        """Without waiting for the answer.  Said again while it is on its way, it goes out once."""
        with self._changed:
            if self._posted is not None:
                return  # one at a time: whoever looks at the view afterwards says the next, or this one again
            self._posted = fact
        threading.Thread(target=self._send_posted, args=(fact,), daemon=True).start()

    def view(self) -> View | None:
        return self._view

    def wait(self, seconds: float, shown: View | None = None) -> None:
        """Until the view differs from `shown`, or something changes, or so long."""
        with self._changed:
            if shown is None or self._view is None or same_view(self._view, shown):
                self._changed.wait(seconds)

    def close(self) -> None:
        self._closed = True

    def _beat(self) -> None:
        while not self._closed:
            began_s = time.monotonic()
            self._ask("beat", Seen(0.0, self._site))
            time.sleep(max(0.0, min(BEAT_S, 0.02 if self._view else BEAT_S) - (time.monotonic() - began_s)))

    def _send_posted(self, fact: RoundFact) -> None:
        self._ask("post", fact)
        with self._changed:
            self._posted = None
            self._changed.notify_all()

    def _ask(self, line: str, fact: RoundFact) -> None:
        try:
            stream = self._lines.get(line)
            if stream is None:
                host, _, port = self._address.rpartition(":")
                connection = socket.create_connection((host, int(port)), 5.0)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._key:
                    context = line_context(self._key, answers=False)
                    connection = context.wrap_socket(connection, server_hostname=line_name(self._task))
                stream = self._lines[line] = connection.makefile("rwb")
            request = {
                "task": self._task,
                "key": self._key,
                "wait": line == "beat",
                "fact": encode_fact(fact),
            }
            stream.write(json.dumps(request).encode() + b"\n")
            stream.flush()
            answer = stream.readline()
            if not answer:
                raise OSError("the coordinator closed the line")
            shown = msgspec.json.decode(answer, type=View)
        except (OSError, ValueError, msgspec.MsgspecError):
            self._lines.pop(line, None)
            time.sleep(BEAT_S)
            return
        with self._changed:
            if self._view is None or shown.version > self._view.version:
                changed = self._view is None or not same_view(shown, self._view)
                self._view = shown
                if changed:
                    self._changed.notify_all()

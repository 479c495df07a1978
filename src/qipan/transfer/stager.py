"""Who brings a board's tasks their data, and keeps what they saved where other boards find it.  Copies run on threads of their
own: an engine asks, and looks again."""

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qipan.errors import QipanError
from qipan.hardware import BoardId, Storage
from qipan.network import Link
from qipan.quantities import format_bytes
from qipan.staging import CHUNK_BYTES, Manifest, newest
from qipan.transfer.fetch import Pace, Progress, fetch
from qipan.transfer.parallel import in_parallel
from qipan.transfer.storage import ContentStorage, open_storage

TRIES, AGAIN_S = 3, 5.0
RELEASE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """`why`: what is still on the way, or what went wrong."""

    state: Literal["here", "coming", "failed"]
    why: str = ""


@dataclass(slots=True)
class _Copy:
    wanted: tuple[int, float]  # attempt and saved_s
    progress: Progress
    source: str = ""
    ended: Arrival | None = None


class Stager:
    """`own`: the board's storage; `storages`: all that are known, its own among them; `ways`: links between their sites.
    `again_s`: what could not be kept is tried again after so long."""

    def __init__(
        self, own: Storage, storages: Iterable[Storage], ways: Iterable[Link] = (), again_s: float = AGAIN_S
    ) -> None:
        self._again_s = again_s
        self._own, self._keep_s = open_storage(own), own.keep_s
        self._others = {store.site: store for store in storages if store.site != own.site}
        self._opened: dict[BoardId, ContentStorage] = {own.site: self._own}
        self._paces = {
            link.source: Pace(link.bytes_per_s * link.share, CHUNK_BYTES)
            for link in ways
            if link.target == own.site
        }
        self._site = own.site
        self._copies: dict[str, _Copy] = {}
        self._asked: dict[str, tuple[Path, int, float]] = {}  # name -> what is to be kept next
        self._kept: dict[
            str, tuple[int, str]
        ] = {}  # name -> (attempt that is over and kept, or why it was not)
        self._final: dict[str, int] = {}
        self._news = threading.Condition()
        self._released_s = float("-inf")
        threading.Thread(target=self._keeping, daemon=True).start()

    # ---- data comes --------------------------------------------------------------------------------------------------

    def arrive(self, name: str, folder: Path, attempt: int, saved_s: float) -> Arrival:
        """Let `folder` hold what attempt `attempt` of the task saved, wherever that lies; asked again, how far it is."""
        copy, wanted = self._copies.get(name), (attempt, saved_s)
        if copy is None or (copy.ended is not None and copy.wanted != wanted):
            copy = self._copies[name] = _Copy(wanted, Progress())
            threading.Thread(
                target=self._bring, args=(copy, name, folder, attempt, saved_s), daemon=True
            ).start()
        if copy.ended is not None and copy.wanted == wanted:
            del self._copies[name]  # asked once more, it is looked for anew
            return copy.ended
        done = copy.progress.here_bytes + copy.progress.sent_bytes
        where = f" from {copy.source}" if copy.source else ""
        return Arrival(
            "coming",
            f"its data is on the way{where}: {format_bytes(done)} of {format_bytes(copy.progress.total_bytes)}",
        )

    def _bring(self, copy: _Copy, name: str, folder: Path, attempt: int, saved_s: float) -> None:
        kept_attempt, why = self._kept.get(name, (0, ""))
        unkept = max(kept_attempt if why else 0, _noted(folder))
        if unkept and unkept >= attempt and folder.exists():
            copy.ended = Arrival("here")  # it could not be kept: what others have is older than this folder
            return
        try:
            site, manifest = self._find(name, attempt, saved_s)
            if manifest is not None and site != self._site:
                copy.source = str(site)
                fetch(self._storage(site), manifest, folder, copy.progress, self._paces.get(site))
            elif manifest is not None and not folder.exists():
                fetch(self._own, manifest, folder, copy.progress)
            copy.ended = Arrival("here")
        except (QipanError, OSError) as error:
            copy.ended = Arrival("failed", f"its data could not be brought here: {error}")

    def _find(self, name: str, attempt: int, saved_s: float) -> tuple[BoardId, Manifest | None]:
        """Where most of the task's work lies.  A storage that does not answer may have more: it is waited for, unless what was
        found is all that the board knows of."""
        sites = sorted({self._site, *self._others})
        asked = in_parallel(sites, lambda site: self._ask(site, name), 16)
        found = newest(
            (site, answer) for site, answer in zip(sites, asked, strict=True) if isinstance(answer, Manifest)
        )
        site, manifest = (self._site, None) if found is None else (BoardId(str(found[0])), found[1])
        whole = manifest is not None and manifest.attempt >= attempt and manifest.saved_s >= saved_s - 1e-6
        silent = next((answer for answer in asked if isinstance(answer, QipanError)), None)
        if silent is not None and not whole:
            raise silent
        return site, manifest

    def _ask(self, site: BoardId, name: str) -> Manifest | QipanError | None:
        try:
            return self._storage(site).manifest(name)
        except QipanError as error:
            return error

    def _storage(self, site: BoardId) -> ContentStorage:
        if site not in self._opened:
            self._opened[site] = open_storage(self._others[site])
        return self._opened[site]

    # ---- data is kept ------------------------------------------------------------------------------------------------

    def keep(self, name: str, folder: Path, attempt: int, saved_s: float) -> None:
        """Soon: what the folder holds now, while the attempt goes on."""
        with self._news:
            self._asked[name] = (folder, attempt, saved_s)
            self._news.notify()

    def settle(self, name: str, folder: Path, attempt: int, saved_s: float) -> str | None:
        """The attempt is over: None while its data is being kept; then "", or why it could not be kept."""
        with self._news:
            kept = self._kept.get(name)
            if kept is not None and kept[0] == attempt:
                return kept[1]
            if self._final.get(name) != attempt:
                self._final[name] = attempt
                self._asked[name] = (folder, attempt, saved_s)
                self._news.notify()
            return None

    def _keeping(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: bool(self._asked), timeout=RELEASE_S)
                name = min(self._asked, default="")
                order = self._asked.pop(name, None)
                final = order is not None and self._final.get(name) == order[1]
            if order is not None:
                why = self._publish(name, *order, tries=TRIES if final else 1)
                if final:
                    _note(order[0], order[1] if why else 0)
                    with self._news:
                        self._kept[name] = (order[1], why)
            if time.monotonic() - self._released_s > RELEASE_S:
                self._released_s = time.monotonic()
                self._let_go()

    def _publish(self, name: str, folder: Path, attempt: int, saved_s: float, tries: int) -> str:
        why = ""
        for number in range(tries):
            try:
                self._own.publish(folder, name, attempt, saved_s, time.time())
                return ""
            except (QipanError, OSError, ValueError) as error:
                why = str(error)
                if number + 1 < tries:
                    time.sleep(self._again_s)
        return why

    def _let_go(self) -> None:
        try:
            self._own.release(time.time(), self._keep_s)
        except (QipanError, OSError):
            return  # in an hour again: what cannot be let go must not end the keeping


def _note(folder: Path, attempt: int) -> None:
    """Beside the folder, for a board that starts again: the attempt whose work lies only there; 0: none."""
    with suppress(OSError):  # a full disk: this process knows it all the same
        if attempt:
            _mark(folder).write_text(str(attempt))
        else:
            _mark(folder).unlink(missing_ok=True)


def _noted(folder: Path) -> int:
    try:
        return int(_mark(folder).read_text())
    except (OSError, ValueError):
        return 0


def _mark(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.qipan-unkept")

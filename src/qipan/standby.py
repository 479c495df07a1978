"""A standby: a process on another host that follows a board's store, change by change, and takes the board over when most of the boards
below have heard nothing from it for long enough (`leading`).  Its folder is then the board's own, and is served like any other."""

import logging
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from qipan.channel.network import Admitted, Network, NetworkCarrier
from qipan.errors import InvalidInput, NotAllowed, QipanError
from qipan.files import write_whole
from qipan.identity import Unknown, Wallet, expects, peer_of
from qipan.identity.wallet import Members
from qipan.leading import REIGNS_AHEAD_MAX, Claim
from qipan.shipping import Following
from qipan.store import Store
from qipan.succession import write_status
from qipan.workload.site import Site

log = logging.getLogger("qipan.standby")

LOOP_S = 0.02
SITE = "site.json"


class Standby:
    def __init__(self, folder: Path, of: str = "") -> None:
        self.folder, self.wallet = folder, Wallet(folder / "standby", time.time)
        self.board = self.wallet.place[-1]
        self._url = (folder / "standby" / "url").read_text()
        self.network = Network(self._refused)
        self._news = threading.Event()
        self._carrier = self.network.carrier(self._news.set)
        self._of = of or self.wallet.kept.parent
        self._following = Following(folder / f"{self.board}.db", self._carrier, self._carrier.ask)
        self._lineage, self._voters = "", tuple[str, ...]()
        self._claim = Claim(self.wallet.kept.lead_s, claimed=self.wallet.kept.reign)
        self._known = (self.wallet.kept.parent_reign, self._of)  # the reign that leads, and where
        self._door, self._began_s = threading.Lock(), time.monotonic()
        self._heard_s: float | None = None
        kept = folder / "standby" / "files"
        if kept.exists() and kept.stat().st_size:
            self._take_files(kept.read_bytes())

    # ---- links ---------------------------------------------------------------------------------------------------------

    def listen(self, host: str, port: int) -> int:
        return self.network.listen(host, port, self.wallet.server_context, self._admit)

    def dial(self) -> None:
        self.dialer = self.network.dial(
            self._of, self.wallet.client_context, expects(self.wallet.place), self._hello, self._carrier,
            self._answer, self._welcomed,
        )  # fmt: skip

    def _hello(self) -> dict[str, Any]:
        return {"url": self._url, "reign": self.wallet.kept.reign}

    def _welcomed(self, words: Any) -> None:
        reign = int(words["reign"])
        with self._door:
            self._lineage = str(words["lineage"])
            self._known = (reign, self._of)
            self.wallet.follow(parent_reign=reign)
            self._claim.lead_s = float(words["lead_s"])
            if self._claim.claimed and reign > self._claim.claimed:
                log.warning("reign %d leads: the claim of %d is given up", reign, self._claim.claimed)
                self._claim.claimed, self._claim.granted = 0, set()
                self.wallet.follow(reign=0)

    def _answer(self, question: str, body: Any) -> Any:
        if question != "files":
            raise InvalidInput(f"{question[:40]!r} is no question to a standby")
        write_whole(self.folder / "standby" / "files", body)
        self._take_files(body)
        return None

    def _take_files(self, body: bytes) -> None:
        told = msgspec.msgpack.decode(body)
        with self._door:
            self._files: dict[str, bytes] = told["files"]
            self._site: bytes = told["site"]
            self._voters = tuple(told["voters"])
            self._claim.lead_s = float(told["lead_s"])

    def _admit(self, certificate: bytes | None, path: str, hello: Any) -> Admitted:
        """A board below says for how long it heard nothing.  Raises Unknown."""
        if certificate is None or not isinstance(hello, dict):
            raise Unknown(f"this is the standby of {self.board}; boards join at {self._of}")
        peer = peer_of(certificate)
        if peer.role != "board" or peer.place[:-1] != self.wallet.place or peer.name not in self._voters:
            raise Unknown(f"{'/'.join(peer.place)} is no board right below {self.board}")
        if path != "/silence":
            raise Unknown(f"this is the standby of {self.board} and does not lead")
        with self._door:
            reign = int(hello.get("reign") or 0)
            if not self._claim.claimed and self._known[0] < reign <= self._known[0] + REIGNS_AHEAD_MAX:
                self._known = (reign, self._known[1])
            self._claim.told(peer.name, float(hello["silent_s"]), reign, time.monotonic())
            known, url = self._known
            claimed = self._claim.claimed
            words = {"reign": claimed or known, "leads": False, "url": self._url if claimed else url}
        self._news.set()
        return Admitted(NetworkCarrier(self.network.has_news, lambda: None), words, _no_questions)

    def _refused(self, address: str, why: str) -> None:
        log.warning("refused %s: %s", address, why)

    # ---- the loop ------------------------------------------------------------------------------------------------------

    def run(self, ended: threading.Event) -> bool:
        """Follow until it is this process's turn to lead (True) or `ended` (False)."""
        while not ended.is_set():
            self._news.wait(LOOP_S * 10)
            self._news.clear()
            try:
                self._follow()
            except QipanError as error:
                log.warning("cannot follow: %s", error)
                time.sleep(0.5)
            if self._step():
                return True
        return False

    def _follow(self) -> None:
        if not self._carrier.connected:
            return
        self._heard_s = time.monotonic()
        if self._lineage:
            self._following.begin(self._lineage)
        self._following.take_in()
        if time.time() >= self.wallet.due_s():
            self.wallet.take(self._carrier.ask("renew", self.wallet.request()))
            self.dialer.again()

    def _step(self) -> bool:
        now_s = time.monotonic()
        with self._door:
            claim, voters = self._claim, self._voters
            silent_s = now_s - (self._heard_s or self._began_s)
            if self._following.number and silent_s >= claim.lead_s and claim.may_claim(voters, now_s):
                claim.claimed = max(self._known[0], self.wallet.kept.reign) + 1
                claim.granted = set()
                self.wallet.follow(reign=claim.claimed)
                log.warning(
                    "%d of %d boards below are without %s: reign %d is claimed",
                    len(claim.silent(now_s)), len(voters), self.board, claim.claimed,
                )  # fmt: skip
            turn = claim.may_lead(voters)
        write_status(self.folder, self._status(now_s))
        return turn

    def _status(self, now_s: float) -> dict[str, Any]:
        claim = self._claim
        return {
            "board": "/".join(self.wallet.place), "role": "standby", "leads": False, "reign": claim.claimed,
            "of": self._of, "connected": self._carrier.connected, "changes": self._following.number,
            "without": sorted(claim.silent(now_s)), "granted": sorted(claim.granted), "voters": list(self._voters),
        }  # fmt: skip

    def close(self) -> None:
        self.dialer.end()
        self.network.close()
        self._following.close()

    # ---- its turn ------------------------------------------------------------------------------------------------------

    def crown(self) -> Site:
        """After `close`: the folder becomes the board's.  Returns the site that the board had."""
        for name, body in self._files.items():
            if name.startswith("identity/"):
                continue
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            write_whole(path, body)
        store = Store(self.folder / f"{self.board}.db")
        store.put("reign", str(self._claim.claimed))
        store.close()
        write_whole(self.folder / SITE, self._site)
        kept = msgspec.json.decode(self._files["identity/members.json"], type=Members)
        kept = msgspec.structs.replace(kept, reign=self._claim.claimed)
        self.wallet.crown(self.folder / "identity", kept, self._url)
        return msgspec.json.decode(self._site, type=Site)


def _no_questions(question: str, _body: Any) -> Any:
    raise NotAllowed(f"{question[:40]!r} cannot be asked of a standby")

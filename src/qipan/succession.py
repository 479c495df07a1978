"""A board's part in who leads: of itself, which a standby may follow and take over; and of its parent, whose standby it may turn to."""

import json
import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from qipan.channel.network import Admitted, Network, NetworkCarrier
from qipan.channel.opening import ask_once
from qipan.clock import SystemClock
from qipan.errors import QipanError
from qipan.hardware import BoardId
from qipan.identity import ROLES, Peer, Unknown, Wallet, expects
from qipan.leading import REIGNS_AHEAD_MAX, Follow, Lead, lead_s_of, most
from qipan.shipping import Shipping
from qipan.store import Store, StoreFolder
from qipan.tree import Tree, next_incarnation
from qipan.workload.site import Site

log = logging.getLogger("qipan.standby")

ASKS_IN_A_LEAD = 4
TELL_S = 3.0  # to tell a board below who may take this board over
WITNESS_S = 3.0  # to ask a standby who leads
STATUS = "grid.json"
#: what a standby needs beside the store: who may be let in, what boards below have, what signs receipts and tokens
SHIPPED = ("identity/members.json", "identity/url", "receipt.key", "token")


class Below(Protocol):
    carrier: NetworkCarrier


class Seat(Protocol):
    """The board's process, as succession sees it."""

    wallet: Wallet
    site: Site
    folder: Path
    database: str | None
    network: Network
    clock: SystemClock
    tree: Tree
    lock: Any

    @property
    def store(self) -> Store: ...

    @property
    def below(self) -> Mapping[BoardId, Below]: ...

    @property
    def parent_link(self) -> NetworkCarrier | None: ...

    @property
    def own_site(self) -> Site: ...

    def turn_to(self, url: str) -> None: ...


class Succession:
    def __init__(self, host: Seat) -> None:
        self._host = host
        kept = host.wallet.kept
        self._lead = Lead(lead_s_of(host.site.lease_s))
        self._standby = host.network.carrier(lambda: None)
        self._shipping: Shipping | None = None
        self._url, self._shipped, self._sending = "", b"", False
        self._zero_s = secrets.randbelow(1 << 32)  # stamps of an earlier process are far from this one's
        self._later: set[str] = set()  # who below said that a later reign leads
        self._told_urls = host.wallet.standby_urls()
        if self._told_urls:
            self._ship()
            self._lead.shipped = frozenset(kept.shipped or host.wallet.voters())
        self._follow = Follow(kept.parent_reign, time.monotonic(), kept.lead_s)
        self._echo: float | None = None
        self._next_ask_s, self._asking, self._witnessing = 0.0, False, False

    # ---- of this board -------------------------------------------------------------------------------------------------

    def leads(self) -> bool:
        return not self._lead.shipped or self._lead.leads(self._host.wallet.voters(), time.monotonic())

    def told(self) -> str:
        """For people: who of how many follows."""
        voters = self._host.wallet.voters()
        return f"{len(self._lead.followers(time.monotonic()) & {*voters})} of {len(voters)} boards below follow it"

    def words(self) -> dict[str, Any]:
        """Said to every board below."""
        wallet = self._host.wallet
        return {
            "reign": wallet.kept.reign, "standbys": list(wallet.standby_urls()), "lead_s": self._lead.lead_s,
        }  # fmt: skip

    def stamp(self, child: str, body: Any) -> list[Any]:
        now_s = time.monotonic()
        self._lead.came_back(child, float(body) - self._zero_s if body is not None else None, now_s)
        return [now_s + self._zero_s, self.leads()]

    def met(self, peer: Peer, hello: dict[str, Any]) -> None:
        """A board below, or the standby, knows of a later reign: whoever leads by most boards goes above it; else it is not
        for us to lead.  Raises Unknown."""
        reign = int(hello.get("reign") or 0)
        own = self._host.wallet.kept.reign
        if reign <= own:
            return
        if reign > own + REIGNS_AHEAD_MAX:
            raise Unknown(f"{peer.name} knows of reign {reign}; this board is of reign {own}")
        if self._lead.shipped and self.leads():
            self._host.wallet.follow(reign=reign + 1)
            log.warning("reign %d was claimed by few: this board leads on as reign %d", reign, reign + 1)
            return
        if not self._lead.shipped:  # an old store, of before it had a standby
            self._later.add(peer.name)
            voters = self._host.wallet.voters()
            if peer.role == "standby" or most(voters, self._later):
                self._lead.shipped = frozenset(voters)
        raise Unknown(f"this board is of reign {own}; a later one, {reign}, was begun by its standby")

    def admit(self, peer: Peer, hello: dict[str, Any]) -> Admitted:
        """The standby connects."""
        host = self._host
        if host.own_site.root.pools:
            raise Unknown(
                f"{peer.name} has chips of its own, which are lost with its host; a standby is for a board that has none"
            )
        self.met(peer, hello)
        if self._shipping is None:
            with host.lock:
                self._ship()
        assert self._shipping is not None
        self._url, self._shipped = str(hello["url"]), b""
        welcome = {**self.words(), "lineage": host.store.get("lineage"), "leads": self.leads()}
        return Admitted(
            self._standby, welcome, lambda question, body: self._answer_standby(peer, question, body), peer.until_s
        )  # fmt: skip

    def _ship(self) -> None:
        host = self._host
        board, database = host.site.root.board, host.database
        self._shipping = Shipping(
            host.store, self._standby, next_incarnation(host.store, host.clock),
            lambda: StoreFolder(host.folder, database).open(board, writer=False),
        )  # fmt: skip
        host.tree.root.settle = self._shipping.settle

    def _answer_standby(self, peer: Peer, question: str, body: Any) -> Any:
        assert self._shipping is not None
        match question:
            case "copy":
                return self._shipping.copy()
            case "piece":
                return self._shipping.piece(int(body))
            case "renew":
                return self._host.wallet.renewed(peer, bytes(body))
        raise Unknown(f"{question[:40]!r} is no question of a standby")

    def _send_files(self) -> None:
        """Beside the store, whenever they changed."""
        host = self._host
        names = [
            *SHIPPED,
            *(f"children/{path.name}" for path in sorted((host.folder / "children").glob("*.json"))),
        ]
        files = {name: (host.folder / name).read_bytes() for name in names if (host.folder / name).exists()}
        site = msgspec.json.encode(host.own_site)
        body = msgspec.msgpack.encode(
            {"files": files, "site": site, "voters": list(host.wallet.voters()), "lead_s": self._lead.lead_s}
        )
        if body == self._shipped or self._sending:
            return
        self._sending = True
        url, voters = self._url, frozenset(host.wallet.voters())

        def send() -> None:
            try:
                self._standby.ask("files", body)
            except QipanError as error:
                log.warning("the standby did not take the files: %s", error)
                return
            finally:
                self._sending = False
            self._shipped, self._lead.shipped = body, voters
            host.wallet.follow(shipped=tuple(sorted(voters)))
            host.wallet.standby_follows(url)

        host.network.work(send)

    def _tell_below(self) -> None:
        """Who may take this board over now.  A board that does not answer learns it when it connects again."""
        for name, child in sorted(self._host.below.items()):
            connection = child.carrier.connection
            if connection is None:
                continue
            try:
                child.carrier.ask("parents", self.words(), TELL_S)
            except QipanError as error:
                log.warning("%s was not told of the standby: %s", name, error)
                connection.drop("it is told of the standby when it connects again")

    # ---- of its parent -------------------------------------------------------------------------------------------------

    def welcomed(self, words: Any) -> None:
        """What the parent says of itself.  Raises Unknown for one that a later reign has replaced."""
        reign = int(words.get("reign", 0))
        kept = self._host.wallet.kept
        if reign < kept.parent_reign:
            raise Unknown(f"it is of reign {reign}; this board follows reign {kept.parent_reign}")
        standbys = tuple(map(str, words.get("standbys", ())))
        lead_s = float(words.get("lead_s", kept.lead_s))
        self._host.wallet.follow(parent_reign=reign, standbys=standbys, lead_s=lead_s)
        self._follow.reign, self._follow.lead_s = reign, lead_s
        self._next_ask_s, self._echo = 0.0, None

    def _ask_parent(self) -> None:
        up = self._host.parent_link
        assert up is not None
        try:
            for _ in range(
                1 if self._echo is not None else 2
            ):  # the first answer gives nothing to send back yet
                stamp, leads = up.ask("lead", self._echo, self._follow.lead_s)
                now_s = time.monotonic()
                self._echo, self._follow.heard_s = float(stamp), now_s
                if leads:
                    self._follow.leaderless_s = None
                elif self._follow.leaderless_s is None:
                    self._follow.leaderless_s = now_s
        except QipanError as error:
            self._echo = None
            log.info("the parent does not answer: %s", error)
        finally:
            self._asking = False

    def _witness(self) -> None:
        """Tell the standbys for how long the parent was silent; turn to one that begins a later reign."""
        try:
            for url in self._host.wallet.kept.standbys:
                self._tell(url)
        finally:
            self._witnessing = False

    def _tell(self, url: str) -> None:
        host, follow = self._host, self._follow
        place = host.wallet.place[:-1]

        def ask() -> dict[str, Any]:
            hello = {
                "board": host.wallet.place[-1], "silent_s": follow.silent_s(time.monotonic()), "reign": follow.reign,
            }  # fmt: skip
            told: dict[str, Any] = ask_once(
                url, host.wallet.client_context(), expects(place, ROLES), hello, "silence", WITNESS_S
            )
            return told

        try:
            words = ask()
            reign, leads = int(words["reign"]), bool(words["leads"])
            if not follow.takes(reign, leads, time.monotonic()):
                return
            follow.reign, follow.leaderless_s, self._echo = reign, None, None
            follow.heard_s = time.monotonic()
            host.wallet.follow(parent=str(words.get("url") or url), parent_reign=reign)
            log.warning("the parent was silent: this board follows reign %d at %s", reign, url)
            host.turn_to(host.wallet.kept.parent)
            if not leads:
                ask()
        except QipanError as error:
            log.info("standby %s: %s", url, error)

    # ---- once a second -------------------------------------------------------------------------------------------------

    def look(self) -> None:
        host, now_s = self._host, time.monotonic()
        urls = host.wallet.standby_urls()
        if urls != self._told_urls:
            self._told_urls = urls
            host.network.work(self._tell_below, first=True)
        if self._shipping is not None:
            self._shipping.flush()
            if self._standby.connection is not None and not host.wallet.standbys():
                self._standby.connection.drop("the standby was taken out of the grid")
            elif self._standby.connected and self._url:
                self._send_files()
        if host.parent_link is not None and host.wallet.kept.standbys:
            if host.parent_link.connected and not self._asking and now_s >= self._next_ask_s:
                self._asking, self._next_ask_s = True, now_s + self._follow.lead_s / ASKS_IN_A_LEAD
                host.network.work(self._ask_parent, first=True)
            if not self._witnessing and self._follow.looks_around(now_s):
                self._witnessing = True
                host.network.work(self._witness, first=True)
        write_status(host.folder, self._status())

    def _status(self) -> dict[str, Any]:
        host, kept = self._host, self._host.wallet.kept
        told: dict[str, Any] = {
            "board": "/".join(kept.place), "role": "board", "leads": self.leads(), "reign": kept.reign,
            "children": {name: child.carrier.connected for name, child in sorted(host.below.items())},
        }  # fmt: skip
        if self._shipping is not None:
            told["standby"] = {
                "url": self._url or next(iter(host.wallet.standby_urls()), ""), "connected": self._standby.connected,
                "keeps_up": self._shipping.keeps_up, "behind": max(0, self._shipping.behind),
            }  # fmt: skip
        if host.parent_link is not None:
            told["parent"] = {
                "url": kept.parent, "connected": host.parent_link.connected, "reign": kept.parent_reign,
                "standbys": list(kept.standbys),
            }  # fmt: skip
        return told


def write_status(folder: Path, told: dict[str, Any]) -> None:
    """For `qipan grid status`: what this process knows of the grid."""
    text, path = json.dumps(told), folder / STATUS
    if not path.exists() or path.read_text() != text:
        part = path.with_suffix(".part")
        part.write_text(text)
        part.rename(path)

"""One board in a process of its own: a `Host` whose parent and children are in other processes, on other hosts.

Facts and commands go over `channel`; beside them boards ask each other what people want to know (logs, why).  The top, which holds
the money, is told of a task submitted here; it runs here if that is good enough (`scheduler.entered`).
"""

import json
import logging
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from qipan.asking import GridIntake, GridQueries, tell, tell_parent
from qipan.channel.network import Admitted, Dialer, Network, NetworkCarrier
from qipan.channel.opening import ask_once
from qipan.difference import BEFORE_S, decode_told, encode_told, told_by
from qipan.errors import InvalidInput, NotAllowed, NotFound, QipanError, Unreachable
from qipan.events import EngineAttached, EngineLost, TaskStarted
from qipan.files import write_whole
from qipan.hardware import BoardId, BoardSpec, Pool
from qipan.host import LOOP_S, Host, LinkEnd
from qipan.identity import Peer, Token, Unknown, Wallet, expects, peer_of, spiffe_of
from qipan.identity.wallet import joining_context
from qipan.journal.exchange import Placed
from qipan.leases import EngineId
from qipan.market.clearing import Bid
from qipan.stored import facts_of_kind
from qipan.succession import Succession
from qipan.tracing import Context
from qipan.workload import Task
from qipan.workload.site import Site

log = logging.getLogger("qipan.grid")

IDLE_S = 0.5  # a board without engines of its own looks at its leases at least so often
REFUSED_BYTES_MAX = 1 << 20
LEAD_WAIT_S = 10.0  # people wait so long for a board that just does not lead


def join(folder: Path, token: Token) -> Wallet:
    """Become the board that the token names.  Raises Unreachable, QipanError with the inviting board's words."""
    if (folder / "identity").exists() or (folder / "standby").exists():
        raise InvalidInput(
            f"{folder} belongs to a grid already; name another --store, or `qipan grid leave` first"
        )
    folder.mkdir(parents=True, exist_ok=True)

    def ask(token: Token, request: bytes, authority_request: bytes) -> tuple[bytes, bytes]:
        hello = {
            "secret": token.secret, "place": token.place, "provider": token.provider, "request": request,
            "authority_request": authority_request,
        }  # fmt: skip
        answer = ask_once(token.url, joining_context(token), expects(inviting(token)), hello)
        return answer["chain"], answer["authority"]

    return Wallet.join(folder / ("standby" if token.role == "standby" else "identity"), token, ask, time.time)


def inviting(token: Token) -> tuple[str, ...]:
    return token.place[:-1] if token.role == "board" else token.place


@dataclass(slots=True)
class Child:
    """A board that joined below: its link, what it said it has, and whether it is silent now."""

    carrier: NetworkCarrier
    spec: BoardSpec | None = None
    attached: bool = False
    lost: bool = False


class GridHost(Host):
    queries: GridQueries

    def __init__(
        self, site: Site, folder: Path, database: str | None = None, keep_s: float | None = None
    ) -> None:
        self.wallet = Wallet(folder / "identity", time.time)
        self.children: dict[BoardId, Child] = {}  # replaced when one comes: others go through it meanwhile
        self._folder = folder
        self.database = database
        self._news = threading.Event()
        self._arrivals: list[tuple[BoardId, BoardSpec]] = []
        self._door = threading.Lock()
        self.network = Network(self._refused)
        self._up = self.network.carrier(self._news.set) if self.wallet.kept.parent else None
        self._own = site.root
        for member in self.wallet.kept.members:
            if not member.revoked and member.role == "board":
                name = BoardId(member.place[-1])
                self.children[name] = Child(
                    self.network.carrier(self._news.set), self._kept_spec(name), attached=True
                )
        joined = {name: child.carrier for name, child in self.children.items()}
        try:
            super().__init__(site, folder, database, keep_s, outer=self._up, joined=joined)
        except BaseException:
            self.network.close()
            raise
        self._compose()
        self._dialer: Dialer | None = None
        self._looked_s = 0.0
        self._renewing = False
        self._succession = Succession(self)
        self._told: set[BoardId] = set()  # who said what its attempts were since this store's newest tick
        self._since_s = max(0.0, self.store.latest_now_s() - BEFORE_S)

    def _make_queries(self) -> GridQueries:
        return GridQueries(self, self._up, lambda: self.children)

    def _make_intake(self) -> GridIntake:
        return GridIntake(self, self.queries, self._up, self.must_lead)

    # ---- links ---------------------------------------------------------------------------------------------------------

    def listen(self, host: str, port: int) -> int:
        return self.network.listen(host, port, self.wallet.server_context, self._admit)

    def dial(self, url: str = "") -> None:
        """Connect to the parent, if there is one, and stay connected."""
        if self._up is not None:
            self._dialer = self.network.dial(
                url or self.wallet.kept.parent, self.wallet.client_context, expects(self.wallet.place[:-1]),
                self._hello, self._up, self._answer_parent, self._succession.welcomed,
            )  # fmt: skip

    @property
    def connected(self) -> bool:
        return self._up is None or self._up.connected

    def _hello(self) -> dict[str, Any]:
        return {
            "board": self.site.root.board, "spec": msgspec.json.encode(self.site.root),
            "reign": self.wallet.kept.parent_reign,
        }  # fmt: skip

    def _admit(self, certificate: bytes | None, path: str, hello: Any) -> Admitted:
        """On the network's thread: who connects, and to what.  Raises QipanError to refuse."""
        if not isinstance(hello, dict):
            raise Unknown("an unreadable hello")
        with self._door:
            if path == "/join":
                return self._admit_new(hello)
            if certificate is None:
                raise Unknown("no certificate was shown; a board joins first (`qipan grid join`)")
            peer = peer_of(certificate)
            member = self.wallet.check_member(peer)
            if member.role == "standby":
                return self._succession.admit(peer, hello)
            if path == "/silence":
                words = {"reign": self.wallet.kept.reign, "leads": self.leads()}
                return Admitted(NetworkCarrier(self.network.has_news, lambda: None), words, _no_questions)
            self._succession.met(peer, hello)
            spec = self._checked_spec(peer.name, hello)
            name = BoardId(peer.name)
            if name not in self.children:
                self.children = {**self.children, name: Child(self.network.carrier(self._news.set))}
            self._arrivals.append((name, spec))
        return Admitted(
            self.children[name].carrier, {"board": self.site.root.board, **self._succession.words()},
            lambda question, body: self._answer_child(peer, question, body), peer.until_s,
        )  # fmt: skip

    def _admit_new(self, hello: dict[str, Any]) -> Admitted:
        try:
            chain, authority = self.wallet.admit(
                str(hello["secret"]), tuple(map(str, hello["place"])), str(hello["provider"]),
                bytes(hello["request"]), bytes(hello["authority_request"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise Unknown(f"an unreadable request to join ({error})") from None
        log.info("%s joined", "/".join(map(str, hello["place"])))
        words = {"chain": chain, "authority": authority}
        return Admitted(NetworkCarrier(self.network.has_news, lambda: None), words, _no_questions)

    def _checked_spec(self, name: str, hello: dict[str, Any]) -> BoardSpec:
        try:
            spec = msgspec.json.decode(hello["spec"], type=BoardSpec)
        except (KeyError, TypeError, msgspec.MsgspecError) as error:
            raise Unknown(f"an unreadable description of {name}: {error}") from None
        if spec.board != name:
            raise Unknown(f"the certificate is {name}'s, the board calls itself {str(spec.board)[:60]}")
        others = {self._own.board} | {
            board.board
            for other, child in self.children.items()
            if other != name and child.spec is not None
            for board in child.spec.walk()
        }
        twice = sorted({board.board for board in spec.walk()} & others)
        if twice:
            raise Unknown(f"a board {twice[0]!r} is in the grid already; names are unique")
        return spec

    def _refused(self, address: str, why: str) -> None:
        """Every identity that was turned away, one line each."""
        log.warning("refused %s: %s", address, why)
        path = self._folder / "refused.jsonl"
        try:
            if path.exists() and path.stat().st_size > REFUSED_BYTES_MAX:
                path.replace(path.with_suffix(".1.jsonl"))
            with path.open("a") as file:
                file.write(json.dumps({"at_s": round(time.time(), 3), "from": address, "why": why}) + "\n")
        except OSError as error:
            log.warning("%s was not written: %s", path, error)

    # ---- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until `stop`."""
        while not self._stop.is_set():
            self.step()
            if self.leads():
                self.trade()
                self.forget()
                self.sweep()
            self._look()
            if any(engine.running() for engine in self.engines.values()):
                self._news.wait(LOOP_S)
            else:
                wake_s = self.tree.root.wake_s
                due_s = wake_s - self.clock.now_s() if wake_s is not None else IDLE_S
                self._news.wait(max(0.01, min(IDLE_S, due_s)))
            if self._news.is_set():
                self._stop.wait(
                    min(0.1, 0.005 + 1e-4 * len(self.children))
                )  # let what comes together be one tick
                self._news.clear()

    @property
    def below(self) -> dict[BoardId, Child]:
        return self.children

    @property
    def parent_link(self) -> NetworkCarrier | None:
        return self._up

    @property
    def own_site(self) -> Site:
        """Without what joined."""
        return replace(self.site, root=self._own)

    def ends(self) -> list[LinkEnd]:
        carriers = {str(name): child.carrier for name, child in self.children.items()}
        if self._up is not None:
            carriers["parent"] = self._up
        return [end_of(peer, carrier) for peer, carrier in sorted(carriers.items())]

    def turn_to(self, url: str) -> None:
        """The parent is elsewhere now."""
        assert self._dialer is not None
        self._dialer.turn_to(url)

    def leads(self) -> bool:
        """False while this board has a standby and most boards below do not follow it: the standby may lead then."""
        return self._succession.leads()

    def step(self) -> None:
        if self.leads():
            super().step()

    @property
    def audience(self) -> str:
        return spiffe_of(self.wallet.place)

    def must_lead(self) -> None:
        end_s = time.monotonic() + LEAD_WAIT_S
        while not self.leads():
            if time.monotonic() > end_s:
                raise Unreachable(
                    f"{self._own.board} does not lead: {self._succession.told()}; its standby may lead by now"
                    " (`qipan grid status`)"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        super().stop()
        self._news.set()

    def close(self) -> None:
        if self._dialer is not None:
            self._dialer.end()
        self.network.close()
        super().close()

    def _look(self) -> None:
        """Who came, who fell silent, whose certificate is half used."""
        now_s = time.monotonic()
        with self._door:
            arrivals, self._arrivals = self._arrivals, []
        if arrivals:
            with self.lock:
                self._arrived(arrivals)
        if now_s < self._looked_s + 1.0:
            return
        self._looked_s = now_s
        lost_after_s = self.site.lease_s / 4
        with self.lock:
            for name, child in self.children.items():
                heard_s = child.carrier.heard_s
                silent = not child.carrier.connected and (heard_s is None or now_s > heard_s + lost_after_s)
                if silent != child.lost and child.attached:
                    child.lost = silent
                    why = f"not connected for {lost_after_s:.0f} s"
                    self.tree.root.accept(
                        EngineLost(EngineId(name), why) if silent else EngineAttached(EngineId(name))
                    )
                    log.info("%s is %s", name, "silent" if silent else "back")
                    self._news.set()
        with self._door:
            self.wallet.flush()
        self._renew()
        self._succession.look()
        for name, child in self.children.items():
            if self._up is None and child.carrier.connected and name not in self._told:
                self._told.add(name)
                self.network.work(partial(self._ask_difference, name))

    def _arrived(self, arrivals: list[tuple[BoardId, BoardSpec]]) -> None:
        for name, spec in arrivals:
            child = self.children[name]
            changed = child.spec != spec
            child.spec = spec
            if not child.attached:
                child.attached = True
                self.tree.join(name, child.carrier)
            if changed:
                path = self._folder / "children" / f"{name}.json"
                path.parent.mkdir(exist_ok=True)
                write_whole(path, msgspec.json.encode(spec))
        self._compose()

    def _all_pools(self) -> list[Pool]:
        """Also those below: an attempt there may be charged before its board connected again."""
        specs = [child.spec for child in self.children.values() if child.spec is not None]
        return [
            *self.site.pools(),
            *(pool for spec in specs for board in spec.walk() for pool in board.pools),
        ]

    def _kept_spec(self, name: BoardId) -> BoardSpec | None:
        path = self._folder / "children" / f"{name}.json"
        return msgspec.json.decode(path.read_bytes(), type=BoardSpec) if path.exists() else None

    def _compose(self) -> None:
        """The site as it is seen from here: this board over those that joined.  The parent is told."""
        below = tuple(child.spec for _, child in sorted(self.children.items()) if child.spec is not None)
        root = replace(self._own, children=below)
        if root == self.site.root:
            return
        self.site = replace(self.site, root=root)
        for pool in self.site.pools():
            self.tariff.micro_cny_per_device_hour[f"{pool.site}|{pool.chip_class}"] = (
                pool.tariff_micro_cny_per_device_hour
            )
        if self._up is not None and self._up.connected:
            spec, up = msgspec.json.encode(root), self._up
            self.network.work(lambda: up.ask("spec", spec))

    def _renew(self) -> None:
        if self._renewing or time.time() < self.wallet.due_s():
            return
        if self._up is None:
            self.wallet.renew_own()
        elif self._up.connected:
            self._renewing = True
            self.network.work(self._renew_above)

    def _renew_above(self) -> None:
        """The parent signs for a new key; the link is made anew with it."""
        assert self._up is not None
        assert self._dialer is not None
        try:
            self.wallet.take(self._up.ask("renew", self.wallet.request()))
            self._dialer.again()
            log.info("certificate renewed")
        except QipanError as error:
            log.warning("cannot renew the certificate: %s", error)
            time.sleep(5)
        finally:
            self._renewing = False

    def _ask_difference(self, name: BoardId) -> None:
        """What ended there since the newest tick that this store had when it was opened; see `difference`."""
        try:
            body = self.children[name].carrier.ask("ended", self._since_s)
        except QipanError as error:
            log.info("%s did not say what ended there: %s", name, error)
            self._told.discard(name)
            return
        try:
            decode_told(body)
        except msgspec.MsgspecError as error:
            log.warning("%s said nothing readable of what ended there: %s", name, error)
            return
        path = self._folder / "told" / f"{name}.msgpack"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, body)

    # ---- what boards ask each other ------------------------------------------------------------------------------------

    def _answer_child(self, peer: Peer, question: str, body: Any) -> Any:
        if question == "lead":
            return self._succession.stamp(peer.name, body)
        if question == "renew":
            return self.wallet.renewed(peer, bytes(body))
        if question == "spec":
            spec = self._checked_spec(peer.name, {"spec": body})
            with self._door:
                self._arrivals.append((BoardId(peer.name), spec))
            self._news.set()
            return None
        if question == "leave":
            self.wallet.revoke(peer.name)
            with self.lock:
                self.children[BoardId(peer.name)].lost = True
                self.tree.root.accept(EngineLost(EngineId(peer.name), "it left the grid"))
            self._news.set()
            return None
        member = self.wallet.check_member(peer)
        if question == "submit":
            if member.provider != self.wallet.kept.provider:
                raise NotAllowed(
                    f"{peer.name} is provider {member.provider}'s: it brings chips; tasks are submitted at a board of their owner"
                )
            trace = msgspec.convert(body[2], type=Context | None) if len(body) > 2 else None
            entered_at = self._below(peer.name, str(body[3])) if len(body) > 3 else peer.name
            task = msgspec.json.decode(body[0], type=Task)
            task_id, plan = self.intake.submit(task, body[1], trace, entered_at)
            return [task_id, msgspec.json.encode(plan)]
        if member.provider != self.wallet.kept.provider:
            raise NotAllowed(
                f"{peer.name} is provider {member.provider}'s: none of its people has a task here"
            )
        return tell(self, question, body)

    def _below(self, child: str, board: str) -> str:
        """The board that a child names, if it is one of those below that; else the child."""
        spec = self.children[BoardId(child)].spec
        return board if spec is not None and any(one.board == board for one in spec.walk()) else child

    def _answer_parent(self, question: str, body: Any) -> Any:
        """The parent wants to know what only this side has."""
        match question:
            case "parents":
                return self._succession.welcomed(body)
            case "ended":
                with self.lock:
                    held = [task.order for task in self.tree.root.state.tasks.values()]
                    return encode_told(told_by(self.store, held, float(body)))
            case "beside":
                return self._beside_here_or_below(*body)
        return tell_parent(self.queries, question, body)

    # ---- what people ask -----------------------------------------------------------------------------------------------

    def place_order(self, product: str, bid: Bid, trader: str) -> Placed:
        self.must_lead()
        return super().place_order(product, bid, trader)

    def beside(self, task_id: str, act: str, name: str, given: list[Any]) -> Any:
        if self._up is not None and self.engine_of(task_id) is None:
            return self._up.ask("beside", [task_id, act, name, given])
        if self._up is None:
            self.queries.task(task_id)
        return self._beside_here_or_below(task_id, act, name, given)

    def _beside_here_or_below(self, task_id: str, act: str, name: str, given: list[Any]) -> Any:
        """Where it runs now, or ran last: here, or at the child that started it last."""
        with self.lock:
            started = facts_of_kind(self.store, [task_id], TaskStarted)
        child = self.children.get(BoardId(started[-1][1].engine)) if started else None
        if child is not None:
            return child.carrier.ask("beside", [task_id, act, name, given])
        engine = self.engine_of(task_id)
        if engine is None:
            raise NotFound(f"{task_id} does not run now; `qipan why {task_id}` says what it waits for")
        with self.lock:
            return engine.act_beside(task_id, act, name, given)


def end_of(peer: str, carrier: NetworkCarrier) -> LinkEnd:
    silent_s = time.monotonic() - carrier.heard_s if carrier.heard_s is not None else None
    return LinkEnd(peer, carrier.connected, silent_s, carrier.bytes_in, carrier.bytes_out, carrier.dropped)


def _no_questions(question: str, _body: Any) -> Any:
    raise NotAllowed(f"{question[:40]!r} cannot be asked while joining")

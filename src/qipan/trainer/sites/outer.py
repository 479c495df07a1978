"""A site's side of the rounds: inner steps, exchange with the twins, vote, and the outer step that all members take
alike.

The *anchor* is the model that all members agree on, the *difference* what this site's inner steps made of it.  A round's result is
anchor + outer step of the differences' mean, weighted by tokens; every site computes it from the same encoded differences, its
own among them, in the order of site names, so results are equal bit by bit.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from qipan.rounds import Joined, Left, Member, Own, Ready, View, Voted, todo
from qipan.strategy import Outer, SiteStrategy
from qipan.trainer import checkpoint
from qipan.trainer.session import Session
from qipan.trainer.sites.codec import BLOCK, checksum, decode, encode
from qipan.trainer.sites.desk import Desk
from qipan.trainer.sites.flat import Flat, Interval, common, numbers, ownership, positions, size
from qipan.trainer.sites.mailbox import Frame, Mailbox

Say = Callable[..., None]
#: Adam's state -> how it goes over the wire and comes back: of squares the roots, which need fewer bits
MOMENTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "exp_avg": (torch.clone, torch.clone),
    "exp_avg_sq": (torch.sqrt, torch.square),
}


@dataclass(slots=True)
class Result:
    """What an exchange made: the new anchor (and momentum) of a fragment, or of everything for a newcomer.  `moments`: the
    sites' mean of the optimiser's own, of the round's fragment."""

    fragment: Interval
    anchor: Tensor
    momentum: Tensor | None
    moments: dict[str, Tensor]
    digest: int


@dataclass(slots=True)
class Flight:
    """An exchange on its way, on one rank."""

    key: tuple[int, int]
    fresh: bool
    done: threading.Event
    result: Result | None = None
    missing: tuple[str, ...] = ()


class Sites:
    """All ranks of a site call `turn` after each inner step.  Rank 0 speaks with the coordinator."""

    def __init__(
        self,
        session: Session,
        desk_address: str,
        task: str,
        host: str,
        say: Say,
        total: int,
        rounds_done: int = 0,
    ) -> None:
        assert session.strategy.outer is not None
        self.session, self.say, self.total = session, say, total
        self.outer: Outer = session.strategy.outer
        self.flat = Flat(session.layout, session.spec)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        key = os.environ.get("QIPAN_ROUND_KEY", "")
        name = hashlib.blake2b(f"{task}/{session.strategy.seed}".encode(), digest_size=8).hexdigest()
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rate = float(os.environ.get("QIPAN_LINK_BYTES_PER_S", "0")) / ranks
        self.mailbox = Mailbox(host, key or name, rate, key)
        self.places = tuple(_all_gather(self.mailbox.address))
        self.desk = Desk(desk_address, task, session.site_id, key) if self.rank == 0 else None
        life = int(time.time() * 10) if self.rank == 0 else 0
        self.own = Own(session.site_id, life)
        self.rounds_done = rounds_done
        self.whole: Interval = (0, self.flat.coordinates.blocks)
        self.anchor = self.flat.gather(self.whole)
        self.momentum = torch.zeros_like(self.anchor) if self.outer.optimizer == "nesterov" else None
        self.digest = _hex(_sum(checksum(self.anchor, numbers(self.flat.own))))
        self.inner = 0  # inner steps since the last snapshot
        self.snapshot: Tensor | None = None  # own blocks of the round's fragment when its steps were done
        self.moments: dict[str, Tensor] = {}  # the optimiser's, of the same blocks then
        self.flight: Flight | None = None
        self.round_tokens = 0
        self.step_s = 0.0
        self.tokens = 0  # of all sites
        self.began_s = time.time()
        self.waited_s = 0.0
        self.behind = False  # the others finished while this site was outside: its model is an older one
        self.ready_tokens = 0
        self.vote_digest = 0  # of the whole site
        self.vote_missing: tuple[str, ...] = ()
        self.began_exchange_s = 0.0

    @property
    def inside(self) -> bool:
        return self.own.round >= 0

    def turn(self, step_s: float = 0.0) -> bool:
        """After an inner step (step_s > 0), or before the first: do what the rounds ask for, until it is to train on.
        True when the task's tokens are all trained."""
        if step_s > 0:
            self.inner += 1
            self.round_tokens += self.session.site.rows * self.session.strategy.seq
            self.step_s = step_s if self.step_s == 0 else 0.8 * self.step_s + 0.2 * step_s
        while True:
            began_s = time.monotonic()
            landed = self._landed()
            order, shown = self._order(landed)
            self.waited_s += time.monotonic() - began_s
            match order:
                case "train":
                    return False
                case "begin":
                    self._begin(shown)
                case "outside":
                    self._outside()
                case "snapshot":
                    self._snapshot(shown)
                case "exchange":
                    self._exchange(shown)
                case "failed":
                    assert self.flight is not None
                    self.own = replace(self.own, failed=self.flight.key)
                    self.vote_missing = tuple(
                        sorted({one for few in _all_gather(self.flight.missing) for one in few})
                    )
                    self.flight = None
                case "exchanged":
                    assert self.flight is not None
                    assert self.flight.result is not None
                    self.own = replace(self.own, exchanged=self.flight.key)
                    self.vote_digest = _sum(self.flight.result.digest)
                case "apply":
                    self._apply(shown)
                case "done" | "behind":
                    self.behind = order == "behind"
                    if (
                        not self.behind
                    ):  # what every site made since the last round is dropped: one model ends, not several
                        self.flat.scatter(self.whole, self.anchor, add=False)
                    return True

    def leave(self) -> None:
        if self.desk is not None:
            self.desk.tell(Left(self.own.site, 0.0))
            self.desk.close()
        self.mailbox.close()

    # ---- rank 0 decides, the others are told -------------------------------------------------------------------------

    def _landed(self) -> int:
        """0: an exchange is under way, 1: it is done on all ranks, -1: it failed on one."""
        if self.flight is None or self.own.exchanged == self.flight.key:
            return 0
        if not self.outer.overlap:
            self.flight.done.wait()
        mine = (1 if self.flight.result is not None else -1) if self.flight.done.is_set() else 0
        states = _all_gather(mine)
        return 0 if 0 in states else min(states)

    def _order(self, landed: int) -> tuple[str, View]:
        told: list[Any] = [None]
        if self.rank == 0:
            told = [self._decide(landed)]
        if dist.is_initialized():
            dist.broadcast_object_list(told)
        order, shown = told[0]
        return order, shown

    def _decide(self, landed: int) -> tuple[str, View]:
        """Blocks while there is nothing to do but wait."""
        assert self.desk is not None
        while True:
            shown = self.desk.view()
            if shown is None:
                self.desk.wait(0.5)
                continue
            if landed and self.flight is not None:
                return ("exchanged" if landed > 0 else "failed"), shown
            order = todo(self.own, shown)
            if order == "apply":
                return "apply", shown
            if self.inside and shown.tokens >= self.total and order in ("train", "ready"):
                return "done", shown
            if not self.inside and shown.tokens >= self.total:
                return "behind", shown
            training = self.inside and self.inner < self._steps(shown)
            match order:
                case "join":
                    self._join()
                case "train":
                    return ("train" if training else "snapshot"), shown
                case "ready":
                    own = self.own
                    self.desk.post(Ready(own.site, 0.0, own.life, own.round, self.ready_tokens, self.step_s))
                case "vote":
                    self._vote(shown)
                case "exchange":
                    if self.flight is None or self.flight.key != (shown.round, shown.generation):
                        return "exchange", shown
                case "begin" | "outside":
                    return order, shown
                case _:
                    pass
            if self.outer.overlap and training and order in ("wait", "exchange", "ready", "vote"):
                return "train", shown
            if (
                self.flight is not None
                and self.own.exchanged != self.flight.key
                and self.flight.done.wait(0.02)
            ):
                return "look", shown  # it ended: ask all ranks
            self.desk.wait(0.1, shown)

    def _steps(self, shown: View) -> int:
        """Inner steps of this round; the last round is no longer than what is left to train."""
        strategy = self.session.strategy
        left = -(-(self.total - shown.tokens) // (strategy.global_batch_rows * strategy.seq))
        return min(dict(shown.steps).get(self.own.site, self.outer.every), max(1, left))

    def _join(self) -> None:
        assert self.desk is not None
        layout = msgspec.json.encode(self.session.site).decode()
        self.desk.tell(
            Joined(
                self.own.site,
                0.0,
                self.own.life,
                self.rounds_done,
                self.digest,
                self.places,
                self.step_s,
                layout,
            )
        )
        self.desk.wait(0.2)

    def _vote(self, shown: View) -> None:
        assert self.desk is not None
        now = (shown.round, shown.generation)
        digest = _hex(self.vote_digest) if self.own.exchanged == now else ""
        missing = () if self.own.exchanged == now else self.vote_missing
        self.desk.post(Voted(self.own.site, 0.0, self.own.life, *now, digest, missing))

    # ---- what all ranks do -------------------------------------------------------------------------------------------

    def _begin(self, shown: View) -> None:
        self.own = replace(self.own, round=shown.round, ready=False, exchanged=None, failed=None)
        self.inner, self.round_tokens, self.flight, self.snapshot = 0, 0, None, None
        self.say("joined", round=shown.round, members=[one.site for one in shown.members], fresh=False)

    def _outside(self) -> None:
        """Dropped, or a commit was missed: what this site made since is lost, and it comes back over the wire."""
        self.say("outside", round=self.own.round)
        self.own = Own(self.own.site, self.own.life + 1)
        self.flight = self.snapshot = None
        self.inner = self.round_tokens = 0
        self.began_s = time.time()

    def _snapshot(self, shown: View) -> None:
        fragment = self._fragment(shown.round)
        self.snapshot = self.flat.gather(fragment)
        names = MOMENTS if self.outer.moments else ()
        self.moments = {name: self.flat.gather(fragment, self._state(name)) for name in names}
        self.ready_tokens, self.round_tokens, self.inner = self.round_tokens, 0, 0
        self.own = replace(self.own, ready=True)

    def _state(self, name: str) -> Callable[[Any], Any]:
        return lambda parameter: self.session.optimizer.state[parameter][name]

    def _fragment(self, number: int) -> Interval:
        of = self.outer.fragments
        return self.flat.coordinates.fragment(number % of, of)

    def _exchange(self, shown: View) -> None:
        mine = next(member for member in shown.members if member.site == self.own.site)
        flight = Flight((shown.round, shown.generation), mine.fresh, threading.Event())
        self.flight = flight
        self.began_exchange_s = time.monotonic()
        threading.Thread(target=self._fly, args=(flight, shown), daemon=True).start()

    def _apply(self, shown: View) -> None:
        flight = self.flight
        assert flight is not None
        assert flight.result is not None
        assert self.own.exchanged is not None
        result = flight.result
        mine = positions(common(self.flat.own, [result.fragment]), self.flat.own)
        if flight.fresh or not self.outer.overlap:
            self.flat.scatter(result.fragment, result.anchor, add=False)
        else:
            assert self.snapshot is not None
            self.flat.scatter(result.fragment, result.anchor - self.snapshot, add=True)
        self._apply_moments(result.moments, self._fragment(flight.key[0]), flight.fresh, shown)
        self.anchor[mine] = result.anchor
        if self.momentum is not None and result.momentum is not None:
            self.momentum[mine] = result.momentum
        number = self.own.exchanged[0]
        self.digest = _hex(self.vote_digest)
        self.rounds_done, self.tokens = number + 1, shown.tokens
        strategy = self.session.strategy
        self.session.step = max(
            self.session.step, shown.tokens // (strategy.global_batch_rows * strategy.seq)
        )
        if flight.fresh:
            self.inner, self.round_tokens = 0, 0
            self.say("joined", round=number + 1, members=[one.site for one in shown.members], fresh=True,
                     seconds=round(time.time() - self.began_s, 3))  # fmt: skip
        self.own = replace(self.own, round=number + 1, ready=False, exchanged=None, failed=None)
        self.flight = self.snapshot = None
        self.mailbox.forget(number)
        self.say(
            "round", n=number, generation=flight.key[1], members=[one.site for one in shown.members], tokens=shown.tokens,
            digest=self.digest, bytes=self.mailbox.sent_bytes, seconds=round(time.monotonic() - self.began_exchange_s, 3),
            waited_s=round(self.waited_s, 3),
        )  # fmt: skip

    def _apply_moments(
        self, moments: dict[str, Tensor], fragment: Interval, fresh: bool, shown: View
    ) -> None:
        if fresh and moments:
            checkpoint.state_of(self.session.layout.model, self.session.optimizer)  # a newcomer may have none
            steps = shown.tokens // (self.session.strategy.global_batch_rows * self.session.strategy.seq)
            for state in self.session.optimizer.state.values():
                state["step"].fill_(max(1, steps))
        for name, mean in moments.items():
            if fresh or not self.outer.overlap:
                self.flat.scatter(fragment, mean, add=False, of=self._state(name))
                continue
            self.flat.scatter(fragment, mean - self.moments[name], add=True, of=self._state(name))
            if name == "exp_avg_sq":
                for state in self.session.optimizer.state.values():
                    state[name].clamp_(min=0)  # what came since may be less than the correction

    # ---- the exchange, in a thread of its own ------------------------------------------------------------------------

    def _fly(self, flight: Flight, shown: View) -> None:
        try:
            flight.result = self._meet(flight, shown)
        finally:
            flight.done.set()

    def _meet(self, flight: Flight, shown: View) -> Result | None:
        number, generation = flight.key
        fragment = self._fragment(number)
        own_part = common(self.flat.own, [fragment])
        members = sorted(shown.members, key=lambda one: one.site)
        others = [member for member in members if member.site != self.own.site]
        source = next(member.site for member in members if not member.fresh)
        layouts = {site: msgspec.json.decode(text, type=SiteStrategy) for site, text in shown.layouts}
        places = dict(shown.places)
        head = {"round": number, "generation": generation, "site": self.own.site}
        at = positions(own_part, self.flat.own)
        encoded: dict[str, Tensor] = {}
        names = tuple(MOMENTS) if self.outer.moments and others else ()
        if not flight.fresh:
            assert self.snapshot is not None
            encoded["difference"] = encode(self.snapshot - self.anchor[at], self.outer.codec)
            for name in names:
                encoded[name] = encode(MOMENTS[name][0](self.moments[name]), self.outer.codec)
        sends: list[Callable[[], None]] = []
        for member in others:
            theirs = ownership(layouts[member.site], self.session.spec, self.flat.coordinates)
            for address, blocks in zip(places[member.site], theirs, strict=True):
                for what, data in encoded.items():
                    shared = common(own_part, blocks)
                    self._post(sends, member.site, address, {**head, "what": what}, shared, own_part, data)
                if member.fresh and self.own.site == source:
                    shared = common(self.flat.own, blocks)
                    raw = encode(self.anchor, "fp32")
                    self._post(
                        sends, member.site, address, {**head, "what": "anchor"}, shared, self.flat.own, raw
                    )
                    if self.momentum is not None:
                        raw = encode(self.momentum, "fp32")
                        self._post(
                            sends,
                            member.site,
                            address,
                            {**head, "what": "momentum"},
                            shared,
                            self.flat.own,
                            raw,
                        )
        wanted = {
            (member.site, what): own_part
            for member in others
            if not member.fresh
            for what in ("difference", *names)
        }
        if flight.fresh:
            wanted[source, "anchor"] = self.flat.own
            if self.momentum is not None:
                wanted[source, "momentum"] = self.flat.own
        grace_s = self.outer.grace_s
        failed: set[str] = set()
        with ThreadPoolExecutor(max(1, len(sends))) as pool:
            futures = [pool.submit(send) for send in sends]
            started_s = time.monotonic()

            def silent() -> bool:
                now_s = time.monotonic()
                quiet = {
                    site for (site, _), _ in wanted.items()
                    if now_s - max(started_s, self.mailbox.heard_s.get(site, 0.0)) > grace_s
                    or self.mailbox.closed_s.get(site, 0.0) > max(started_s, self.mailbox.heard_s.get(site, 0.0))
                }  # fmt: skip
                late = {site for site in quiet if not self._complete(site, wanted, flight.key)}
                failed.update(late)
                newer = (
                    self.desk is not None
                    and (view := self.desk.view()) is not None
                    and (view.round, view.generation) != flight.key
                )
                return bool(late) or newer

            frames = self.mailbox.wait(
                lambda _found: all(self._complete(site, wanted, flight.key) for site, _ in wanted), silent
            )
            for future in futures:
                error = future.exception()
                if isinstance(error, Unreachable):
                    failed.add(error.site)
                elif error is not None:
                    raise error
        if frames is None or failed:
            flight.missing = tuple(sorted(failed))
            return None
        return self._result(flight, members, frames, encoded, names, own_part, at)

    def _post(
        self, sends: list[Callable[[], None]], site: str, address: str, head: dict[str, Any], blocks: list[Interval],
        within: list[Interval], data: Tensor,
    ) -> None:  # fmt: skip
        if not blocks:
            return
        payload = data[positions(blocks, within)]

        def send() -> None:
            try:
                self.mailbox.send(address, {**head, "blocks": blocks}, payload, self.outer.grace_s)
            except OSError as error:
                raise Unreachable(site) from error

        sends.append(send)

    def _complete(
        self, site: str, wanted: dict[tuple[str, str], list[Interval]], key: tuple[int, int]
    ) -> bool:
        for (sender, what), blocks in wanted.items():
            if sender == site:
                have = sum(
                    size([(a, b) for a, b in f.head["blocks"]]) for f in self.mailbox.of(key, site, what)
                )
                if have < size(blocks):
                    return False
        return True

    def _result(
        self, flight: Flight, members: list[Member], frames: list[Frame], encoded: dict[str, Tensor], names: tuple[str, ...],
        own_part: list[Interval], at: Tensor,
    ) -> Result:  # fmt: skip
        anchor, momentum = self.anchor, self.momentum
        if flight.fresh:
            anchor = self._collect(flight.key, frames, "anchor", self.flat.own, "fp32", "")
            if momentum is not None:
                momentum = self._collect(flight.key, frames, "momentum", self.flat.own, "fp32", "")
        weights = {member.site: max(0, member.tokens) for member in members if not member.fresh}
        total = sum(weights.values())
        alone = len(weights) == 1
        codec = self.outer.codec

        def mean_of(what: str, back: Callable[[Tensor], Tensor]) -> Tensor:
            """Over the members, by their tokens, in the order of their names."""
            mean = torch.zeros((size(own_part), BLOCK))
            for site, weight in weights.items():
                if site == self.own.site:
                    values = decode(encoded[what], codec)
                else:
                    values = self._collect(flight.key, frames, what, own_part, codec, site)
                mean.add_(back(values), alpha=weight / total)
            return mean

        mean = mean_of("difference", torch.clone)
        moments = {name: mean_of(name, MOMENTS[name][1]) for name in names}
        before = anchor[at]
        velocity: Tensor | None = None
        if momentum is not None:
            velocity = momentum[at] * self.outer.momentum + mean
            after = before + self.outer.lr * (mean + self.outer.momentum * velocity)
        elif alone and self.outer.lr == 1.0 and self.snapshot is not None and len(members) == 1:
            after = self.snapshot  # one site alone is plain training, to the last bit
        else:
            after = before + self.outer.lr * mean
        own_sum = checksum(after, numbers(own_part))
        for values in moments.values():
            own_sum += checksum(values, numbers(own_part))
        if not flight.fresh:
            return Result(self._fragment(flight.key[0]), after, velocity, moments, own_sum)
        anchor[at] = after
        if momentum is not None and velocity is not None:
            momentum[at] = velocity
        return Result(self.whole, anchor, momentum, moments, own_sum)

    def _collect(
        self,
        key: tuple[int, int],
        frames: list[Frame],
        what: str,
        wanted: list[Interval],
        codec: str,
        site: str,
    ) -> Tensor:
        out = torch.zeros((size(wanted), BLOCK))
        for frame in frames:
            head = frame.head
            if (
                (head["round"], head["generation"]) != key
                or head["what"] != what
                or (site and head["site"] != site)
            ):
                continue
            blocks = [(int(a), int(b)) for a, b in head["blocks"]]
            out[positions(blocks, wanted)] = decode(frame.data.view(size(blocks), -1), codec)
        return out


class Unreachable(Exception):
    """A twin's site that could not be sent to within the grace."""

    def __init__(self, site: str) -> None:
        super().__init__(site)
        self.site = site


def _all_gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _sum(value: int) -> int:
    """Over all ranks, modulo 2**64."""
    return int(sum(_all_gather(value))) % (1 << 64)


def _hex(value: int) -> str:
    return f"{value % (1 << 64):016x}"

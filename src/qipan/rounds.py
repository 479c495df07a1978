"""Rounds of outer steps between sites: who takes part, when they exchange, and what counts.  Pure, like `decide`.

    join -> members(generation) -> exchange -> vote -> commit

Every site tells facts to one coordinator, at the lowest board that all sites are below, and is shown a `View`; facts and views may be lost,
repeated or late.  A round is committed when every member of one generation has voted for the same result; all members apply it, or it is
repeated without those who went silent, from the state before it.  A site that missed a commit is outside until it asks
again, and comes back with weight 0 in its first round: it is given the others' state on the way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from qipan.errors import InvalidInput
from qipan.strategy import round_steps

BACKOFF_MAX = 6
HUNG_UP_S = 0.5


# ---- facts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Joined:
    """A site asks to take part.  `round` and `digest` say what state it has; `places` is where its ranks listen.  `life`
    counts how often it came from outside: what an earlier life was part of is over."""

    site: str
    at_s: float
    life: int
    round: int = 0
    digest: str = ""
    places: tuple[str, ...] = ()
    step_s: float = 0.0
    layout: str = ""  # its part of the strategy, for its twins (JSON)


@dataclass(frozen=True, slots=True)
class Seen:
    """A sign of life, or nothing but the time (`site` empty)."""

    at_s: float
    site: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """A member has done its inner steps of the round."""

    site: str
    at_s: float
    life: int
    round: int
    tokens: int
    step_s: float


@dataclass(frozen=True, slots=True)
class Voted:
    """How an exchange went: the digest of the result, or who could not be reached."""

    site: str
    at_s: float
    life: int
    round: int
    generation: int
    digest: str = ""
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Left:
    site: str
    at_s: float


@dataclass(frozen=True, slots=True)
class HungUp:
    """A site's line closed, as a killed process's does: it has HUNG_UP_S to come back."""

    site: str
    at_s: float


RoundFact = Joined | Seen | Ready | Voted | Left | HungUp


# ---- state and what sites are shown ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Member:
    """`fresh`: in its first round, with weight 0."""

    site: str
    life: int
    fresh: bool = False
    tokens: int = -1  # of this round; -1: not ready
    vote: str = ""  # digest
    missing: tuple[str, ...] = ()
    voted: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """What a site last said."""

    site: str
    seen_s: float
    places: tuple[str, ...] = ()
    step_s: float = 0.0
    layout: str = ""
    life: int = -1
    waiting: bool = False  # asks to join
    round: int = 0
    digest: str = ""
    failures: int = 0
    barred_until_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Rules:
    every: int
    grace_s: float = 10.0
    min_sites: int = 1
    expected: tuple[str, ...] = ()  # the first round waits for these, up to `found_s`
    found_s: float = 120.0
    ramp: int = 0  # a round is at most one part in `ramp` of the steps done before it; 0: all are alike
    batch_tokens: int = 0  # of all sites in a step; with a ramp

    def every_after(self, tokens: int) -> int:
        """Inner steps of the round that begins after so many tokens."""
        return (
            round_steps(self.every, self.ramp, tokens // self.batch_tokens)
            if self.batch_tokens
            else self.every
        )


@dataclass(frozen=True, slots=True)
class Rounds:
    """`round` is the one being worked on; `phase` gathers, then exchanges.  `asked_s`: when the present phase began to
    wait for the last ones."""

    rules: Rules
    round: int = 0
    generation: int = 0
    phase: Literal["found", "gather", "exchange"] = "found"
    members: tuple[Member, ...] = ()
    known: tuple[Known, ...] = ()
    asked_s: float = -1.0
    committed: tuple[int, int] = (-1, 0)  # (round, generation)
    digest: str = ""  # of the state after the last commit
    tokens: int = 0
    version: int = 0  # counts facts, from the coordinator's start time on: a later view is the greater

    def about(self, site: str) -> Known | None:
        return next((one for one in self.known if one.site == site), None)

    def member(self, site: str) -> Member | None:
        return next((one for one in self.members if one.site == site), None)


@dataclass(frozen=True, slots=True)
class View:
    """What a site is shown.  Seeing it twice, or late, does no harm: it names round and generation."""

    round: int
    generation: int
    phase: str
    members: tuple[Member, ...]
    committed: tuple[int, int]
    tokens: int
    steps: tuple[tuple[str, int], ...]  # inner steps of each member in a round
    places: tuple[tuple[str, tuple[str, ...]], ...]
    layouts: tuple[tuple[str, str], ...]
    version: int = 0


@dataclass(frozen=True, slots=True)
class Admit:
    site: str
    round: int
    fresh: bool


@dataclass(frozen=True, slots=True)
class Drop:
    site: str
    round: int
    why: str


@dataclass(frozen=True, slots=True)
class Exchange:
    round: int
    generation: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    round: int
    generation: int
    members: tuple[str, ...]
    tokens: tuple[int, ...]
    digest: str


RoundCommand = Admit | Drop | Exchange | Commit


def decide_round(state: Rounds, fact: RoundFact) -> tuple[Rounds, tuple[RoundCommand, ...]]:
    """One fact.  The same state and fact give the same answer; nothing else is read."""
    commands: list[RoundCommand] = []
    state = _absorb(replace(state, version=state.version + 1), fact)
    for _ in range(4):  # a drop may complete a phase, which may begin the next
        before = state
        state = _advance(state, fact.at_s, commands)
        if state == before:
            break
    return state, tuple(commands)


def view(state: Rounds) -> View:
    sites = [state.about(member.site) for member in state.members]
    known = [one for one in sites if one is not None]
    steps = inner_steps(state.rules.every_after(state.tokens), [one.step_s for one in known])
    return View(
        state.round, state.generation, state.phase, state.members, state.committed, state.tokens,
        tuple((one.site, count) for one, count in zip(known, steps, strict=True)),
        tuple((one.site, one.places) for one in known), tuple((one.site, one.layout) for one in known),
        state.version,
    )  # fmt: skip


def same_view(one: View, other: View) -> bool:
    """Whether they differ in their version alone."""
    return replace(one, version=0) == replace(other, version=0)


FACTS: dict[str, type[RoundFact]] = {
    kind.__name__: kind for kind in (Joined, Seen, Ready, Voted, Left, HungUp)
}


def encode_fact(fact: RoundFact) -> dict[str, object]:
    return {"kind": type(fact).__name__, "body": msgspec.to_builtins(fact)}


def decode_fact(value: dict[str, object]) -> RoundFact:
    """Raises InvalidInput."""
    kind = FACTS.get(str(value.get("kind")))
    if kind is None:
        raise InvalidInput(f"unknown fact {str(value.get('kind'))[:40]!r}; it is one of {', '.join(FACTS)}")
    try:
        return msgspec.convert(value.get("body"), type=kind)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{kind.__name__}: {error}") from None


def inner_steps(every: int, step_s: Sequence[float]) -> list[int]:
    """The fastest site does `every` steps, the others as many as fit into the same time."""
    measured = [s for s in step_s if s > 0]
    if not measured:
        return [every] * len(step_s)
    return [max(1, round(every * min(measured) / s)) if s > 0 else every for s in step_s]


# ---- facts into state ------------------------------------------------------------------------------------------------


def _absorb(state: Rounds, fact: RoundFact) -> Rounds:
    match fact:
        case Joined():
            old = state.about(fact.site) or Known(fact.site, fact.at_s)
            if fact.life < old.life:
                return state
            if fact.life == old.life:  # said again; one that was dropped before its first round asks anew
                old = replace(old, seen_s=max(old.seen_s, fact.at_s), waiting=state.member(fact.site) is None)
                return _know(state, old)
            known = replace(
                old, seen_s=fact.at_s, places=fact.places, step_s=fact.step_s or old.step_s, layout=fact.layout,
                life=fact.life, waiting=True, round=fact.round, digest=fact.digest,
            )  # fmt: skip
            return _without(_know(state, known), fact.site)
        case Seen() if fact.site:
            return _saw(state, fact.site, fact.at_s)
        case Ready():
            state = _saw(state, fact.site, fact.at_s)
            member = state.member(fact.site)
            if member is None or member.life != fact.life or fact.round != state.round:
                return state
            if state.phase != "gather" or member.tokens >= 0:
                return state
            about = state.about(fact.site)
            if about is not None and fact.step_s > 0:
                state = _know(state, replace(about, step_s=fact.step_s))
            return _put(state, replace(member, tokens=fact.tokens))
        case Voted():
            state = _saw(state, fact.site, fact.at_s)
            member = state.member(fact.site)
            now = (state.round, state.generation)
            if (
                member is None
                or (fact.round, fact.generation) != now
                or state.phase != "exchange"
                or member.voted
            ):
                return state
            return _put(state, replace(member, vote=fact.digest, missing=fact.missing, voted=True))
        case Left():
            state = _without(state, fact.site)
            return replace(state, known=tuple(one for one in state.known if one.site != fact.site))
        case HungUp():
            hung = state.about(fact.site)
            if hung is None:
                return state
            seen_s = min(hung.seen_s, fact.at_s - state.rules.grace_s + HUNG_UP_S)
            return _know(state, replace(hung, seen_s=seen_s))
        case _:
            return state


def _saw(state: Rounds, site: str, at_s: float) -> Rounds:
    known = state.about(site)
    return state if known is None else _know(state, replace(known, seen_s=max(known.seen_s, at_s)))


def _know(state: Rounds, known: Known) -> Rounds:
    others = [one for one in state.known if one.site != known.site]
    return replace(state, known=tuple(sorted([*others, known], key=lambda one: one.site)))


def _put(state: Rounds, member: Member) -> Rounds:
    return replace(state, members=tuple(member if one.site == member.site else one for one in state.members))


def _without(state: Rounds, site: str) -> Rounds:
    """Members change only with the generation: votes of the old one count for nothing."""
    if state.member(site) is None:
        return state
    members = tuple(
        replace(one, vote="", missing=(), voted=False) for one in state.members if one.site != site
    )
    return replace(state, members=members, generation=state.generation + 1, asked_s=-1.0)


# ---- what follows ----------------------------------------------------------------------------------------------------


def _advance(state: Rounds, now_s: float, commands: list[RoundCommand]) -> Rounds:
    if not any(not member.fresh for member in state.members):
        return _found(state, now_s, commands)
    return _gather(state, now_s, commands) if state.phase == "gather" else _exchange(state, now_s, commands)


def _found(state: Rounds, now_s: float, commands: list[RoundCommand]) -> Rounds:
    """Nobody holds the state: the site with the most rounds brings it, and whoever has the same.  The first time it is
    waited for all that are expected."""
    rules = state.rules
    alive = [one for one in state.known if one.waiting and now_s - one.seen_s <= rules.grace_s]
    if not alive:
        return replace(state, phase="found", members=(), asked_s=-1.0)
    began_s = now_s if state.asked_s < 0 or state.phase != "found" else state.asked_s
    state = replace(state, phase="found", members=(), asked_s=began_s)
    wait_s = rules.found_s if state.committed[0] < 0 else rules.grace_s
    missing = set(rules.expected) - {one.site for one in alive}
    if len(alive) < rules.min_sites or (missing and now_s - began_s < wait_s):
        return state
    source = max(alive, key=lambda one: (one.round, one.digest, one.site))
    members = tuple(
        Member(one.site, one.life, fresh=(one.round, one.digest) != (source.round, source.digest))
        for one in alive
    )
    for member in members:
        commands.append(Admit(member.site, state.round, member.fresh))
        known = state.about(member.site)
        assert known is not None
        state = _know(state, replace(known, waiting=False))
    return replace(
        state, phase="gather", members=members, generation=state.generation + 1, asked_s=-1.0, digest=source.digest,
        round=max(state.round, source.round),
    )  # fmt: skip


def _gather(state: Rounds, now_s: float, commands: list[RoundCommand]) -> Rounds:
    """Until every member has done its steps.  The silent are waited for once, for `grace_s`."""
    rules = state.rules
    for member in state.members:
        if _silent(state, member.site, now_s):
            commands.append(Drop(member.site, state.round, "silent"))
            return _without(state, member.site)
    waiting = [member for member in state.members if not member.fresh and member.tokens < 0]
    if waiting:
        return state
    present = {member.site for member in state.members}
    for known in state.known:
        if (
            known.waiting
            and known.site not in present
            and not _silent(state, known.site, now_s)
            and now_s >= known.barred_until_s
        ):
            commands.append(Admit(known.site, state.round, True))
            state = _know(state, replace(known, waiting=False))
            members = tuple(
                sorted([*state.members, Member(known.site, known.life, fresh=True)], key=lambda one: one.site)
            )
            state = replace(state, members=members)
    if len(state.members) < rules.min_sites:
        return state
    state = replace(state, phase="exchange", generation=state.generation + 1, asked_s=now_s)
    commands.append(Exchange(state.round, state.generation, tuple(one.site for one in state.members)))
    return state


def _exchange(state: Rounds, now_s: float, commands: list[RoundCommand]) -> Rounds:
    if len(state.members) < state.rules.min_sites:
        return replace(state, phase="gather")
    for member in state.members:
        if _silent(state, member.site, now_s):
            return _again(state, member.site, "silent", now_s, commands)
    voted = [member for member in state.members if member.voted]
    blamed = [
        site for member in voted for site in (member.missing or (() if member.vote else (member.site,)))
    ]
    # One vote against is enough to repeat; it is waited for the others' so that the right one is dropped.
    if len(voted) < len(state.members):
        return state
    if blamed:
        return _again(state, _worst(state, blamed), "could not be reached by all", now_s, commands)
    digests = [member.vote for member in voted]
    if len(set(digests)) > 1:
        rare = min(
            state.members, key=lambda one: (digests.count(one.vote), not one.fresh, one.tokens, one.site)
        )
        return _again(state, rare.site, "its result differs", now_s, commands)
    commands.append(
        Commit(
            state.round, state.generation, tuple(one.site for one in state.members),
            tuple(max(0, one.tokens) for one in state.members), digests[0],
        )
    )  # fmt: skip
    tokens = state.tokens + sum(max(0, one.tokens) for one in state.members)
    for member in state.members:
        known = state.about(member.site)
        if known is not None and known.failures:
            state = _know(state, replace(known, failures=0))
    return replace(
        state, committed=(state.round, state.generation), round=state.round + 1, phase="gather", digest=digests[0],
        members=tuple(Member(one.site, one.life) for one in state.members), tokens=tokens, asked_s=-1.0,
    )  # fmt: skip


def _again(state: Rounds, site: str, why: str, now_s: float, commands: list[RoundCommand]) -> Rounds:
    """The round is repeated without this site, which may ask again after a while that doubles each time."""
    commands.append(Drop(site, state.round, why))
    known = state.about(site)
    if known is not None:
        failures = min(known.failures + 1, BACKOFF_MAX)
        barred_s = now_s + state.rules.grace_s * 2 ** (failures - 1)
        state = _know(state, replace(known, failures=failures, barred_until_s=barred_s))
    state = _without(state, site)
    if not any(not member.fresh for member in state.members):
        return state
    commands.append(Exchange(state.round, state.generation, tuple(one.site for one in state.members)))
    return replace(state, asked_s=now_s)


def _silent(state: Rounds, site: str, now_s: float) -> bool:
    known = state.about(site)
    return known is None or now_s - known.seen_s > state.rules.grace_s


def _worst(state: Rounds, blamed: list[str]) -> str:
    """Whom most could not reach; of two who blame each other, the newcomer, then the one with less work done."""
    members = [one for one in state.members if one.site in blamed] or list(state.members)
    return min(members, key=lambda one: (-blamed.count(one.site), not one.fresh, one.tokens, one.site)).site


# ---- a site's own side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Own:
    """What a site knows of itself.  `round`: the one it works on, its state being that after `round - 1`; -1: outside.
    `exchanged`: the (round, generation) of a result it holds and has not applied."""

    site: str
    life: int = 0
    round: int = -1
    ready: bool = False
    exchanged: tuple[int, int] | None = None
    failed: tuple[int, int] | None = None


Todo = Literal["join", "begin", "train", "ready", "exchange", "vote", "apply", "wait", "outside"]


def todo(own: Own, shown: View) -> Todo:
    """What a site does next.  `outside`: it has missed a commit or its place, and must join anew."""
    mine = next((one for one in shown.members if (one.site, one.life) == (own.site, own.life)), None)
    if own.exchanged is not None and shown.committed == own.exchanged:
        return "apply"
    if own.round >= 0 and (mine is None or shown.round != own.round):
        return "outside"
    if mine is None:
        return "join"
    if own.round < 0 and not mine.fresh:
        return (
            "begin" if own.exchanged is None else "outside"
        )  # named when the state was founded, or it missed its commit
    if shown.phase == "exchange":
        now = (shown.round, shown.generation)
        if now in (own.exchanged, own.failed):
            return "wait" if mine.voted else "vote"
        return "exchange" if mine.fresh or own.ready else "wait"
    if own.round < 0:
        return "wait"
    if not own.ready:
        return "train"
    return "wait" if mine.tokens >= 0 else "ready"

"""The rules of rounds between sites on a manual clock: crashes, silence, cut links, lost and late messages, in each phase."""

import os
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace

import pytest

from qipan.round_server import TICK_S, RoundServer
from qipan.rounds import (
    Commit,
    HungUp,
    Joined,
    Known,
    Left,
    Member,
    Own,
    Ready,
    RoundFact,
    Rounds,
    Rules,
    Seen,
    View,
    Voted,
    decide_round,
    inner_steps,
    todo,
    view,
)
from qipan.trainer.sites.desk import Desk

GRACE_S = 5.0
STEP_S = 0.5


@dataclass
class Site:
    """A simulated site: its own side of the rules is the real `todo`; state is the list of rounds it applied."""

    name: str
    own: Own
    state: tuple[str, ...] = ()  # digests of commits, the oldest first
    saved: tuple[str, ...] = ()
    saved_round: int = 0
    shown: View | None = None
    result: tuple[str, ...] = ()
    steps: int = 0
    alive: bool = True
    back_s: float = 0.0
    busy_s: float = -1.0
    base_round: int = 0  # the round that its state is the state before
    applied: list[tuple[int, int]] = field(default_factory=list)


class World:
    def __init__(self, seed: int, sites: int = 3, faults_until_s: float = 150.0) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.faults_until_s = faults_until_s
        self.rounds = Rounds(Rules(2, GRACE_S, 1, tuple("abcd"[:sites]), 20.0))
        self.sites = {name: Site(name, Own(name)) for name in "abcd"[:sites]}
        self.cut: dict[frozenset[str], float] = {}  # pair, or {site} for its way to the coordinator -> until
        self.mail: list[tuple[float, int, str, object]] = []
        self.sent = 0
        self.history: dict[int, tuple[int, str, tuple[str, ...]]] = {}  # round -> generation, digest, members
        self.faults: Counter[tuple[str, str]] = Counter()  # (what, phase it fell into)

    # the coordinator

    def tell(self, fact: RoundFact, sender: str) -> None:
        self._send(("fact", sender, fact), sender)

    def _send(self, what: object, site: str) -> None:
        if self.cut.get(frozenset([site]), 0.0) > self.now_s or (self._faulty() and self.rng.random() < 0.05):
            return
        self.sent += 1
        delay_s = self.rng.choice((0.02, 0.02, 0.3, 1.0)) if self._faulty() else 0.02
        self.mail.append((self.now_s + delay_s, self.sent, site, what))
        if self._faulty() and self.rng.random() < 0.05:
            self.mail.append((self.now_s + self.rng.random() * 8, self.sent, site, what))

    def _faulty(self) -> bool:
        return self.now_s < self.faults_until_s

    def decide(self, fact: RoundFact) -> None:
        fact = replace(fact, at_s=self.now_s)  # the coordinator's clock
        self.rounds, commands = decide_round(self.rounds, fact)
        for command in commands:
            if isinstance(command, Commit):
                assert command.round not in self.history, "no round is committed twice"
                self.history[command.round] = (command.generation, command.digest, command.members)

    def deliver(self) -> None:
        due = sorted(item for item in self.mail if item[0] <= self.now_s)
        self.mail = [item for item in self.mail if item[0] > self.now_s]
        for _, _, name, (kind, *rest) in due:
            site = self.sites[name]
            if kind == "fact":
                self.decide(rest[1])
                self._send(("view", view(self.rounds)), name)
            elif site.alive and (site.shown is None or rest[0].version > site.shown.version):
                site.shown = rest[0]

    # the sites

    def turn(self, site: Site) -> None:
        if not site.alive:
            if self.now_s >= site.back_s:
                life = site.own.life + 1
                self.sites[site.name] = Site(
                    site.name, Own(site.name, life), site.saved, site.saved, site.saved_round,
                    base_round=site.saved_round, applied=site.applied,
                )  # fmt: skip
            return
        if self.rng.random() < 0.5:
            self.tell(Seen(0.0, site.name), site.name)
        if site.shown is None:
            return
        shown, own = site.shown, site.own
        match todo(own, shown):
            case "join":
                digest = site.state[-1] if site.state else ""
                self.tell(Joined(site.name, 0.0, own.life, site.base_round, digest), site.name)
            case "begin":
                site.own = replace(own, round=shown.round, ready=False, exchanged=None, failed=None)
                site.base_round, site.steps = shown.round, 0
            case "outside":
                site.own = Own(site.name, own.life + 1)
            case "train":
                site.steps += 1
                if site.steps >= dict(shown.steps)[site.name]:
                    site.own = replace(own, ready=True)
            case "ready":
                self.tell(Ready(site.name, 0.0, own.life, own.round, 100, STEP_S), site.name)
            case "exchange":
                self.exchange(site, shown)
            case "vote":
                done = own.exchanged == (shown.round, shown.generation)
                digest = site.result[-1] if done else ""
                self.tell(
                    Voted(
                        site.name,
                        0.0,
                        own.life,
                        shown.round,
                        shown.generation,
                        digest,
                        () if done else self.missing(site, shown),
                    ),
                    site.name,
                )
            case "apply":
                assert own.exchanged is not None
                number, generation = own.exchanged
                site.state = site.result
                site.applied.append(own.exchanged)
                site.base_round = number + 1
                site.own = replace(own, round=number + 1, ready=False, exchanged=None, failed=None)
                site.steps = 0
                assert self.history[number][:2] == (generation, site.state[-1]), "applied as committed"
                if number % 2:
                    site.saved, site.saved_round = site.state, site.base_round

    def missing(self, site: Site, shown: View) -> tuple[str, ...]:
        return tuple(
            other.site for other in shown.members
            if other.site != site.name and not self.reaches(site.name, other.site, shown)
        )  # fmt: skip

    def reaches(self, one: str, other: str, shown: View) -> bool:
        peer = self.sites[other]
        life = next(member.life for member in shown.members if member.site == other)
        return (
            peer.alive and peer.own.life == life and self.cut.get(frozenset([one, other]), 0.0) <= self.now_s
        )

    def exchange(self, site: Site, shown: View) -> None:
        """Takes time; fails when a peer cannot be reached for a while."""
        now = (shown.round, shown.generation)
        if self.missing(site, shown):
            if site.busy_s < 0:
                site.busy_s = self.now_s + GRACE_S / 2
            if self.now_s >= site.busy_s:
                site.own, site.busy_s = replace(site.own, failed=now), -1.0
            return
        site.busy_s = -1.0
        holders = [self.sites[member.site] for member in shown.members if not member.fresh]
        states = {holder.state for holder in holders}
        assert len(states) == 1, "all members go on from the same state"
        digest = f"{now[0]}.{now[1]}:" + ",".join(
            f"{one.site}{'' if one.fresh else one.tokens}" for one in shown.members
        )
        site.result = (*states.pop(), digest)
        site.own = replace(site.own, exchanged=now)

    # faults

    def trouble(self) -> None:
        if not self._faulty():
            return
        names = sorted(self.sites)
        if self.rng.random() < 0.02:
            site = self.sites[self.rng.choice(names)]
            site.alive, site.back_s = False, self.now_s + self.rng.choice((0.5, 3.0, 20.0))
            self.faults["crash", self.rounds.phase] += 1
        if self.rng.random() < 0.02:
            pair = (
                frozenset(self.rng.sample(names, 2))
                if self.rng.random() < 0.5
                else frozenset([self.rng.choice(names)])
            )
            self.cut[pair] = self.now_s + self.rng.choice((0.5, 4.0, 15.0))
            self.faults["cut" if len(pair) > 1 else "silence", self.rounds.phase] += 1
        if self.rng.random() < 0.003:
            name = self.rng.choice(names)
            self.tell(Left(name, 0.0), name)

    def run(self, until_s: float) -> None:
        while self.now_s < until_s:
            self.now_s = round(self.now_s + 0.25, 3)
            self.trouble()
            for name in sorted(self.sites):
                self.turn(self.sites[name])
            self.deliver()
            self.decide(Seen(self.now_s))


def endure(seed: int) -> Counter[tuple[str, str]]:
    """Faults for 150 s, then 100 s or more without, then all but one die for good.  Returns which faults fell into which phase."""
    world = World(seed, sites=2 + seed % 3)
    world.run(150.0)
    before = len(world.history)
    world.run(
        200.0
    )  # the last cut ends at 165 s; whoever could not be reached is barred for up to 32 times the grace
    barred_s = max((known.barred_until_s for known in world.rounds.known), default=0.0)
    world.run(max(250.0, barred_s + 30.0))
    assert len(world.history) > before + 5, f"seed {seed}: it stands still after the faults"
    assert {member.site for member in world.rounds.members} == set(world.sites), f"seed {seed}: all are back"
    for site in world.sites.values():
        assert len(site.applied) == len(set(site.applied)), f"seed {seed}: {site.name} applied a round twice"
        numbers = [number for number, _ in site.applied]
        assert len(numbers) == len(set(numbers)), f"seed {seed}: {site.name} applied a round twice"
    last = max(world.history)
    for number, (generation, _, members) in world.history.items():
        if number >= last:
            continue  # being applied
        for member in members:
            site = world.sites[member]
            applied = dict(site.applied)
            assert applied.get(number, generation) == generation, (
                f"seed {seed}: round {number} differs at {member}"
            )
    survivor = world.rng.choice(sorted(world.sites))
    for site in world.sites.values():
        if site.name != survivor:
            site.alive, site.back_s = False, float("inf")
    before = len(world.history)
    world.run(world.now_s + 30.0)
    assert len(world.history) > before + 2, f"seed {seed}: {survivor} alone stands still"
    return world.faults


@pytest.mark.parametrize("seed", range(40))
def test_no_round_is_applied_twice_or_differently_and_none_waits_for_ever(seed):
    endure(seed)


@pytest.mark.endurance
@pytest.mark.timeout(7200)
def test_ten_thousand_seeds_with_each_fault_in_each_phase():
    faults: Counter[tuple[str, str]] = Counter()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(endure, range(10_000), chunksize=50):
            faults += found
    for what in ("crash", "silence", "cut"):
        for phase in ("found", "gather", "exchange"):
            assert faults[what, phase] > 100, f"{what} while {phase}: {faults[what, phase]} times"


def told(rounds: Rounds, *facts: RoundFact) -> Rounds:
    for fact in facts:
        rounds, _ = decide_round(rounds, fact)
    return rounds


def two_ready() -> Rounds:
    rounds = Rounds(Rules(10, GRACE_S, 1, ("a", "b")))
    rounds = told(rounds, Joined("a", 0.0, 0), Joined("b", 0.1, 0))
    return told(rounds, Ready("a", 1.0, 0, 0, 100, 0.1), Ready("b", 1.1, 0, 0, 50, 0.2))


def test_a_round_is_committed_when_all_voted_for_the_same():
    rounds = two_ready()
    assert rounds.phase == "exchange"
    vote = [Voted(site, 2.0, 0, 0, rounds.generation, "x") for site in "ab"]
    rounds = told(rounds, vote[0])
    assert rounds.committed == (-1, 0)
    rounds, commands = decide_round(rounds, vote[1])
    assert commands == (Commit(0, rounds.committed[1], ("a", "b"), (100, 50), "x"),)
    assert rounds.round == 1


def test_a_round_is_repeated_without_the_silent_one():
    rounds = told(two_ready(), Seen(4.0, "a"), Seen(7.0, "a"))
    assert [member.site for member in rounds.members] == ["a"]
    assert rounds.phase == "exchange"


def test_two_that_blame_each_other_lose_the_one_with_less_work():
    rounds = two_ready()
    rounds = told(
        rounds,
        Voted("a", 2.0, 0, 0, rounds.generation, missing=("b",)),
        Voted("b", 2.0, 0, 0, rounds.generation, missing=("a",)),
    )
    assert [member.site for member in rounds.members] == ["a"]
    assert rounds.about("b").barred_until_s > 2.0


def test_a_closed_line_is_waited_for_half_a_second_and_forgiven_when_it_comes_back():
    rounds = told(two_ready(), HungUp("b", 2.0), Seen(2.2, "b"), Seen(2.9, "a"))
    assert len(rounds.members) == 2
    rounds = told(rounds, HungUp("b", 3.0), Seen(3.6, "a"))
    assert [member.site for member in rounds.members] == ["a"]


def test_what_a_coordinator_could_not_write_it_has_not_heard(tmp_path):
    """Else it would answer from what is gone once it is killed; and it goes on once there is room."""
    folder = tmp_path / "rounds"
    server = RoundServer("127.0.0.1", folder)
    server.open("t", Rules(1, GRACE_S, 1, ("a",)))
    desk = Desk(server.address, "t", "a")
    try:
        folder.rmdir()
        desk.tell(Joined("a", 0.0, 0))
        time.sleep(3 * TICK_S)
        assert server.state("t").members == ()
        folder.mkdir()
        desk.tell(Joined("a", 0.0, 0))
        end_s = time.monotonic() + 30
        while not (folder / "t.json").exists():
            assert time.monotonic() < end_s, "its clock stands still"
            time.sleep(0.02)
        assert [member.site for member in server.state("t").members] == ["a"]
    finally:
        desk.close()
        server.close()


def test_a_coordinator_forgets_a_task_that_is_over(tmp_path):
    server = RoundServer("127.0.0.1", tmp_path)
    for task in ("t", "other"):
        server.open(task, Rules(1, GRACE_S, 1, ("a",)))
    desk, other = Desk(server.address, "t", "a"), Desk(server.address, "other", "a")
    try:
        desk.tell(Joined("a", 0.0, 0))
        assert (tmp_path / "t.json").exists()
        server.forget("t")
        desk.tell(Joined("a", 0.0, 1))  # from one that has not heard: nobody answers
        other.tell(Joined("a", 0.0, 0))
        assert [member.site for member in server.state("other").members] == ["a"]
        assert server.tasks() == ["other"]
        assert not (tmp_path / "t.json").exists()
    finally:
        desk.close()
        other.close()
        server.close()


def test_votes_for_unlike_results_never_commit():
    rounds = two_ready()
    rounds = told(
        rounds, Voted("a", 2.0, 0, 0, rounds.generation, "x"), Voted("b", 2.0, 0, 0, rounds.generation, "y")
    )
    assert rounds.committed == (-1, 0)


def test_rounds_grow_with_what_was_trained_and_no_further_than_asked():
    """A round is at most a quarter of the steps before it: what a member of a round is told to do, step by step."""
    rules = Rules(5, 10.0, 1, ("a", "b"), 60.0, ramp=4, batch_tokens=100)
    lengths, state = [], Rounds(rules)
    while state.tokens < 60 * 100:
        told = view(replace(state, members=(Member("a", 0),), known=(Known("a", 0.0),))).steps
        lengths.append(told[0][1])
        state = replace(state, tokens=state.tokens + 100 * lengths[-1])
    assert lengths[:8] == [1] * 8
    assert lengths == sorted(lengths)
    assert lengths[-1] == 5
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    assert all(length <= max(1, begun // 4) for length, begun in zip(lengths, begins, strict=True))
    assert Rules(5).every_after(0) == 5


def test_sites_do_unlike_numbers_of_steps_in_the_same_time():
    assert inner_steps(50, [0.1, 0.3, 0.0]) == [50, 17, 50]

"""What a board says of which nobody knows that it is sound: the board above keeps and shows what can be read, and goes on."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qipan.channel.network import Network
from qipan.difference import Told, decode_told, encode_told
from qipan.events import TaskStarted
from qipan.grid import GridHost, join
from qipan.hardware import BoardId, BoardSpec
from qipan.identity import Wallet, expects
from qipan.leases import EngineId, LeaseId, TaskId
from qipan.workload.site import Site

SOUND = encode_told(Told(0.0, (), {}))
UNREADABLE = [None, 10**15, -1, True, "text", b"junk", [], [1], {}, [["a"]], [[1, 2, 3, 4]], 1.5]
WAIT_S = 60.0


class Below:
    """The board dc1 below cn; what it answers to a question is what stands in `answers`."""

    def __init__(self, folder: Path) -> None:
        Wallet.found(folder / "cn" / "identity", "cn", time.time)
        self.host = GridHost(Site(BoardSpec(BoardId("cn"))), folder / "cn")
        url = f"grid://127.0.0.1:{self.host.listen('127.0.0.1', 0)}"
        wallet = join(folder / "dc1", self.host.wallet.invite("dc1", "", url))
        self.answers: dict[str, Any] = {"ended": SOUND}
        self.asked: list[str] = []
        self.bodies: list[Any] = []
        self.network = Network()
        hello = {"board": "dc1", "spec": msgspec.json.encode(BoardSpec(BoardId("dc1")))}
        self.dialer = self.network.dial(
            url, wallet.client_context, expects(("cn",)), lambda: hello, self.network.carrier(), self.answer
        )
        self.until(
            lambda: (
                BoardId("dc1") in self.host.children and self.host.children[BoardId("dc1")].carrier.connected
            )
        )

    def answer(self, question: str, body: Any) -> Any:
        self.asked.append(question)
        self.bodies.append(body)
        return self.answers[question]

    def until(self, holds: Any) -> None:
        end_s = time.monotonic() + WAIT_S
        while not holds():
            assert time.monotonic() < end_s
            time.sleep(0.01)

    def close(self) -> None:
        self.dialer.end()
        self.network.close()
        self.host.close()


@pytest.fixture(scope="module")
def below(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Below]:
    made = Below(tmp_path_factory.mktemp("below"))
    made.host.note(TaskStarted(TaskId("t-1"), LeaseId("l"), EngineId("dc1"), 1, 1, "p", (), "dc1/local"))
    yield made
    made.close()


@pytest.mark.parametrize("said", UNREADABLE)
def test_what_ended_there_is_kept_only_where_it_can_be_read(below, said, caplog):
    kept = below.host.folder / "told" / "dc1.msgpack"
    kept.unlink(missing_ok=True)
    below.answers["ended"] = said
    with caplog.at_level(logging.WARNING):
        below.host._ask_difference(BoardId("dc1"))
    assert not kept.exists()
    assert "dc1 said nothing readable of what ended there" in caplog.text
    below.answers["ended"] = SOUND
    below.host._ask_difference(BoardId("dc1"))
    assert decode_told(kept.read_bytes()) == Told(0.0, (), {})


REASON = {"at_s": 1.0, "board": "dc1", "verdict": "placed", "text": "there", "task_id": "t-1"}


@pytest.mark.parametrize("said", UNREADABLE)
def test_what_people_ask_above_is_answered_without_what_cannot_be_read(below, said):
    queries = below.host.queries
    below.answers |= {
        "why": [REASON],
        "logs": [b"printed", 7],
        "log_bytes": 7,
        "seen": [["dc1", "", [], [2.0]]],
    }
    sound = answers_of(queries)
    assert [one["text"] for one in sound[0]] == ["there"]
    assert sound[1:3] == ((b"printed", 7), 7)
    assert [(one.board, one.parent, one.placed_s) for one in sound[3]][1:] == [("dc1", "cn", (2.0,))]
    below.asked.clear()
    below.answers |= dict.fromkeys(("why", "logs", "log_bytes", "seen"), said)
    reasons, text, size, seen = answers_of(queries)
    assert sorted(below.asked) == ["log_bytes", "logs", "seen", "why"]
    assert reasons == []
    assert text == (b"", 0)
    assert size == (said if type(said) is int else 0)
    assert [one.board for one in seen] == ["cn"]


def test_a_page_of_a_log_goes_on_below_where_it_ends_here(below):
    below.answers["logs"] = [b"x" * 50, 70]
    assert below.host.queries.printed("t-1", 20, 40) == (b"x" * 40, 70), "no more than was asked for"
    assert below.bodies[-1] == ["t-1", 20, 40]


def answers_of(queries: Any) -> tuple[Any, ...]:
    return (
        queries.reasons_below("t-1"),
        queries.printed("t-1", 0, 100),
        queries.printed_bytes("t-1"),
        queries.seen("t-1"),
    )


def test_a_board_below_names_only_its_own_as_where_a_task_entered(below):
    assert below.host._below("dc1", "cn") == "dc1"
    assert below.host._below("dc1", "dc1") == "dc1"

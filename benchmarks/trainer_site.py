"""One rank of `benchmarks.trainer`: `python -m benchmarks.trainer_site ROLE PLAN`.  PLAN is JSON; lines of JSON go out."""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from qipan.round_server import RoundServer
from qipan.rounds import Rules
from qipan.strategy import SiteStrategy, Stage, Strategy
from qipan.trainer.balance import Balance
from qipan.trainer.data import Corpus, load_corpus, part_of, read_texts, row_offsets
from qipan.trainer.loop import LEARNING_RATE, schedule
from qipan.trainer.session import Session
from qipan.trainer.sites.outer import Sites
from qipan.workload import Model

DATA = ("fortunes:tang300+song100",)
UNSEEN_ROWS = 512


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def spec(plan: dict[str, Any], vocab: int) -> Model:
    return Model(
        "bench",
        plan["layers"],
        plan["hidden"],
        4,
        4,
        plan["hidden"] // 4,
        plan["hidden"] * 3,
        vocab,
        tied_embeddings=True,
    )


def bytes_corpus(data: tuple[str, ...] = DATA) -> Corpus:
    """The same texts, one token for each byte of UTF-8."""
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for uri in data:
        for text in read_texts(uri):
            parts[part_of(text)].append(text)
    streams = [
        np.frombuffer("\n".join(found).encode(), np.uint8).astype(np.int64) for found in parts.values()
    ]
    return Corpus(*streams, vocab=256)


class Text:
    def __init__(self, plan: dict[str, Any]) -> None:
        data = tuple(plan.get("data", DATA))
        self.corpus = bytes_corpus(data) if plan.get("bytes") else load_corpus(data)
        self.spec = spec(plan, self.corpus.vocab)

    def batch(self, strategy: Strategy, step: int, first: int, last: int) -> torch.Tensor:
        offsets = row_offsets(
            strategy.seed, step, strategy.global_batch_rows, len(self.corpus.train), strategy.seq
        )
        tokens = self.corpus.train
        return torch.from_numpy(np.stack([tokens[at : at + strategy.seq + 1] for at in offsets[first:last]]))

    def unseen(self, session: Session) -> float:
        """Nat per token on the validation part, whole rows, UNSEEN_ROWS at the most; every rank computes it alone."""
        seq, tokens = session.strategy.seq, self.corpus.validation
        rows = min((len(tokens) - 1) // seq, UNSEEN_ROWS)
        total = 0.0
        for i in range(0, rows, 16):
            starts = [j * seq for j in range(i, min(rows, i + 16))]
            total += session.layout.loss(
                torch.from_numpy(np.stack([tokens[a : a + seq + 1] for a in starts]))
            )
        return total / (rows * seq)


def step_of(session: Session, text: Text, steps: int, end: Callable[[], None] = lambda: None) -> float:
    first, last = session.own_rows()
    began_s = time.perf_counter()
    session.train(
        text.batch(session.strategy, session.step, first, last), LEARNING_RATE * schedule(session.step, steps)
    )
    end()
    return time.perf_counter() - began_s


def coordinator(plan: dict[str, Any]) -> None:
    server = RoundServer(
        plan["host"],
        None,
        lambda _task, command: say(
            command=type(command).__name__, **msgspec.to_builtins(command), at_s=time.time()
        ),
    )
    for task, (every, ramp) in plan["runs"].items():
        rules = Rules(
            every,
            plan["grace_s"],
            1,
            tuple(plan["sites"]),
            120.0,
            ramp=ramp,
            batch_tokens=plan["batch_tokens"],
        )
        server.open(task, rules)
    say(address=server.address)
    signal.pause()


def paced(model: torch.nn.Module, step_s: Callable[[int], float], passes: float = 1.0) -> Callable[[], None]:
    """A chip of known speed, given a step's seconds for so many rows: its passes end after the share `passes` of them, a third
    of that forward, layer by layer, so that whatever overlaps with the backward pass may; what is returned waits for the end.
    The real computation lies within; other programs on the machine do not blur it."""
    layers = list(model.layers.values())  # type: ignore[operator, union-attr]
    began_s, whole_s = [0.0], [0.0]

    def wait(share: float) -> None:
        time.sleep(max(0.0, began_s[0] + share * whole_s[0] - time.perf_counter()))

    def begin(_model: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        began_s[0], whole_s[0] = time.perf_counter(), step_s(len(given[0]))

    def after(i: int) -> Any:
        def hook(layer: torch.nn.Module, given: tuple[torch.Tensor, ...], _made: object) -> None:
            if layer.training:
                wait(passes * (i + 1) / len(layers) / 3)
                backward = 1 / 3 + (len(layers) - i) / len(layers) * 2 / 3
                given[0].register_hook(lambda _grad: wait(passes * backward))

        return hook

    model.register_forward_pre_hook(begin)
    for i, layer in enumerate(layers):
        layer.register_forward_hook(after(i))
    return lambda: wait(1.0)


def site(plan: dict[str, Any]) -> None:
    """For each run: train with outer steps for so many tokens; say what the rounds cost."""
    text = Text(plan)
    for run in plan["runs"]:
        one_run(plan, run, text)
    os._exit(0)


def one_run(plan: dict[str, Any], run: dict[str, Any], text: Text) -> None:
    strategy = msgspec.convert(run["strategy"], type=Strategy)
    session = Session(text.spec, strategy, plan["site"])
    end = paced(session.layout.model, lambda _rows: float(plan["step_s"]), 0.9)
    rounds: list[dict[str, Any]] = []

    def note(event: str, **values: Any) -> None:
        rounds.append({"event": event, "at_s": time.time(), **values})
        if event in ("joined", "outside"):
            say(event=event, at_s=time.time(), **values)

    steps = run["tokens"] // (strategy.global_batch_rows * strategy.seq)
    sites = Sites(session, plan["desk"], run["task"], plan["host"], note, run["tokens"])
    finished = sites.turn()
    began_s, computed_s, waited_s = time.perf_counter(), 0.0, sites.waited_s
    cpu_s = time.process_time()
    done = 0
    while not finished:
        took_s = step_of(session, text, steps, end)
        computed_s += took_s
        done += 1
        finished = sites.turn(took_s)
    seconds = time.perf_counter() - began_s
    sites.leave()
    say(
        site=plan["site"], task=run["task"], steps=done, tokens=sites.tokens, seconds=seconds, computed_s=computed_s,
        waited_s=sites.waited_s - waited_s, cpu_s=time.process_time() - cpu_s,
        parameters=sum(parameter.numel() for parameter in session.layout.model.parameters()),
        rounds=[one for one in rounds if one["event"] == "round"],
    )  # fmt: skip


def ddp(plan: dict[str, Any]) -> None:
    """Plain torch: DistributedDataParallel over both sites, under torchrun; nothing of Qipan's layouts."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    text = Text(plan)
    strategy = msgspec.convert(plan["strategy"], type=Strategy)
    alone = SiteStrategy(
        "one", (replace(strategy.sites[0].stages[0], rows_per_dp=(strategy.global_batch_rows,)),)
    )
    real = dist.is_initialized
    dist.is_initialized = lambda: False  # type: ignore[assignment]
    model = Session(text.spec, replace(strategy, sites=(alone,), outer=None)).layout.model
    dist.is_initialized = real  # type: ignore[assignment]
    end = paced(model, lambda _rows: float(plan["step_s"]), 0.9)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    rows = strategy.global_batch_rows // dist.get_world_size()
    began_s, done = 0.0, 0
    for step in range(plan["steps"] + 2):
        if step == 2:
            began_s = time.perf_counter()
        batch = text.batch(strategy, step, rank * rows, (rank + 1) * rows)
        optimizer.zero_grad()
        logits = wrapped(batch[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        end()
        done += step >= 2
    seconds = time.perf_counter() - began_s
    if rank == 0:
        say(steps=done, tokens=done * strategy.global_batch_rows * strategy.seq, seconds=seconds)
    dist.barrier()
    os._exit(0)


def losses(plan: dict[str, Any]) -> None:
    """Loss after equal tokens: exact data parallelism, and outer steps between two sites (threads of this process)."""
    text, seed = Text(plan), plan["seed"]
    exact = msgspec.convert(plan["exact"], type=Strategy)
    session = Session(text.spec, replace(exact, seed=seed))
    steps = plan["tokens"] // (exact.global_batch_rows * exact.seq)
    while session.step < steps:
        step_of(session, text, steps)
    say(seed=seed, every=0, loss=text.unseen(session))
    for way, fields in plan["ways"].items():
        outer = msgspec.convert(plan["outer"], type=Strategy)
        assert outer.outer is not None
        made = replace(outer, seed=seed, outer=replace(outer.outer, **fields))
        found = trained_apart(made, text, plan, steps)
        losses = found.losses.values()
        say(
            seed=seed, every=outer.outer.every, way=way, loss=max(losses), apart=max(losses) - min(losses),
            rounds=found.rounds, sent_bytes=found.sent_bytes,
        )  # fmt: skip
    os._exit(0)


@dataclass(frozen=True, slots=True)
class Apart:
    """`losses`: site -> that of the model that it ends with."""

    losses: dict[str, float]
    rounds: int
    sent_bytes: int  # by one site


def trained_apart(made: Strategy, text: Text, plan: dict[str, Any], steps: int) -> Apart:
    assert made.outer is not None
    server = RoundServer("127.0.0.1")
    batch_tokens = made.global_batch_rows * made.seq
    names = tuple(s.id for s in made.sites)
    server.open(
        "bench",
        Rules(made.outer.every, 30.0, 1, names, 60.0, ramp=made.outer.ramp, batch_tokens=batch_tokens),
    )
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    found: dict[str, float] = {}

    def run(name: str) -> None:
        session = Session(text.spec, made, name)

        def note(event: str, **values: Any) -> None:
            if event == "round":
                rounds[name].append(values)

        sites = Sites(session, server.address, "bench", "127.0.0.1", note, plan["tokens"])
        finished = sites.turn()
        while not finished:
            step_of(session, text, steps)
            finished = sites.turn(0.1)  # alike: equal numbers of steps
        sites.leave()
        found[name] = text.unseen(session)

    threads = [threading.Thread(target=run, args=(s.id,)) for s in made.sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.close()
    first, *others = ([one["digest"] for one in rounds[name]] for name in names)
    assert all(other == first for other in others), "digests differ"
    return Apart(found, len(first), rounds[names[0]][-1]["bytes"])


def mixed(plan: dict[str, Any]) -> None:
    """Two ranks, one three times slower (paced by the row); then the other one is."""
    rank, ranks = int(os.environ["RANK"]), 2
    dist.init_process_group("gloo")
    text = Text(plan)
    rows, seq = plan["rows"], plan["seq"]
    pauses = [plan["row_s"], 3 * plan["row_s"]]
    pause = [pauses[rank]]

    def opened(strategy: Strategy) -> Session:
        session = Session(text.spec, strategy)
        paced(session.layout.model, lambda rows: pause[0] * rows)
        return session

    def one(rows_per_dp: tuple[int, ...]) -> Strategy:
        stage = Stage("bench", ((0, plan["layers"]),), dp=len(rows_per_dp), rows_per_dp=rows_per_dp)
        return Strategy(0, seq, sum(rows_per_dp), (SiteStrategy("here", (stage,)),))

    def rate_alone(own: int) -> float:
        real = dist.is_initialized
        dist.is_initialized = lambda: False  # type: ignore[assignment]
        session = opened(one((own,)))
        times = [step_of(session, text, 100) for _ in range(7)][2:]
        dist.is_initialized = real  # type: ignore[assignment]
        return own / float(np.median(times))

    share = [rows * 3 // 4, rows // 4]
    rates = torch.tensor(
        [rate_alone(share[rank]) if r == rank else 0.0 for r in range(ranks)], dtype=torch.float64
    )
    dist.all_reduce(rates)
    dist.barrier()
    session, balance = opened(one((rows // 2, rows // 2))), Balance()
    said: list[dict[str, Any]] = []
    times: list[float] = []
    for step in range(plan["steps"]):
        if step == plan["steps"] // 2:
            pause[0] = pauses[1 - rank]
        began_s = time.perf_counter()
        step_of(session, text, 100)
        told = torch.zeros(ranks, dtype=torch.float64)
        told[rank] = session.watch.forward_s / session.watch.rows
        session.watch.clear()
        dist.all_reduce(told)
        times.append(time.perf_counter() - began_s)
        other = balance.rows(session.site, told.tolist())
        if other is not None:
            said.append({"step": step, "from": session.site.stages[0].rows_per_dp, "to": other})
            session.set_rows(other)
    even = float(np.median(times[:2]))
    half = plan["steps"] // 2
    settled = float(np.median(times[half // 2 : half]))
    before = [one["to"] for one in said if one["step"] < half]
    reshapes = reshape(plan, text)
    if rank == 0:
        say(
            rows=before[-1] if before else (rows // 2, rows // 2),
            rates=rates.tolist(),
            ideal=float(rates.sum()),
            reached=rows / settled,
            even=rows / even,
            times=times,
            rebalanced=said,
            changed_at=half,
            reshape_s=reshapes,
        )
    dist.barrier()
    os._exit(0)


def reshape(plan: dict[str, Any], text: Text) -> list[dict[str, Any]]:
    """Another strategy in the same processes, each way once."""
    rows, seq, layers = 8, plan["seq"], plan["layers"]
    half = layers // 2

    def made(**site: Any) -> Strategy:
        stages = site.pop("stages")
        return Strategy(0, seq, rows, (SiteStrategy("here", stages, **site),))

    dp = Stage("bench", ((0, layers),), dp=2, rows_per_dp=(rows // 2,) * 2)
    walk = {
        "dp2": made(stages=(dp,)),
        "fsdp2": made(stages=(dp,), zero=3),
        "tp2": made(stages=(Stage("bench", ((0, layers),), tp=2, rows_per_dp=(rows,)),)),
        "pp2": made(stages=tuple(Stage("bench", cut, rows_per_dp=(rows,)) for cut in (((0, half),), ((half, layers),))), micro_batches=4, schedule="1f1b"),
        "dp2 again": made(stages=(dp,)),
    }  # fmt: skip
    shared = [tempfile.mkdtemp(prefix="qipan-bench-")]
    dist.broadcast_object_list(shared)
    session, found, before = Session(text.spec, walk["dp2"]), [], "dp2"
    step_of(session, text, 100)
    for name, strategy in list(walk.items())[1:]:
        seconds = session.reshape(strategy, Path(shared[0]))
        found.append({"from": before, "to": name, "seconds": seconds})
        step_of(session, text, 100)
        before = name
    return found


ROLES = {"coordinator": coordinator, "site": site, "ddp": ddp, "losses": losses, "mixed": mixed}


if __name__ == "__main__":
    torch.set_num_threads(1)
    ROLES[sys.argv[1]](json.loads(sys.argv[2]))

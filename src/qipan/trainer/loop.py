"""The training loop of one rank.  What it does is stated by the task and the strategy in the environment; what came
of it goes out as JSON lines."""

import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qipan.disk import is_full
from qipan.errors import DiskFull, InvalidInput, QipanError
from qipan.strategy import Strategy, parse_strategy
from qipan.trainer import checkpoint
from qipan.trainer.balance import WINDOW_S, Balance
from qipan.trainer.data import Corpus, load_corpus, row_offsets, unigram_loss
from qipan.trainer.device import device
from qipan.trainer.fed_rows import FedRows
from qipan.trainer.model import summed_loss as summed_loss
from qipan.trainer.session import LEARNING_RATE, Session, warm_up
from qipan.trainer.sites.mailbox import own_address
from qipan.trainer.sites.outer import Sites
from qipan.trainer.world import World
from qipan.trainer.world_board import WorldBoard, WorldOrder
from qipan.workload import Task

WARM_UP_STEPS = 20
PROGRESS_S = 0.5
FULL_S = 2.0
RESHAPE_S = 3.0  # expected before one was measured
EVALUATION_ROWS = 16
PARKED_BESIDE = 75
ROUNDS_DONE = "rounds-done"


def main() -> None:
    try:
        run = Run()
        run.train()
        sys.stdout.flush()
        os._exit(run.exit_code)  # gloo's threads now and then abort in the interpreter's own tear-down
    except QipanError as error:
        print(f"qipan.trainer: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


class Run:
    """One attempt on one rank."""

    def __init__(self) -> None:
        self.launched_s = float(os.environ.get("QIPAN_LAUNCHED_S", time.time()))
        self.task = msgspec.json.decode(os.environ["QIPAN_TASK"], type=Task)
        strategy = parse_strategy(os.environ["QIPAN_STRATEGY"])
        self.site_id = os.environ.get("QIPAN_SITE", "")
        self.folder = Path(os.environ["QIPAN_CHECKPOINT_DIR"])
        self.every_s = float(os.environ.get("QIPAN_CHECKPOINT_EVERY_S", "20"))
        self.control = Path(os.environ["QIPAN_CONTROL"]) if "QIPAN_CONTROL" in os.environ else None
        self.events = os.environ.get("QIPAN_EVENTS")
        self.asked_to_stop = False
        self._cut = False
        signal.signal(signal.SIGTERM, self._on_signal)
        torch.set_num_threads(1)
        site = strategy.site(self.site_id)
        vendors = len({stage.chip_class.split("/")[0] for stage in site.stages})
        self.ordered = False  # a reshape can be done now
        self.left = False  # this process is no longer in the world
        self.board = WorldBoard(self.control.parent) if self.control is not None else None
        self.corpus: Corpus = load_corpus(self.task.data)
        self.fed = FedRows.of(self.task, self.corpus)
        if "QIPAN_WORKER" in os.environ:
            strategy = self._join(int(os.environ["QIPAN_WORKER"]), vendors)
        else:
            self.world = World.from_environment(vendors)
            if self.board is not None and self.world.rank == 0:
                self.board.put_address()
            self.world.open()
        assert self.task.model is not None
        spec = replace(self.task.model, vocab=self.task.model.vocab or self.corpus.vocab)
        self.session = Session(spec, strategy, self.site_id)
        self.work = self.task.part.work if self.task.part is not None else self.task.work
        self.steps = self.work.tokens // (strategy.global_batch_rows * strategy.seq)
        self.balance = Balance()
        self.reshape_s = RESHAPE_S
        self.sites: Sites | None = None
        self.exit_code = 0

    def _join(self, worker: int, vendors: int) -> Strategy:
        """A new process says that it is there, and enters the world that was ordered."""
        assert self.board is not None
        order = self.board.order()
        if order is None or worker not in order.members:
            raise InvalidInput(f"worker {worker} is not named in {self.board.folder}/reshape.json")
        warm_up()
        self.board.ready(worker).touch()
        self.world = World.joining(
            worker, order.members, order.generation, *self.board.address(), vendors=vendors
        )
        self.world.open()
        return order.strategy

    def train(self) -> None:
        if self.world.generation:
            self.session.receive()
        else:
            self._resume()
        start_s = round(time.time() - self.launched_s, 3)
        self._say("ready", start_s=start_s, step=self.session.step, steps=self.steps)
        if self.session.strategy.outer is not None and "QIPAN_ROUNDS" in os.environ:
            self.sites = Sites(
                self.session, os.environ["QIPAN_ROUNDS"], os.environ.get("QIPAN_ROUNDS_TASK", self.task.name),
                own_address(os.environ["QIPAN_ROUNDS"]), self._say, self.work.tokens, _rounds_done(self.folder),
            )  # fmt: skip
        stopped = self._steps()
        if self.left:
            return
        if self.sites is not None:
            self.sites.leave()
        if not stopped:
            self._finish()
        self.world.close()

    def _resume(self) -> None:
        began_s = time.time()
        newest = self.session.resume(self.folder)
        if newest is not None:
            self._say(
                "resumed", step=newest.step, from_strategy=newest.strategy, strategy=self.session.strategy.label(),
                seconds=round(time.time() - began_s, 3),
            )  # fmt: skip

    def _steps(self) -> bool:
        """Train to the end.  Returns whether it was stopped before."""
        session = self.session
        finished = self.sites.turn() if self.sites is not None else session.step >= self.steps
        if finished and not self._save():
            raise DiskFull(f"no room for the last checkpoint in {self.folder}")
        saved_s = said_s = time.time()
        first = True
        while not finished:
            began_s = time.time()
            rate = LEARNING_RATE * schedule(session.step, self.steps)
            share = session.train(self._batch(session.step), rate)
            loss, stop, due, row_s = self._agree(share, began_s - saved_s >= self.every_s)
            now_s = time.time()
            finished = (
                self.sites.turn(now_s - began_s) if self.sites is not None else session.step >= self.steps
            )
            step = session.step
            if first:
                first = False
                self._say("first_step", step=step, step_s=round(now_s - began_s, 4))
            if now_s - said_s >= PROGRESS_S or finished:
                said_s = now_s
                self._say_progress(loss, now_s - began_s, row_s)
            if due or stop or finished:
                kept = self._save()
                saved_s = time.time()
                while finished and not kept and not stop:  # what it came to is worth the wait for room
                    time.sleep(FULL_S)
                    _, stop, _, _ = self._agree(0.0, False)
                    kept = self._save()
                finished = finished and kept
            if stop and not finished:
                self._say("parked", step=step)
                if self.control is not None and not self.control.exists():
                    self.exit_code = PARKED_BESIDE  # another node of this site was told to stop
                return True
            if not finished:
                self._rebalance(row_s, now_s - began_s)
                self._follow_orders()
            if self.left:
                return True
        return False

    def _batch(self, step: int) -> Tensor:
        """This rank's rows of a step's global batch: (rows, seq + 1)."""
        strategy = self.session.strategy
        if self.fed is not None:
            self.fed.stream.leads = self.world.rank == 0
            begin = step * strategy.global_batch_rows
            own, end = self.session.own_rows()
            return self.fed.rows(begin + own, begin + end, strategy.seq)
        offsets = row_offsets(
            strategy.seed, step, strategy.global_batch_rows, len(self.corpus.train), strategy.seq
        )
        first, last = self.session.own_rows()
        return _rows(self.corpus.train, offsets[first:last].tolist(), strategy.seq)

    def _agree(self, share: float, due: bool) -> tuple[float, bool, bool, list[float]]:
        """What all ranks must do alike: (loss in nat per token, stop, save, seconds a row took on each rank; empty until
        they have computed for long enough to tell)."""
        session, rank = self.session, self.world.rank
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # of its node: each node may be told to stop
        asked = self.asked_to_stop or (first and self.control is not None and self.control.exists())
        ranks = self.world.size
        told = torch.zeros(4 + 2 * ranks, dtype=torch.float64)
        told[0], told[1], told[2] = share, float(asked), float(due and rank == 0)
        told[3] = float(rank == 0 and self._waiting() is not None)
        told[4 + rank], told[4 + ranks + rank] = session.watch.forward_s, session.watch.rows
        told = told.to(device())
        if dist.is_initialized():
            dist.all_reduce(told)
        values = told.tolist()
        tokens = session.site.rows * session.strategy.seq
        self.ordered = values[3] > 0
        seconds, rows = values[4 : 4 + ranks], values[4 + ranks :]
        row_s: list[float] = []
        if max(seconds) >= WINDOW_S:
            row_s = [s / n if n else 0.0 for s, n in zip(seconds, rows, strict=True)]
            session.watch.clear()
        return values[0] / tokens, values[1] > 0, values[2] > 0, row_s

    def _waiting(self) -> WorldOrder | None:
        """Another strategy on other ranks, when it was ordered and whoever is new is there."""
        return (
            self.board.waiting(self.world.generation, self.world.members) if self.board is not None else None
        )

    def _rebalance(self, row_s: list[float], step_s: float) -> None:
        """Unlike chips, or chips whose speed changed: other rows at once, other layers by a reshape when that pays."""
        session = self.session
        site, stage = session.site, session.site.stages[0]
        if site.zero or not row_s:
            return  # forward passes gather, so they tell no speed of their own
        if len(site.stages) == 1:
            columns = stage.cp * stage.tp
            by_dp = [max(row_s[d * columns : (d + 1) * columns]) for d in range(stage.dp)]
            rows = self.balance.rows(site, by_dp)
            if rows is not None:
                self._say("rebalanced", step=session.step, rows_from=stage.rows_per_dp, rows_to=rows)
                session.set_rows(rows)
            return
        by_stage = [max(row_s[s * stage.devices : (s + 1) * stage.devices]) for s in range(len(site.stages))]
        other = self.balance.layers(site, by_stage)
        if other is not None and step_s * (self.steps - session.step) * 0.05 > self.reshape_s:
            sites = tuple(other if one is site else one for one in session.strategy.sites)
            try:
                self.reshape(replace(session.strategy, sites=sites))
            except DiskFull as error:  # it saves first: all is as before
                self._say("unsaved", step=session.step, why=str(error))

    def reshape(self, strategy: Strategy) -> None:
        """Go on under another strategy in the same processes."""
        before = self.session.strategy
        self.reshape_s = self.session.reshape(strategy, self.folder)
        self.balance = Balance()
        self._say(
            "reshaped", step=self.session.step, strategy_from=before.label(), strategy_to=strategy.label(),
            layers=[stage.layers for stage in self.session.site.stages], seconds=round(self.reshape_s, 3),
        )  # fmt: skip

    def _follow_orders(self) -> None:
        """Another strategy on other ranks, when it was ordered: the same processes go on."""
        if self.board is None or not self.ordered:
            return
        told: list[Any] = [self._waiting() if self.world.rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(told)
        order: WorldOrder | None = told[0]
        if order is None:
            return  # it was withdrawn meanwhile
        before, was_first = self.session.strategy, self.world.rank == 0
        try:
            if self.sites is not None:
                raise InvalidInput("a site's ranks do not change while it exchanges with others")
            devices = order.strategy.site(self.site_id).devices
            if devices != len(order.members):
                raise InvalidInput(
                    f"the strategy is for {devices} devices, {len(order.members)} members are named"
                )
            if 0 not in order.members:
                raise InvalidInput("worker 0 keeps the store of worlds and cannot leave")
            self.reshape_s = self.session.reshape(
                order.strategy, self.folder, lambda: self.world.change(order.generation, order.members),
                newcomers=bool(set(order.members) - set(self.world.members)),
            )  # fmt: skip
        except QipanError as error:
            self.board.refuse(order, str(error))
            self._say("refused", why=str(error))
            return
        self.left = self.world.worker not in order.members
        if was_first:
            self._say(
                "reshaped", step=self.session.step, strategy_from=before.label(), strategy_to=order.strategy.label(),
                generation=order.generation, members=order.members, seconds=round(self.reshape_s, 3),
            )  # fmt: skip
        self.balance = Balance()

    def _save(self) -> bool:
        """Whether there was room for it: else what was saved before stays, and training goes on."""
        began_s = time.time()
        validation = self._evaluate(self.corpus.validation)
        step = self.session.step
        self._say("validation", step=step, loss=round(validation, 4), seconds=round(time.time() - began_s, 3))
        began_s = time.time()
        try:
            size = self.session.save(self.folder, validation)
        except DiskFull as error:
            self._say("unsaved", step=step, why=str(error))
            return False
        if self.fed is not None:
            self.fed.stream.saved(step * self.session.strategy.global_batch_rows)
        if self.sites is not None and self.world.rank == 0:
            (self.folder / ROUNDS_DONE).write_text(str(self.sites.rounds_done))
        self._say("checkpoint", step=step, seconds=round(time.time() - began_s, 3), bytes=size)
        return True

    def _finish(self) -> None:
        if self.fed is not None:
            self.fed.stream.close()
        kept = checkpoint.best(self.folder)
        assert kept is not None, "a run that ended has saved and validated"
        checkpoint.load(kept.path, self.session.layout.model, None)
        test = self._evaluate(self.corpus.test)
        self._say(
            "done", step=self.steps, test_loss=round(test, 4), unigram_loss=round(unigram_loss(self.corpus), 4),
            best_step=kept.step, vocab=self.corpus.vocab,
            **({"behind": True} if self.sites is not None and self.sites.behind else {}),
        )  # fmt: skip

    def _evaluate(self, tokens: Any) -> float:
        """Nat per token over a part, in whole rows, each data-parallel rank its share.  All ranks run equally many
        batches of equal size: sharded models gather in each, and pipelines pass them on."""
        session = self.session
        seq, layout = session.strategy.seq, session.layout
        rows = (len(tokens) - 1) // seq
        starts = [i * seq for i in range(rows)]
        ranks = layout.stage.dp
        mine = starts[layout.place.d :: ranks]
        total = 0.0
        for i in range(0, -(-rows // ranks), EVALUATION_ROWS):
            piece = mine[i : i + EVALUATION_ROWS]
            total += layout.loss(_rows(tokens, piece or starts[:1], seq).to(device())) * bool(piece)
        told = torch.tensor([total], dtype=torch.float64, device=device())
        if dist.is_initialized():
            dist.all_reduce(told)
        return float(told) / (rows * seq)

    def _say_progress(self, loss: float, step_s: float, row_s: list[float]) -> None:
        session = self.session
        tokens = session.strategy.global_batch_rows * session.strategy.seq
        step = (
            session.step if self.sites is None else self.sites.tokens // tokens
        )  # of the whole, not of this site
        self._say(
            "progress", step=step, steps=self.steps, tokens=step * tokens,
            loss=round(loss, 4), step_s=round(step_s, 4), rows_per_s=round(session.site.rows / step_s, 2),
            **({"forward_rows_per_s": [round(1 / s, 1) if s else 0 for s in row_s]} if row_s else {}),
        )  # fmt: skip

    def _say(self, event: str, **values: object) -> None:
        leads = (
            os.environ.get("LOCAL_RANK", "0") == "0" if self.task.part is not None else self.world.rank == 0
        )
        if not leads:
            return  # each part of a site tells its own engine
        line = json.dumps({"event": event, "at_s": round(time.time(), 3), **values})
        if not self.events:
            print(line, flush=True)
            return
        try:
            with open(self.events, "a") as file:
                file.write("\n" * self._cut + line + "\n")
            self._cut = False
        except OSError as error:
            if not is_full(error):
                raise
            self._cut = True  # a part of the line may stand there: the next one begins anew
            print(line, flush=True)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked_to_stop = True


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth (Loshchilov and Hutter 2017)."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    share = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def _rows(tokens: Any, starts: list[int], seq: int) -> Tensor:
    return torch.from_numpy(np.stack([tokens[at : at + seq + 1] for at in starts]))


def _rounds_done(folder: Path) -> int:
    path = folder / ROUNDS_DONE
    return int(path.read_text()) if path.exists() else 0

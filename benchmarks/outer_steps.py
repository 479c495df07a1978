"""Ways to do outer steps, compared by the loss after equal tokens: two sites simulated in one process with the trainer's own
model, optimiser, codec and order of data, without its wire.

    python -m benchmarks.outer_steps --seeds 1,2 --ways ddp,plain,ramp      # a JSON line for each way and seed

`benchmarks.trainer --parts loss` measures on the real path what was chosen here.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.trainer_site import DATA, Text
from qipan.strategy import Outer, SiteStrategy, Stage, Strategy
from qipan.trainer.loop import LEARNING_RATE, schedule
from qipan.trainer.session import Session
from qipan.trainer.sites.codec import decode, encode
from qipan.trainer.sites.flat import Flat
from qipan.trainer.sites.outer import MOMENTS

SEQ = 64


@dataclass(frozen=True, slots=True)
class Size:
    """The defaults are those of benchmarks.trainer.  `rows`: of each of two sites."""

    layers: int = 4
    hidden: int = 128
    rows: int = 8
    steps: int = 300


@dataclass(frozen=True, slots=True)
class Way:
    """`every`: inner steps of the round that begins at this step.  `lr`: times the schedule's learning rate.  `moments`: Adam's
    are averaged with the model, every `moments_every` rounds.  `variance`: Adam's second moment is corrected to that of the
    whole batch.  `delay`: steps that an exchange takes, during which sites train on."""

    every: Callable[[int], int]
    sites: int = 2
    lr: float = 1.0
    outer_lr: float = 1.0
    moments: tuple[str, ...] = ()
    variance: bool = False
    codec: str = "int8"
    delay: int = 0
    moments_every: int = 1


def ramp(*until: tuple[int, int], then: int = 10) -> Callable[[int], int]:
    """(step, inner steps of rounds that begin before it) ..."""
    return lambda step: next((every for end, every in until if step < end), then)


def quadratic(step: int, steps: int = 300) -> int:
    """H ~ 1 / lr^2 (Gu et al., ICLR 2024), 10 at the peak, at most 40."""
    return min(40, max(1, round(10 / schedule(step, steps) ** 2)))


def share(part: int) -> Callable[[int], int]:
    """A round is at most a part of the steps done before it."""
    return lambda step: min(10, max(1, step // part))


def falling(most: float, part: int = 10, until: int = 40, steps: int = 300) -> Callable[[int], int]:
    """The same rule with `most` steps at the peak, and rounds that grow as `share(part)` has them before."""
    return lambda step: max(1, min(round(most / schedule(step, steps) ** 2), step // part, until))


TEN = ramp()
BOTH = ("exp_avg", "exp_avg_sq")
WAYS = {
    "ddp": Way(TEN, sites=1),
    "ddp lr 0.7": Way(TEN, sites=1, lr=0.7),
    "ddp lr 1.2": Way(TEN, sites=1, lr=1.2),
    "ddp lr 1.4": Way(TEN, sites=1, lr=2**0.5),
    "ddp lr 2": Way(TEN, sites=1, lr=2.0),
    "plain": Way(TEN),
    "fp32": Way(TEN, codec="fp32"),
    "H 1": Way(ramp(then=1)),
    "H 2": Way(ramp(then=2)),
    "ramp to 20": Way(ramp((20, 1))),
    "ramp": Way(ramp((20, 1), (40, 2), (100, 5))),
    "long ramp": Way(ramp((40, 1), (100, 2), (200, 5))),
    "quadratic": Way(quadratic),
    "fifth": Way(share(5)),
    "tenth": Way(share(10)),
    "twentieth": Way(share(20)),
    "tenth, variance": Way(share(10), variance=True),
    "twentieth, variance": Way(share(20), variance=True),
    "tenth, lr 1.2": Way(share(10), lr=1.2),
    "tenth, lr 1.4": Way(share(10), lr=2**0.5),
    "outer 0.8": Way(TEN, outer_lr=0.8),
    "outer 1.1": Way(TEN, outer_lr=1.1),
    "second moments": Way(TEN, moments=("exp_avg_sq",)),
    "both moments": Way(TEN, moments=BOTH),
    "moments, lr 1.2": Way(TEN, lr=1.2, moments=BOTH),
    "moments, lr 1.4": Way(TEN, lr=2**0.5, moments=BOTH),
    "tenth, moments": Way(share(10), moments=BOTH),
    "twentieth, moments": Way(share(20), moments=BOTH),
    "tenth, moments, lr 1.4": Way(share(10), lr=2**0.5, moments=BOTH),
    "first moments": Way(TEN, moments=("exp_avg",)),
    "lr 1.2": Way(TEN, lr=1.2),
    "lr 1.4": Way(TEN, lr=2**0.5),
    "variance": Way(TEN, variance=True),
    "ramp, variance": Way(ramp((20, 1), (40, 2), (100, 5)), variance=True),
    "ramp, lr 1.2": Way(ramp((20, 1), (40, 2), (100, 5)), lr=1.2),
    "ramp, lr 1.4": Way(ramp((20, 1), (40, 2), (100, 5)), lr=2**0.5),
    "tenth, moments, outer 0.8": Way(share(10), outer_lr=0.8, moments=BOTH),
    "tenth, moments, outer 0.6": Way(share(10), outer_lr=0.6, moments=BOTH),
    "tenth, moments, lr 0.7, outer 1.4": Way(share(10), lr=0.7, outer_lr=1.4, moments=BOTH),
    "tenth, moments, five": Way(lambda step: min(5, share(10)(step)), moments=BOTH),
    "tenth, moments, bf16": Way(share(10), moments=BOTH, codec="bf16"),
    "tenth, moments, delay 3": Way(share(10), moments=BOTH, delay=3),
    "tenth, moments every 3": Way(share(10), moments=BOTH, moments_every=3),
    "twentieth, moments, delay 3": Way(share(20), moments=BOTH, delay=3),
    "falling 4, moments": Way(falling(4), moments=BOTH),
    "falling 4, moments, delay 3": Way(falling(4), moments=BOTH, delay=3),
    "H 1, moments": Way(ramp(then=1), moments=BOTH),
    "ramp, both moments": Way(ramp((20, 1), (40, 2), (100, 5)), moments=BOTH),
}  # fmt: skip


class WholeBatchAdamW(torch.optim.AdamW):
    """Adam's second moment of a site's gradients is mean^2 + variance / (rows of the site): the mean being about the first
    moment, what the whole batch's would be follows."""

    share = 0.5  # of the batch's rows that are this site's

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            b1, b2 = group["betas"]
            leak = (1 - b1) / (1 + b1)  # of the variance that is left in the first moment
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                n = float(state["step"])
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(p.grad, 1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                mean, second = m / (1 - b1**n), v / (1 - b2**n)
                noise = (second - mean**2).clamp_min(0) / (1 - leak)
                whole = torch.maximum(second - (1 - self.share) * noise, second * self.share)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(mean, whole.sqrt() + group["eps"], value=-group["lr"])


def whole_batch_adamw(parameters: Any) -> torch.optim.Optimizer:
    return WholeBatchAdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)


def trained(way: Way, seed: int, of: Size, text: Text) -> dict[str, Any]:
    rows, steps = 2 * of.rows // way.sites, of.steps
    stage = Stage("bench", ((0, of.layers),), rows_per_dp=(rows,))
    names = [f"site-{i}" for i in range(way.sites)]
    made = Strategy(
        seed, SEQ, 2 * of.rows, tuple(SiteStrategy(name, (stage,)) for name in names),
        Outer(10) if way.sites > 1 else None,
    )  # fmt: skip
    own = {"optimizer": whole_batch_adamw} if way.variance else {}
    sessions = [Session(text.spec, made, name, **own) for name in names]  # type: ignore[arg-type]
    flats = [Flat(session.layout, session.spec) for session in sessions]
    whole = (0, flats[0].coordinates.blocks)
    anchor = flats[0].gather(whole)
    rounds, begun, landing = 0, 0, -1
    sent: list[list[torch.Tensor]] = []
    moments: tuple[str, ...] = ()
    for step in range(1, steps + 1):
        for session in sessions:
            first, last = session.own_rows()
            session.train(
                text.batch(made, step - 1, first, last), way.lr * LEARNING_RATE * schedule(step - 1, steps)
            )
        if way.sites == 1:
            continue
        last_one = step == steps
        if landing < 0 and (step >= begun + way.every(begun) or last_one):
            moments = way.moments if rounds % way.moments_every == 0 else ()
            sent = [_held(session, flat, moments) for session, flat in zip(sessions, flats, strict=True)]
            begun, landing = step, step + way.delay * (not last_one)
        if landing >= 0 and (step >= landing or last_one):
            rounds, landing = rounds + 1, -1
            anchor = _meet(sessions, flats, sent, anchor, moments, way)
    if way.sites > 1:
        flats[0].scatter((0, flats[0].coordinates.blocks), anchor, add=False)
    return {"loss": text.unseen(sessions[0]), "rounds": rounds}


def _held(session: Session, flat: Flat, moments: tuple[str, ...]) -> list[torch.Tensor]:
    """The model, then the moments, in blocks."""
    whole = (0, flat.coordinates.blocks)
    return [flat.gather(whole), *(flat.gather(whole, _state(session, name)) for name in moments)]


def _state(session: Session, name: str) -> Callable[[Any], Any]:
    return lambda parameter: session.optimizer.state[parameter][name]


def _meet(
    sessions: list[Session], flats: list[Flat], sent: list[list[torch.Tensor]], anchor: torch.Tensor, moments: tuple[str, ...], way: Way
) -> torch.Tensor:  # fmt: skip
    """The sites take the mean of what they held when the exchange began, and keep what they did since.  Returns the new anchor."""
    whole = (0, flats[0].coordinates.blocks)
    differences = [decode(encode(held[0] - anchor, way.codec), way.codec) for held in sent]
    after = anchor + way.outer_lr * torch.stack(differences).mean(dim=0)
    for flat, held in zip(flats, sent, strict=True):
        flat.scatter(whole, after - held[0], add=True)
    for i, name in enumerate(moments, 1):
        there, back = MOMENTS[name]
        told = [back(decode(encode(there(held[i]), way.codec), way.codec)) for held in sent]
        mean = torch.stack(told).mean(dim=0)
        for session, flat, held in zip(sessions, flats, sent, strict=True):
            flat.scatter(whole, mean - held[i], add=True, of=_state(session, name))
            for state in session.optimizer.state.values():
                state["exp_avg_sq"].clamp_(min=0)
    return after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--data", default=DATA[0])
    parser.add_argument("--ways", default=",".join(WAYS).replace(", ", "; "), help="apart by commas")
    for name in ("layers", "hidden", "rows", "steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Size(), name))
    given = parser.parse_args()
    torch.set_num_threads(1)
    of = Size(given.layers, given.hidden, given.rows, given.steps)
    text = Text({"bytes": True, "layers": of.layers, "hidden": of.hidden, "data": [given.data]})
    for name in given.ways.split(","):
        name = name.replace("; ", ", ")
        for seed in map(int, given.seeds.split(",")):
            began_s = time.perf_counter()
            found = trained(WAYS[name], seed, of, text)
            assert math.isfinite(found["loss"])
            seconds = time.perf_counter() - began_s
            print(json.dumps({"way": name, "data": given.data, "seed": seed, "steps": of.steps, **found, "seconds": round(seconds, 1)}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

"""Work that cannot be known beforehand, skipped or half done, and that is checked at a small part of its cost.

A device is given B (n x n, from one seed, beforehand) and at the start signal a second seed, from which X_0 follows.  It computes

    X_j = tanh(X_{j-1} B / 2 + X_0),   j = 1 .. steps

and answers with the fingerprints f_j = X_j v, one number per row and step (v is +-1, from the second seed).  Because of tanh no
fingerprint follows without its whole row; because each row has its own X_0 none follows from another row; because the next
step needs the last, steps cannot be spread over devices.  The rows do not touch each other, so whoever asked recomputes
a few, drawn after the answer, from the seed alone: s rows cost s / n of the work.  An answer with a share p of its rows right
passes with p^s.  Halving B makes the step a contraction, so that rounding does not grow with the steps.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
#: of a fingerprint's error over the norm of its row: what rounding in this precision explains, many times over.  A product
#: made in a coarser precision than claimed errs by more.
TOLERANCE = {"fp32": 2e-5, "fp16": 8e-3, "bf16": 5e-2}
ROWS_CHECKED = 12


@dataclass(frozen=True, slots=True)
class Challenge:
    """`size` n, `steps` products of n x n by n x n; `weights` and `start` are the two seeds."""

    size: int
    steps: int
    precision: str
    weights: int
    start: int

    @property
    def flops(self) -> float:
        return 2.0 * self.size**3 * self.steps


def weights(challenge: Challenge) -> Floats:
    """B: normal with variance 1 / n."""
    chance = np.random.default_rng(challenge.weights)
    made = chance.standard_normal((challenge.size, challenge.size), dtype=np.float32)
    return made / np.float32(np.sqrt(challenge.size))


def start(challenge: Challenge) -> tuple[Floats, Floats, Floats]:
    """(u, w, v): X_0 = cos(u w^T), cheap to make on the device; v the projection."""
    chance = np.random.default_rng(challenge.start)
    u = chance.uniform(1.0, 50.0, challenge.size).astype(np.float32)
    w = chance.uniform(1.0, 50.0, challenge.size).astype(np.float32)
    v = chance.integers(0, 2, challenge.size).astype(np.float32) * 2 - 1
    return u, w, v


def rows_of(challenge: Challenge, b: Floats, rows: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """(fingerprints, norms of the rows), both steps x rows, of these rows alone."""
    u, w, v = start(challenge)
    x0 = np.cos(np.outer(u[rows], w).astype(np.float32))
    x, prints, norms = x0, [], []
    for _ in range(challenge.steps):
        x = np.tanh(x @ b * np.float32(0.5) + x0)
        prints.append(x @ v)
        norms.append(np.linalg.norm(x, axis=1))
    return np.stack(prints), np.stack(norms)


def check(challenge: Challenge, b: Floats, prints: Floats, chance: np.random.Generator) -> str:
    """ "" when the answer (steps x n) is right as far as rows drawn now show, else what is wrong."""
    if prints.shape != (challenge.steps, challenge.size) or not np.isfinite(prints).all():
        return f"the answer has the shape {prints.shape}, not {(challenge.steps, challenge.size)}, or numbers that are none"
    rows = chance.choice(challenge.size, min(ROWS_CHECKED, challenge.size), replace=False)
    wanted, norms = rows_of(challenge, b, rows)
    worst = float(np.max(np.abs(prints[:, rows] - wanted) / norms))
    if worst > TOLERANCE[challenge.precision]:
        return f"products in {challenge.precision} are off by {worst:.2g} of a row, {TOLERANCE[challenge.precision]:g} is rounding"
    return ""

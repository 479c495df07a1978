"""Two steps of a script before the whole task is let go: the original's losses (on a CPU, where need be) against the
rewritten one's on the target, kept beside the task."""

import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qipan.errors import QipanError

STEPS = 2
#: of a loss; chips differ in the order of sums and in 16-bit products, not by more than this over two steps
RELATIVE = 2e-2
LIMIT_S = 900.0


@dataclass(frozen=True, slots=True)
class Trial:
    """`reference` and `losses` of the same steps; `devices`: what torch called the place where the rewritten script ran;
    `script_sha256` of the rewritten script that was tried."""

    target: str
    script_sha256: str
    reference: tuple[float, ...]
    losses: tuple[float, ...]
    devices: tuple[str, ...]
    relative: float
    passed: bool
    why: str
    at_s: float


def run_steps(
    script: Path,
    arguments: Sequence[str],
    *,
    shim: bool,
    steps: int = STEPS,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """In a process of its own.  Raises QipanError when it gave no losses in time."""
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    with socket.socket() as free, tempfile.TemporaryDirectory(prefix="qipan-trial-") as folder:
        free.bind(("127.0.0.1", 0))
        alone["MASTER_PORT"] = str(free.getsockname()[1])
        free.close()
        out = Path(folder) / "losses.json"
        command = [
            sys.executable,
            "-m",
            "qipan.portability.harness",
            str(out),
            str(steps),
            "1" if shim else "0",
            str(script),
            *arguments,
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=False,
                stdin=subprocess.DEVNULL, env={**os.environ, **alone, **(environment or {})},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise QipanError(
                f"{script}: made no {steps} steps in {LIMIT_S:g} s; give it arguments for a small run after `--`"
            ) from None
        if not out.exists():
            raise QipanError(
                f"{script}: ended with status {done.returncode}: {done.stderr[-600:].strip() or 'without a word'}"
            )
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def compare(
    target: str,
    torch_device: str,
    script: Path,
    reference: dict[str, Any],
    tried: dict[str, Any],
    now_s: float,
    *,
    on_target: bool = True,
) -> Trial:
    """`on_target` False: a trial on another machine's CPU, which says that the rewriting keeps the losses and nothing of the chip."""
    ours, theirs = tried["losses"], reference["losses"]
    pairs = list(zip(ours, theirs, strict=False))
    apart = [abs(a - b) / max(abs(b), 1e-12) for a, b in pairs]
    relative = next((value for value in apart if math.isnan(value)), max(apart, default=math.inf))
    why = ""
    if reference["error"]:
        why = f"the original failed: {reference['error']}"
    elif tried["error"]:
        why = f"the rewritten script failed: {tried['error']}"
    elif not pairs:
        why = "no loss was seen: the script calls backward() on no single number in its first steps"
    elif len(ours) != len(theirs):
        why = f"the original called backward() {len(theirs)} times, the rewritten script {len(ours)} times"
    elif not relative <= RELATIVE:
        why = f"the losses differ by {relative:.2g}, more than {RELATIVE:g}"
    elif on_target and tried["devices"] != [torch_device]:
        why = f"it ran on {', '.join(tried['devices'])}, not on {torch_device}"
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    return Trial(
        target, digest, tuple(theirs), tuple(ours), tuple(tried["devices"]), relative, not why, why, now_s
    )


def keep(trial: Trial, path: Path) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(trial), indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def guard(arguments: list[str]) -> int:  # noqa: RET503 - exec does not come back
    """`python -m qipan.portability.trial REFERENCE.json TARGET TORCH_DEVICE SCRIPT [ARGUMENT ...] -- COMMAND ...`: the first line of a
    ported task.  Two steps here, on the target; only when their losses are the reference's, the whole command.  The trial
    is written beside the checkpoints, and printed, so that the task's log has it."""
    before, command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    reference, target, torch_device, script, *rest = before
    trial = compare(
        target, torch_device, Path(script), json.loads(Path(reference).read_text(encoding="utf-8")),
        run_steps(Path(script), rest, shim=False), time.time(),
    )  # fmt: skip
    folder = Path(os.environ.get("QIPAN_CHECKPOINT_DIR", "."))
    folder.mkdir(parents=True, exist_ok=True)
    keep(trial, folder / "trial.json")
    print(f"qipan trial: {json.dumps(asdict(trial))}", flush=True)
    if not trial.passed:
        print(f"qipan: the task was not let go: {trial.why}", file=sys.stderr)
        return 100
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))

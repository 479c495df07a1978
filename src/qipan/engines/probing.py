"""Measure the pools of this machine: every pool at once, each of its devices held to its share."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import msgspec

from qipan.engines import devices as chips
from qipan.engines.make import inside
from qipan.errors import QipanError
from qipan.hardware import BoardSpec, Pool, PoolId, Probe

VALID_S = 7 * 86400.0
LIMIT_S = 180.0


def probe_tree(root: BoardSpec, cache: Path, now_s: float, say: Callable[[str], None]) -> BoardSpec:
    """The same tree, its pools with a `Probe`.  Fresh results in `cache` are used again; they expire after
    VALID_S.  Raises QipanError when a pool cannot be measured."""
    known = _read(cache, now_s)
    boards = {pool.pool_id: board for board in root.walk() for pool in board.pools}
    missing = [pool for board in root.walk() for pool in board.pools if _key(pool) not in known]
    if missing:
        say(
            f"measuring {sum(pool.devices for pool in missing)} chips in {len(missing)} pools, all at once (about half a minute)"
        )
        for pool, probe in zip(missing, _measure(missing, boards), strict=True):
            known[_key(pool)] = probe
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps({key: asdict(probe) for key, probe in sorted(known.items())}))
    return _with(root, known)


def _key(pool: Pool) -> str:
    return f"{pool.pool_id} x{pool.devices} share {pool.cpu_share} on {os.cpu_count()} cores, calibrated"


def _read(cache: Path, now_s: float) -> dict[str, Probe]:
    if not cache.exists():
        return {}
    found = {key: msgspec.convert(value, Probe) for key, value in json.loads(cache.read_text()).items()}
    return {key: probe for key, probe in found.items() if probe.measured_at_s + VALID_S > now_s}


def _with(board: BoardSpec, known: dict[str, Probe]) -> BoardSpec:
    pools = tuple(replace(pool, probe=known.get(_key(pool))) for pool in board.pools)
    return replace(board, pools=pools, children=tuple(_with(child, known) for child in board.children))


def _measure(pools: Sequence[Pool], boards: Mapping[PoolId, BoardSpec]) -> list[Probe]:
    with ExitStack() as stack:
        runs = []
        for pool in pools:
            seen = boards[pool.pool_id].engine_options.get("folder")  # where the nodes see it too
            if seen:
                Path(seen).mkdir(parents=True, exist_ok=True)
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="qipan-probe-", dir=seen))
            runs.append(_start(pool, boards[pool.pool_id], Path(scratch) / "run"))
        probes = []
        for pool, (process, folder, group) in zip(pools, runs, strict=True):
            try:
                process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
            out = folder / "out.json"
            for _ in range(20 if group else 0):
                if chips.remove_group(group):
                    break
                time.sleep(0.05)
            if not out.exists():
                tail = (folder / "log.txt").read_text(errors="replace")[-800:]
                raise QipanError(
                    f"{pool.pool_id}: could not be measured; the probe said: {tail or 'nothing in time'}"
                )
            probes.append(Probe(**json.loads(out.read_text())))
        return probes


def _start(pool: Pool, board: BoardSpec, folder: Path) -> "tuple[subprocess.Popen[bytes], Path, str]":
    folder.mkdir()
    shares = (pool.cpu_share,) * pool.devices if pool.cpu_share else ()
    group, ranks = "", list[str]()
    if shares and chips.quotas_available():
        group, ranks = chips.make_group(f"qipan-probe-{os.getpid()}-{folder.parent.name}", shares)
    enter = str(Path(__file__).with_name("enter.py"))
    environment = {
        **os.environ,
        "QIPAN_PROBE_OUT": str(folder / "out.json"),
        "QIPAN_ATTEMPT_DIR": str(folder),
        "QIPAN_RANK_GROUPS": ":".join(ranks),
        "QIPAN_LAUNCHED_S": str(time.time()),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={pool.devices}",
        "--max-restarts=0", "--no-python", sys.executable, "-S", enter, sys.executable, "-W", "ignore", "-m", "qipan.trainer.probe",
    ]  # fmt: skip
    if group:  # the launcher counts against the same shares as a task's launcher does
        procs = str(Path(group, "cgroup.procs"))
        command = ["bash", "-c", f'echo $$ > {procs}; exec "$@"', "probe", *command]
    if board.engine != "local":
        command = inside(board, pool, command)
    log = (folder / "log.txt").open("w")
    return (
        subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL),
        folder,
        group,
    )

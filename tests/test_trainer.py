"""The trainer with real torchrun and gloo: layouts against one rank, another layout after a checkpoint, memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from qipan.errors import Infeasible, InvalidInput
from qipan.strategy import SiteStrategy, Stage, Strategy, check_strategy, parse_strategy
from qipan.trainer.data import load_corpus, part_of, row_offsets, unigram_loss

HERE = Path(__file__).parent
DATA = "fortunes:song100"
SEQ, ROWS = 16, 12


def strategy(
    tp: int = 1, dp: int = 1, zero: int = 0, rows: tuple[int, ...] = (), micro_batches: int = 1
) -> Strategy:
    rows = rows or tuple(ROWS // dp for _ in range(dp))
    stage = Stage("cpu", ((0, 2),), tp=tp, dp=dp, rows_per_dp=rows)
    return Strategy(3, SEQ, ROWS, (SiteStrategy("here", (stage,), micro_batches, zero=zero),))


def run(tmp_path: Path, ranks: int, *plans: dict) -> list[list[float]]:
    """Run the plans one after the other on so many ranks; per-step losses of each."""
    plan, out = tmp_path / f"plan-{ranks}.json", tmp_path / f"out-{ranks}.json"
    plan.write_text(json.dumps([{"data": DATA, "tokens": 100 * SEQ * ROWS, **one} for one in plans]))
    out.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=0",
        str(HERE / "training.py"), str(plan), str(out),
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert out.exists(), done.stderr[-3000:]
    return json.loads(out.read_text())


def plan(folder: Path, made: Strategy, stop_at: int, **more: object) -> dict:
    return {"folder": str(folder), "strategy": msgspec.to_builtins(made), "stop_at": stop_at, **more}


@pytest.mark.slow
def test_every_layout_follows_the_curve_of_one_rank(tmp_path):
    [alone] = run(tmp_path, 1, plan(tmp_path / "one", strategy(), 6, save=False))
    layouts = {
        "dp4": strategy(dp=4),
        "fsdp4": strategy(dp=4, zero=3),
        "tp4": strategy(tp=4),
        "tp2 x dp2": strategy(tp=2, dp=2),
        "tp2 x fsdp2": strategy(tp=2, dp=2, zero=3),
        "uneven rows": strategy(dp=4, rows=(5, 4, 2, 1)),
        "uneven rows, sharded": strategy(dp=4, zero=3, rows=(5, 4, 2, 1)),
        "micro-batches": strategy(dp=4, micro_batches=3),
    }
    plans = [plan(tmp_path / name, made, 6, save=False) for name, made in layouts.items()]
    wrong = plan(tmp_path / "wrong", strategy(dp=4, rows=(5, 4, 2, 1)), 6, save=False, mutant="mean of means")
    *curves, mutant = run(tmp_path, 4, *plans, wrong)
    for name, curve in zip(layouts, curves, strict=True):
        assert np.abs(np.array(curve) - np.array(alone)).max() < 2e-6, name
    assert np.abs(np.array(mutant) - np.array(alone)).max() > 100 * 2e-6, "the test sees wrong weights"


@pytest.mark.slow
def test_written_by_four_continued_on_two_and_on_one_under_another_strategy(tmp_path):
    """Fifty steps after each change within 1e-3 relative of the unbroken run: same batch, same order."""
    [whole] = run(tmp_path, 1, plan(tmp_path / "whole", strategy(), 60, save=False))
    run(tmp_path, 4, plan(tmp_path / "moved", strategy(dp=4, zero=3), 10))
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(tmp_path / "moved"), str(copy)], check=True)
    [on_two] = run(tmp_path, 2, plan(tmp_path / "moved", strategy(tp=2), 60))
    [on_one] = run(tmp_path, 1, plan(copy, strategy(), 60))
    for curve in (on_two, on_one):
        assert len(curve) == 50
        relative = np.abs(np.array(curve) - np.array(whole[10:])) / np.array(whole[10:])
        assert relative.max() < 1e-3


def test_the_order_of_samples_knows_no_rank():
    assert (row_offsets(1, 5, 8, 1000, 16) == row_offsets(1, 5, 8, 1000, 16)).all()
    assert (row_offsets(1, 5, 8, 1000, 16) != row_offsets(1, 6, 8, 1000, 16)).any()


def test_poems_are_split_by_hash_into_three_parts():
    corpus = load_corpus(("fortunes:tang300+song100",))
    sizes = len(corpus.train), len(corpus.validation), len(corpus.test)
    assert sizes[0] > 5 * sizes[1] > 0
    assert corpus.train.max() < corpus.vocab
    assert part_of("床前明月光") == part_of("床前明月光")
    assert 5.5 < unigram_loss(corpus) < 7.0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (strategy(dp=2, rows=(1, 2)), "rows_per_dp sum to 3"),
        (strategy(dp=2, rows=(12,)), "rows_per_dp has 1 entries"),
        (strategy(dp=12, micro_batches=2), "1 rows for 2 micro-batches"),
    ],
)
def test_a_strategy_that_means_nothing_is_refused(broken, message):
    with pytest.raises(InvalidInput, match=message):
        check_strategy(broken)
    with pytest.raises(InvalidInput):
        parse_strategy(broken.to_json())


def test_what_the_trainer_does_not_run_yet_is_refused_by_name():
    from qipan.trainer.layout import check_layout

    stage = Stage("cpu", ((0, 1),), rows_per_dp=(ROWS,))
    pipeline = Strategy(0, SEQ, ROWS, (SiteStrategy("here", (stage, stage)),))
    with pytest.raises(Infeasible, match="2 pipeline stages"):
        check_layout(pipeline, 2)


@pytest.mark.endurance
def test_no_rank_ever_holds_the_whole_of_a_sharded_model(tmp_path):
    """200 M parameters on four ranks: each rank's peak above its imports stays below half of weights, gradients and
    Adam state; a mutant that gathers the state on rank 0 does not."""
    whole_bytes = 16 * 200_000_000
    for mutant in (False, True):
        out = tmp_path / f"peaks-{mutant}"
        out.mkdir()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "--max-restarts=0",
            str(HERE / "memory.py"), str(out), str(int(mutant)),
        ]  # fmt: skip
        subprocess.run(
            command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        )
        peaks = [int(path.read_text()) for path in sorted(out.iterdir())]
        assert len(peaks) == 4
        assert (max(peaks) < whole_bytes / 2) is not mutant, [peak / whole_bytes for peak in peaks]

"""The trainer with real torchrun and gloo: layouts against one rank, reshapes, memory, what is refused.

All layouts run in one group of four processes: importing torch costs more than training."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from qipan.errors import Infeasible, InvalidInput
from qipan.strategy import (
    SiteStrategy,
    Stage,
    Strategy,
    check_strategy,
    parse_strategy,
    share_layers,
    share_rows,
)
from qipan.trainer.balance import Balance
from qipan.trainer.data import load_corpus, part_of, row_offsets, unigram_loss

HERE = Path(__file__).parent
SEQ, ROWS, LAYERS = 16, 24, 8
FIRST, SECOND = ((0, 4),), ((4, 8),)
QUARTERS = (((0, 2),), ((2, 4),), ((4, 6),), ((6, 8),))
UNEVEN = (((0, 1),), ((1, 4),), ((4, 7),), ((7, 8),))
LOOPED = tuple(((i, i + 1), (i + 4, i + 5)) for i in range(4))
V = tuple(((i, i + 1), (7 - i, 8 - i)) for i in range(4))


def strategy(
    *cuts: tuple, dp: int = 1, rows: tuple[int, ...] = (), tp: int = 1, sp: bool = False, cp: int = 1, ep: int = 1, **site
) -> Strategy:  # fmt: skip
    """Without cuts, one stage."""
    rows = rows or (ROWS // dp,) * dp
    stages = tuple(
        Stage("cpu", cut, tp=tp, sp=sp, cp=cp, ep=ep, dp=dp, rows_per_dp=rows)
        for cut in cuts or (((0, LAYERS),),)
    )
    return Strategy(3, SEQ, ROWS, (SiteStrategy("here", stages, **site),))


def pipeline(*cuts: tuple, micro_batches: int = 4, schedule: str = "1f1b", **more) -> Strategy:
    return strategy(*cuts, micro_batches=micro_batches, schedule=schedule, **more)


#: name -> (strategy, more about the case)
LAYOUTS: dict[str, tuple[Strategy, dict]] = {
    "ddp4": (strategy(dp=4), {}),
    "micro-batches": (strategy(dp=4, micro_batches=3), {}),
    "uneven rows": (strategy(dp=4, rows=(10, 8, 4, 2)), {}),
    "fsdp4": (strategy(dp=4, zero=3), {}),
    "zero2": (strategy(dp=4, zero=2), {"tied": False}),
    "uneven rows, sharded": (strategy(dp=4, zero=3, rows=(10, 8, 4, 2)), {}),
    "hsdp 2x2": (strategy(dp=4, zero=3, replicas=2), {}),
    "tp4": (strategy(tp=4), {}),
    "tp4 sp, loss parallel": (strategy(tp=4, sp=True), {"tied": False}),
    "tp2 x dp2": (strategy(tp=2, dp=2), {}),
    "tp2 sp x fsdp2": (strategy(tp=2, sp=True, dp=2, zero=3), {}),
    "cp4": (strategy(cp=4), {}),
    "cp2 x fsdp2": (strategy(cp=2, dp=2, zero=3), {}),
    "cp2 x tp2 sp": (strategy(cp=2, tp=2, sp=True), {}),
    "pp4 gpipe": (pipeline(*QUARTERS, schedule="gpipe"), {}),
    "pp4 1f1b": (pipeline(*QUARTERS), {"tied": False}),
    "pp4 uneven layers": (pipeline(*UNEVEN, micro_batches=6), {}),
    "pp4 interleaved": (pipeline(*LOOPED, schedule="interleaved_1f1b"), {}),
    "pp4 interleaved zero bubble": (pipeline(*LOOPED, schedule="interleaved_zero_bubble"), {}),
    "pp4 zbv": (pipeline(*V, micro_batches=8, schedule="zbv"), {}),
    "pp4 dualpipev": (pipeline(*V, micro_batches=8, schedule="dualpipev"), {"tied": False}),
    "pp2 x fsdp2": (pipeline(FIRST, SECOND, dp=2, zero=3), {}),
    "pp2 x dp2": (pipeline(FIRST, SECOND, dp=2), {}),
    "pp2 x dp2, uneven rows": (pipeline(FIRST, SECOND, dp=2, rows=(16, 8)), {}),
    "pp2 x tp2 sp": (pipeline(FIRST, SECOND, tp=2, sp=True), {}),
    "pp2 x cp2": (pipeline(FIRST, SECOND, cp=2), {}),
    "recompute": (strategy(dp=4, recompute="full"), {}),
    "recompute attention, sharded": (strategy(tp=2, dp=2, zero=3, recompute="selective"), {"layers": 4}),
    "experts ep2 x dp4": (strategy(dp=4, ep=2), {"moe": True}),
    "experts ep4, uneven rows": (strategy(dp=4, ep=4, rows=(10, 8, 4, 2)), {"moe": True}),
    "experts ep2, sharded": (strategy(dp=4, ep=2, zero=3), {"moe": True, "tied": False}),
    "experts ep2 x cp2": (strategy(dp=2, ep=2, cp=2), {"moe": True}),
    "experts pp2 x ep2": (pipeline(FIRST, SECOND, dp=2, ep=2), {"moe": True}),
}
STATIONS = {
    "dp": strategy(dp=4),
    "fsdp": strategy(dp=4, zero=3),
    "tp x dp": strategy(tp=2, dp=2),
    "pp x dp": pipeline(FIRST, SECOND, dp=2),
    "pp x tp": pipeline(FIRST, SECOND, tp=2),
    "uneven rows": strategy(dp=4, rows=(10, 8, 4, 2)),
}
WALKS = {seed: [random.Random(seed).choice(sorted(STATIONS)) for _ in range(5)] for seed in (1, 2)}
SGD = 0.5
MUTANTS = ("mean of means", "wrong weights")


def torchrun(tmp: Path, ranks: int, cases: list[dict]) -> list[dict]:
    plan, out = tmp / f"plan-{ranks}.json", tmp / f"out-{ranks}.json"
    plan.write_text(json.dumps(cases))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=0",
        str(HERE / "training.py"), str(plan), str(out),
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert out.exists(), done.stderr[-4000:]
    return json.loads(out.read_text())


def case(made: Strategy, steps: int = 6, **more: object) -> dict:
    return {"strategy": msgspec.to_builtins(made), "steps": steps, **more}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict]]:
    """Every case's result, by name; one group of four ranks runs them all."""
    tmp = tmp_path_factory.mktemp("four")
    cases: dict[str, dict] = {}
    for more in ({}, {"tied": False}, {"layers": 4}, {"moe": True}, {"moe": True, "tied": False}):
        cases[alone_name(more)] = case(strategy(), alone=True, **more)
    cases["walked alone"] = case(strategy(), 15, alone=True)
    for name, (made, more) in LAYOUTS.items():
        cases[name] = case(made, **more)
    unlike = strategy(dp=4, rows=(14, 6, 3, 1))
    cases["alone, sgd"] = case(strategy(), 8, sgd=SGD, alone=True)
    cases["unlike rows, sgd"] = case(unlike, 8, sgd=SGD)
    for mutant in MUTANTS:
        cases[mutant] = case(unlike, 8, sgd=SGD, mutant=mutant)
    cases["bf16"] = case(strategy(dp=4, precision="bf16"))
    for seed, names in WALKS.items():
        walk = {3 * i: msgspec.to_builtins(STATIONS[name]) for i, name in enumerate(names) if i}
        cases[f"walk {seed}"] = case(STATIONS[names[0]], 15, walk=walk, folder=str(tmp / f"walk-{seed}"))
    results = torchrun(tmp, 4, list(cases.values()))
    return dict(zip(cases, results, strict=True))


def alone_name(more: dict) -> str:
    return "alone " + json.dumps({key: more[key] for key in sorted(more)})


def apart(one: dict, other: dict) -> float:
    return float(np.abs(np.array(one["losses"]) - np.array(other["losses"])).max())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_follows_the_curve_of_one_rank(four, name):
    reference = four[alone_name(LAYOUTS[name][1])]
    assert apart(four[name], reference) < 2e-6
    assert abs(four[name]["unseen"] - reference["unseen"]) < 2e-6


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_sums_are_seen(four, mutant):
    assert apart(four["unlike rows, sgd"], four["alone, sgd"]) < 2e-6
    assert apart(four[mutant], four["alone, sgd"]) > 1e-2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bf16_is_near_and_not_the_same(four):
    assert 1e-6 < apart(four["bf16"], four["alone {}"]) < 1e-2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", WALKS)
def test_a_walk_of_four_reshapes_goes_on_as_if_unbroken(four, seed):
    walked = four[f"walk {seed}"]
    assert len(walked["reshape_s"]) == 4
    assert apart(walked, four["walked alone"]) < 5e-6, WALKS[seed]


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
        (strategy(dp=24, micro_batches=2), "1 rows for 2 micro-batches"),
        (strategy(dp=5), "rows_per_dp sum to 20, global_batch_rows is 24"),
    ],
)
def test_a_strategy_that_means_nothing_is_refused(broken, message):
    with pytest.raises(InvalidInput, match=message):
        check_strategy(broken)
    with pytest.raises(InvalidInput):
        parse_strategy(broken.to_json())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (pipeline(FIRST, SECOND, schedule="none"), "2 pipeline stages without a schedule"),
        (pipeline(FIRST, ((5, 8),)), "layers 5 to 8 follow on layer 4"),
        (pipeline(FIRST, ((4, 7),)), "hold 7 of the model's 8 layers"),
        (pipeline(FIRST, SECOND, micro_batches=5), "24 rows do not divide into 5 micro-batches"),
        (pipeline(*QUARTERS, micro_batches=2), "1f1b over 4 stages needs 4"),
        (pipeline(*QUARTERS, schedule="zbv"), "zbv needs 2 layer ranges"),
        (strategy(tp=3), "tp=3 does not divide the model's kv_heads 4"),
        (strategy(cp=5), "seq 16 does not divide by cp=5"),
        (strategy(dp=2, ep=2), "ep=2 must divide dp=2 and the model's 0 experts"),
        (strategy(dp=2, precision="fp8"), "precision is fp8"),
        (strategy(dp=2, offload=True), "offload is True"),
        (strategy(dp=3, zero=3, replicas=2), "replicas is 2"),
    ],
)
def test_what_the_trainer_does_not_run_is_refused_by_name(made, message):
    from qipan.trainer.layout import check_layout
    from qipan.workload import Model

    model = Model("m", LAYERS, 32, 4, 4, 8, 64, 51)
    with pytest.raises(Infeasible, match=message):
        check_layout(made.sites[0], SEQ, model, made.devices)


def test_rows_follow_speed_and_every_rank_keeps_its_least():
    assert share_rows([3.0, 1.0, 1.0, 1.0], 24) == (12, 4, 4, 4)
    assert share_rows([100.0, 1.0], 10, least=3) == (7, 3)
    with pytest.raises(InvalidInput, match="each needs 3"):
        share_rows([1.0, 1.0], 5, least=3)


def test_layers_follow_speed():
    assert share_layers([1.0, 5.0], [0.0, 0.0], 12) == (10, 2)
    assert share_layers([1.0, 1.0], [0.0, 4.0], 8) == (6, 2)


def test_a_change_of_speed_is_taken_up_in_two_steps_and_noise_is_not():
    site = strategy(dp=4).sites[0]
    balance = Balance()
    assert balance.rows(site, [1.0, 1.0, 1.0, 1.0]) is None
    assert balance.rows(site, [1.03, 1.0, 0.98, 1.0]) is None
    assert balance.rows(site, [9.0, 1.0, 1.0, 1.0]) is None, "one slow step"
    assert balance.rows(site, [1.0, 1.0, 1.0, 1.0]) is None
    assert balance.rows(site, [3.0, 1.0, 1.0, 1.0]) is None
    assert balance.rows(site, [3.0, 1.0, 1.0, 1.0]) == (2, 8, 7, 7)


def test_a_small_difference_is_taken_when_it_is_sure():
    site = strategy(dp=4, rows=(6, 6, 6, 6)).sites[0]
    balance = Balance()
    told = [balance.rows(site, [1.18, 1.0, 1.0, 1.0]) for _ in range(6)]
    assert told == [None] * 6, "whole rows allow no split that is 5 % better"
    fine = replace(site, stages=(replace(site.stages[0], rows_per_dp=(60, 60, 60, 60)),))
    balance = Balance()
    told = [balance.rows(fine, [1.18, 1.0, 1.0, 1.0]) for _ in range(12)]
    assert told[:5] == [None] * 5
    assert told[5] == (53, 63, 62, 62)


def test_stages_of_unlike_speed_take_unlike_layers():
    site = pipeline(FIRST, SECOND).sites[0]
    balance = Balance()
    found = [balance.layers(site, [4.0, 1.0]) for _ in range(6)]
    assert [one for one in found if one]
    assert found[0] is None
    made = next(one for one in found if one)
    assert [stage.layers for stage in made.stages] == [((0, 1),), ((1, 8),)]
    assert balance.layers(made, [1.0, 1.75]) is None


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

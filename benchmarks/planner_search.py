"""The cost of searching the whole strategy space: python -m benchmarks.planner_search --json OUT

A search costs memory and time of every candidate, so nothing is missed inside its axes; the gap is
held against layouts enumerated one by one, by rules written apart, on 24 instances.  A candidate counts when both its memory and its time were worked out."""

import math
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.form import Figure, arguments, write
from qipan.catalogue import load_catalogue
from qipan.hardware import ChipClass, ChipClassId
from qipan.planner.costs import costs
from qipan.planner.space import AXES, RECOMPUTE, Space, space
from qipan.workload.cards import CARDS
from qipan.workload.model import Model

GPT_1T = replace(
    CARDS["gpt3-175b"],
    name="gpt-1t",
    layers=128,
    hidden=25600,
    heads=160,
    kv_heads=160,
    head_dim=160,
    ffn_hidden=102400,
)  # Narayanan et al. 2021, table 1


def main() -> None:
    given = arguments("planner_search")
    chips = load_catalogue().chips
    h100 = chips[ChipClassId("nvidia/h100-sxm5-80gb")]
    a100 = chips[ChipClassId("nvidia/a100-sxm4-80gb")]
    llama = CARDS["llama-3.1-405b"]
    large = [timed(llama, 16384, 2048, h100, 8192, precisions=2) for _ in range(5)]
    wide = [timed(GPT_1T, 4096, 3072, a100, 2048) for _ in range(5)]
    rows = gaps(h100)
    figures = [
        Figure("405b_search_s", statistics.median(cpu_s for cpu_s, _, _ in large), "CPU s", "<= 1"),
        Figure("405b_floor_s", floor_s(large[0][1]), "CPU s: 100 additions of arrays of that length"),
        Figure("405b_space_before_pruning", float(AXES.size(llama)), "layouts", ">= 100000"),
        Figure("405b_candidates", float(large[0][1]), "layouts"),
        Figure("405b_gap_to_exhaustive", max(row["gap"] for row in rows), "share", "<= 0.01"),
        Figure("gap_mean", statistics.mean(row["gap"] for row in rows), "share"),
        Figure(
            "gpt1t_candidates_per_s", statistics.median(count / cpu_s for cpu_s, count, _ in wide), "1/CPU s", ">= 1000000"
        ),
    ]  # fmt: skip
    write(given.json, figures, rows, axes=str(AXES))


def timed(
    model: Model, devices: int, rows: int, chip: ChipClass, seq: int, precisions: int = 1
) -> tuple[float, int, float]:
    """CPU seconds, candidates costed, seconds of the best step that fits; in 16 bits, with two `precisions` in fp8 too."""
    started, count, best = time.process_time(), 0, math.inf
    for low in (False, True)[:precisions]:
        found = space(model, devices, rows, 8, seq=seq, fp8=low)
        best = min(best, best_step_s(found, model, chip, seq))
        count += len(found)
    return time.process_time() - started, count, best


def best_step_s(found: Space, model: Model, chip: ChipClass, seq: int) -> float:
    worked_out = costs(found, model, chip, seq)
    fits = worked_out.memory_bytes <= chip.memory_bytes.value * 0.94
    return float(np.min(np.where(fits, worked_out.step_s, np.inf)))


def gaps(chip: ChipClass) -> list[dict[str, Any]]:
    rows = []
    for name in ("llama-2-7b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b"):
        for devices, batch in (
            (512, 512),
            (768, 768),
            (1024, 1000),
            (1024, 2048),
            (2048, 2048),
            (4096, 1536),
        ):
            model = CARDS[name]
            found = timed(model, devices, batch, chip, 8192)[2]
            optimum = best_step_s(enumerated(model, devices, batch, 8192), model, chip, 8192)
            rows.append({"model": name, "devices": devices, "rows": batch, "gap": found / optimum - 1})
    return rows


def enumerated(model: Model, devices: int, batch: int, seq: int) -> Space:
    """Every tensor, pipeline, context and micro-batch count to 64 that the strategy's own rules allow, one by one."""
    found = []
    for tp in range(1, 9):
        for pp in range(1, model.layers + 1):
            for cp in (1, 2, 4, 8, 16, 32):
                if devices % (tp * pp * cp) or model.kv_heads % tp or model.ffn_hidden % tp:
                    continue
                if cp > 1 and seq // cp < 4096:
                    continue
                dp = devices // tp // pp // cp
                for micro in range(1, 65):
                    count = math.ceil(math.ceil(batch / dp) / micro)
                    if dp > batch or count > batch // dp:
                        continue
                    chunks = math.ceil(model.layers / pp)
                    for virtual in range(0 if pp > 1 else 1, 2 if pp == 1 else min(chunks, 16) + 1):
                        if virtual > 1 and count % pp:
                            continue
                        for zero in range(4 if pp == 1 else 3):
                            for again in range(len(RECOMPUTE)):
                                if virtual == 0 and RECOMPUTE[again] == "full":
                                    continue
                                found += [
                                    (tp, pp, dp, micro, virtual, zero, again, cp, inside)
                                    for inside in ((0, 1) if zero == 3 and dp * tp > 8 else (0,))
                                ]
    tensor, pipeline, data, micros, virtuals, zeros, recomputes, contexts, sharded = np.array(found).T
    return Space(
        tensor, pipeline, data, micros, virtuals, zeros, recomputes, batch, context_parallel=contexts,
        node_sharded=sharded,
    )  # fmt: skip


def floor_s(length: int) -> float:
    array = np.ones(length)
    started = time.process_time()
    for _ in range(100):
        array = array + 1.0
    return time.process_time() - started


if __name__ == "__main__":
    main()

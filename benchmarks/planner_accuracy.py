"""The planner's step time against published training runs: `python -m benchmarks.planner_accuracy --json OUT`.

Rows with a full layout (tensor, pipeline, data parallel, micro-batch and recomputation published, nothing recalled) on chips
of the catalogue.  The headline is leave-one-table-out: the constants that predict a table were fitted without it.
`--fit 1` prints the constants fitted on all rows."""

import re
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.optimize import least_squares

from benchmarks.form import Figure, arguments, data_folder, write
from qipan.catalogue import load_catalogue
from qipan.hardware import ChipClass
from qipan.hardware import Figure as Figure_
from qipan.planner.costs import Constants, costs
from qipan.planner.space import RECOMPUTE, Space
from qipan.workload.model import Model, Moe

CHIPS = {
    "A100-SXM-80GB": "nvidia/a100-sxm4-80gb", "A100-SXM-40GB": "nvidia/a100-sxm4-40gb",
    "H100-SXM-80GB": "nvidia/h100-sxm5-80gb", "H800-SXM-80GB": "nvidia/h800-sxm5-80gb",
    "MI250X-GCD": "amd/mi250x",
}  # fmt: skip
NAMES = [field.name for field in fields(Constants)]
LOW, HIGH = 0.15, 3.0  # a fitted constant stays within these multiples of where it starts


def usable(run: dict[str, Any]) -> bool:
    layout = run["parallel"]
    return (
        all(layout.get(key) is not None for key in ("tp", "pp", "dp", "micro_batch", "recompute"))
        and not run.get("config_partly_recalled")
        and run["system"]["accelerator"] in CHIPS
        and layout["recompute"] in RECOMPUTE
        and run["dtype"] in ("fp16", "bf16")
        and bool(run.get("step_time_s"))
    )


def model_of(found: dict[str, Any]) -> Model:
    moe = found.get("moe")
    return Model(
        found["name"], found["layers"], found["hidden"], found["heads"], found.get("kv_heads") or found["heads"],
        found.get("head_dim") or found["hidden"] // found["heads"], found["ffn_hidden"], found["vocab"],
        gated_mlp=bool(found.get("gated_mlp")), tied_embeddings=bool(found.get("tied_embeddings")),
        moe=Moe(moe["experts"], moe["top_k"], moe["expert_ffn"], moe.get("shared") or 0) if moe else None,
    )  # fmt: skip


def chip_of(run: dict[str, Any], chips: dict[str, ChipClass]) -> ChipClass:
    """The catalogue's chip with the network that the row publishes for its nodes, where it does."""
    chip = chips[CHIPS[run["system"]["accelerator"]]]
    per_node = re.search(r"([0-9]+) ?(?:Gb/s|Gbps) (?:per node |node-node)", str(run["system"].get("inter")))
    if per_node is None:
        return chip
    share = float(per_node[1]) * 1e9 / 8 / run["system"]["per_node"]
    return replace(chip, nic_bytes_per_s=Figure_(share, "third-party", "the row"))


def predicted_s(
    run: dict[str, Any], chips: dict[str, ChipClass], constants: Constants
) -> tuple[float, float]:
    """Seconds of a step, and peak bytes, of one published layout."""
    layout = run["parallel"]
    tp, pp, dp, micro, virtual, zero = (
        np.array([int(layout[key] or least)])
        for key, least in (("tp", 1), ("pp", 1), ("dp", 1), ("micro_batch", 1), ("vpp", 1), ("zero", 0))
    )
    recompute = np.array([RECOMPUTE.index(layout["recompute"])])
    space = Space(tp, pp, dp, micro, virtual, zero, recompute, int(layout["global_batch"]))
    model = model_of(run["model"])
    found = costs(space, model, chip_of(run, chips), run["model"]["seq_len"], constants)
    return float(found.step_s[0]), float(found.memory_bytes[0])


def fitted(runs: list[dict[str, Any]], chips: dict[str, ChipClass]) -> Constants:
    """Least absolute (soft) logarithm of the ratio, every table of equal weight."""
    start = np.array(astuple(Constants()))
    sizes: dict[str, int] = {}
    for run in runs:
        sizes[run["group"]] = sizes.get(run["group"], 0) + 1
    weight = np.array([sizes[run["group"]] ** -0.5 for run in runs])
    truth = np.array([run["step_time_s"] for run in runs])

    def miss(scale: NDArray[np.float64]) -> NDArray[np.float64]:
        constants = Constants(*np.exp(scale) * start)
        ratio = np.array([predicted_s(run, chips, constants)[0] for run in runs]) / truth
        return np.asarray(weight * np.log(ratio))

    highest = np.array(
        [
            min(HIGH, 1 / value if name.endswith(("share", "exposed")) else HIGH)
            for name, value in zip(NAMES, start, strict=True)
        ]
    )
    bounds = (np.full(len(start), np.log(LOW)), np.log(highest) + 1e-9)
    found = least_squares(miss, np.zeros(len(start)), bounds=bounds, loss="soft_l1", f_scale=0.1, max_nfev=60)
    return Constants(*(float(value) for value in np.exp(found.x) * start))


def main() -> None:
    given = arguments("planner_accuracy", runs="", fit=0)
    data = data_folder(given.data, "published training runs (their sources are named row by row)")
    path = Path(given.runs) if given.runs else data / "reference" / "training_runs.yaml"
    chips = {str(key): chip for key, chip in load_catalogue().chips.items()}
    every = yaml.safe_load(path.read_text(encoding="utf-8"))["runs"]
    runs = [run for run in every if usable(run)]
    whole = fitted(runs, chips)
    if given.fit:
        for field, value in zip(fields(Constants), astuple(whole), strict=True):
            print(f"{field.name} = {value:.4g}")
    rows = []
    for group in sorted({run["group"] for run in runs}):
        without = fitted([run for run in runs if run["group"] != group], chips)
        for run in (run for run in runs if run["group"] == group):
            apart, peak = predicted_s(run, chips, without)
            together, _ = predicted_s(run, chips, whole)
            shipped, _ = predicted_s(run, chips, Constants())
            truth = run["step_time_s"]
            rows.append({
                "id": run["id"], "group": group, "measured_s": truth, "step_time_s": apart,
                "error": apart / truth - 1, "error_fitted_on_all": together / truth - 1,
                "error_shipped": shipped / truth - 1,
                "fits": peak <= chips[CHIPS[run["system"]["accelerator"]]].memory_bytes.value,
            })  # fmt: skip
    write(given.json, figures(rows), rows, runs=len(rows), of=len(every), constants=len(astuple(whole)))


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    def error(key: str) -> NDArray[np.float64]:
        return np.abs([row[key] for row in rows])

    too_big = sum(not row["fits"] for row in rows) / len(rows)
    found = [
        Figure("leave_one_table_out_mape", float(np.mean(error("error"))), "share", "<= 0.15"),
        Figure("leave_one_table_out_median", float(np.median(error("error"))), "share", "<= 0.08"),
        Figure("fitted_mape", float(np.mean(error("error_fitted_on_all"))), "share", "<= 0.12"),
        Figure("fitted_median", float(np.median(error("error_fitted_on_all"))), "share", "<= 0.06"),
        Figure("shipped_mape", float(np.mean(error("error_shipped"))), "share", "<= 0.12"),
        Figure("called_too_big", too_big, "share", "<= 0.02"),
    ]
    for group in sorted({row["group"] for row in rows}):
        mine = [abs(row["error"]) for row in rows if row["group"] == group]
        found.append(Figure(f"mape_{group}", float(np.mean(mine)), f"share of {len(mine)} rows", ""))
    return found


if __name__ == "__main__":
    main()

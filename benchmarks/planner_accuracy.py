"""The planner's step time against published training runs: `python -m benchmarks.planner_accuracy --json OUT`.

Rows with a full layout (tensor, pipeline, data parallel, micro-batch and recomputation published, nothing recalled) are the
measure; rows with open fields, and mixtures of experts, are scored apart, their guesses as `published_runs` states them.
The headline is leave-one-table-out: the constants that predict a table were fitted without it.  `--runs FILE` predicts the rows of
FILE: those that the shipped fit saw (same id) without their table, all others with the shipped constants; FILE is never fitted.
`--fit 1` prints the constants fitted on all rows of `--data`; `--evidence FILE` writes `qipan/planner/published.py` from them."""

import sys
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.optimize import least_squares

from benchmarks.form import Figure, arguments, data_folder, write
from benchmarks.published_runs import Costed, Runs, chip_of, model_of, read
from qipan.catalogue import Catalogue, load_catalogue
from qipan.planner.constants import Constants
from qipan.workload.model import parameter_count

Floats = NDArray[np.float64]
#: where each constant is expected before any run is seen, and how far (relative, one deviation): keeps what the runs of a
#: fit do not tell apart where physics or other publications put it
EXPECTED = {
    "gemm_share": (0.85, 0.15), "full_clock_w_per_flops": (1.2e-12, 0.4), "fused_attention_share": (0.5, 0.4),
    "tuned_attention_share": (0.9, 0.3), "score_bytes": (14, 0.4), "memory_share": (0.8, 0.3),
    "link_share": (0.8, 0.15), "nic_share": (0.8, 0.2), "half_wave": (1.5e6, 0.7), "depth_per_intensity": (1.5, 0.7),
    "layer_passes": (8, 0.5), "layer_floor_s": (6e-4, 0.7), "sequence_exposed": (0.5, 0.5),
    "shard_exposed": (0.2, 0.7), "pipeline_exposed": (0.3, 0.7), "straggler_per_doubling": (0.003, 1),
    "fp8_share": (0.65, 0.2), "step_floor_s": (0.01, 0.7), "expert_exposed": (0.5, 0.5), "expert_passes": (6, 0.7),
}  # fmt: skip
NAMES = [field.name for field in fields(Constants)]
EXPECTED_WEIGHT = 0.05  # of all expectations together, per row
OPEN_WEIGHT = 0.4  # of a row with guessed fields
SOFT = 0.05  # relative errors beyond this count by their size, not its square


def fitted(runs: Runs, start: Constants | None = None) -> Constants:
    """Most likely constants: soft absolute logarithms of the ratios, a table of n rows counting as root n, and the
    expectations."""
    known = runs.only(np.isfinite(runs.measured_s))
    costed = Costed(known)
    expected = np.log([EXPECTED[name][0] for name in NAMES])
    spread = np.array([EXPECTED[name][1] for name in NAMES])
    highest = np.array([0.0 if name.endswith(("share", "exposed")) else 99.0 for name in NAMES])
    sizes = {group: known.groups.count(group) for group in known.groups}
    weight = np.array([sizes[group] ** -0.25 for group in known.groups]) * np.where(
        known.whole, 1, OPEN_WEIGHT
    )
    weight /= np.sqrt(np.mean(weight**2))
    truth = np.log(known.measured_s)
    at = np.minimum(np.log(astuple(start)) if start else expected, highest - 1e-6)
    for _ in range(2):  # which guess stands for an open row follows from the constants
        which = costed.chosen(Constants(*np.exp(at)))
        chosen = Costed(picked(known, which))

        def miss(x: Floats, chosen: Costed = chosen) -> Floats:
            error = weight * (np.log(chosen.candidates_s(Constants(*np.exp(x)))) - truth) / SOFT
            soft = np.sqrt(2 * (np.sqrt(1 + error**2) - 1))
            return np.concatenate([soft, np.sqrt(EXPECTED_WEIGHT * len(truth)) * (x - expected) / spread])

        at = np.minimum(least_squares(miss, at, bounds=(-99, highest), max_nfev=60).x, highest - 1e-6)
    return Constants(*(float(value) for value in np.exp(at)))


def picked(runs: Runs, which: NDArray[np.int64]) -> Runs:
    return Runs(
        runs.ids, runs.groups, runs.measured_s, runs.whole, runs.moe, np.arange(len(runs.ids)),
        [runs.sizes[i] for i in which], [runs.chips[i] for i in which], [runs.layouts[i] for i in which],
    )  # fmt: skip


def main() -> None:
    given = arguments("planner_accuracy", runs="", fit=0, evidence="")
    catalogue = load_catalogue()
    path = Path(given.runs) if given.runs else None
    data = None
    if path is None or Path(given.data or "../shared").is_dir():
        data = data_folder(given.data, "published training runs (their sources are named row by row)")
    shared = load(data / "reference" / "training_runs.yaml") if data is not None else []
    seen, _ = read([run for run in shared if run.get("step_time_s")], catalogue)
    whole = fitted(seen) if seen.ids else Constants()
    if given.fit:
        for name, value in zip(NAMES, astuple(whole), strict=True):
            print(f"    {name}: float = {value:.4g}")
    asked, left_out = read(
        load(path) if path else [run for run in shared if run.get("step_time_s")], catalogue
    )
    rows = predictions(asked, seen, whole)
    if not rows:
        sys.exit(f"no row of {path} can be costed: {left_out}")
    if given.evidence:
        Path(given.evidence).write_text(evidence(rows, shared, catalogue), encoding="utf-8")
    write(
        given.json, figures(rows), rows, runs=len(rows), constants=len(NAMES), left_out=left_out,
        guesses="open fields: the fastest layout that fits; attention kernel by precision",
    )  # fmt: skip


def load(path: Path) -> list[dict[str, Any]]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    return list(found["runs"] if isinstance(found, dict) else found)


def predictions(asked: Runs, seen: Runs, whole: Constants) -> list[dict[str, Any]]:
    """`step_time_s` of a row that the fit saw is predicted without its table."""
    apart = {
        group: fitted(seen.only(np.array([other != group for other in seen.groups])), whole)
        for group in sorted(set(asked.groups) & set(seen.groups))
    }
    left = errors_left(seen, apart if set(seen.groups) <= set(apart) else {})
    costed = Costed(asked)
    shipped, fits = costed.predict(Constants())
    together, _ = costed.predict(whole)
    known = set(seen.ids)
    held_out = {group: costed.predict(constants)[0] for group, constants in apart.items()}
    rows = []
    for i, (run, group) in enumerate(zip(asked.ids, asked.groups, strict=True)):
        seconds = float(held_out[group][i] if run in known else shipped[i])
        low, high = band(left, group, whole=bool(asked.whole[i]))
        truth = float(asked.measured_s[i])
        row = {
            "id": run, "group": group, "step_time_s": seconds, "p10": seconds * low, "p90": seconds * high,
            "fits": bool(fits[i]), "full_layout": bool(asked.whole[i]), "moe": bool(asked.moe[i]),
            "fitted_on_all_s": float(together[i]), "shipped_s": float(shipped[i]),
        }  # fmt: skip
        if np.isfinite(truth):
            row |= {
                "measured_s": truth, "error": seconds / truth - 1, "error_fitted_on_all": together[i] / truth - 1,
                "error_shipped": shipped[i] / truth - 1, "inside": bool(row["p10"] <= truth <= row["p90"]),
            }  # fmt: skip
        rows.append(row)
    return rows


def errors_left(seen: Runs, apart: dict[str, Constants]) -> dict[tuple[str, bool], list[float]]:
    """Logarithms of measured over predicted, leave-one-table-out, by table and by whether the layout was whole."""
    if not apart:
        return {}
    costed = Costed(seen)
    found: dict[tuple[str, bool], list[float]] = {}
    for group, constants in apart.items():
        seconds, _ = costed.predict(constants)
        for i, other in enumerate(seen.groups):
            if other == group:
                ratio = float(np.log(seen.measured_s[i] / seconds[i]))
                found.setdefault((group, bool(seen.whole[i])), []).append(ratio)
    return found


#: 10 and 90 % of the leave-one-table-out errors of the shared tables, for a file of rows alone
SHIPPED_BAND = {True: (0.90, 1.15), False: (0.75, 1.29)}


def band(left: dict[tuple[str, bool], list[float]], group: str, *, whole: bool) -> tuple[float, float]:
    """From the other tables' errors."""
    others = [
        error
        for (other, kind), errors in left.items()
        if other != group and kind == whole
        for error in errors
    ]
    if len(others) < 20:
        return SHIPPED_BAND[whole]
    low, high = np.quantile(others, (0.1, 0.9))
    return float(np.exp(low)), float(np.exp(high))


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    measured = [row for row in rows if "error" in row]
    dense = [row for row in measured if row["full_layout"]]
    experts = [row for row in measured if row["moe"]]
    found = []
    for prefix, key, mean, median in (
        ("leave_one_table_out", "error", 0.15, 0.08), ("fitted", "error_fitted_on_all", 0.12, 0.06),
        ("shipped", "error_shipped", 0.12, 0.06),
    ):  # fmt: skip
        if not dense:
            continue
        found += [
            Figure(f"{prefix}_mape", mape(dense, key), "share", f"<= {mean}"),
            Figure(f"{prefix}_median", float(np.median([abs(row[key]) for row in dense])), "share", f"<= {median}"),
            Figure(f"{prefix}_mean_of_groups", float(np.mean([
                mape([row for row in dense if row["group"] == group], key)
                for group in sorted({row["group"] for row in dense})
            ])), "share"),
        ]  # fmt: skip
    if dense:
        large = [
            mape([row for row in dense if row["group"] == group], "error_fitted_on_all")
            for group in sorted({row["group"] for row in dense})
            if sum(row["group"] == group for row in dense) >= 5
        ]
        found += [
            Figure("fitted_worst_group_of_5", max(large, default=0.0), "share", "<= 0.25"),
            Figure("p10_p90_covers", float(np.mean([row["inside"] for row in dense])), "share", ">= 0.75"),
            Figure("p90_over_p10_median", float(np.median([row["p90"] / row["p10"] for row in dense])), "ratio", "<= 1.6"),
        ]  # fmt: skip
    if experts:
        found.append(Figure("moe_mape", mape(experts, "error"), f"share of {len(experts)} rows", "<= 0.2"))
        found.append(Figure("moe_fitted_mape", mape(experts, "error_fitted_on_all"), "share", "<= 0.2"))
    other = [row for row in measured if not row["full_layout"] and not row["moe"]]
    if other:
        found.append(Figure("open_fields_mape", mape(other, "error"), f"share of {len(other)} rows"))
    ran = [row for row in rows if row["full_layout"]] or rows
    found.append(Figure("called_too_big", sum(not row["fits"] for row in ran) / len(ran), "share", "<= 0.02"))
    for group in sorted({row["group"] for row in measured}):
        mine = [row for row in measured if row["group"] == group]
        found.append(Figure(f"mape_{group}", mape(mine, "error"), f"share of {len(mine)} rows"))
        found.append(
            Figure(
                f"median_{group}",
                float(np.median([abs(row["error"]) for row in mine])),
                f"share of {len(mine)} rows",
            )
        )
    return found


#: rows of a table that become evidence
EVIDENCE_MOST = 4


def evidence(rows: list[dict[str, Any]], runs: list[dict[str, Any]], catalogue: Catalogue) -> str:
    """The module that names measured runs: a few of each table, from its smallest to its largest model."""
    by_id = {run["id"]: run for run in runs}
    lines = []
    for group in sorted({row["group"] for row in rows}):
        mine = sorted(
            (
                (parameter_count(model_of(by_id[row["id"]]["model"])), row)
                for row in rows
                if row["group"] == group
            ),
            key=lambda pair: (pair[0], pair[1]["id"]),
        )
        step = max(1, (len(mine) - 1) / (EVIDENCE_MOST - 1))
        for place in sorted(
            {round(number * step) for number in range(EVIDENCE_MOST) if round(number * step) < len(mine)}
        ):
            parameters, row = mine[place]
            run = by_id[row["id"]]
            chip = chip_of(run, catalogue)
            assert chip is not None, "it was costed"
            source = str(run["source"]).replace('"', "'")
            lines.append(
                f'    ("{row["id"]}", "{source}", "{chip.chip_class}", {parameters:.3g}, '
                f"{run['system'].get('count') or 0}, {run['model']['seq_len']}, {row['measured_s']:.4g}, {row['error']:.3f}),"
            )
    return EVIDENCE.format(runs="\n".join(lines))


EVIDENCE = '''"""Published runs that a plan names as its evidence.  Written by `python -m benchmarks.planner_accuracy --evidence`:
id, source, chip class, parameters, devices, seq, measured seconds of a step, error of the model where its constants were
fitted without the run's table."""

# fmt: off
RUNS = (
{runs}
)
'''


def mape(rows: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([abs(row[key]) for row in rows]))


if __name__ == "__main__":
    main()

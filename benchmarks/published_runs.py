"""Published training runs as arrays that the planner costs in one call.

A field that was not published is guessed: every value that could be is costed, and the fastest that fits in memory stands for
the row (a run that was published was tuned).  Which attention kernel ran is nowhere stated; it is taken from the precision, as each
came with its time: fp16 stored the scores, bf16 a portable fused kernel; one written for the chip with fp8, and on chips that
have fp8 where parameters are not sharded (the vendor's own framework)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qipan.catalogue import Catalogue
from qipan.hardware import ChipClass, ChipClassId, Figure
from qipan.planner.block import FUSED, STORED, TUNED, Split, block
from qipan.planner.constants import Constants, Rates, rates
from qipan.planner.costs import step
from qipan.planner.memory import memory
from qipan.planner.sizes import PROJECTIONS, Sizes, sizes
from qipan.planner.space import RECOMPUTE, Space
from qipan.workload.cards import CARDS
from qipan.workload.model import Model, Moe

Floats = NDArray[np.float64]
USABLE = 0.94
#: other names of chips of the catalogue
KIN = {"h800": "nvidia/h800-sxm5-80gb", "mi250x": "amd/mi250x"}
#: recomputation under other names: what is kept is between none and full
OTHER_RECOMPUTE = "selective"
MICRO_BATCHES = (1, 2, 4, 8, 16)
TENSOR, PIPELINE = (1, 2, 4, 8), (1, 2, 4, 8, 16)
VIRTUAL = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Runs:
    """Arrays over candidates, several for a row that leaves a field open; `row[i]` is the row of candidate i."""

    ids: list[str]
    groups: list[str]
    measured_s: Floats
    whole: NDArray[np.bool_]  # the layout was published in full, and the model is dense
    moe: NDArray[np.bool_]
    row: NDArray[np.int64]
    sizes: list[Sizes]
    chips: list[ChipClass]
    layouts: list[dict[str, float]]

    def only(self, keep: NDArray[np.bool_]) -> "Runs":
        numbers = np.cumsum(keep) - 1
        which = [i for i, row in enumerate(self.row) if keep[row]]
        kept = np.flatnonzero(keep)
        return Runs(
            [self.ids[i] for i in kept], [self.groups[i] for i in kept], self.measured_s[kept], self.whole[kept],
            self.moe[kept], numbers[self.row[which]], [self.sizes[i] for i in which],
            [self.chips[i] for i in which], [self.layouts[i] for i in which],
        )  # fmt: skip


def read(runs: Sequence[dict[str, Any]], catalogue: Catalogue) -> tuple[Runs, dict[str, str]]:
    """Rows that can be costed, and why each other cannot."""
    kept: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    row: list[int] = []
    shapes: list[Sizes] = []
    chips: list[ChipClass] = []
    layouts: list[dict[str, float]] = []
    for run in runs:
        why, chip = "", chip_of(run, catalogue)
        if chip is None:
            why = f"no chip like {run['system'].get('accelerator')} in the catalogue"
        elif not shapes_of(run):
            why = "neither tensor, pipeline and data parallel nor the devices were published"
        elif not run["parallel"].get("global_batch"):
            why = "global batch not published"
        elif any(
            not run["model"].get(key)
            for key in ("layers", "hidden", "heads", "ffn_hidden", "vocab", "seq_len")
        ):
            why = "architecture not published"
        if why or chip is None:
            left_out[run["id"]] = why
            continue
        shape = sizes(model_of(run["model"]))
        for layout in guesses(run, chip):
            row.append(len(kept))
            shapes.append(shape)
            chips.append(chip)
            layouts.append(layout)
        kept.append(run)
    dense = np.array([not run["model"].get("moe") for run in kept], dtype=bool)
    return Runs(
        [run["id"] for run in kept], [str(run.get("group")) for run in kept],
        np.array([run.get("step_time_s") or np.nan for run in kept]),
        np.array([whole(run) for run in kept], dtype=bool) & dense, ~dense,
        np.array(row, dtype=np.int64), shapes, chips, layouts,
    ), left_out  # fmt: skip


def whole(run: dict[str, Any]) -> bool:
    layout = run["parallel"]
    stated = all(layout.get(key) is not None for key in ("tp", "pp", "dp", "micro_batch", "recompute"))
    return stated and not run.get("config_partly_recalled")


def guesses(run: dict[str, Any], chip: ChipClass) -> list[dict[str, float]]:
    """Every layout that the row can mean."""
    return [layout for shape in shapes_of(run) for layout in _guesses(run, chip, *shape)]


def shapes_of(run: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    """Tensor, pipeline, data, context parallel: as published, or every way to split the published devices."""
    layout, count = run["parallel"], run["system"].get("count")
    context = int(layout.get("cp") or 1)
    if all(layout.get(key) is not None for key in ("tp", "pp", "dp")):
        tp, pp, dp = (int(layout[key]) for key in ("tp", "pp", "dp"))
        if count and tp * pp * dp * context != count and count % (tp * pp * context) == 0:
            dp = count // (
                tp * pp * context
            )  # replicas of a sharded group: all its ranks have rows of their own
        return [(tp, pp, dp, context)]
    if not count or not layout.get("global_batch"):
        return []
    return [
        (tp, pp, count // (tp * pp * context), context)
        for tp in ([int(layout["tp"])] if layout.get("tp") else TENSOR)
        for pp in ([int(layout["pp"])] if layout.get("pp") else PIPELINE)
        if count % (tp * pp * context) == 0 and pp <= run["model"]["layers"]
        and 1 <= count // (tp * pp * context) <= layout["global_batch"]
    ]  # fmt: skip


def _guesses(
    run: dict[str, Any], chip: ChipClass, tp: int, pp: int, dp: int, context: int
) -> list[dict[str, float]]:
    layout, model = run["parallel"], run["model"]
    rows = int(layout["global_batch"])
    precision = str(run["dtype"])
    recompute = layout.get("recompute")
    if recompute is not None and recompute not in RECOMPUTE:
        recompute = OTHER_RECOMPUTE
    each = -(-rows // dp)
    micros = [int(layout["micro_batch"])] if layout.get("micro_batch") else [
        micro for micro in MICRO_BATCHES if each % micro == 0
    ] or [1]  # fmt: skip
    virtual = [int(layout["vpp"])] if layout.get("vpp") else [1]
    if pp > 1 and not layout.get("vpp") and not whole(run):
        virtual = [chunks for chunks in VIRTUAL if chunks <= -(-model["layers"] // pp)]
    parallel = layout.get("sequence_parallel")
    fixed = {
        "tp": tp, "pp": pp, "dp": dp, "rows": rows, "cp": context, "ep": layout.get("ep") or 1,
        "zero": (1 if pp > 1 else 3) if layout.get("zero") is None and layout.get("tp") is None else layout.get("zero") or 0, "seq": model["seq_len"], "fp8": float("fp8" in precision),
        "sp": float(precision != "fp16" if parallel is None else parallel),
        "kernel": float(kernel_of(precision, layout.get("zero") or 0, chip)),
    }  # fmt: skip
    return [
        {**fixed, "micro": micro, "recompute": RECOMPUTE.index(again), "virtual": chunks}
        for micro in micros
        for again in ([recompute] if recompute is not None else RECOMPUTE)
        for chunks in virtual
    ]


def kernel_of(precision: str, zero: int, chip: ChipClass) -> int:
    if "fp8" in precision:
        return TUNED
    if precision == "fp16":
        return STORED
    return TUNED if "fp8" in chip.peak_flops_per_s and zero < 3 else FUSED


def model_of(found: dict[str, Any]) -> Model:
    card = CARDS.get(str(found["name"]).lower())
    if card is not None and card.mla is not None:
        return card  # the row's schema has no latent attention
    moe = found.get("moe")
    heads, hidden = found["heads"], found["hidden"]
    return Model(
        found["name"], found["layers"], hidden, heads, found.get("kv_heads") or heads,
        found.get("head_dim") or hidden // heads, found["ffn_hidden"], found["vocab"],
        gated_mlp=bool(found.get("gated_mlp")), tied_embeddings=bool(found.get("tied_embeddings")),
        moe=Moe(
            moe["experts"], moe["top_k"], moe.get("expert_ffn") or found["ffn_hidden"], moe.get("shared") or 0,
            moe.get("dense_layers") or 0,
        ) if moe else None,
    )  # fmt: skip


def chip_of(run: dict[str, Any], catalogue: Catalogue) -> ChipClass | None:
    """The catalogue's chip, with what the row says of its peak, memory, nodes and network."""
    system = run["system"]
    name = str(system.get("accelerator")).lower()
    found = [chip for chip in catalogue.chips.values() if chip.chip_class.split("/")[1] == name]
    token = name.split("-")[0]
    if not found and token in KIN:
        found = [catalogue.chips[ChipClassId(KIN[token])]]
    if not found and token != "tpu":
        near = [
            chip for chip in catalogue.chips.values() if chip.chip_class.split("/")[1].split("-")[0] == token
        ]
        found = sorted(
            near,
            key=lambda chip: (
                ("sxm" in name) != ("sxm" in chip.chip_class),
                abs(chip.memory_bytes.value / 2**30 - (system.get("mem_gb") or 0)), chip.chip_class,
            ),
        )  # fmt: skip
    if not found:
        return None
    chip = found[0]

    def stated(value: float) -> Figure:
        return Figure(value, "third-party", "the row")

    peaks = dict(chip.peak_flops_per_s)
    for kind, key in (("bf16", "peak_bf16_tflops"), ("fp8", "peak_fp8_tflops")):
        if system.get(key):
            peaks[kind] = stated(system[key] * 1e12)
    per_node = system.get("per_node") or chip.devices_per_node
    domain = re.search(r"([0-9]+)-GPU domain", str(system.get("intra")))
    linked = int(domain[1]) if domain else max(int(per_node), chip.linked_devices if chip.compiled else 0)
    network = nic_bytes_per_s(str(system.get("inter")), per_node)
    return replace(
        chip, peak_flops_per_s=peaks, devices_per_node=int(per_node), linked_devices=linked,
        memory_bytes=stated(system["mem_gb"] * 2**30) if system.get("mem_gb") else chip.memory_bytes,
        nic_bytes_per_s=stated(network) if network else chip.nic_bytes_per_s,
    )  # fmt: skip


def nic_bytes_per_s(text: str, per_node: int) -> float:
    """A device's share of the network that a row describes in words; 0: it does not."""
    found = re.search(r"(?:([0-9]+)x )?[A-Za-z/ :\-]*?([0-9]+(?:\.[0-9]+)?) ?(Gb/s|Gbps|GB/s)", text)
    if found is None:
        return 0.0
    rate = float(found[2]) * 1e9 / (1 if found[3] == "GB/s" else 8)
    if found[1]:
        return int(found[1]) * rate / per_node
    return rate / per_node if re.search(r"per node(?!-GPU)|node-node", text) else rate


class Costed:
    """Runs laid out once; `predict` works them all out with given constants."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.sizes = stacked(runs.sizes)
        column = {key: np.array([layout[key] for layout in runs.layouts]) for key in runs.layouts[0]}
        self.split = Split(
            column["tp"], column["cp"], column["ep"], column["micro"], column["sp"], column["recompute"],
            column["seq"], column["fp8"], column["kernel"],
        )  # fmt: skip
        whole_numbers = {key: values.astype(np.int64) for key, values in column.items()}
        self.space = Space(
            whole_numbers["tp"], whole_numbers["pp"], whole_numbers["dp"], whole_numbers["micro"],
            whole_numbers["virtual"], whole_numbers["zero"], whole_numbers["recompute"], whole_numbers["rows"],
            whole_numbers["cp"], whole_numbers["ep"],
        )  # fmt: skip
        self.usable = np.array([chip.memory_bytes.value for chip in runs.chips])
        chosen = rates_of(runs.chips, Constants())
        self.peak_bytes = memory(
            self.sizes, self.space, chosen, self.split.seq, sequence_parallel=self.split.sequence_parallel,
            fp8=self.split.fp8, kernel=self.split.kernel,
        )  # fmt: skip

    def candidates_s(self, constants: Constants) -> Floats:
        chosen = rates_of(self.runs.chips, constants)
        layer = block(self.sizes, self.split, chosen, constants)
        return step(
            self.sizes, self.space, layer, chosen, constants, self.split.seq, self.peak_bytes,
            self.split.sequence_parallel,
        ).step_s  # fmt: skip

    def chosen(self, constants: Constants) -> NDArray[np.int64]:
        """The candidate that stands for each row: the fastest that fits, else the smallest."""
        over = np.maximum(0, self.peak_bytes / (USABLE * self.usable) - 1)
        order = np.lexsort((self.candidates_s(constants), over, self.runs.row))
        rows = self.runs.row[order]
        first = np.r_[True, rows[1:] != rows[:-1]]
        return np.asarray(order[first])

    def predict(self, constants: Constants) -> tuple[Floats, NDArray[np.bool_]]:
        """Seconds of a step a row, and whether it fits."""
        which = self.chosen(constants)
        return self.candidates_s(constants)[which], self.peak_bytes[which] <= self.usable[which]


def rates_of(chips: Sequence[ChipClass], constants: Constants) -> Rates:
    known: dict[int, Rates] = {}
    found = [known.setdefault(id(chip), rates(chip, constants)) for chip in chips]
    return Rates(*(np.array([getattr(one, part.name) for one in found]) for part in fields(Rates)))


def stacked(shapes: Sequence[Sizes]) -> Sizes:
    values: dict[str, Any] = {
        part.name: np.array([getattr(shape, part.name) for shape in shapes])
        for part in fields(Sizes)
        if part.name != "projections"
    }
    pairs = tuple(
        tuple(np.array([shape.projections[number][side] for shape in shapes]) for side in (0, 1))
        for number in range(PROJECTIONS)
    )
    return Sizes(projections=pairs, **values)

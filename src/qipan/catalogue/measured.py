"""Measured figures over nominal ones: the records of this machine that are signed by its own key and have not expired."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qipan.errors import InvalidInput
from qipan.hardware import ChipClassId, Figure

if TYPE_CHECKING:
    from qipan.catalogue import Catalogue
    from qipan.measure import Measurement


def measured_folder() -> Path:
    import platformdirs

    return Path(os.environ.get("QIPAN_MEASURED") or platformdirs.user_data_path("qipan") / "measured")


def records(folder: Path, now_s: float) -> "tuple[list[Measurement], list[str]]":
    """(those that count, why others do not).  Keys beside the own one are named by QIPAN_TRUSTED_KEYS (hex, by commas)."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        return [], []
    from qipan.measure.record import own_key, public_hex, read_record

    named = os.environ.get("QIPAN_TRUSTED_KEYS", "").split(",")
    trusted = frozenset({public_hex(own_key(folder)), *(key.strip() for key in named if key.strip())})
    good, bad = [], []
    for path in paths:
        try:
            good.append(read_record(path, trusted, now_s))
        except InvalidInput as error:
            bad.append(str(error))
    return [record for record in good if record.holds], bad


def with_measured(
    catalogue: "Catalogue", folder: Path | None = None, now_s: float | None = None
) -> "Catalogue":
    """A class that several nodes measured has the slowest node's figures: a plan must hold on any of them."""
    good, _ = records(folder or measured_folder(), time.time() if now_s is None else now_s)
    chips = dict(catalogue.chips)
    for record in sorted(good, key=lambda r: -max(r.best_flops_per_s().values(), default=0.0)):
        chip = chips.get(ChipClassId(record.chip_class))
        if chip is None:
            continue
        source = f"measured on {record.host}, {time.strftime('%Y-%m-%d', time.gmtime(record.measured_at_s))}"
        rates = {
            precision: Figure(rate, "measured", source)
            for precision, rate in record.best_flops_per_s().items()
        }
        chips[chip.chip_class] = replace(
            chip, on_request=False, measured_flops_per_s=rates,
            memory_bytes_per_s=Figure(record.memory_bytes_per_s, "measured", source)
            if record.memory_bytes_per_s else chip.memory_bytes_per_s,
        )  # fmt: skip
    return replace(catalogue, chips=chips)

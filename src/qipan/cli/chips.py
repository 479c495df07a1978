"""`qipan chips`: the catalogue of chip classes."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="The catalogue of chip classes.")
Json = Annotated[bool, typer.Option("--json", help="One JSON document.")]
Overlay = Annotated[
    list[Path] | None, typer.Option("--overlay", help="A YAML file with more `accelerators:`.")
]


@app.command()
def ls(json_: Json = False, overlay: Overlay = None) -> None:
    """All chip classes: figures per schedulable device."""
    import msgspec

    from qipan.catalogue import load_catalogue
    from qipan.cli.app import out
    from qipan.cli.tables import table
    from qipan.quantities import format_bytes

    chips = load_catalogue(*(overlay or [])).chips
    if json_:
        out({"chips": msgspec.to_builtins(list(chips.values()))})
        return
    rows = [
        [
            chip.chip_class, chip.kind, _tflops(chip, "bf16"), _tflops(chip, "fp32"), format_bytes(chip.memory_bytes.value),
            f"{chip.memory_bytes_per_s.value / 1e9:.0f} GB/s", str(chip.devices_per_node), chip.memory_bytes.confidence,
        ]
        for chip in chips.values()
    ]  # fmt: skip
    table(
        "芯片 chips",
        ["chip class", "kind", "bf16 TFLOP/s", "fp32", "memory", "bandwidth", "per node", "confidence"],
        rows,
    )


@app.command()
def explain(chip: str, json_: Json = False, overlay: Overlay = None) -> None:
    """One chip class: every figure with its source and confidence."""
    import msgspec

    from qipan.catalogue import load_catalogue
    from qipan.cli.app import out
    from qipan.cli.tables import table

    found = load_catalogue(*(overlay or [])).find(chip)
    if json_:
        out(msgspec.to_builtins(found))
        return
    figures = {
        **{f"peak {precision} FLOP/s": figure for precision, figure in found.peak_flops_per_s.items()},
        "memory bytes": found.memory_bytes,
        "memory bytes/s": found.memory_bytes_per_s,
        "to its node's devices, bytes/s": found.intra_node_bytes_per_s,
        "network, bytes/s": found.nic_bytes_per_s,
    }
    rows = [
        [name, f"{figure.value:.4g}", figure.confidence, figure.source] for name, figure in figures.items()
    ]
    title = (
        f"{found.chip_class} ({found.kind}, stack {found.stack}), one device; {found.devices_per_card} a card"
    )
    table(title, ["figure", "value", "confidence", "source"], rows)


def _tflops(chip: Any, precision: str) -> str:
    figure = chip.peak_flops_per_s.get(precision)
    return f"{figure.value / 1e12:.1f}" if figure else "-"


@app.command()
def probe(json_: Json = False) -> None:
    """What chips this machine has: usable, present but broken (why, and the next step), or absent."""
    import msgspec

    from qipan.cli.app import out
    from qipan.cli.tables import table
    from qipan.probe import probe as look

    answers = look()
    if json_:
        out({"vendors": msgspec.to_builtins(answers)})
        return
    rows = [
        [answer.vendor, answer.state, str(len(answer.devices)), "; ".join(answer.evidence), answer.reason, answer.next_step]
        for answer in answers
    ]  # fmt: skip
    table("芯片 chips here", ["vendor", "state", "devices", "evidence", "why", "next step"], rows)

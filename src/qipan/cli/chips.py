"""`qipan chips`: what chips there are, here and in the catalogue, and what they do."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qipan.cli.options import Json, finite

if TYPE_CHECKING:
    from qipan.probe import Answer

app = typer.Typer(
    no_args_is_help=True,
    help="Chips: the catalogue, what this machine has, what it does, what a site is worth.",
)
Overlay = Annotated[
    list[Path] | None, typer.Option("--overlay", help="A YAML file with more `accelerators:`, or `stacks:`.")
]


@app.command()
def ls(json_: Json = False, overlay: Overlay = None) -> None:
    """All chip classes: figures per schedulable device."""
    import msgspec

    from qipan.catalogue import site_catalogue
    from qipan.cli.app import out
    from qipan.cli.tables import table
    from qipan.quantities import format_bytes

    chips = site_catalogue(*(overlay or [])).chips
    if json_:
        out({"chips": msgspec.to_builtins(list(chips.values()))})
        return
    rows = [
        [
            chip.chip_class, chip.kind, _tflops(chip, "bf16"), _tflops(chip, "fp32"), format_bytes(chip.memory_bytes.value),
            f"{chip.memory_bytes_per_s.value / 1e9:.0f} GB/s", str(chip.devices_per_node), _confidence(chip),
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
    """One chip class: every figure with its source and confidence, and its vendor's software."""
    import msgspec

    from qipan.catalogue import site_catalogue
    from qipan.cli.app import out
    from qipan.cli.tables import table

    catalogue = site_catalogue(*(overlay or []))
    found = catalogue.find(chip)
    stack = catalogue.stacks.get(found.stack)
    if json_:
        out({**msgspec.to_builtins(found), "software": msgspec.to_builtins(stack)})
        return
    figures = {
        **{f"peak {precision} FLOP/s": figure for precision, figure in found.peak_flops_per_s.items()},
        **{f"reached {precision} FLOP/s": figure for precision, figure in found.measured_flops_per_s.items()},
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
    if found.on_request:
        print(
            "  not measured yet: placed where a task names it in limits.chips; `qipan chips measure --as` lets the planner choose it"
        )
    if stack is not None:
        shown = [
            [key.replace("_", " "), value if isinstance(value, str) else ", ".join(value)]
            for key, value in msgspec.to_builtins(stack).items()
            if value and key != "stack"
        ]
        table(f"software of {found.stack}", ["what", "value"], shown)


def _tflops(chip: Any, precision: str) -> str:
    figure = chip.measured_flops_per_s.get(precision) or chip.peak_flops_per_s.get(precision)
    return f"{figure.value / 1e12:.1f}" if figure else "-"


def _confidence(chip: Any) -> str:
    if chip.measured_flops_per_s:
        return "measured"
    return "on request" if chip.on_request else str(chip.memory_bytes.confidence)


@app.command()
def probe(
    json_: Json = False, overlay: Overlay = None,
    timeout: Annotated[float, typer.Option(min=0.1, callback=finite, help="Seconds that each vendor's tool may take.")] = 1.0,
) -> None:  # fmt: skip
    """What chips this machine has: usable, present but broken (why, and the next step), or absent."""
    import msgspec

    from qipan.cli.app import out
    from qipan.cli.tables import table

    answers = _look(overlay, timeout)
    if json_:
        out({"vendors": msgspec.to_builtins(answers)})
        return
    present = [answer for answer in answers if answer.state != "absent"]
    rows = [
        [answer.vendor, answer.state, _devices(answer), answer.reason or "-", answer.next_step or "-"]
        for answer in present
    ]
    table("芯片 chips here", ["vendor", "state", "devices", "why", "next step"], rows)
    for answer in present:
        for evidence in answer.evidence:
            took = f" ({evidence.took_s:.2f} s)" if evidence.took_s else ""
            print(f"  {answer.vendor}: {evidence.layer}: {evidence.what}{took}")
    absent = [answer.vendor for answer in answers if answer.state == "absent"]
    if absent:
        print(f"  absent (no device node, PCI device or tool): {', '.join(absent)}")


def _look(overlay: list[Path] | None, timeout: float = 1.0) -> "tuple[Answer, ...]":
    from qipan.catalogue import site_catalogue
    from qipan.probe import probe as look

    catalogue = site_catalogue(*(overlay or []))
    return look(names=catalogue, more=catalogue.detect, limit_s=timeout)


def _devices(answer: "Answer") -> str:
    """4 x MXC500 64.0 GiB = metax/c500."""
    from collections import Counter

    from qipan.quantities import format_bytes

    kinds = Counter((device.name, device.memory_bytes, device.chip_class) for device in answer.devices)
    return "; ".join(
        f"{count} x {name or 'a model that the tool does not name'}"
        + (f" {format_bytes(size)}" if size else "")
        + (f" = {chip}" if chip else "" if answer.vendor == "cpu" else ", not in the catalogue")
        for (name, size, chip), count in kinds.items()
    ) or "-"  # fmt: skip


@app.command()
def record(
    vendor: Annotated[str, typer.Argument(help="One vendor of `qipan chips probe`; without it, all that have a tool here.")] = "",
    json_: Json = False, timeout: Annotated[float, typer.Option(min=0.1, callback=finite)] = 5.0,
) -> None:  # fmt: skip
    """Vendor tools' output for a bug report, without serial numbers, addresses, host, user and program names."""
    import getpass
    import socket

    from qipan.catalogue import site_catalogue
    from qipan.cli.app import out
    from qipan.errors import InvalidInput
    from qipan.probe import shipped_vendors
    from qipan.probe.parsers import recognise
    from qipan.probe.record import redacted
    from qipan.probe.tools import run_tools
    from qipan.quantities import format_devices

    vendors = {**shipped_vendors(), **site_catalogue().detect}
    if vendor and vendor not in vendors:
        raise InvalidInput(f"no vendor {vendor!r}; give one of {', '.join(sorted(vendors))}")
    asked = {name: facts for name, facts in vendors.items() if not vendor or name == vendor}
    ran = run_tools({tuple(map(str, tool)) for facts in asked.values() for tool in facts["tools"]}, timeout)
    samples = list[dict[str, Any]]()
    for command, answer in ran.items():
        name = next(
            name for name, facts in asked.items() if [*command] in [[*map(str, t)] for t in facts["tools"]]
        )
        devices = recognise(asked[name]["forms"], answer.text)
        text = redacted(
            answer.text or answer.failure, (socket.gethostname(), getpass.getuser()), (device.name for device in devices)
        )  # fmt: skip
        kept = [(d.index, d.name, d.bus, d.memory_bytes) for d in recognise(asked[name]["forms"], text)]
        same = kept == [(d.index, d.name, d.bus, d.memory_bytes) for d in devices]
        samples.append({
            "vendor": name, "command": " ".join(command), "recorded": time.strftime("%Y-%m-%d"), "devices": len(devices),
            "parses_alike": same, "text": text,
        })  # fmt: skip
    if json_:
        out({"samples": samples})
        return
    if not samples:
        print("no vendor tool is on PATH here; `qipan chips probe` says what was looked for")
    for sample in samples:
        print(
            f"# {sample['vendor']}: {sample['command']} ({format_devices(sample['devices'])} read, {sample['recorded']})"
        )
        if not sample["parses_alike"]:
            print("# the masked text reads differently from the original: say so in the report")
        print(sample["text"].rstrip("\n"))
    if samples:
        print("# look it over before you send it: masking knows common shapes only")


@app.command()
def pool(
    json_: Json = False, overlay: Overlay = None,
    site: Annotated[Path | None, typer.Option("--site", help="The site file (default: qipan.yaml here).")] = None,
) -> None:  # fmt: skip
    """A site's pools as one: devices, nominal and measured rates, and standard card-hours per kind of work."""
    from qipan.catalogue import site_catalogue
    from qipan.catalogue.families import FAMILIES, STANDARD, standard_hours
    from qipan.cli.app import out, site_of
    from qipan.cli.tables import table
    from qipan.hardware import ChipClassId

    catalogue = site_catalogue(*(overlay or []))
    standard = catalogue.chips[ChipClassId(STANDARD)]
    counts: dict[str, int] = {}
    for found in site_of(site).pools():
        counts[found.chip_class] = counts.get(found.chip_class, 0) + found.devices
    rows, lines = list[dict[str, Any]](), list[list[str]]()
    for name, devices in sorted(counts.items()):
        chip = catalogue.chips.get(ChipClassId(name))
        worth = standard_hours(chip, standard) if chip else {family.name: None for family in FAMILIES}
        rows.append({
            "chip_class": name, "devices": devices, "in_catalogue": chip is not None,
            "nominal_flops_per_s": {k: f.value for k, f in chip.peak_flops_per_s.items()} if chip else {},
            "measured_flops_per_s": {k: f.value for k, f in chip.measured_flops_per_s.items()} if chip else {},
            "standard_card_hours_per_device_hour": worth,
        })  # fmt: skip
        lines.append([
            name, str(devices), _tflops(chip, "bf16") if chip else "-", "measured" if chip and chip.measured_flops_per_s else "nominal",
            *(f"{value * devices:.2f}" if value is not None else "-" for value in worth.values()),
        ])  # fmt: skip
    totals = {
        family.name: sum(
            row["devices"] * (row["standard_card_hours_per_device_hour"][family.name] or 0.0) for row in rows
        )
        for family in FAMILIES
    }
    if json_:
        out({"standard": STANDARD, "pools": rows, "standard_card_hours_per_hour": totals})
        return
    lines.append(["all", str(sum(counts.values())), "", "", *(f"{total:.2f}" for total in totals.values())])
    table(
        f"资源池 pools, in card-hours of {STANDARD} per hour",
        ["chip class", "devices", "bf16 TFLOP/s", "", *totals],
        lines,
    )
    print("  -: no published figure; it counts as none.  Kinds of work do not add up to one number.")


@app.command()
def measure(
    as_: Annotated[str, typer.Option("--as", help="The chip class that this machine's devices are; default: what the probe found.")] = "",
    device: Annotated[str, typer.Option(help="What torch calls them: cpu, cuda, npu, ...; default: its vendor's stack.")] = "",
    devices: Annotated[int, typer.Option(min=0, help="How many; 0: all that the probe found, one for a CPU.")] = 0,
    claim: Annotated[str, typer.Option(help="What one device is said to do, such as 312 TFLOP/s in fp32 products; checked.")] = "",
    storage: Annotated[Path | None, typer.Option(help="A folder whose storage is measured too.")] = None,
    quick: Annotated[bool, typer.Option(help="Smaller and fewer: about ten seconds.")] = False,
    overlay: Overlay = None, json_: Json = False,
) -> None:  # fmt: skip
    """Measure this machine's devices, all at once: products, memory, links, storage; a signed record that the planner uses."""
    import sys

    import msgspec

    from qipan.catalogue import site_catalogue
    from qipan.catalogue.measured import measured_folder
    from qipan.cli.app import out
    from qipan.cli.measuring import choose, show
    from qipan.measure.record import write_record
    from qipan.measure.session import measure as run

    chip_class, torch_device, count = choose(
        _look(overlay), site_catalogue(*(overlay or [])), as_, device, devices
    )
    say = (
        (lambda _text: None) if json_ else (lambda text: print(f"qipan: {text}", file=sys.stderr, flush=True))
    )
    made = run(
        chip_class, torch_device, count, claim_flops_per_s=_flops(claim), storage=storage, quick=quick, now_s=time.time(), say=say
    )  # fmt: skip
    path = write_record(made, measured_folder())
    if json_:
        out({**msgspec.to_builtins(made), "record": str(path)})
    else:
        show(made, path)
    if not made.holds:
        raise typer.Exit(100)


def _flops(text: str) -> float:
    """ "312 TFLOP/s", "1.5e12", "40G"."""
    import re

    from qipan.errors import InvalidInput

    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMGTP]?)(?:FLOPS?|FLOP/s)?\s*", text or "0", re.I)
    if found is None:
        raise InvalidInput(f"--claim {text!r} is no rate; give one such as 312 TFLOP/s")
    return float(found[1]) * 1000.0 ** " KMGTP".index(found[2].upper() or " ")

"""What `qipan chips measure` measures by default, and how its result reads."""

from pathlib import Path
from typing import TYPE_CHECKING

from qipan.errors import InvalidInput

if TYPE_CHECKING:
    from qipan.catalogue import Catalogue
    from qipan.measure import Measurement
    from qipan.probe import Answer


def choose(
    answers: "tuple[Answer, ...]", catalogue: "Catalogue", chip: str, torch_device: str, count: int
) -> tuple[str, str, int]:
    """(chip class, torch device, devices).  The accelerator that the probe found; the CPU only when it is asked for or there is
    nothing else at all: a broken accelerator is never replaced in silence."""
    found = [answer for answer in answers if answer.vendor != "cpu" and answer.state == "usable"]
    broken = [answer for answer in answers if answer.vendor != "cpu" and answer.state == "broken"]
    chip_class = catalogue.find(chip).chip_class if chip and chip != "cpu/core" else chip
    if torch_device == "cpu" or (not found and not broken and not torch_device):
        return chip_class or "cpu/core", "cpu", count or 1
    if torch_device:
        kinds = {device.chip_class for answer in found for device in answer.devices if device.chip_class}
        if not chip_class and len(kinds) != 1:
            raise InvalidInput(
                f"the chip class is not clear ({', '.join(sorted(kinds)) or 'none found'}); name it with --as"
            )
        return (
            chip_class or kinds.pop(),
            torch_device,
            count or sum(len(answer.devices) for answer in found) or 1,
        )
    if not found:
        why = "; ".join(f"{answer.vendor}: {answer.reason}" for answer in broken)
        raise InvalidInput(
            f"an accelerator is present but broken ({why}); mend it, or measure the CPU with --device cpu"
        )
    if len(found) > 1:
        raise InvalidInput(
            f"several vendors here: {', '.join(a.vendor for a in found)}; name one with --device and --as"
        )
    healthy = [device for device in found[0].devices if device.healthy]
    name = chip_class or healthy[0].chip_class
    if not name:
        raise InvalidInput(
            f"{healthy[0].name!r} is in no catalogue; add it with --overlay, or name its class with --as"
        )
    stack = catalogue.stacks.get(found[0].vendor)
    if stack is None or not stack.torch_device:
        raise InvalidInput(f"torch has no device for {found[0].vendor}; name one with --device")
    return name, stack.torch_device, count or len(healthy)


def show(made: "Measurement", path: Path) -> None:
    from qipan.cli.tables import table
    from qipan.quantities import format_bytes

    rows = [
        [
            f"products in {precision}",
            ", ".join(f"{size}: {rate / 1e9:.4g}" for size, rate in rates.items()),
            "GFLOP/s by size",
        ]
        for precision, rates in made.gemm_flops_per_s.items()
    ]
    rows += [
        ["memory, copied", f"{made.memory_bytes_per_s / 1e9:.3g}", "GB/s, read and written"],
        ["memory, filled and read back", format_bytes(made.filled_bytes), "right"],
        [
            "seeded products, checked",
            f"{made.challenge_flops_per_s / 1e9:.4g}",
            f"GFLOP/s, spread {made.spread:.0%}",
        ],
    ]
    if made.devices > 1:
        rows.append(
            [
                "all-reduce",
                f"{made.collective_bytes_per_s / 1e9:.3g}",
                f"GB/s, {made.collective_latency_s * 1e6:.0f} us",
            ]
        )
    if made.storage_write_bytes_per_s:
        write, read = made.storage_write_bytes_per_s / 1e6, made.storage_read_bytes_per_s / 1e6
        rows.append(["storage", f"{write:.0f} written, {read:.0f} read", "MB/s"])
    table(
        f"{made.devices} x {made.chip_class} on {made.host}, one device while all work",
        ["what", "value", "unit"],
        rows,
    )
    for reason in made.reasons:
        print(f"  refused: {reason}")
    kept = "the planner uses it for 30 days" if made.holds else "the planner will not use it"
    print(f"  {kept}; signed record: {path}")

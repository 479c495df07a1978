"""Vendor tools' tables into devices.  Pure.  A row that is not whole gives no device, a memory size that cannot be laid at
one device's door gives none."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from qipan.probe.device import Device

BUS = re.compile(
    r"(?<![0-9a-fA-F:])(?:[0-9a-fA-F]{2,8}:)?[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-9a-fA-F](?![\w.:])"
)
MASKED_BUS = re.compile(r"[0-9a-fA-F]{4}:xx:[0-9a-fA-F]{2}\.[0-9a-fA-F]")
USED_OF_TOTAL = re.compile(r"(\d+)\s*(?:[MG]i?B)?\s*[/(]\s*(\d+)\s*([MG])i?B")
RULE = re.compile(r"[|+\s]*[-=+|_─━═╞╡┏┓┡┩└┘┴┼├┤┬]{4,}[|+\s]*")
HEAD = re.compile(r"^\|?\s*(\d{1,4})\s+(?:/\s+)?([A-Za-z][\w .+()/\[\]@-]*?)(?:\s{2,}[^|]*|\s*)\|")
ASCEND_HEAD = re.compile(r"(\d{1,4})\s+((?:310|\S*[A-Za-z]\S*)(?: \S+)*)")
LINE_MAX = 1000  # no tool's row is longer; garbage is


def blocks(text: str) -> list[list[str]]:
    """Lines between rules and blank lines; a line that is repeated at once counts once."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if len(line) > LINE_MAX:
            continue
        if not line.strip() or RULE.fullmatch(line):
            if found[-1]:
                found.append([])
        elif not found[-1] or found[-1][-1] != line:
            found[-1].append(line)
    return [block for block in found if block]


def boxed(text: str) -> Iterable[Device]:
    """The table of nvidia-smi and its many likes: a block per device, whose first line has index, name and bus address;
    memory and link width in it or in the lines below."""
    counts_ecc = "Uncorr. ECC" in text
    devices: list[Device] = []
    torn = beyond = False
    all_blocks, width = blocks(text), _frame_width(text)
    for number, block in enumerate(all_blocks):
        heads = [
            (at, *_head(line))
            for at, line in enumerate(block)
            if _head(line) and _is_whole(line, block, width)
        ]
        beyond |= any(word in line for line in block for word in ("Process", "MIG devices"))
        sized = sum(_memory_bytes(line) > 0 for line in block)
        inside = 0 < number < len(all_blocks) - 1
        torn |= not beyond and (sized > max(1, len(heads)) or (sized > len(heads) and inside))
        if not heads:
            continue
        # rows of one line each share a block; otherwise a block is one device
        shared = all(_memory_bytes(block[at]) for at, *_ in heads)
        for at, index, name, bus in heads:
            lines = [block[at]] if shared and len(heads) > 1 else block[at:]
            size = _memory_bytes(*lines)
            torn |= not shared and (at > 0 or len(heads) > 1)
            torn |= size == 0 and number + 1 < len(all_blocks)
            devices.append(Device(index, name, bus, size, tuple(_complaints(lines, counts_ecc))))
    known = any(device.memory_bytes for device in devices)
    yield from (replace(device, memory_bytes=0) if torn and known else device for device in devices)


def _head(line: str) -> tuple[int, str, str] | tuple[()]:
    bus, start = BUS.search(line), HEAD.match(line)
    if not bus or not start or start.end() > bus.start() + 1:
        return ()
    return int(start[1]), re.sub(r" (On|Off|N/A)$", "", start[2].strip()), bus[0]


def _is_whole(line: str, block: list[str], width: int) -> bool:
    """As wide as its frame, and with as many cells as another line of its block, where there are such."""
    others = {other.count("|") for other in block if other is not line}
    fits = not line.startswith("|") or not width or abs(len(line.rstrip()) - width) <= 2
    return fits and (not others or line.count("|") in others)


def _frame_width(text: str) -> int:
    """That of most of its rules; 0 without any."""
    widths = Counter(len(line.rstrip()) for line in text.splitlines() if RULE.fullmatch(line))
    return widths.most_common(1)[0][0] if widths else 0


def _memory_bytes(*lines: str) -> int:
    for line in lines:
        if found := USED_OF_TOTAL.search(line):
            return int(found[2]) * 2 ** (20 if found[3] == "M" else 30)
    for line in lines:
        if alone := re.search(r"\|\s*(\d+)MiB\s+[A-Za-z]+\s*\|", line):
            return int(alone[1]) * 2**20
    return 0


def _complaints(lines: list[str], counts_ecc: bool) -> Iterable[str]:
    if any("ERR!" in line for line in lines):
        yield "the tool shows ERR! for it"
    errors = re.search(r"\|\s*(\d+)\s*\|\s*$", lines[0]) if counts_ecc else None
    if errors and int(errors[1]):
        yield f"{errors[1]} uncorrectable memory errors"
    for line in lines:
        width = re.search(r"\b(\d+)x\((\d+)x\)", line)
        if width and int(width[1]) < int(width[2]):
            yield f"link at {width[1]} of {width[2]} lanes"


def ascend(text: str) -> Iterable[Device]:
    """`npu-smi info`: a block per chip, of a row (NPU, name, health) and a row (chip, bus address, memory).  The rows are held
    together by nothing but their place, so a block that is not whole inside the table means that none can be trusted."""
    devices: list[Device] = []
    all_blocks = blocks(text)
    width = _frame_width(text)
    for number, block in enumerate(all_blocks):
        rows = [_ascend_cells(line) for line in block]
        heads = [at for at, row in enumerate(rows) if _is_ascend_head(row)]
        chips = [at for at, row in enumerate(rows) if _is_ascend_chip(row)]
        if not heads and not chips:
            continue
        is_end = number + 1 == len(all_blocks)
        closed = block[-1].rstrip().endswith("|")
        is_whole = (
            heads == [0]
            and chips == list(range(1, len(block)))
            and len({rows[at][0] for at in chips}) == len(chips) > 0
            and all(
                abs(len(line.rstrip()) - width) <= 2
                for line in block[: -1 if is_end and not closed else None]
            )
        )
        if not is_whole and not is_end and (number or heads):
            return
        if not is_whole:
            continue  # cut off at an end of the text
        head = ASCEND_HEAD.fullmatch(rows[0][0])
        assert head is not None, "the row was checked to be a head"
        complaints = () if rows[0][1] in ("OK", "正常") else (f"npu-smi says {rows[0][1]}",)
        for at in chips:
            numbers = rows[at][0].split()
            index = int(numbers[1]) if len(numbers) > 1 else int(head[1])
            size = _ascend_memory_bytes(rows[at][2], block[at].rstrip().endswith("|"))
            devices.append(Device(index, head[2], rows[at][1], size, complaints, card=int(head[1])))
    order = [(device.card, device.index) for device in dict.fromkeys(devices)]
    if order == sorted(order):
        yield from devices


def _ascend_cells(line: str) -> list[str]:
    cells = [cell.strip() for cell in line.strip().removeprefix("|").split("|")]
    if line.rstrip().endswith("|"):
        cells.pop()
    if len(cells) == 4:  # 950PR: id and name in cells of their own
        cells = [f"{cells[0]} {cells[1]}".strip(), *cells[2:]]
    return cells


def _is_ascend_head(cells: list[str]) -> bool:
    return (
        len(cells) > 2
        and ASCEND_HEAD.fullmatch(cells[0]) is not None
        and bool(re.fullmatch(r"[^\W\d][\w ]*", cells[1]))
    )


def _is_ascend_chip(cells: list[str]) -> bool:
    return (
        len(cells) > 2
        and re.fullmatch(r"[\d\s]*", cells[0]) is not None
        and bool(BUS.fullmatch(cells[1]) or MASKED_BUS.fullmatch(cells[1]))
    )


def _ascend_memory_bytes(cell: str, closed: bool) -> int:
    """The last `used / total` of the cell (HBM, where there is any).  An open cell may have lost digits: sizes are whole
    GiB, and a whole number of GiB that lost its end is none."""
    found = re.search(r"\d\s*/\s*(\d+)\s*$", cell)
    size = int(found[1]) if found else 0
    return size * 2**20 if closed or size % 1024 == 0 else 0


def kunlunxin(text: str) -> Iterable[Device]:
    """`xpu_smi`: one line per device under a line of titles."""
    lines = _lines(text)
    for titles in lines:
        if "|" in titles and "DevID" in titles and "PCI Addr" in titles:
            yield from _piped(lines, _cells(titles))


def ascend_map(text: str) -> Iterable[Device]:
    """`npu-smi info -m`: the same, columns set apart by blanks."""
    lines = _lines(text)
    for titles in lines:
        if titles.startswith("NPU ID") and "Chip Name" in titles:
            columns = re.split(r"\s{2,}", titles.strip())
            if columns[0] == "NPU ID" and columns[-1] == "Chip Name":
                yield from _mapping(lines, columns, text.endswith("\n"))


def dcu(text: str) -> Iterable[Device]:
    """Hygon's `rocm-smi` and `hy-smi`: a line per device, which names no model."""
    lines = _lines(text)
    for titles in lines:
        if titles.split()[:1] in (["DCU"], ["HCU"]) and "VRAM%" in titles:
            yield from _percents(lines, titles.split())


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) <= LINE_MAX]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _piped(lines: list[str], titles: list[str]) -> Iterable[Device]:
    for line in lines:
        cells = _cells(line)
        if len(cells) != len(titles) or not line.rstrip().endswith("|"):
            continue
        row = dict(zip(titles, cells, strict=True))
        size = USED_OF_TOTAL.search(row.get("Memory", ""))
        if row["DevID"].isdigit() and BUS.fullmatch(row["PCI Addr"]):
            yield Device(
                int(row["DevID"]), row.get("Model", ""), row["PCI Addr"], int(size[2]) * 2**20 if size else 0
            )


def _mapping(lines: list[str], titles: list[str], ended: bool) -> Iterable[Device]:
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    names = [row[-1] for row in rows[: None if ended else -1]]
    for row in rows:
        if len(row) != len(titles) or not row[0].isdigit() or row[-1] not in names:
            continue
        cells = dict(zip(titles, row, strict=True))
        number = cells.get("Chip Logic ID", cells.get("Chip Phy-ID", cells["NPU ID"]))
        if (
            number.isdigit()
            and re.fullmatch(r"[A-Za-z][\w .-]*", cells["Chip Name"], re.A)
            and cells["Chip Name"].lower() != "mcu"
        ):
            yield Device(int(number), cells["Chip Name"], card=int(cells["NPU ID"]))


def _percents(lines: list[str], titles: list[str]) -> Iterable[Device]:
    if "VRAM%" not in titles:
        return  # a word of titles that were run together
    at = titles.index("VRAM%")
    for line in lines:
        row = line.split()
        if (
            len(row) == len(titles)
            and row[0].isdigit()
            and re.fullmatch(r"\d+%", row[at])
            and re.search(r"\d[.,]\d[cC]$", row[1])
        ):
            yield Device(int(row[0]), "")


def matrix(text: str) -> Iterable[Device]:
    """`topo -m`: who is linked to whom; a whole row names a device, but no model."""
    lines = [line.split() for line in text.splitlines() if len(line) <= LINE_MAX]
    for titles in lines:
        count = sum(re.fullmatch(r"GPU\d+", title) is not None for title in titles)
        if count and [f"GPU{i}" for i in range(count)] == titles[:count]:
            rows = {row[0]: row for row in lines if len(row) > count and row[0] in titles[:count]}
            for i in range(count):
                row = rows.get(f"GPU{i}", [])
                if row and row[1 + i] == "X" and row[1 : 1 + count].count("X") == 1:
                    yield Device(i, "")
            return


def listing(text: str) -> Iterable[Device]:
    """`-L`: a line per device with its whole UUID (the closing bracket may be lost)."""
    for line in text.splitlines()[:4096]:
        found = re.match(
            r"GPU (\d{1,4}): ([A-Za-z][\w .+()/\[\]-]*?) \(UUID: (GPU-[0-9a-f-]{36})\)?\s*$", line[:LINE_MAX]
        )
        if found:
            yield Device(int(found[1]), found[2], uuid=found[3])


def tpu(text: str) -> Iterable[Device]:
    """`tpu-info`: /dev/accel0 or /dev/vfio/0, the chip's type, its cores."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃|]", line[:LINE_MAX])]
        node = re.fullmatch(r"/dev/(?:accel|vfio/)(\d+)", cells[1]) if len(cells) > 4 else None
        if node and cells[2].startswith("TPU") and cells[3].isdigit():
            yield Device(int(node[1]), cells[2].removesuffix(" chip"), cores=int(cells[3]))


def xilinx(text: str) -> Iterable[Device]:
    """`xbutil examine`: a line per card, its bus address in square brackets, then its shell."""
    cards: list[tuple[str, str]] = []
    for line in text.splitlines():
        found = re.match(r"^\s*\|?\s*\[([0-9a-fA-F:.]+)\]\s*[|:]\s*(xilinx_\w+)\s+\S", line[:LINE_MAX])
        if found and BUS.fullmatch(found[1]) and (found[1], found[2]) not in cards:
            cards.append((found[1], found[2]))
    for index, (bus, shell) in enumerate(cards):
        yield Device(index, shell, bus)

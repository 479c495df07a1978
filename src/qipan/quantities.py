"""Quantities as people write them: `8M CNY`, `2T`, `30d`, `1h30m`, `80GiB`, `500ms`, `200Mbit/s`.

Text becomes a number in base units here, and nowhere else.  Money is an integer of 1e-6 CNY.
"""

import math
import re

from qipan.errors import InvalidInput

COUNT = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15,
         "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}  # fmt: skip
BITS = {"bit": 1, "kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9, "Tbit": 10**12}
SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
MONEY_MICRO_MAX = 2**62
WHOLE_MAX = 2**63 - 1  # what the store and the wire hold
DURATION_S_MAX = 100 * 365.25 * 86400.0
RATE_BYTES_PER_S_MAX = 1e18
NUMBER = r"([0-9]{1,18}(?:\.[0-9]{1,9})?)"


def parse_count(text: str | int) -> int:
    """`2T`, `4M`, `30`; whole and positive."""
    match = re.fullmatch(rf"{NUMBER}\s*([kKMBGT]?)", str(text).strip())
    if match is None:
        raise InvalidInput(f"{text!r} is not a count; write 4096, 4M or 2T")
    value = _exact(match[1], COUNT[match[2]])
    if value is None or value > WHOLE_MAX:
        raise InvalidInput(f"{text!r} is not a whole number, or too large; write 4096, 4M or 2T")
    return value


def parse_money_micro_cny(text: str) -> int:
    """`8000 CNY`, `8M CNY`, `0.35 CNY`; at most six decimals."""
    match = re.fullmatch(rf"{NUMBER}\s*([kKMB]?)\s*(CNY|RMB|元|¥)", str(text).strip())
    if match is None:
        raise InvalidInput(f"{text!r} is not an amount of money; write 8000 CNY, 8M CNY or 0.35 CNY")
    value = _exact(match[1], COUNT[match[2]] * 10**6)
    if value is None or value > MONEY_MICRO_MAX:
        raise InvalidInput(
            f"{text!r} is finer than 0.000001 CNY or too large; write an amount such as 0.35 CNY"
        )
    return value


def parse_duration_s(text: str | float) -> float:
    """`30d`, `1h30m`, `500ms`, or plain seconds."""
    plain = str(text).strip()
    parts = re.findall(rf"{NUMBER}\s*(ms|min|[smhdw])", plain)
    rest = re.sub(rf"{NUMBER}\s*(ms|min|[smhdw])\s*", "", plain)
    if re.fullmatch(NUMBER, plain):
        seconds = float(plain)
    elif parts and not rest:
        seconds = math.fsum(float(number) * SECONDS[unit] for number, unit in parts)
    else:
        raise InvalidInput(f"{text!r} is not a duration; write 30d, 1h30m, 45s or 500ms")
    if seconds > DURATION_S_MAX:
        raise InvalidInput(f"{text!r} is longer than 100 years; write 30d, 1h30m, 45s or 500ms")
    return seconds


def parse_utc_offset_s(text: str) -> float:
    """`+08:00`."""
    found = re.fullmatch(r"([+-])(\d{1,2}):([0-5]\d)", text)
    if found is None or int(found[2]) > 14:
        raise InvalidInput(f"{text[:40]!r} is no offset; write +08:00")
    return (1 if found[1] == "+" else -1) * (int(found[2]) * 3600.0 + int(found[3]) * 60)


def parse_bytes(text: str | int) -> int:
    """`80GiB`, `1.5TB`, or plain bytes."""
    match = re.fullmatch(rf"{NUMBER}\s*([KMGTP]iB|[kKMGTP]?B)?", str(text).strip())
    if match is None:
        raise InvalidInput(f"{text!r} is not a size; write 80GiB, 1.5TB or a number of bytes")
    value = _exact(match[1], BYTES[match[2] or "B"])
    if value is None or value > WHOLE_MAX:
        raise InvalidInput(
            f"{text!r} is not a whole number of bytes, or too large; write 80GiB, 1.5TB or a number of bytes"
        )
    return value


def parse_bytes_per_s(text: str | float) -> float:
    """`200Mbit/s`, `12 GB/s`, or plain bytes per second."""
    match = re.fullmatch(rf"{NUMBER}\s*(?:([kMGT]?bit|[KMGTP]iB|[kKMGTP]?B)(?:/s|ps))?", str(text).strip())
    if match is None:
        raise InvalidInput(f"{text!r} is not a rate; write 200Mbit/s or 12GB/s")
    unit = match[2] or "B"
    rate = float(match[1]) * (BITS[unit] / 8 if unit in BITS else BYTES[unit])
    if rate > RATE_BYTES_PER_S_MAX:
        raise InvalidInput(f"{text!r} is faster than any link; write 200Mbit/s or 12GB/s")
    return rate


def format_money(micro_cny: int) -> str:
    """Exact: two decimals, more only where they are needed."""
    sign, whole = ("-" if micro_cny < 0 else ""), abs(micro_cny)
    decimals = f"{whole % 10**6:06d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole // 10**6:,}.{decimals} CNY"


def format_devices(count: int) -> str:
    return f"{count} device" if count == 1 else f"{count} devices"


def format_duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "never"
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 100:
        return f"{seconds:.0f}s"
    if seconds < 5400:
        return f"{seconds / 60:.1f}m"
    return f"{seconds / 3600:.1f}h" if seconds < 172800 else f"{seconds / 86400:.1f}d"


def format_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            return f"{size:.0f}{unit}" if unit == "B" else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}PiB"


def _exact(number: str, factor: int) -> int | None:
    """number x factor when that is whole."""
    whole, _, decimals = number.partition(".")
    scale = 10 ** len(decimals)
    value, rest = divmod(int(whole + decimals) * factor, scale)
    return value if rest == 0 else None

"""A statement of accounts: a tenant's, a provider's or a region's postings in a period, as a table, CSV, JSON or PDF.

A CSV cell that a spreadsheet would take for a formula is quoted; a PDF needs a font with Chinese characters for Chinese names, and
says so when there is none."""

import csv
import io
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from qipan.errors import InvalidInput, QipanError

COLUMNS = ("time", "account", "key", "about", "amount", "balance", "currency")
#: where distributions keep fonts with Chinese characters: file, number in a collection
FONTS = (
    ("/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc", 2),
    ("/usr/share/fonts/google-noto-cjk/NotoSansCJK-Regular.ttc", 2),
    ("/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc", 2),
    ("/usr/share/fonts/truetype/wqy/wqy-microhei.ttc", 0),
    ("/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc", 0),
    ("/System/Library/Fonts/PingFang.ttc", 0),
)
PDF_LINES_MAX = 20_000


@dataclass(frozen=True, slots=True)
class Line:
    """One entry; `balance_micro` is of all the statement's accounts after it."""

    at_s: float
    account: str
    key: str
    about: str
    amount_micro: int
    balance_micro: int


@dataclass(frozen=True, slots=True)
class Statement:
    """`name`: an account such as `tenant/poets`, or `region/NAME` for all providers there."""

    name: str
    currency: str
    from_s: float
    until_s: float
    opening_micro: int
    closing_micro: int
    lines: tuple[Line, ...]


#: now_s, account, key, cause, amount
Posting = tuple[float, str, str, str, int]


def make_statement(
    name: str, currency: str, opening_micro: int, postings: Sequence[Posting], from_s: float, until_s: float
) -> Statement:
    """`postings`: of the period, in order."""
    balance, lines = opening_micro, []
    for at_s, account, key, cause, amount in postings:
        balance += amount
        lines.append(Line(at_s, account, key, cause, amount, balance))
    return Statement(name, currency, from_s, until_s, opening_micro, balance, tuple(lines))


def decimal(micro: int) -> str:
    """Exact, without separators: `-12.5`, `0.000001`."""
    sign, whole = ("-" if micro < 0 else ""), abs(micro)
    text = f"{sign}{whole // 10**6}.{whole % 10**6:06d}".rstrip("0")
    return text + "00" if text.endswith(".") else text


def stamp(at_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s))


def safe(cell: str) -> str:
    """A cell that begins like a formula (=, +, -, @, tab, return, and their wide forms) is shown as text; a plain number stays one."""
    if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", cell):
        return cell
    return "'" + cell if cell.lstrip()[:1] in tuple("=+-@\t\r＝＋－＠|%") else cell


def to_csv(statement: Statement) -> str:
    """RFC 4180.  The first row after the columns is the opening balance, the last the closing one."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    writer.writerow([stamp(statement.from_s), safe(statement.name), "opening", "", "", decimal(statement.opening_micro), statement.currency])  # fmt: skip
    for line in statement.lines:
        cells = [stamp(line.at_s), line.account, line.key, line.about, decimal(line.amount_micro), decimal(line.balance_micro), statement.currency]  # fmt: skip
        writer.writerow([safe(cell) for cell in cells])
    writer.writerow([stamp(statement.until_s), safe(statement.name), "closing", "", "", decimal(statement.closing_micro), statement.currency])  # fmt: skip
    return out.getvalue()


def to_json(statement: Statement) -> str:
    return msgspec.json.encode(statement).decode()


def find_font() -> tuple[str, int] | None:
    """QIPAN_FONT (a file, or FILE:NUMBER in a collection), else a known place."""
    named = os.environ.get("QIPAN_FONT")
    if named:
        file, _, number = named.rpartition(":") if re.search(r":\d+$", named) else (named, "", "0")
        if not Path(file).is_file():
            raise InvalidInput(f"QIPAN_FONT names {file}, which is no file; name a .ttf, .otf or .ttc")
        return file, int(number)
    return next(((file, number) for file, number in FONTS if Path(file).is_file()), None)


def to_pdf(statement: Statement, font: tuple[str, int] | None) -> bytes:
    """Raises QipanError when fpdf2 is not installed, InvalidInput for a statement too long to print."""
    try:
        from fpdf import FPDF
        from fpdf.enums import XPos, YPos
        from fpdf.fonts import FontFace
    except ImportError:
        raise QipanError("a PDF needs fpdf2; install the extra: pip install 'qipan[server]'") from None
    if len(statement.lines) > PDF_LINES_MAX:
        raise InvalidInput(f"{len(statement.lines)} lines are too many for a PDF ({PDF_LINES_MAX}); take CSV, or a shorter period")  # fmt: skip
    pdf = FPDF(orientation="landscape", format="A4")
    pdf.set_creator("Qipan")
    pdf.set_title(f"Statement of {statement.name}")
    if font is not None:
        try:
            pdf.add_font("cjk", fname=font[0], collection_font_number=font[1])
        except Exception as error:  # whatever its reader says of a file that is no font
            raise InvalidInput(
                f"{font[0]} (number {font[1]}) is no font that can be used: {error!r:.120}; name a .ttf, .otf or .ttc in QIPAN_FONT"
            ) from None
    family = "cjk" if font is not None else "helvetica"

    def shown(text: str, most: int) -> str:
        text = text if len(text) <= most else text[: most - 3] + "..."
        return text if font is not None else text.encode("latin-1", "backslashreplace").decode("latin-1")

    pdf.add_page()
    pdf.set_font(family, size=14)
    title = f"对账单 Statement of {statement.name}" if font is not None else f"Statement of {statement.name}"
    pdf.cell(text=shown(title, 100), new_x=XPos.LMARGIN, new_y=YPos.NEXT)
    pdf.set_font(family, size=9)
    pdf.cell(
        text=f"{stamp(statement.from_s)} - {stamp(statement.until_s)}", new_x=XPos.LMARGIN, new_y=YPos.NEXT
    )
    pdf.cell(
        text=f"opening {decimal(statement.opening_micro)} {statement.currency}, closing {decimal(statement.closing_micro)} {statement.currency}",
        new_x=XPos.LMARGIN, new_y=YPos.NEXT,
    )  # fmt: skip
    if font is None and not statement.name.isascii():
        pdf.cell(text="no font with Chinese characters was found: name one in QIPAN_FONT", new_x=XPos.LMARGIN, new_y=YPos.NEXT)  # fmt: skip
    pdf.ln(3)
    pdf.set_font(family, size=7)
    with pdf.table(col_widths=(34, 48, 70, 50, 34, 38), text_align=("LEFT", "LEFT", "LEFT", "LEFT", "RIGHT", "RIGHT"), headings_style=FontFace(emphasis=None)) as table:  # fmt: skip
        table.row([*COLUMNS[:4], *(f"{name} ({statement.currency})" for name in COLUMNS[4:6])])
        for line in statement.lines:
            table.row(
                [stamp(line.at_s), shown(line.account, 40), shown(line.key, 60), shown(line.about, 44), decimal(line.amount_micro), decimal(line.balance_micro)]
            )  # fmt: skip
    return bytes(pdf.output())


def rows(statement: Statement) -> list[list[str]]:
    """For a table on a terminal."""
    return [
        [stamp(line.at_s), line.account, line.key, line.about, decimal(line.amount_micro), decimal(line.balance_micro)]
        for line in statement.lines
    ]  # fmt: skip


def read_statement(value: Any) -> Statement:
    return msgspec.convert(value, type=Statement)

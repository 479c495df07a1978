"""A vendor tool's output as a sample for a bug report, without what names a person, a machine, a card or a program.  Layout and
widths stay, so that a parser can be mended with it."""

import re
from collections.abc import Iterable

from qipan.probe.tables import BUS

#: what is masked, letter by letter: identifiers, addresses, paths; then long words of letters and digits, which serial numbers are
SECRETS = re.compile(
    r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
    r"|(?<=GPU-)[0-9a-fA-F]{8,}"
    r"|(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}"
    r"|\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b"
    r"|(?<![\w/])/(?:home|root|Users|data|mnt|opt|usr|workspace|tmp)/[^\s\"'|,]*"
    r"|\b0x[0-9a-fA-F]{12,}\b|\b[0-9a-fA-F]{16,}\b"
    r"|\b(?=[\w-]*\d)(?=[\w-]*[A-Za-z])[A-Z0-9][A-Z0-9-]{9,}\b"
)
SECRET_KEYS = re.compile(
    r"(\"?(?:serial|unique id|uuid|guid|sn|host ?name|asset)[\w ]*\"?\s*[:=]\s*\"?)([^\",|\n]+)", re.I
)
PROCESS_TITLES = re.compile(r"process|\bpid\b", re.I)


def redacted(text: str, private: Iterable[str] = (), names: Iterable[str] = ()) -> str:
    """`private`: words of this machine (host name, user); `names`: device names, which stay."""
    kept = {name for name in names if name}
    for word in sorted(filter(None, private), key=len, reverse=True):
        text = re.sub(rf"\b{re.escape(word)}\b", lambda found: masked(found[0]), text, flags=re.I)
    lines, in_processes = [], False
    for line in text.splitlines(keepends=True):
        if in_processes and not line.strip():
            in_processes = False
        in_processes |= (
            PROCESS_TITLES.search(line) is not None
            and re.search(r"\bname\b|processes|command", line, re.I) is not None
        )
        if in_processes and re.match(r"^\|?\s*\d+\s", line) and not BUS.search(line):
            line = re.sub(r"[A-Za-z_./:-]{2,}|\b\d{3,}\b", lambda found: masked(found[0]), line)
        line = SECRET_KEYS.sub(lambda found: found[1] + masked(found[2]), line)
        lines.append(SECRETS.sub(lambda found: found[0] if found[0] in kept else masked(found[0]), line))
    return "".join(lines)


def masked(word: str) -> str:
    return re.sub(r"\d", "0", re.sub(r"[A-Za-z]", "x", word))

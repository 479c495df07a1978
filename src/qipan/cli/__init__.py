"""The command line.  Commands are light at import: what they need comes in when they run."""

import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from qipan.errors import QipanError


def main() -> None:
    from qipan.cli.app import app
    from qipan.errors import InvalidInput, QipanError

    if "--json" in sys.argv:
        _only_our_words_on_stdout()
    try:
        _only_text([*sys.argv, *(value for name, value in os.environ.items() if name.startswith("QIPAN_"))])
        app(standalone_mode=True)
    except QipanError as error:
        _refuse(error)
    except OSError as error:
        if error.filename is None:
            raise
        _refuse(InvalidInput(f"{error.filename}: {error.strerror}; name a file or folder that can be used"))


def _refuse(error: "QipanError") -> NoReturn:
    print(f"qipan: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _only_text(words: list[str]) -> None:
    """Raises InvalidInput for bytes that are no text here: they can be neither sent, kept nor printed."""
    from qipan.errors import InvalidInput

    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise InvalidInput(f"{word[:60]!r} is not UTF-8 text; write it in UTF-8, or rename the file")


def _only_our_words_on_stdout() -> None:
    """Native libraries that write to file descriptor 1 (solvers do) must not break the JSON: theirs goes to stderr."""
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", encoding="utf-8", buffering=1)

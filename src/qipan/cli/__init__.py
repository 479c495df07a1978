"""The command line.  Commands are light at import: what they need comes in when they run."""

import os
import sys


def main() -> None:
    from qipan.cli.app import app
    from qipan.errors import QipanError

    if "--json" in sys.argv:
        _only_our_words_on_stdout()
    try:
        app(standalone_mode=True)
    except QipanError as error:
        print(f"qipan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _only_our_words_on_stdout() -> None:
    """Native libraries that write to file descriptor 1 (solvers do) must not break the JSON: theirs goes to stderr."""
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", encoding="utf-8", buffering=1)

"""The command line.  Commands are light at import: what they need comes in when they run."""

import sys


def main() -> None:
    from qipan.cli.app import app
    from qipan.errors import QipanError

    try:
        app(standalone_mode=True)
    except QipanError as error:
        print(f"qipan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

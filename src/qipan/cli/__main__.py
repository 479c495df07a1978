"""`python -m qipan.cli` is `qipan`."""

from qipan.cli import main

main()

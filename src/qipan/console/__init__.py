"""The console: pages for a browser, rendered here, live by server-sent events.  A client of the public API and
nothing else; a process of its own."""

from qipan.console.app import make_console
from qipan.console.serve import run_console

__all__ = ["make_console", "run_console"]

"""HiGHS as SciPy brings it (Huangfu and Hall 2018), silent: it prints lines of its own on standard output at times, past Python and whatever
its options say, which would break the one JSON value of `--json`.  Both raise ImportError where SciPy is not installed."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from typing import Any

_ONE_AT_A_TIME = threading.Lock()


def milp(*given: Any, **more: Any) -> Any:
    """`scipy.optimize.milp`."""
    from scipy import optimize

    with standard_output_kept_clean():
        return optimize.milp(*given, **more)


def linprog(*given: Any, **more: Any) -> Any:
    """`scipy.optimize.linprog`."""
    from scipy import optimize

    with standard_output_kept_clean():
        return optimize.linprog(*given, **more)


@contextlib.contextmanager
def standard_output_kept_clean() -> Iterator[None]:
    """What libraries write to descriptor 1 meanwhile goes to standard error; so does what other threads write, and nothing is lost."""
    with _ONE_AT_A_TIME:
        try:
            kept = os.dup(1)
        except OSError:
            kept = -1  # a process without standard output
        if kept < 0:
            yield
            return
        libc = ctypes.CDLL(None)
        try:
            libc.fflush(None)
            os.dup2(2, 1)
            yield
        finally:
            libc.fflush(None)  # what it printed may stand in a buffer still
            os.dup2(kept, 1)
            os.close(kept)


__all__ = ["linprog", "milp"]

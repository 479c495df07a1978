"""The exception tree, split by what the caller can do.

    QipanError              exit 100  something failed while running
    ├── InvalidInput        exit 2    fix the input (file, flag, quantity)
    ├── NotFound            exit 102  name something that exists
    ├── Infeasible          exit 104  no place can run it as asked: relax a limit
    ├── OverLimit           exit 105  over budget or quota: raise it, or wait
    ├── Unreachable         exit 106  a server or link did not answer: start it, or wait
    │   └── DiskFull                  it cannot store anything now: make room, it goes on by itself
    └── NotAllowed          exit 107  ask an administrator

A message says what happened, the values, and what to do next.
"""


class QipanError(Exception):
    exit_code = 100


class InvalidInput(QipanError):
    """`where` is a position in the input such as `task.yaml:3:7`, or empty."""

    exit_code = 2

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.where = where


class NotFound(QipanError):
    exit_code = 102


class Infeasible(QipanError):
    exit_code = 104


class OverLimit(QipanError):
    exit_code = 105


class Unreachable(QipanError):
    exit_code = 106


class DiskFull(Unreachable):
    pass


class NotAllowed(QipanError):
    exit_code = 107

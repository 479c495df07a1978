"""Bubblewrap around a task on this machine: it reaches what is its own, and nothing of the board's."""

import os
import shutil
import sys
from pathlib import Path

from qipan.engines.launcher import Folders
from qipan.engines.processes import SANDBOX
from qipan.engines.shim import EXITED, Spec
from qipan.errors import InvalidInput
from qipan.hardware import BoardSpec

#: what makes a program run another's code: the loader's part of glibc's sysdeps/generic/unsecvars.h
LOADER = ("LD_", "GLIBC_", "GCONV_PATH", "LOCPATH", "MALLOC_", "NLSPATH")
#: how many values bubblewrap's options have, of those used here
VALUES = {
    "--ro-bind": 2,
    "--dev-bind": 2,
    "--bind": 2,
    "--setenv": 2,
    "--tmpfs": 1,
    "--proc": 1,
    "--cap-drop": 1,
}


#: between bubblewrap, whose 128 + N may be signal N or the program's own code, and the program: a file tells that it was the latter.
#: The program has a session of its own, so that what it tells its process group does not end this one.
INSIDE = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
pid = os.fork()
signal.signal(signal.SIGTERM, signal.SIG_IGN if pid else signal.SIG_DFL)
if not pid:
    os.setsid()
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT): signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
if not pid:
    try: os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error: sys.stderr.write(f"{sys.argv[2]} cannot be started: {error}\\n")
    os._exit(127)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
if code > 128:
    try: open(sys.argv[1], "w").close()
    except OSError: pass
os._exit(code if code >= 0 else 128 - code)
"""


def wanted(board: BoardSpec) -> bool:
    """`engine_options: {sandbox: bubblewrap}`.  Raises InvalidInput."""
    kind = board.engine_options.get("sandbox", "none")
    if kind not in ("none", "bubblewrap"):
        raise InvalidInput(f"board {board.board}: no sandbox {kind[:40]!r}; there are bubblewrap and none")
    if kind == "bubblewrap" and shutil.which(SANDBOX) is None:
        raise InvalidInput(
            f"board {board.board}: sandbox bubblewrap needs the program bwrap (package bubblewrap); install it, or say none"
        )
    return kind == "bubblewrap"


def enclose(attempt: Folders) -> None:
    """The attempt's command runs in bubblewrap: the machine is read-only but for the task's folder, its checkpoints, its
    working folder, `folders` and a /tmp of its own; what else the board keeps (keys, other tasks, what its supervisor writes) is not there; no rights, no
    way to signal or see processes outside.  What is bound is the engine's word: the environment may be the task's.  Raises
    InvalidInput where the working folder reaches into the board's."""
    spec = Spec.read(str(attempt.control / "spec"))
    if spec.enclosed:
        return
    engine = attempt.control.parent.parent
    store = next((above for above in (engine, *engine.parents) if any((above / name).exists() for name in ("identity", "token"))), engine)  # fmt: skip
    own = [str(attempt.task), *spec.folders]
    if spec.cwd and spec.cwd not in own:
        _check_apart(Path(spec.cwd), store)
    kept = [*own, spec.cwd, spec.group]
    command = [
        SANDBOX,
        "--ro-bind",
        "/",
        "/",
        "--dev-bind",
        "/dev",
        "/dev",
        "--tmpfs",
        "/tmp",
        "--tmpfs",
        str(store),
    ]
    for path in [path for path in kept if path and path != "/"]:
        command += ["--bind", path, path]
    command += [
        "--unshare-user",
        "--unshare-ipc",
        "--unshare-uts",
        "--cap-drop",
        "ALL",
        "--new-session",
        "--die-with-parent",
        "--unshare-pid",
        "--proc",
        "/proc",
    ]
    for name in [name for name in spec.env if name == "PATH" or name.startswith(LOADER)]:
        command += ["--setenv", name, spec.env.pop(name)]  # else the task says what runs as bwrap, outside
    spec.env["PATH"] = os.environ.get("PATH", os.defpath)
    python = Path(sys.executable).resolve()
    hidden = any(
        python.is_relative_to(place) for place in ("/tmp", store.resolve())
    )  # then 128 + N is read as a signal
    inside = [] if hidden else [str(python), "-I", "-S", "-c", INSIDE, str(attempt.task / EXITED)]
    spec.command = [*command, "--", *inside, *spec.command]
    spec.write(str(attempt.control / "spec"))


def opening(command: list[str]) -> list[str]:
    """The words of an attempt's command that put what follows them into its sandbox; none where it has none."""
    if command[0] != SANDBOX:
        return []
    at = 1
    while command[at] != "--":  # as an option: a value may be the task's
        at += 1 + VALUES.get(command[at], 0)
    return command[: at + 1]


def _check_apart(cwd: Path, store: Path) -> None:
    """Raises InvalidInput where a task that may write in `cwd` could reach what the board keeps; `/` stays read-only."""
    cwd, store = cwd.resolve(), store.resolve()
    if cwd != Path("/") and (cwd.is_relative_to(store) or store.is_relative_to(cwd)):
        raise InvalidInput(
            f"the working folder {cwd} holds, or lies in, the board's own folder {store}; submit the task from another folder"
        )

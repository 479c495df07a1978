"""What both ends of a stream have from the attempt that they are part of, and tell it."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qipan.disk import is_full
from qipan.disk import told as words
from qipan.errors import InvalidInput

POLL_S = 0.005
TELL_S = 1.0  # between two lines on a stream
ROOM_S = 0.5  # between two tries on a full disk


def output_of(number: int = 0) -> Path:
    """The folder with what the stage that this one comes after left in its QIPAN_CHECKPOINT_DIR; of several, by their number in `after`."""
    folders = [one for one in os.environ.get("QIPAN_AFTER", "").split(":") if one]
    if number >= len(folders):
        raise InvalidInput(f"this stage comes after {len(folders)} others; there is no output {number}")
    return Path(folders[number])


def say(event: str, **values: object) -> None:
    line = json.dumps({"event": event, "at_s": round(time.time(), 3), **values})
    events = os.environ.get("QIPAN_EVENTS")
    try:
        if events:
            with open(events, "a") as file:
                file.write(line + "\n")
            return
    except OSError as error:
        if not is_full(error):
            raise
    print(line, flush=True)


def told_to_stop() -> bool:
    control = os.environ.get("QIPAN_CONTROL")
    return control is not None and Path(control).exists()


class StoppedWaiting(SystemExit):
    """The stage was told to stop while it waited for a sample; its newest checkpoint is what it goes on from."""

    def __init__(self) -> None:
        super().__init__(0)


def with_room(folder: Path, act: Callable[[], Any]) -> Any:
    """What `act` gives, once the disk has room for it.  Raises StoppedWaiting."""
    said = False
    while True:
        try:
            return act()
        except OSError as error:
            if not is_full(error):
                raise
            if told_to_stop():
                raise StoppedWaiting from error
            if not said:
                say("unsaved", why=words(folder))
            said = True
            time.sleep(ROOM_S)

"""Looks at this machine's devices again and again, so that one that fails is drained before it fails a gang."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from qipan.hardware import ChipClassId
from qipan.probe import Answer, probe

EVERY_S = 30.0
#: a vendor whose tool did not answer is looked at again before its devices are drained: a busy machine is not a sick one
SILENT_TIMES = 3


class Watch:
    """`sick` answers at once with what the last look found, and has the next look made in the background when it is due.  Only
    chip classes of the catalogue that the probe ever saw here are watched: no tool, no opinion."""

    def __init__(
        self,
        chips: Sequence[ChipClassId],
        look: Callable[[], Sequence[Answer]] | None = None,
        every_s: float = EVERY_S,
    ) -> None:
        self._chips = frozenset(chips)
        self._look = look or _look
        self._every_s = every_s
        self._due_s = 0.0
        self._thread: threading.Thread | None = None
        self._found: dict[ChipClassId, dict[int, str]] = {}
        self._seen: dict[
            str, dict[int, ChipClassId]
        ] = {}  # vendor -> device -> its class, as it was once seen
        self._silent: dict[str, int] = {}

    def sick(self) -> Mapping[ChipClassId, Mapping[int, str]]:
        now_s = time.monotonic()
        if now_s >= self._due_s and (self._thread is None or not self._thread.is_alive()):
            self._due_s = now_s + self._every_s
            self._thread = threading.Thread(target=self.take, name="qipan-watch", daemon=True)
            self._thread.start()
        return self._found

    def take(self) -> None:
        """One look."""
        found: dict[ChipClassId, dict[int, str]] = {}
        for answer in self._look():
            here = {
                device.index: ChipClassId(device.chip_class)
                for device in answer.devices
                if device.chip_class in self._chips
            }
            known = {**self._seen.get(answer.vendor, {}), **here}
            self._seen[answer.vendor] = known
            silent = self._silent.get(answer.vendor, 0) + 1 if known and not answer.devices else 0
            self._silent[answer.vendor] = silent
            for device in answer.devices:
                if device.index in here and not device.healthy:
                    found.setdefault(here[device.index], {})[device.index] = ", ".join(device.complaints)
            for index, chip in known.items():
                if silent >= SILENT_TIMES:
                    found.setdefault(chip, {})[index] = answer.reason or "it is no longer there"
                elif answer.devices and index not in here:
                    found.setdefault(chip, {})[index] = "the tool does not show it any more"
        self._found = found


def _look() -> Sequence[Answer]:
    from qipan.catalogue import site_catalogue

    catalogue = site_catalogue()
    return probe(names=catalogue, more=catalogue.detect)

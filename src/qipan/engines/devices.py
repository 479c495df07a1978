"""A local chip is a fixed share of a core: a cgroup with a CPU quota where one can be made, else a duty cycle kept
by the shim."""

import os
from pathlib import Path

from qipan.engines.processes import descendants, stat_of

ROOT = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 20_000  # short, so that ranks that wait for each other are held back together


def quotas_available() -> bool:
    """Whether this process may make cgroups with a CPU quota (v1; v2 where the cpu controller is delegated)."""
    return os.access(ROOT, os.W_OK) and (ROOT / "cpu.cfs_quota_us").exists()


def make_group(name: str, shares: tuple[float, ...]) -> tuple[str, list[str]]:
    """A group that may use the sum of the shares, and in it one per device.  Returns their paths."""
    whole = ROOT / name
    _limit(whole, sum(shares))
    devices = []
    for i, share in enumerate(shares):
        device = whole / f"device-{i}"
        _limit(device, share)
        devices.append(str(device))
    return str(whole), devices


def remove_group(path: str) -> bool:
    """Remove an empty group and its devices'.  False when a process is still in it: try again later."""
    whole = Path(path)
    if not whole.exists():
        return True
    try:
        for device in whole.glob("device-*"):
            device.rmdir()
        whole.rmdir()
    except OSError:
        return False  # its last process is on the way out
    return True


def groups(prefix: str) -> list[str]:
    """Groups whose names begin so, left by an earlier run or still in use."""
    return sorted(str(path) for path in ROOT.glob(f"{prefix}*")) if ROOT.exists() else []


def cpu_s_below(root: int) -> float:
    """Processor seconds of all processes below `root`, of those they reaped too."""
    ticks = 0
    for pid in descendants(root):
        try:
            ticks += sum(map(int, stat_of(pid)[11:15]))
        except OSError:
            continue  # it ended while we looked
    return ticks / os.sysconf("SC_CLK_TCK")


def _limit(group: Path, share: float) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
    (group / "cpu.cfs_quota_us").write_text(str(max(1000, round(share * PERIOD_US))))

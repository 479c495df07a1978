"""Qipan (棋盘): many data centres full of unlike AI chips, as one supply."""

from typing import TYPE_CHECKING, Any

from qipan.release import RELEASE as __version__

if TYPE_CHECKING:
    from qipan.client import AsyncClient, Client, Job, Task

__all__ = ["AsyncClient", "Client", "Job", "Task", "__version__"]


def __getattr__(name: str) -> Any:
    """The client comes in when it is named: `import qipan` stays light."""
    if name in ("AsyncClient", "Client", "Job", "Task"):
        import qipan.client

        return getattr(qipan.client, name)
    raise AttributeError(f"module 'qipan' has no attribute {name!r}")

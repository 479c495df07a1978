"""`qipan mcp`: the boards as tools of the Model Context Protocol, for assistants.  A client of the public API.

Reading is always there.  Writing (`--write`) is off by default, and every writing tool is a dry run unless it is told
`dry_run: false`; then it says what it did."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qipan.client import Client, Task
from qipan.errors import QipanError

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

INSTRUCTIONS = """Qipan (棋盘) runs tasks on scattered AI chips as one supply. Money is in micro-CNY (1e-6 CNY), times in seconds.
Plan before you submit: `plan` says options, cost, finish and what limits, and starts nothing. `why` explains every decision."""
LOG_CHARACTERS_MAX = 20_000


def make_server(client: Client, *, write: bool) -> "MCPServer":
    """Raises QipanError when the extra is not installed."""
    try:
        from mcp.server.mcpserver import MCPServer
        from mcp.server.mcpserver.exceptions import ToolError
        from mcp.types import ToolAnnotations
    except ImportError:
        raise QipanError("`qipan mcp` needs the extra: pip install 'qipan[mcp]'") from None
    server = MCPServer("qipan", instructions=INSTRUCTIONS, log_level="WARNING")

    def told(ask: Callable[[], Any]) -> Any:
        """An error of ours as the tool's error: what happened, the values, the next step."""
        try:
            return ask()
        except QipanError as error:
            raise ToolError(f"{type(error).__name__} (code {error.exit_code}): {error}") from None

    def reads(tool: Callable[..., Any]) -> None:
        server.tool(annotations=ToolAnnotations(read_only_hint=True, open_world_hint=False))(tool)

    def writes(tool: Callable[..., Any]) -> None:
        hints = ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False)
        server.tool(annotations=hints)(tool)

    def plan(task_yaml: str) -> dict[str, Any]:
        """How a task could run: options with cost and finish, refusals with reasons. Starts nothing."""
        return dict(told(lambda: client.call("POST", "/plan", {"text": task_yaml})))

    def tasks(state: str = "", limit: int = 50) -> dict[str, Any]:
        """Tasks, newest first; `state` such as queued, running, parked, done, failed, cancelled."""
        return dict(told(lambda: client.call("GET", "/tasks", newest_first=True, limit=limit, state=state)))

    def task(task_id: str) -> dict[str, Any]:
        """One task: state, place, devices, progress, what it waits for, and its cost against its plan."""
        view = told(lambda: client.task(task_id))
        return {**view, "cost": told(lambda: client.call("GET", f"/tasks/{task_id}/cost"))}

    def why(task_id: str) -> dict[str, Any]:
        """Every decision about a task with its reason, and each single change that would start a waiting one."""
        return dict(told(lambda: client.call("GET", f"/tasks/{task_id}/why")))

    def logs(task_id: str) -> str:
        """The end of what a task printed."""
        path = f"/tasks/{task_id}/logs"
        end = max(0, told(lambda: client.call("GET", path))["size"] - LOG_CHARACTERS_MAX)
        return str(told(lambda: client.call("GET", path, after=end))["text"])

    def bill(task_id: str) -> dict[str, Any]:
        """The receipt of a task, a line per attempt, and what the ledger took."""
        return dict(told(lambda: client.call("GET", f"/tasks/{task_id}/bill")))

    def boards() -> dict[str, Any]:
        """The tree of boards with pools, free devices, who holds what, tariffs."""
        return dict(told(lambda: client.call("GET", "/boards")))

    def prices() -> dict[str, Any]:
        """Tariffs and ask curves of every board."""
        return dict(told(lambda: client.call("GET", "/prices")))

    def decisions(limit: int = 50) -> dict[str, Any]:
        """What was decided and why, newest first."""
        return dict(told(lambda: client.call("GET", "/decisions", limit=limit)))

    def ledger() -> dict[str, Any]:
        """Accounts; the sum of all is zero."""
        return dict(told(lambda: client.call("GET", "/ledger")))

    def submit(task_yaml: str, key: str, dry_run: bool = True) -> dict[str, Any]:
        """Hand a task to the board. The same `key` submits once. A dry run answers the plan and what would be held."""
        if dry_run:
            made = plan(task_yaml)
            best = next((option for option in made["options"] if option["option_id"] == made["chosen"]), None)
            if made["stages"]:
                best = made["options"]  # one of each stage
            return {"dry_run": True, "would_run": best, "refused": made["refused"]}
        job = told(lambda: client.submit(Task(task_yaml), key))
        return {"dry_run": False, "task_id": job.task_id}

    def cancel(task_id: str, dry_run: bool = True) -> dict[str, Any]:
        """Stop a task for good. A dry run answers what would be stopped."""
        before = task(task_id)
        if not dry_run:
            told(lambda: client.call("POST", f"/tasks/{task_id}/cancel"))
        return {"dry_run": dry_run, "task": before}

    reading: list[Callable[..., Any]] = [
        plan,
        tasks,
        task,
        why,
        logs,
        bill,
        boards,
        prices,
        decisions,
        ledger,
    ]
    writing: list[Callable[..., Any]] = [submit, cancel]
    for tool in reading:
        reads(tool)
    for tool in writing if write else []:
        writes(tool)
    return server


def run_mcp(client: Client, *, write: bool) -> None:
    """On standard input and output, until they close."""
    make_server(client, write=write).run("stdio")

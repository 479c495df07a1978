"""The planner: how a task could run, at what cost, and when it would end; pure."""

from qipan.planner.option import Option, Plan, Refused
from qipan.planner.plan import plan_task, rank

__all__ = ["Option", "Plan", "Refused", "plan_task", "rank"]

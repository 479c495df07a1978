"""What people see: tables on a terminal, plain aligned lines when piped."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qipan.quantities import format_bytes, format_duration, format_money
from qipan.workload.imports import Directive

if TYPE_CHECKING:  # a command that plans nothing starts without the planner
    from qipan.planner import Option, Plan


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        view = Table(title=title, title_justify="left", header_style="bold")
        for column in columns:
            view.add_column(column)
        for row in rows:
            view.add_row(*row)
        Console().print(view)
        return
    print(title)
    widths = [max(_width(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        line = "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
        print("  " + line.rstrip())
    sys.stdout.flush()


def _width(text: str) -> int:
    return sum(2 if ord(character) > 0x2E80 else 1 for character in text)


def print_plan(plan: "Plan") -> None:
    if plan.stages:
        _print_stages(plan)
        return
    _print_options(plan)
    if plan.meetings is not None:
        print(f"  {plan.meetings.text}")


OPTIONS_OF_A_STAGE = 6


def _print_stages(plan: "Plan") -> None:
    rows = []
    for stage, option in zip(plan.stages, plan.options, strict=True):
        told = [f"after {' and '.join(stage.after)}"] if stage.after else []
        told += [f"feeds {stage.feeds}"] if stage.feeds else []
        rows.append(
            [
                stage.stage, ", ".join(told) or "-", option.place, option.chip_class, str(option.devices), option.strategy,
                format_money(option.cost_p50_micro_cny), f"{format_duration(stage.begins_s)}..{format_duration(stage.ends_s)}",
            ]
        )  # fmt: skip
    table(
        f"方案 plan of {plan.task}: stages (from..to p50, from the start of the first)",
        ["stage", "when", "place", "chip", "devices", "runs", "cost p50", "from..to"],
        rows,
    )
    for flow in plan.flows:
        print(f"  {flow.text}")
    for stage in plan.stages:
        near = [option for option in stage.options if option.option_id == stage.chosen]
        near += [option for option in stage.options if option.option_id != stage.chosen]
        shown = replace(plan, task=f"{plan.task}, stage {stage.stage}", options=tuple(near[:OPTIONS_OF_A_STAGE]),
                        refused=(), chosen=stage.chosen, mixed=())  # fmt: skip
        _print_options(shown)
        if len(near) > OPTIONS_OF_A_STAGE:
            print(f"  and {len(near) - OPTIONS_OF_A_STAGE} more; --json has them all")
        if stage.refused:
            print(
                f"  refused: {'; '.join(f'{one.place} {one.chip_class}: {one.why}' for one in stage.refused[:3])}"
            )


def _print_options(plan: "Plan") -> None:
    odds = any(option.deadline_odds is not None for option in plan.options)
    limits = any(option.limit for option in plan.options)
    rows = [
        [
            str(number) if option.point_id else "mixed",
            "*" if option.option_id == plan.chosen else "front" if option.on_front else "",
            option.place,
            option.chip_class,
            str(option.devices),
            option.strategy,
            format_money(option.cost_p50_micro_cny),
            f"{format_duration(option.finish_p10_s)}..{format_duration(option.finish_p50_s)}..{format_duration(option.finish_p90_s)}",
            format_duration(option.restart_s),
            format_bytes(option.data_bytes_to_move),
            *(["-" if option.deadline_odds is None else f"{option.deadline_odds:.0%}"] if odds else []),
            *([option.limit or "-"] if limits else []),
            option.why_not or "chosen",
        ]
        for number, option in enumerate((*plan.options, *plan.mixed), 1)
    ]
    if not rows:
        print(f"方案 plan of {plan.task}: no place can run it")
    else:
        table(
            f"方案 plan of {plan.task} (finish p10..p50..p90 from its start)",
            ["#", "", "place", "chip", "devices", "strategy", "cost p50", "finish", "restart", "data"]
            + ["odds"] * odds
            + ["limited by"] * limits
            + ["why not"],
            rows,
        )
    if plan.refused:
        refused = [[refused.place, refused.chip_class, refused.what, refused.why] for refused in plan.refused]
        table("refused", ["place", "chip", "what", "why"], refused)
    if plan.vocab_assumed:
        print(
            f"  vocabulary from the data: {plan.vocab_assumed}; checkpoint every {format_duration(plan.checkpoint_every_s)}"
        )


BAR = 40


def print_option(option: "Option") -> None:
    """Where each second of a step and each GiB of a device goes, and how sure that is."""
    print(f"{option.option_id}: {option.strategy}, a step {option.step_s:.3f} s, from {option.source}")
    for name, seconds in option.parts_s.items():
        share = seconds / option.step_s
        print(f"  {name:<20} {seconds:9.3f} s {share:6.1%} {'█' * round(share * BAR)}")
    if option.memory_bytes:
        print(
            f"  device memory at the peak: {format_bytes(option.memory_bytes)}, fits with {option.memory_odds:.0%}"
        )
        for name, size in option.memory_parts.items():
            share = size / option.memory_bytes
            print(f"  {name:<20} {format_bytes(round(size)):>11} {share:6.1%} {'█' * round(share * BAR)}")
    if option.limit:
        print(f"  limited by: {option.limit}; useful time {option.useful_share:.1%}")
    if option.evidence:
        print(f"  nearest measured run: {option.evidence}")
    if option.deadline_odds is not None:
        print(f"  odds to end by the deadline: {option.deadline_odds:.0%}")
    finish = (option.finish_p10_s, option.finish_p50_s, option.finish_p90_s)
    print(f"  finish {'..'.join(format_duration(seconds) for seconds in finish)} (p10..p50..p90)")
    print(
        f"  cost {format_money(option.cost_p50_micro_cny)} (p50), {format_money(option.cost_p90_micro_cny)} (p90); of it storage"
        f" {format_money(option.storage_micro_cny)}, moving data {format_money(option.egress_micro_cny)}"
    )
    if option.save_s:
        print(
            f"  a checkpoint stalls it for {format_duration(option.save_s)} every {format_duration(option.checkpoint_every_s)}"
        )


def print_directives(directives: Sequence[Directive]) -> None:
    if directives:
        rows = [
            [row.name, " ".join(row.value.split())[:40], str(row.line), row.fate, row.why]
            for row in directives
        ]
        table("import", ["directive", "value", "line", "fate", "why"], rows)


def print_submitted(answer: dict[str, Any], store: Path | None = None) -> None:
    """`store`: as it was named."""
    for row in answer["directives"]:
        if row["fate"] != "used":
            print(f"  {row['name']} (line {row['line']}): {row['fate']}: {row['why']}")
    options, stages = answer["plan"]["options"], answer["plan"].get("stages")
    at = f" --store {store}" if store is not None else ""
    follow = f"follow it with: qipan logs -f {answer['task_id']}{at}"
    if stages:
        devices = [
            f"{stage['stage']} on {one['devices']} x {one['chip_class']}"
            for stage, one in zip(stages, options, strict=True)
        ]
        cost = sum(one["cost_p50_micro_cny"] for one in options)
        ends_s = max(stage["ends_s"] for stage in stages)
        print(
            f"{answer['task_id']}: submitted; planned {', '.join(devices)}, about {format_duration(ends_s)}, {format_money(cost)}; {follow}"
        )
        for flow in answer["plan"]["flows"]:
            print(f"  {flow['text']}")
        return
    parts = options if answer["plan"].get("meetings") else options[:1]  # of a task over several sites all run
    where = ", ".join(f"{one['place']} on {one['devices']} x {one['chip_class']}" for one in parts)
    ends_s, cost = max(one["finish_p50_s"] for one in parts), sum(one["cost_p50_micro_cny"] for one in parts)
    print(
        f"{answer['task_id']}: submitted; planned at {where}, about {format_duration(ends_s)}, {format_money(cost)}; {follow}"
    )
    if answer["plan"].get("meetings"):
        print(f"  {answer['plan']['meetings']['text']}")


def print_tasks(tasks: Sequence[dict[str, Any]]) -> None:
    rows = [
        [
            task["task_id"], task["tenant"], task["state"], task["place"] or "-", str(task["devices"] or "-"),
            f"{task['progress']:.0%}", str(task["attempt"] or "-"), task["waiting"],
        ]
        for task in tasks
    ]  # fmt: skip
    table("任务 tasks", ["task", "tenant", "state", "place", "devices", "done", "attempt", "waits for"], rows)


def print_why(answer: dict[str, Any]) -> None:
    began_s = answer["decisions"][0]["at_s"] if answer["decisions"] else 0.0
    task_id = answer["task_id"]
    parts = any(entry.get("task_id", task_id) != task_id for entry in answer["decisions"])
    rows = [
        [
            f"+{entry['at_s'] - began_s:.1f}s", entry["board"], *([_part_of(task_id, entry.get("task_id", task_id))] if parts else []),
            entry["verdict"], entry["text"],
        ]
        for entry in answer["decisions"]
    ]  # fmt: skip
    columns = ["when", "board", *(["part"] if parts else []), "what", "because"]
    table(f"为什么 why {task_id} ({answer['state']})", columns, rows)
    for entry in answer["waiting"]:
        print(f"  waits: [{entry['constraint']}] {entry['text']}")


def _part_of(whole: str, task_id: str) -> str:
    return task_id.removeprefix(f"{whole}.")


def print_receipt(receipt: dict[str, Any], charged_micro_cny: int) -> None:
    whole = receipt["task_id"]
    parts = any(line["usage"]["task_id"] != whole for line in receipt["lines"])
    rows = [
        [
            *([_part_of(whole, line["usage"]["task_id"])] if parts else []), str(line["usage"]["attempt"]), line["usage"]["board"], line["usage"]["chip_class"],
            str(line["usage"]["devices"]), line["usage"]["point_id"],
            time.strftime("%H:%M:%S", time.localtime(line["usage"]["started_s"])),
            f"{line['usage']['device_s']:.3f}", line["tariff_version"],
            format_money(line["tariff_micro_cny_per_device_hour"]), format_money(line["cost_micro_cny"]),
        ]
        for line in receipt["lines"]
    ]  # fmt: skip
    table(
        f"凭据 receipt of {receipt['task_id']} ({receipt['outcome']}) for {receipt['tenant']}",
        [
            *(["part"] if parts else []),
            "attempt",
            "where",
            "chip",
            "devices",
            "point",
            "from",
            "device-seconds",
            "tariff",
            "per device-hour",
            "cost",
        ],
        rows,
    )
    total = receipt["cost_micro_cny"]
    agree = "agrees" if total == charged_micro_cny else "DOES NOT AGREE"
    print(f"  total {format_money(total)}; the ledger charged {format_money(charged_micro_cny)}: {agree}")
    print(
        f"  work done again after losses: {receipt['lost_work_s']:.1f} s; signature {receipt['signature'][:16]}"
    )


def print_explained(explained: dict[str, Any]) -> None:
    planned = explained["planned"]
    print(
        f"  planned {format_money(planned['cost_p50_micro_cny'])} (p90 {format_money(planned['cost_p90_micro_cny'])}) on"
        f" {planned['devices']} x {planned['chip_class']} at {planned['place']}"
    )
    for part in explained["differences"]:
        amount = part["amount_micro_cny"]
        print(f"    {'+' if amount > 0 else ''}{format_money(amount)}: {part['text']}")


def print_ledger(balances: dict[str, int]) -> None:
    rows = [[account, format_money(balance)] for account, balance in sorted(balances.items())]
    table("账本 ledger", ["account", "balance"], rows)
    print(f"  all accounts sum to {format_money(sum(balances.values()))}")


def print_boards(boards: Sequence[dict[str, Any]]) -> None:
    rows = []
    for board in boards:
        if not board["pools"]:
            rows.append(
                [board["board"], "-> " + ", ".join(board["children"]), "", "", "", str(board["tasks"])]
            )
        for pool in board["pools"]:
            speed = pool["train_flops_per_s"]
            rows.append(
                [
                    board["board"], pool["chip_class"], f"{pool['free']}/{pool['devices']}",
                    format_money(pool["tariff_micro_cny_per_device_hour"]),
                    f"{speed / 1e9:.1f} GFLOP/s" if speed else "not measured", str(board["tasks"]),
                ]
            )  # fmt: skip
    table("棋盘 boards", ["board", "chip class", "free", "per device-hour", "measured", "tasks"], rows)


def print_twin(report: dict[str, Any]) -> None:
    rows = [[name, str(value)] for name, value in report["figures"].items()]
    title = f"孪生 twin of {report['scenario']} (policy {report['policy']}, seed {report['seed']})"
    table(title, ["figure", "value"], rows)
    rows = [
        [
            str(own["cluster"]), str(own["region"]), str(own["devices"]), f"{own['leased_share']:.0%}",
            f"{own['device_hours']:.0f}", str(own["tasks"]), str(own["attempts"]), str(own["chips"]),
        ]
        for own in report["clusters"]
    ]  # fmt: skip
    names = ["data centre", "region", "devices", "leased", "device-hours", "tasks", "attempts", "chips"]
    table("in the scenario's hours", names, rows)
    if "services" in report:
        rows = [[str(value) for value in own.values()] for own in report["services"]]
        table("服务 services", [name.replace("_", " ") for name in report["services"][0]], rows)
    for path in report.get("files", ()):
        print(f"  wrote {path}")


def print_what_if(told: dict[str, Any]) -> None:
    rows = [
        [
            outcome["policy"], f"{outcome['done']} of {outcome['tasks']}", format_duration(outcome["mean_s"]),
            format_duration(outcome["p95_s"]), format_money(outcome["cost_micro_cny"]),
            f"{outcome['late']} of {outcome['with_deadline']}", str(outcome["attempts"]),
        ]
        for outcome in (told["as_it_was"], told["other"])
    ]  # fmt: skip
    table(
        "如果 what if (both simulated)", ["policy", "done", "mean", "p95", "cost", "late", "attempts"], rows
    )
    if told["truncated"]:
        print(f"  the {told['truncated']} oldest causes were left out")

"""`qipan check`: is a script portable to another vendor's chip."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qipan.portability import Checked
    from qipan.portability.trial import Trial

SHOWN = {"runs": "runs", "rewritten": "rewritten", "blocks": "BLOCKS"}


def check(
    context: typer.Context, script: Path,
    for_: Annotated[str, typer.Option("--for", help="A vendor's stack such as huawei, or a chip class.")],
    write: Annotated[Path | None, typer.Option(help="Where the rewritten script goes.")] = None,
    diff: Annotated[bool, typer.Option("--diff/--no-diff", help="Show what is rewritten.")] = True,
    trial: Annotated[bool, typer.Option(help="Two steps of the original and of the rewritten script here, losses compared; the script's arguments follow `--`.")] = False,
    task: Annotated[Path | None, typer.Option(help="A task file that runs the script: write one for the target, which makes two steps there first.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:  # fmt: skip
    """What of a training script runs on another vendor's chip, what is rewritten, what blocks, by line."""
    import msgspec

    from qipan.catalogue import site_catalogue
    from qipan.cli.app import out
    from qipan.errors import InvalidInput
    from qipan.files import text_in

    try:
        from qipan.portability import check_script
    except ImportError:
        raise InvalidInput("reading scripts needs libcst: pip install 'qipan[check]'") from None
    text = text_in(script, "no such file; name a Python script")
    catalogue = site_catalogue()
    stack = catalogue.stacks.get(for_.lower()) or catalogue.stacks[catalogue.find(for_).stack]
    made = check_script(text, stack, script.name)
    if write is not None:
        write.write_text(made.rewritten, encoding="utf-8")
    tried = None
    if (trial or task is not None) and made.verdict != "blocks":
        tried = _tried(made, script, write, str(stack.torch_device), list(context.args), task)
    if json_:
        out({
            "script": str(script), "for": stack.stack, "verdict": made.verdict, "findings": msgspec.to_builtins(made.findings),
            "diff": made.diff(), "trial": msgspec.to_builtins(tried),
        })  # fmt: skip
    else:
        _show(made, stack.stack, diff, tried, write)
    if made.verdict == "blocks":
        raise typer.Exit(104)
    if tried is not None and not tried.passed:
        raise typer.Exit(100)


def _tried(
    made: "Checked",
    script: Path,
    write: Path | None,
    torch_device: str,
    arguments: list[str],
    task: Path | None,
) -> "Trial":
    """The original under a shim where cuda is the CPU, the rewritten script as it is; with a task, the reference and the
    target's task file are written beside it."""
    import json

    from qipan.portability.ported import ported_task
    from qipan.portability.trial import compare, keep, run_steps

    target = write or script.with_name(f"{script.stem}_{made.target}.py")
    target.write_text(made.rewritten, encoding="utf-8")
    value: dict[str, Any] = {}
    if task is not None:
        from qipan.portability.ported import read_task

        value, arguments = read_task(task, script.name)
    reference = run_steps(script, arguments, shim=True)
    found = compare(
        made.target,
        torch_device,
        target,
        reference,
        run_steps(target, arguments, shim=False),
        time.time(),
        on_target=False,
    )
    keep(found, target.with_suffix(".trial.json"))
    if task is not None and found.passed:
        losses = target.with_suffix(".losses.json")
        losses.write_text(json.dumps(reference) + "\n", encoding="utf-8")
        ported = ported_task(value, script.name, arguments, target, losses, made.target, torch_device)
        task.with_name(f"{task.stem}.{made.target}.yaml").write_text(ported, encoding="utf-8")
    return found


def _show(made: "Checked", target: str, diff: bool, tried: "Trial | None", write: Path | None) -> None:
    from qipan.cli.tables import table

    rows = [[str(f.line), SHOWN[f.verdict], f.construct, f.new or "-", f.why or "-"] for f in made.findings]
    if rows:
        table(f"{made.name} for {target}", ["line", "verdict", "construct", "becomes", "why"], rows)
    if diff and made.diff():
        print(made.diff(), end="")
    counts = {verdict: sum(f.verdict == verdict for f in made.findings) for verdict in SHOWN}
    told = {
        "runs": f"runs on {target} as it is",
        "rewritten": f"runs on {target} once rewritten ({counts['rewritten']} places" + (f", in {write})" if write else "; --write FILE keeps it)"),
        "blocks": f"does not run on {target}: {counts['blocks']} constructs block it",
    }  # fmt: skip
    print(f"  {made.name} {told[made.verdict]}")
    if tried is not None:
        steps = ", ".join(f"{a:.6g} / {b:.6g}" for a, b in zip(tried.reference, tried.losses, strict=False))
        print(
            f"  trial here, original / rewritten: {steps or 'no losses'}: "
            + ("alike" if tried.passed else tried.why)
        )

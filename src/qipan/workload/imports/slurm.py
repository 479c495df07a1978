"""A Slurm batch script.  Flags: the manual page of sbatch(1); variables: its section OUTPUT ENVIRONMENT VARIABLES."""

import re
import shlex

from qipan.errors import InvalidInput
from qipan.quantities import format_devices
from qipan.workload.imports.directive import Directive, Source, task_name
from qipan.workload.task import Limits, Shape, Task

SHORT = {
    "A": "account", "a": "array", "c": "cpus-per-task", "C": "constraint", "D": "chdir", "d": "dependency",
    "e": "error", "G": "gpus", "i": "input", "J": "job-name", "L": "licenses", "m": "distribution", "N": "nodes",
    "n": "ntasks", "o": "output", "p": "partition", "q": "qos", "t": "time", "w": "nodelist", "x": "exclude",
}  # fmt: skip
IGNORED = {
    "account": "the tenant pays; give --tenant or the site's first tenant pays",
    "partition": "Qipan chooses the place",
    "qos": "Qipan bids by max_cost and deadline instead",
    "output": "output is kept by Qipan: qipan logs TASK",
    "error": "output is kept by Qipan: qipan logs TASK",
    "mail-type": "no mail is sent: qipan wait TASK, qipan events TASK",
    "mail-user": "no mail is sent",
    "dependency": "Qipan does not order tasks; submit this one when the other ended",
    "mem": "host memory comes with the devices of a pool",
    "mem-per-cpu": "host memory comes with the devices of a pool",
    "mem-per-gpu": "host memory comes with the devices of a pool",
    "cpus-per-gpu": "cores come with the devices of a pool",
    "exclusive": "devices are never shared; nodes may be",
    "nodelist": "Qipan chooses the place",
    "exclude": "Qipan chooses the place",
    "requeue": "a task that loses a node always goes on from its checkpoint",
    "no-requeue": "a task that loses a node always goes on from its checkpoint",
}
#: set by Slurm to what the flag says, and only where the flag is given
STATED = {
    "cpus-per-task": "SLURM_CPUS_PER_TASK", "cpus-per-gpu": "SLURM_CPUS_PER_GPU", "gpus": "SLURM_GPUS",
    "gpus-per-node": "SLURM_GPUS_PER_NODE", "gpus-per-task": "SLURM_GPUS_PER_TASK", "ntasks-per-node": "SLURM_NTASKS_PER_NODE",
    "partition": "SLURM_JOB_PARTITION", "account": "SLURM_JOB_ACCOUNT", "qos": "SLURM_JOB_QOS",
    "dependency": "SLURM_JOB_DEPENDENCY", "distribution": "SLURM_DISTRIBUTION", "mem": "SLURM_MEM_PER_NODE",
    "mem-per-cpu": "SLURM_MEM_PER_CPU", "mem-per-gpu": "SLURM_MEM_PER_GPU", "export": "SLURM_EXPORT_ENV",
}  # fmt: skip
#: Copies of the command, one a rank, as srun starts them: those of this node, where the script runs on each.
SRUN = """srun() {
  local n="${SLURM_NTASKS:-1}" rank pids=() failed=0
  while [ $# -gt 0 ]; do
    case "$1" in
      -n|--ntasks) n="$2"; shift 2 ;;
      -n[0-9]*) n="${1#-n}"; shift ;;
      --ntasks=*) n="${1#*=}"; shift ;;
      -[NcptGJowxADe]|--nodes|--cpus-per-task|--gpus|--gres|--mem|--time|--output|--error|--job-name|--partition) shift 2 ;;
      -*) shift ;;
      *) break ;;
    esac
  done
  local each=$(((n + ${QIPAN_NUM_NODES:-1} - 1) / ${QIPAN_NUM_NODES:-1}))
  local first=$((${QIPAN_NODE_RANK:-0} * each))
  for ((rank = first; rank < n && rank < first + each; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank - first)) SLURM_NTASKS=$n "$@" & pids+=($!)
  done
  for rank in "${pids[@]}"; do wait "$rank" || failed=$?; done
  return $failed
}
"""


def sbatch_task(text: str, file: str, workdir: str) -> tuple[Task, list[Directive]]:
    source, flags = Source(file), {}
    for flag, value, line in _flags(text, file):
        source.leaves[flag] = (value, line)
        source.root[flag] = value
        flags[flag] = value
    for flag, why in IGNORED.items():
        source.mark("ignored", flag, why)
    nodes, devices, chips = _devices(source)
    ntasks = source.whole("ntasks", nodes * source.whole("ntasks-per-node", 1, 1), 1)
    array = _array(source)
    limit_s = _time_s(source)
    task = Task(
        "batch" if array else "train",
        task_name(source.text("job-name", "sbatch")),
        limits=Limits(chips=chips, time_limit_s=limit_s),
        devices=Shape(devices, devices, devices // nodes if nodes > 1 and devices % nodes == 0 else 0),
        run=_environment(source, nodes, ntasks, devices, array) + _script(source, text),
        env=_export(source),
        foreach=array,
        workdir=source.text("chdir") or workdir,
    )
    for flag in ("job-name", "chdir"):
        source.mark(
            "used", flag, {"job-name": f"name: {task.name}", "chdir": "where the script starts"}[flag]
        )
    for flag in ("ntasks", "ntasks-per-node"):
        source.mark("used", flag, "SLURM_NTASKS, and what srun starts")
    source.mark(
        "approximated", "cpus-per-task", "set in the environment; cores come with the devices of a pool"
    )
    source.mark("approximated", "signal", "SIGTERM asks for a checkpoint 10 s before the end")
    return task, source.directives()


def _flags(text: str, file: str) -> list[tuple[str, str, int]]:
    """Slurm stops reading flags at the first line that is neither comment nor blank."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#SBATCH"):
            try:
                words = shlex.split(line[len("#SBATCH") :], comments=True)
            except ValueError as error:
                raise InvalidInput(f"#SBATCH line cannot be read: {error}", f"{file}:{number}:1") from None
            while words:
                word = words.pop(0)
                if word.startswith("--"):
                    name, equals, value = word[2:].partition("=")
                    if not equals and words and not words[0].startswith("-"):
                        value = words.pop(0)
                elif word.startswith("-") and len(word) > 1 and word[1] in SHORT:
                    name, value = SHORT[word[1]], word[2:]
                    if not value and words:
                        value = words.pop(0)
                else:
                    raise InvalidInput(f"{word[:40]!r} is no flag of sbatch", f"{file}:{number}:1")
                found.append((name, value, number))
        elif line.strip() and not line.startswith("#"):
            break
    return found


def _devices(source: Source) -> tuple[int, int, tuple[str, ...]]:
    """Nodes, devices in all, and the chip classes asked for."""
    least = source.text("nodes", "1").split("-")[0]
    if not least.isascii() or not least.isdigit() or not 0 < int(least) <= 100_000:
        raise source.error("nodes", f"{source.text('nodes')!r} is not a number of nodes such as 4 or 2-4")
    nodes = int(least)
    source.mark(
        "approximated" if "-" in source.text("nodes") else "used",
        "nodes",
        "devices are those of all nodes together",
    )
    tasks = source.whole("ntasks", nodes * source.whole("ntasks-per-node", 1, 1), 1)
    factors = {"gres": nodes, "gpus": 1, "gpus-per-node": nodes, "gpus-per-task": tasks}
    for flag, factor in factors.items():
        if not source.text(flag):
            continue
        match = re.fullmatch(
            r"(?:gres/)?(?:gpu|npu)?:?(?:([A-Za-z][\w.-]*):)?([0-9]{1,6})?", source.text(flag)
        )
        if match is None or (not match[2] and flag != "gres"):
            raise source.error(flag, f"{source.text(flag)[:60]!r} is not devices such as gpu:h100:8")
        count = int(match[2] or 1) * factor
        chips = (f"*/*{match[1].lower()}*",) if match[1] else ()
        if not 0 < count <= 1_000_000:
            raise source.error(flag, f"{format_devices(count)}; give 1 or more")
        source.mark("used", flag, f"devices: {count}" + (f", chips: {chips[0]}" if chips else ""))
        return nodes, count, chips
    return nodes, nodes, ()


def _time_s(source: Source) -> float | None:
    """minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]] (sbatch(1), --time)."""
    text = source.text("time")
    if not text or text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = re.fullmatch(r"(?:([0-9]{1,5})-)?([0-9]{1,7})(?::([0-9]{1,5}))?(?::([0-9]{1,5}))?", text)
    if match is None:
        raise source.error("time", f"{text[:40]!r} is not a time such as 1-12:00:00 or 30")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match[1]:
        seconds = days * 86400 + first * 3600 + second * 60 + third
    elif match[4]:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    source.mark("used", "time", f"limits.time: {seconds}s")
    return float(seconds) or None


def _array(source: Source) -> tuple[str, ...]:
    text = source.text("array")
    if not text:
        return ()
    items: list[int] = []
    body, _, at_once = text.partition("%")
    for part in body.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6})(?::([0-9]{1,6}))?)?", part)
        if match is None or match[3] == "0":
            raise source.error("array", f"{text[:40]!r} is not indices such as 0-9 or 1,3,5")
        items += range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))
        if len(items) > 10_000:
            raise source.error("array", f"{text[:40]!r} is more than 10000 indices; submit several")
    source.mark(
        "approximated",
        "array",
        "kind: batch with foreach: one after another" + (", not side by side" if at_once else ""),
    )
    return tuple(str(item) for item in items)


def _export(source: Source) -> tuple[tuple[str, str], ...]:
    pairs = [word.partition("=") for word in source.text("export").split(",") if "=" in word]
    fate = "approximated" if not pairs or source.text("export").startswith("NONE") else "used"
    source.mark(fate, "export", "stated values are set; the submitter's other variables do not travel")  # type: ignore[arg-type]
    return tuple((name, value) for name, _, value in pairs)


def _environment(source: Source, nodes: int, ntasks: int, devices: int, items: tuple[str, ...]) -> str:
    """Variables that Slurm would set, before the script's first line."""
    lines = [
        'export SLURM_JOB_ID="$QIPAN_TASK_ID" SLURM_JOBID="$QIPAN_TASK_ID"',
        f"export SLURM_JOB_NAME={shlex.quote(source.text('job-name', 'sbatch'))}",
        'export SLURM_SUBMIT_DIR="$PWD" SLURM_RESTART_COUNT="$((${QIPAN_ATTEMPT:-1} - 1))"',
        'export SLURM_NODEID="${QIPAN_NODE_RANK:-0}" SLURM_PROCID="${QIPAN_NODE_RANK:-0}" SLURM_LOCALID=0',
        f"export SLURM_JOB_NUM_NODES={nodes} SLURM_NNODES={nodes} SLURM_NTASKS={ntasks}",
        f"export SLURM_GPUS_ON_NODE={max(1, devices // nodes)}",
        'export SLURM_JOB_NODELIST="$(hostname)" SLURM_NODELIST="$(hostname)"',
    ]
    per_node = -(-ntasks // nodes)
    lines.append(f"export SLURM_NPROCS={ntasks} SLURM_TASKS_PER_NODE={shlex.quote(_each(per_node, nodes))}")
    lines.append(
        'export SLURM_SUBMIT_HOST="$(hostname)" SLURM_TASK_PID=$$ SLURM_JOB_GPUS="${QIPAN_DEVICES:-}"'
    )
    lines.append('export SLURM_CPUS_ON_NODE="$(nproc)" SLURM_JOB_CPUS_PER_NODE="$(nproc)"')
    for flag, variable in STATED.items():
        if source.text(flag):
            lines.append(f"export {variable}={shlex.quote(source.text(flag))}")
    if items:
        first, last = min(map(int, items)), max(map(int, items))
        stepped = re.search(r":([0-9]+)", source.text("array"))
        step = stepped[1] if stepped else "1"
        lines.append('export SLURM_ARRAY_TASK_ID="$QIPAN_ITEM" SLURM_ARRAY_JOB_ID="$QIPAN_TASK_ID"')
        lines.append(f"export SLURM_ARRAY_TASK_COUNT={len(items)} SLURM_ARRAY_TASK_MIN={first}")
        lines.append(f"export SLURM_ARRAY_TASK_MAX={last} SLURM_ARRAY_TASK_STEP={step}")
    return "\n".join(lines) + "\n"


def _each(count: int, nodes: int) -> str:
    return f"{count}(x{nodes})" if nodes > 1 else str(count)


def _script(source: Source, text: str) -> str:
    first, _, body = text.partition("\n")
    lines = [line for line in body.splitlines() if not line.startswith("#SBATCH")]
    body = "\n".join(lines) + "\n"
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"\bsrun\b", line) and not line.startswith("#"):
            source.leaves.setdefault("srun", (line.strip()[:200], number))
            source.mark(
                "approximated", "srun", "starts SLURM_NTASKS copies on the one node that the task has"
            )
        if re.match(r"\s*module\s", line):
            source.leaves.setdefault("module", (line.strip()[:200], number))
            source.mark("approximated", "module", "runs where the node has environment modules")
    interpreter = first[2:].strip()
    if re.search(r"\b(ba)?sh\b", interpreter):
        return (SRUN if "srun" in body else "") + body
    source.leaves["#!"] = (interpreter, 1)
    source.mark("used", "#!", "the script's interpreter")
    return f"{interpreter} /dev/fd/3 3<<'QIPAN_END_OF_SCRIPT'\n{body}QIPAN_END_OF_SCRIPT\n"

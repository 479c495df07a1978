"""The one form of a benchmark's answer: figures with goals, rows, setting."""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """`goal` reads like "<= 0.02"; empty: none is stated."""

    name: str
    value: float
    unit: str
    goal: str = ""

    @property
    def holds(self) -> bool | None:
        if not self.goal:
            return None
        relation, bound = self.goal.split()
        return self.value <= float(bound) if relation == "<=" else self.value >= float(bound)


def arguments(name: str, **options: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--json", required=True, help="where the answer goes; /dev/stdout for here")
    parser.add_argument(
        "--data", default=os.environ.get("QIPAN_BENCH_DATA", ""), help="folder with reference/ and traces/"
    )
    for option, default in options.items():
        parser.add_argument(f"--{option}", type=type(default), default=default)
    return parser.parse_args()


def data_folder(given: str, source: str) -> Path:
    """The data folder, or an exit that says where the data is published."""
    path = Path(given) if given else Path("../shared")
    if not path.is_dir():
        print(
            f"this benchmark reads {source}; name the folder with --data or QIPAN_BENCH_DATA", file=sys.stderr
        )
        sys.exit(2)
    return path


def write(out: str, figures: list[Figure], rows: list[dict[str, Any]], **setting: Any) -> None:
    """The answer to `out`; each figure with its goal on standard error, for who watches."""
    for figure in figures:
        verdict = "" if figure.holds is None else "holds" if figure.holds else "MISSED"
        told = f"{figure.name:44} {figure.value:12.5g} {figure.unit:10} {figure.goal:10} {verdict}"
        print(told.rstrip(), file=sys.stderr)
    answer = {
        "figures": [{**asdict(figure), "holds": figure.holds} for figure in figures],
        "rows": rows,
        "setting": {"python": platform.python_version(), "cores": os.cpu_count(), **setting},
    }
    with open(out, "w") as file:
        json.dump(answer, file, ensure_ascii=False, indent=1)
        file.write("\n")

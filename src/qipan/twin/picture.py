"""A run of the twin as files: report.json, tasks.csv (and tasks.parquet where pyarrow is installed), and one page of pictures
that needs no network: utilisation of each data centre, completion times, the tree."""

import csv
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qipan.quantities import format_devices

WIDTH, ROW, LEFT = 960, 26, 150
#: a light-to-dark scale of one colour, for shares from 0 to 1
SCALE = ("#f4f1e8", "#dfe5d3", "#bcd1b4", "#8fb694", "#5f9777", "#34765c", "#145341")


def write_files(report: Mapping[str, Any], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / "report.json", folder / "tasks.csv", folder / "report.html"]
    made[0].write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    with made[1].open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, list(report["tasks"][0]))
        rows.writeheader()
        rows.writerows(report["tasks"])
    made[2].write_text(page(report), encoding="utf-8")
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        return made
    parquet.write_table(pyarrow.Table.from_pylist(list(report["tasks"])), folder / "tasks.parquet")
    return [*made, folder / "tasks.parquet"]


def page(report: Mapping[str, Any]) -> str:
    figures = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, value in report["figures"].items()
    )
    title = f"{report['scenario']} · policy {report['policy']} · seed {report['seed']}"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>
<style>body{{font:14px/1.5 system-ui,sans-serif;max-width:{WIDTH + 40}px;margin:2em auto;color:#222}}
table{{border-collapse:collapse}}td{{border-bottom:1px solid #ddd;padding:.2em 1em .2em 0}}svg text{{font:12px system-ui,sans-serif}}
h2{{margin-top:2em;font-size:1.1em}}</style>
<h1>孪生 twin</h1><p>{escape(title)}. Simulated; nothing here was measured on hardware.</p>
<table>{figures}</table>
<h2>Leased share of each data centre, by time</h2>{utilisation(report)}
<h2>Time from submission to end: share of tasks that took at most so long</h2>{completion(report)}
<h2>The tree</h2>{tree(report)}
</html>
"""


def utilisation(report: Mapping[str, Any]) -> str:
    shares: Mapping[str, Sequence[float]] = report["series"]["leased_share"]
    bucket_s = report["series"]["bucket_s"]
    most = max((len(own) for own in shares.values()), default=1)
    step = (WIDTH - LEFT) / most
    parts = []
    for line, (name, own) in enumerate(shares.items()):
        y = line * ROW
        parts.append(f'<text x="0" y="{y + 17}">{escape(name)}</text>')
        for at, share in enumerate(own):
            colour = SCALE[min(len(SCALE) - 1, int(share * len(SCALE)))]
            told = f"{name}, hour {at * bucket_s / 3600:.1f}: {share:.0%}"
            parts.append(
                f'<rect x="{LEFT + at * step:.1f}" y="{y + 2}" width="{step + 0.2:.1f}" height="{ROW - 4}" fill="{colour}">'
                f"<title>{escape(told)}</title></rect>"
            )
    hours = most * bucket_s / 3600
    every = max(1, round(hours / 12))
    bottom = len(shares) * ROW
    for hour in range(0, int(hours) + 1, every):
        x = LEFT + hour * 3600 / bucket_s * step
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{hour} h</text>')
    for number, colour in enumerate(SCALE):
        x = LEFT + number * 40
        parts.append(f'<rect x="{x}" y="{bottom + 26}" width="40" height="12" fill="{colour}"/>')
    parts.append(f'<text x="{LEFT}" y="{bottom + 54}">0 %</text>')
    parts.append(f'<text x="{LEFT + 280}" y="{bottom + 54}" text-anchor="end">100 %</text>')
    return _svg(parts, bottom + 60)


def completion(report: Mapping[str, Any]) -> str:
    lengths = sorted(task["jct_s"] / 3600 for task in report["tasks"] if task["jct_s"] is not None)
    if not lengths:
        return "<p>No task ended.</p>"
    height, most = 240, lengths[-1] or 1.0
    points = " ".join(
        f"{LEFT + hours / most * (WIDTH - LEFT - 20):.1f},{height - rank / len(lengths) * (height - 20):.1f}"
        for rank, hours in enumerate(lengths, 1)
    )
    parts = [f'<polyline points="{LEFT},{height} {points}" fill="none" stroke="#145341" stroke-width="2"/>']
    parts.append(f'<line x1="{LEFT}" y1="{height}" x2="{WIDTH}" y2="{height}" stroke="#999"/>')
    for share in (0.5, 0.9, 1.0):
        y = height - share * (height - 20)
        own = lengths[min(len(lengths) - 1, int(share * len(lengths)))]
        parts.append(f'<text x="0" y="{y + 4:.1f}">{share:.0%}: {own:.1f} h</text>')
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH}" y2="{y:.1f}" stroke="#eee"/>')
    for part in range(5):
        x = LEFT + part / 4 * (WIDTH - LEFT - 20)
        parts.append(
            f'<text x="{x:.1f}" y="{height + 18}" text-anchor="middle">{part / 4 * most:.1f} h</text>'
        )
    return _svg(parts, height + 24)


def tree(report: Mapping[str, Any]) -> str:
    shares = {own["cluster"]: own for own in report["clusters"]}
    most = max(row["devices"] for row in report["tree"]) or 1
    parts = []
    for line, row in enumerate(report["tree"]):
        y, x = line * ROW, row["depth"] * 28
        own = shares.get(row["board"])
        width = (WIDTH - 420) * row["devices"] / most
        told = format_devices(row["devices"])
        if own is not None:
            told += f", {own['leased_share']:.0%} leased, {own['tasks']} tasks, {own['chips']}"
            leased = width * min(1.0, own["leased_share"])
            parts.append(f'<rect x="200" y="{y + 5}" width="{width:.1f}" height="16" fill="#dfe5d3"/>')
            parts.append(f'<rect x="200" y="{y + 5}" width="{leased:.1f}" height="16" fill="#34765c"/>')
        text = 210 + (width if own is not None else 0)
        parts.append(f'<text x="{x}" y="{y + 17}">{escape(row["board"])}</text>')
        parts.append(f'<text x="{text:.1f}" y="{y + 17}" fill="#555">{escape(told)}</text>')
    return _svg(parts, len(report["tree"]) * ROW + 4)


def _svg(parts: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" width="100%" role="img">{"".join(parts)}</svg>'

"""The measured examples of docs/techniques, from what `techniques.py` and `cascade.py` of benchmarks/ stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STORED = tuple(RESULTS / f"{group}.json" for group in ("techniques", "further", "rest", "rare", "pool"))
CASCADE = RESULTS / "cascade.json"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def pages() -> dict[Path, str]:
    """Every page that has a place for examples, with what belongs there."""
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in STORED if path.exists()}
    found = {}
    for path in sorted((ROOT / "docs" / "techniques").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        mine = {name: [e for e in run["examples"] if e["page"] == path.stem] for name, run in runs.items()}
        parts = [_table(name, runs[name], some) for name, some in mine.items() if some]
        if path.stem == "cascade" and CASCADE.exists():
            parts.append(_tiers(json.loads(CASCADE.read_text(encoding="utf-8"))))
        if begin and parts:
            behind = rest.partition(END)[2] if END in rest else rest
            body = "\n\n".join(parts)
            found[path] = f"{before}{BEGIN}\n{body}\n{END}{behind}"
    return found


def _table(group: str, stored: dict[str, Any], examples: list[dict[str, Any]]) -> str:
    teacher = stored["examples"][0]
    data = {"banking77": "BANKING77"}.get(stored["set"], stored["set"])
    lines = [
        f"| on {data}'s dev ({stored['rows']} rows) | {stored['metric']} | agreement with the teacher | file | µs a row | made in |",
        "|---|---|---|---|---|---|",
    ]
    for e in (teacher, *examples):
        made = "" if e is teacher else f"{e['seconds']:.0f} s"
        row = f"{1e6 * e['row']:.0f}" if "row" in e else ""
        lines.append(
            f"| {e['name']} | {100 * e['quality']:.1f} | {100 * e['agreement']:.1f} % | {e['bytes'] / 1e6:.1f} MB | "
            f"{row} | {made} |"
        )
    machine = stored["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"`benchmarks/techniques.py --group {group}`, at most {stored['seconds']:.0f} s for each fit; one run each, so a point is noise "
            f"({machine['cpu']}, {machine['threads']} threads, {machine['date']}, commit {machine['commit']}).",
        ]
    )


def _tiers(stored: dict[str, Any]) -> str:
    rows, machine = stored["rows"], stored["machine"]
    lines = [
        f"| may lose | tiers | the cheapest on BANKING77's dev | {stored['metric']} | agreement with the teacher | files | µs a row |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {e['lost']:g} | {e['tiers']} | `{e['name']}` | {100 * e['quality']:.1f} | {100 * e['agreement']:.1f} % | "
        f"{e['bytes'] / 1e6:.1f} MB | {1e6 * e['row']:.0f} |"
        for e in stored["examples"]
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"`benchmarks/cascade.py` on a finished job: chosen by points lost on the {rows['calibrate']} calibrate rows, shown on the "
            f"{rows['select']} select rows, where the teacher has {100 * stored['teacher']:.1f}; times are sums of what the job measured. "
            f"Many choices were compared on few rows, so a point is noise: hence the certificate, on rows of its own ({machine['cpu']}, {machine['threads']} threads, {machine['date']}, commit "
            f"{machine['commit']}).",
        ]
    )

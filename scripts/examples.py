"""The measured examples of docs/techniques, from benchmarks/results/techniques.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "results" / "techniques.json"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def pages() -> dict[Path, str]:
    """Every page that has a place for examples, with what belongs there."""
    if not STORED.exists():
        return {}
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    found = {}
    for path in sorted((ROOT / "docs" / "techniques").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        examples = [e for e in stored["examples"] if e["page"] == path.stem]
        if begin and examples:
            behind = rest.partition(END)[2] if END in rest else rest
            found[path] = f"{before}{BEGIN}\n{_table(stored, examples)}\n{END}{behind}"
    return found


def _table(stored: dict[str, Any], examples: list[dict[str, Any]]) -> str:
    teacher = stored["examples"][0]
    lines = [
        f"| on BANKING77's dev ({stored['rows']} rows) | {stored['metric']} | agreement with the teacher | file | µs a row | made in |",
        "|---|---|---|---|---|---|",
    ]
    for e in (teacher, *examples):
        made = "" if e is teacher else f"{e['seconds']:.0f} s"
        lines.append(
            f"| {e['name']} | {100 * e['quality']:.1f} | {100 * e['agreement']:.1f} % | {e['bytes'] / 1e6:.1f} MB | "
            f"{1e6 * e['row']:.0f} | {made} |"
        )
    machine = stored["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"`benchmarks/techniques.py`, at most {stored['seconds']:.0f} s for each fit; one run each, so a point is noise "
            f"({machine['cpu']}, {machine['threads']} threads, {machine['date']}, commit {machine['commit']}).",
        ]
    )

"""How cost grows from 1x to 10x rows, of `optimize` and of `predict`:

    .venv/bin/python benchmarks/scaling.py predict runs/banking77-seed0.nw ../shared/data/banking77/test.csv.gz
    .venv/bin/python benchmarks/scaling.py optimize ../shared/data/banking77 [--largest 7500]

predict: the file, repeated; optimize: stratified parts of train, with dev and test whole, a job each, under a time
limit that none reaches. Seconds are of fresh processes, peak memory is the process's own. Writes
benchmarks/results/scaling-predict.json or scaling-optimize.json after each step; steps that are there are kept.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from netweight.measure import cores, machine
from netweight.pipeline import store_of

TIMES = (1, 2, 5, 10)
# Runs the command line and says how much memory it held at most. Not getrusage: what the parent held counts there.
_RUN = """
import re, sys
from netweight.cli import main
try:
    main()
finally:
    print("PEAK", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def rows_of(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a csv or csv.gz."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader)
        return list(reader.fieldnames or ()), found


def write(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    """A csv."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def run(words: list[Any]) -> tuple[float, int]:
    """Wall seconds and peak bytes."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _RUN, *map(str, words)], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found = re.search(r"PEAK (\d+)", done.stderr)
    return seconds, 1024 * int(found[1]) if found else 0


def predict_steps(given: argparse.Namespace) -> Iterator[tuple[int, Callable[[], tuple[float, int]]]]:
    """Rows and what runs them."""
    columns, rows = rows_of(given.table)
    table, out = given.work / "scaling.csv", given.work / "scaling-out.csv"

    def step(count: int) -> tuple[float, int]:
        write(table, columns, rows * count)
        return run(["predict", given.artifact, table, "--text", given.text, "--out", out, "--threads", given.threads])

    for count in TIMES:
        yield count * len(rows), lambda count=count: step(count)


def optimize_steps(given: argparse.Namespace) -> Iterator[tuple[int, Callable[[], tuple[float, int]]]]:
    """Rows and what runs them. Every part holds the one before, and of each label two rows and as much as it can."""
    columns, rows = rows_of(given.folder / "train.csv.gz")
    order = np.random.default_rng(given.seed).permutation(len(rows))
    seen: dict[str, int] = {}
    turn = []
    for i in order:
        label = rows[i][given.label]
        seen[label] = seen.get(label, 0) + 1
        turn.append(seen[label])
    sizes = np.array([seen[rows[i][given.label]] for i in order])
    # By the share of its label that a row completes: each prefix is stratified. Jobs need two rows of a label.
    share = np.where(np.array(turn) <= 2, 0.0, np.array(turn) / sizes)
    order = order[np.argsort(share, kind="stable")]
    largest = min(given.largest or len(rows), len(rows))

    def step(count: int) -> tuple[float, int]:
        table, out = given.work / f"scaling-{count}.csv", given.work / f"scaling-{count}.nw"
        # What a killed step left would be resumed, and its seconds would say nothing.
        for left in (out, store_of(out)):
            shutil.rmtree(left, ignore_errors=True)
        write(table, columns, [rows[i] for i in order[:count]])
        words = ["optimize", table, "--dev", given.folder / "dev.csv.gz", "--certify", given.folder / "test.csv.gz"]
        words += ["--text", given.text, "--label", given.label, "--out", out, "--time-limit", given.limit]
        return run([*words, "--seed", given.seed, "--threads", given.threads])

    for times in TIMES:
        count = largest * times // TIMES[-1]
        yield count, lambda count=count: step(count)


def main() -> None:
    """Every step that is not there yet."""
    parser = argparse.ArgumentParser()
    kinds = parser.add_subparsers(dest="what", required=True)
    one, other = kinds.add_parser("predict"), kinds.add_parser("optimize")
    one.add_argument("artifact", type=Path)
    one.add_argument("table", type=Path)
    other.add_argument("folder", type=Path)
    other.add_argument("--largest", type=int)
    other.add_argument("--limit", default="4h")
    other.add_argument("--seed", type=int, default=0)
    other.add_argument("--label", default="label")
    for part in (one, other):
        part.add_argument("--text", default="text")
        part.add_argument("--threads", type=int, default=cores())
        part.add_argument("--work", type=Path, default=Path("runs"))
        part.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    given.results.mkdir(parents=True, exist_ok=True)
    path = given.results / f"scaling-{given.what}.json"
    source = given.table.parent.name if given.what == "predict" else given.folder.name
    found: dict[str, Any] = {"machine": asdict(machine(given.threads)), "set": source, "steps": []}
    if path.exists() and (known := json.loads(path.read_text(encoding="utf-8")))["set"] == source:
        found["steps"] = known["steps"]
    done = {step["rows"] for step in found["steps"]}
    for rows, call in (predict_steps if given.what == "predict" else optimize_steps)(given):
        if rows in done:
            continue
        seconds, peak = call()
        print(f"{rows:,} rows: {seconds:.1f} s, {peak / 1e6:,.0f} MB", flush=True)
        found["steps"].append({"rows": rows, "seconds": round(seconds, 2), "memory": peak})
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

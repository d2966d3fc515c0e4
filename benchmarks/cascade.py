"""One, two and three tiers: the measured example of docs/techniques/cascade.md.

    .venv/bin/python benchmarks/cascade.py FOLDER ARTIFACT [--seed 0] [--results DIR]

FOLDER holds train.csv.gz, dev.csv.gz and test.csv.gz (columns text, label); ARTIFACT is what a job with that seed made
of them, its run store beside it. Every cascade of the points that the job timed is composed as the job does, from what
they say in ONNX Runtime. Of each number of tiers the cheapest is taken that loses no more than so much on the calibrate
rows, which thresholds and temperatures come from. What it reaches is of the select rows; its time is a sum of what the
job measured. Nothing is trained or timed, and no label of test is read. Writes cascade.json under benchmarks/results,
or where --results says.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from netweight import artifact, measure
from netweight.choose import choices, engine_of
from netweight.data import Columns
from netweight.job import Job, Options, Tables, prepare
from netweight.measure import Cost, cores
from netweight.search import Point
from netweight.store import Store, store_of

RESULTS = Path(__file__).resolve().parent / "results"
LOST = (0.0, 0.5, 1.0)  # points on the calibrate rows


def timed(store: Store, measured: str) -> tuple[list[Point], dict[str, Cost]]:
    """Points that a job timed, and what each costs in the engine that suits it; "": tokenization."""
    costs = {name: Cost(*pair) for name, pair in store.get(measured).items()}
    points = []
    for name, held in store.held("point").items():
        if f"{name} {held['engine']}" in costs:
            points.append(Point(name, **held, logits=store.read_arrays(f"points/{name}")["logits"]))
    own = {p.name: costs[f"{p.name} {engine_of(p.name, p.engine, costs, 'cost')}"] for p in points}
    return points, own | {"": costs[""]}


def main() -> None:
    """Compose, choose, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    files = {name: str(given.folder / f"{name}.csv.gz") for name in ("train", "dev", "test")}
    tables = Tables(files["train"], Columns("text", "label"), files["dev"], files["test"])
    with TemporaryDirectory() as work:
        data, *_ = prepare(Job(tables, options=Options(seed=given.seed)), Path(work))
    manifest = artifact.read_manifest(given.artifact)
    task = manifest.task
    targets, select = task.targets(data.dev.label or ()), slice(0, len(data.select))
    calibrate = slice(len(data.select), len(data.dev))
    with Store(store_of(given.artifact), None) as store:
        points, costs = timed(store, manifest.provenance["measured"])
        reference = task.outcomes(store.read_arrays("teacher-dev")["logits"], targets)
    found = choices(points, costs, task, calibrate, targets, "cost")
    least = float(task.quality(reference[calibrate]))
    examples = []
    for lost, tiers in product(LOST, (1, 2, 3)):
        floor = least - task.margin(lost, least)
        able = [c for c in found if len(c.points) == tiers and task.quality(c.outcomes[calibrate]) >= floor]
        if able:
            best = min(able, key=lambda c: c.cost)
            said = best.outcomes[select]
            examples.append(
                {
                    "lost": lost,
                    "tiers": tiers,
                    "name": best.name,
                    "quality": float(task.quality(said)),
                    "agreement": task.agreement(said, reference[select]),
                    "bytes": sum(p.bytes for p in best.points),
                    "row": best.cost,
                }
            )
            print(f"{lost:g} points, {tiers} tiers: {best.name}, {1e6 * best.cost:.0f} us a row", flush=True)
    kept = {
        "metric": task.metric,
        "rows": {"select": len(data.select), "calibrate": len(data.calibrate)},
        "teacher": float(task.quality(reference[select])),
        "machine": asdict(measure.machine(cores())),
        "examples": examples,
    }
    (given.results / "cascade.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

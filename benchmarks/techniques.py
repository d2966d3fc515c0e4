"""What each technique does to one fine-tuned model: the measured examples of docs/techniques.

    .venv/bin/python benchmarks/techniques.py FOLDER STORE [--group techniques] [--seconds 60] [--work DIR]
                                                           [--seed 0] [--results DIR]

FOLDER holds train.csv.gz, dev.csv.gz and test.csv.gz (columns text, label); STORE is the run store of a finished job on
them, whose teacher is taken. Every fit gets the same time box, so that a recipe of two fits has had twice the training
of a recipe of one. Quality and agreement with the teacher are on dev: no label of test is read. Rows a second of all
files are timed in turns, in one run. What is made stays in DIR: a run that was stopped goes on, and one that is
repeated only times again. Writes GROUP.json under benchmarks/results, or where --results says; `recipes.py` has the
groups.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recipes import FEW, GROUPS, PRETRAINED, TEACHER, first

from netweight import measure
from netweight.artifact import Tier
from netweight.data import Columns, Dataset, Rows
from netweight.encode import Tokens
from netweight.engine.base import TierEngine
from netweight.engine.cascade import tier_engine
from netweight.engine.exits import ExitsEngine, thresholds
from netweight.export import export
from netweight.job import Job, Options, Tables, prepare
from netweight.measure import cores
from netweight.model import Model, pretrained
from netweight.progress import Bar
from netweight.run import Local
from netweight.scratch import scratch
from netweight.techniques import Recipe
from netweight.train import Plan

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Within:
    """An engine, timed on rows of a longer vocabulary than its own: which tokens they are does not change the time."""

    engine: TierEngine
    vocabulary: int

    def logits(self, tokens: Tokens, batch: int) -> NDArray[np.float32]:
        """Of the rows with other tokens for those that it does not know."""
        return self.engine.logits(replace(tokens, ids=tokens.ids % self.vocabulary), batch)


def few(data: Dataset) -> Dataset:
    """FEW labelled rows of each class; the other texts are the pool."""
    kept = first(data.train, FEW)
    rest = np.setdiff1d(np.arange(len(data.train)), kept)
    return replace(data, train=data.train.take(kept), pool=Rows(data.train.take(rest).text))


def make(kept: Path, asked: dict[str, Any], base: Callable[[], Model], run: Local, recipe: Recipe) -> None:
    """One example: its file, what it says of dev's rows, and facts. A folder that exists is complete."""
    began, dev = time.monotonic(), run.data.dev
    with Bar() as bar:
        model = base()
        for technique in recipe:
            model = technique(model, run, Plan(seed=asked["seed"], seconds=asked["seconds"], reporter=bar))
    took = round(time.monotonic() - began, 1)
    exported, tokens, pad = export(model), model.encoder.encode(dev.text), model.encoder.pad
    options = exported.options
    if exported.kind == "exits":
        stages = ExitsEngine(exported.data, options, pad, cores()).stages(tokens, 32)
        options = {"thresholds": thresholds([stage[len(run.data.select) :] for stage in stages], 0.005)}
    engine = tier_engine(Tier("example", exported.kind, "", options), exported.data, pad, cores())
    facts = {"asked": asked, "kind": exported.kind, "options": options, "took": took}
    new = kept.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    (new / "file").write_bytes(exported.data)
    np.save(new / "dev.npy", engine.logits(tokens, 32))
    (new / "facts.json").write_text(json.dumps(facts | {"vocabulary": model.encoder.vocabulary}), encoding="utf-8")
    new.rename(kept)
    run.forget()  # the next example may begin with the same fit, and is timed


def main() -> None:
    """Make what is missing, then time everything and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--group", choices=sorted(GROUPS), default="techniques")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--work", type=Path, default=Path("runs/techniques"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(cores())
    files = {name: str(given.folder / f"{name}.csv.gz") for name in ("train", "dev", "test")}
    tables = Tables(files["train"], Columns("text", "label"), files["dev"], files["test"])
    given.work.mkdir(parents=True, exist_ok=True)
    data, task, *_ = prepare(Job(tables, options=Options(seed=given.seed)), given.work)
    teacher = Model.load(given.store / "models" / "teacher")
    starts: dict[str, tuple[Dataset, Callable[[], Model]]] = {
        TEACHER: (data, lambda: teacher),
        PRETRAINED: (data, lambda: pretrained("starter", task, seed=given.seed)),
        "few": (few(data), lambda: pretrained("starter", task, seed=given.seed)),
        "few-alone": (replace(few(data), pool=None), lambda: pretrained("starter", task, seed=given.seed)),
        "scratch": (data, lambda: teacher),
        "gpt2": (data, lambda: scratch(data.train.text, task, family="gpt2", seed=given.seed)),
    }
    targets = task.targets(data.dev.label or ())
    found, engines = {}, dict[str, TierEngine]()
    reference = None
    for page, name, start, recipe in GROUPS[given.group]:
        rows, base = starts[start]
        asked = {"recipe": [repr(technique) for technique in recipe], "seconds": given.seconds, "seed": given.seed}
        kept = given.work / re.sub("[^a-z0-9]+", "-", f"{page}: {name}".lower())
        if not kept.is_dir() or json.loads((kept / "facts.json").read_text())["asked"] != asked:
            shutil.rmtree(kept, ignore_errors=True)
            make(kept, asked, base, Local(rows, given.work / start), recipe)
        facts, exported = json.loads((kept / "facts.json").read_text()), (kept / "file").read_bytes()
        key = f"{page}: {name}"
        engine = tier_engine(Tier(name, facts["kind"], "", facts["options"]), exported, teacher.encoder.pad, cores())
        if start not in ("gpt2", "scratch"):  # their tokenizers cut texts into other numbers of tokens
            engines[key] = Within(engine, facts["vocabulary"])
        said = np.load(kept / "dev.npy")
        reference = said if reference is None else reference
        quality, agreement, _ = measure.quality(task, said, reference, targets)
        found[key] = {
            "page": page,
            "name": name,
            "recipe": asked["recipe"],
            "quality": quality,
            "agreement": agreement,
            "bytes": len(exported),
            "seconds": facts["took"],
        }
        print(f"{key}: {100 * quality:.2f}, {100 * agreement:.2f} %, {len(exported) / 1e6:.1f} MB", flush=True)
    costs = measure.tier_costs(engines, teacher.encoder, data.dev)
    for key, cost in costs.items():
        if key in found:  # tokenization is none of them
            found[key]["row"] = cost.row
    kept = {
        "set": given.folder.name,
        "seconds": given.seconds,
        "metric": task.metric,
        "rows": len(data.dev),
        "machine": asdict(measure.machine(cores())),
        "examples": list(found.values()),
    }
    (given.results / f"{given.group}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

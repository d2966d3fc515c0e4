"""Federated against pooled training and against each client alone, cell by cell.

    python benchmarks/runs_federated.py [--data ../shared/data] [--only TEXT] [--scale 1.0] [--minutes M] [--json FILE]

A cell is one data set, one way of training and one seed, in a process of its own; cells that the JSON file has are not
made again. `amazon`: amazon_multidomain, its four categories as four shops; `banking77`: ten clients, Dirichlet(0.3).
Both train the starter model with frozen embeddings and a closed-form head. Rows to train on and rows to be asked are
cut from the train split by seed; no official test row is read. Every client's share of the rows that are asked is cut
as its training rows are, so that a client is judged on rows like its own. `--scale` below 1 takes fewer rows: a trial.

Ways: "pooled" (all rows in one place), "alone" (each client by itself), "fedavg" (all weights but the embeddings),
"lora-int8" (adapters and head in int8 with error feedback), "head-int8" (first seed only), on banking77 "many" (50
clients, one round of "fedavg": peak memory), and "private-E": the head under row-level privacy with epsilon E (delta
1e-5) and secure aggregation, which is the default; "private-off" is the same fit without.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.measure import machine
from netweight.model import Model, pretrained
from netweight.run import Local
from netweight.run.federated import Client, Federated, Full, Int8, Rounds, RowLevel, Travel
from netweight.run.federated.partition import ByColumn, Dirichlet, Partition, datasets
from netweight.task import Classify
from netweight.techniques import Finetune
from netweight.train import Plan

SEEDS = (0, 1, 2)
WAYS = ("pooled", "fedavg", "lora-int8", "alone", "head-int8")
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "runs-federated.json"


@dataclass(frozen=True)
class Setting:
    """Sizes of one data set's cells. `epochs` and `rate` are for one place, `shared` and `together` for rounds, two of
    which make an epoch: clients that step side by side take fewer steps one after the other than one place does, and
    the mean of many short fits moves less than one long fit. `lora` is the rate of adapters, which train `longer` times
    the epochs and rounds; `noisy` is that of the head alone under privacy, for so many `passes`, one a round."""

    folder: str
    rows: int
    asked: int
    max_length: int
    epochs: float
    rate: float
    shared: float
    together: float
    lora: float
    longer: float
    noisy: float
    passes: float


SETTINGS = {
    "banking77": Setting("banking77", 3000, 2000, 48, 6.0, 1e-4, 9.0, 4e-4, 5e-3, 1.0, 9.0, 9.0),
    "amazon": Setting("amazon_multidomain", 1600, 1600, 64, 3.0, 1e-4, 6.0, 3e-4, 2e-3, 1.5, 1.0, 6.0),
}
MANY = 50
EPSILONS = ("8", "1", "3", "off")  # the first with all seeds
BATCH = 16
PRIVATE_BATCH = 128  # noise is added once a step


@dataclass(frozen=True)
class Cell:
    """One result. Accuracies are on the rows that are asked, over all and by client; bytes are of one round over all
    clients; `peak_mb` is the process's largest resident memory, `base_mb` that after loading model and rows; `commit`,
    `date` and `threads` are of the moment when it was made."""

    name: str
    accuracy: float
    clients: dict[str, float]
    rows: dict[str, int]
    up: int
    down: int
    seconds: float
    base_mb: float
    peak_mb: float
    epochs: float
    rounds: int
    moved: float
    commit: str = ""
    date: str = ""
    threads: int = 0


def table(path: Path) -> Rows:
    """A split with its category, where it has one."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        held = list(csv.DictReader(file))
    slices = {"category": tuple(r["category"] for r in held)} if "category" in held[0] else {}
    return Rows(tuple(r["text"] for r in held), tuple(r["label"] for r in held), slices=slices)


def cut(setting: Setting, data: Path, seed: int, scale: float) -> Dataset:
    """Training rows, and those that are asked as `select`; drawn from the train split by seed."""
    every = table(data / setting.folder / "train.csv.gz")
    order = np.random.default_rng([seed, 11]).permutation(len(every))
    train, asked = round(setting.rows * scale), round(setting.asked * scale)
    nothing = every.take([])
    return Dataset(every.take(order[:train]), every.take(order[train : train + asked]), nothing, Sealed(nothing))


def partition(name: str, seed: int, clients: int = 10) -> Partition:
    """How a data set's rows are cut into clients."""
    return ByColumn("category") if name == "amazon" else Dirichlet(clients, 0.3, seed)


def peak() -> float:
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def technique(way: str, setting: Setting, seed: int) -> tuple[Finetune, Plan]:
    """What is trained, and how."""
    plan = Plan(batch_size=BATCH, precision="bf16", seed=seed)
    if way == "lora-int8":
        epochs = setting.shared * setting.longer
        return Finetune(train="lora", rank=6, epochs=epochs, learning_rate=setting.lora), plan
    if way.startswith("private"):
        # No probe: sums over rows are exact, and no noise hides them.
        tuned = Finetune(train="head", probe=False, epochs=setting.passes, learning_rate=setting.noisy)
        # Adam's steps have one size, be it noise or signal: tried on pooled features, SGD reached 61 %, Adam 43.
        return tuned, replace(plan, batch_size=PRIVATE_BATCH, optimizer="sgd")
    if way == "head-int8":
        return Finetune(train="head", epochs=setting.shared, learning_rate=5e-3), plan
    if way == "many":
        return Finetune(epochs=0.5, learning_rate=setting.together), plan
    if way == "fedavg":
        return Finetune(epochs=setting.shared, learning_rate=setting.together), plan
    return Finetune(epochs=setting.epochs, learning_rate=setting.rate), plan


def by_client(model: Model, parts: dict[str, Dataset]) -> dict[str, float]:
    """Accuracy on each client's rows."""
    return {name: Local(part).quality(model) for name, part in parts.items() if len(part.select)}


def federated(
    way: str, model: Model, parts: dict[str, Dataset], setting: Setting, seed: int
) -> tuple[Model, Federated]:
    """A model trained over rounds, and its run."""
    codec = Int8() if way.endswith("int8") else Full()
    tuned, plan = technique(way, setting, seed)
    budget = way.partition("private-")[2]
    run = Federated(
        [Client(n, p) for n, p in parts.items()],
        rounds=Rounds(round(tuned.epochs if budget else 2 * tuned.epochs)),
        travel=Travel(codec),
        privacy=RowLevel(float(budget)) if budget not in ("", "off") else None,
    )
    return tuned(model, run, plan), run


def measured(name: str, data: Path, scale: float) -> Cell:
    """One cell."""
    kind, way, number = name.split("/")
    setting, seed = SETTINGS[kind], int(number)
    rows = cut(setting, data, seed, scale)
    clients = round(MANY * min(1.0, max(scale, 0.1))) if way == "many" else 10
    parts = datasets(rows, partition(kind, seed, clients))
    labels = tuple(sorted({*(rows.train.label or ()), *(rows.select.label or ())}))
    model = pretrained("starter", Classify(labels), setting.max_length, seed)
    tuned, plan = technique(way, setting, seed)
    base, began = peak(), time.monotonic()
    up = down = rounds = 0
    moved = 0.0
    if way == "alone":
        scores = {n: Local(p).quality(tuned(model, Local(p), plan)) for n, p in parts.items() if len(p.select)}
    elif way == "pooled":
        scores = by_client(tuned(model, Local(rows), plan), parts)
    else:
        made, run = federated(way, model, parts, setting, seed)
        up, down, moved = run.report.rounds[0].up, run.report.rounds[0].down, run.report.moved
        rounds = len(run.report.rounds)
        scores = {s.client: s.quality for s in run.report.standings if s.quality is not None}
        if way == "many":
            scores = by_client(made, parts)
    asked = {n: len(p.select) for n, p in parts.items()}
    where = machine(torch.get_num_threads())
    accuracy = sum(scores[n] * asked[n] for n in scores) / sum(asked[n] for n in scores)
    return Cell(
        name,
        round(accuracy, 5),
        {n: round(q, 4) for n, q in scores.items()},
        {n: len(p.train) for n, p in parts.items()},
        up,
        down,
        round(time.monotonic() - began, 1),
        round(base, 1),
        round(peak(), 1),
        tuned.epochs,
        rounds,
        round(moved, 5),
        where.commit,
        where.date,
        where.threads,
    )


def cells() -> list[str]:
    """Names of all cells; what decides most comes first."""
    found = [f"{kind}/{way}/{seed}" for seed in SEEDS for way in WAYS[:-1] for kind in SETTINGS]
    private = [f"{kind}/private-{EPSILONS[0]}/{seed}" for seed in SEEDS for kind in SETTINGS]
    others = [f"{kind}/{way}/0" for way in (WAYS[-1], *(f"private-{e}" for e in EPSILONS[1:])) for kind in SETTINGS]
    return [*found, "banking77/many/0", *private, *others]


def load(path: Path) -> dict[str, Cell]:
    """Cells that are done, by name."""
    if not path.exists():
        return {}
    return {c["name"]: Cell(**c) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]}


def save(path: Path, done: dict[str, Cell], scale: float) -> None:
    """Write all cells; whole or not at all."""
    about = {
        "machine": asdict(machine(torch.get_num_threads())),
        "scale": scale,
        "settings": {name: asdict(s) for name, s in SETTINGS.items()},
        "cells": [asdict(done[name]) for name in cells() if name in done],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".new").replace(path)


def show(done: dict[str, Cell]) -> None:
    """The figures of the issue, from what is there."""
    for kind in SETTINGS:
        for way in (*WAYS, *(f"private-{e}" for e in EPSILONS)):
            found = [done[f"{kind}/{way}/{s}"] for s in SEEDS if f"{kind}/{way}/{s}" in done]
            if not found:
                continue
            mean = float(np.mean([c.accuracy for c in found]))
            worst = float(np.mean([min(c.clients.values()) for c in found]))
            sent = (found[0].up + found[0].down) / 1e6
            took = sum(c.seconds for c in found)
            print(
                f"{kind:10} {way:10} {len(found)} seeds: accuracy {mean:.4f}, worst client {worst:.4f}, "
                f"{sent:9.2f} MB a round, {took:.0f} s"
            )
        for seed in SEEDS:
            named = {way: done.get(f"{kind}/{way}/{seed}") for way in WAYS}
            together, pooled, alone, small = (named[w] for w in ("fedavg", "pooled", "alone", "lora-int8"))
            said = [f"{kind} seed {seed}:"]
            if together and pooled:
                said.append(f"fedavg - pooled {100 * (together.accuracy - pooled.accuracy):+.2f} points;")
            if together and alone:
                at = min(together.clients, key=lambda n: together.clients[n])
                said.append(f"worst client {at} {together.clients[at]:.4f}, alone {alone.clients[at]:.4f};")
            if together and small:
                ratio = (together.up + together.down) / (small.up + small.down)
                points = 100 * (small.accuracy - together.accuracy)
                said.append(f"lora-int8 sends 1/{ratio:.0f} of the same fit's fp32 at {points:+.2f} points")
            if len(said) > 1:
                print(" ".join(said))
    many = done.get("banking77/many/0")
    if many:
        print(
            f"{len(many.rows)} clients: peak {many.peak_mb:.0f} MB, of which model, rows, libraries {many.base_mb:.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="cells whose name has this in it")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after that")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cell", help="make this one here and print it")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.cell:
        print(json.dumps(asdict(measured(given.cell, given.data, given.scale))))
        return
    began = time.monotonic()
    done = load(given.json)
    for name in [c for c in cells() if given.only in c and c not in done]:
        if time.monotonic() - began > 60 * given.minutes:
            break
        options = [f"--{k}={getattr(given, k)}" for k in ("data", "scale", "threads")]
        made = subprocess.run(
            [sys.executable, __file__, f"--cell={name}", *options], check=True, capture_output=True, text=True
        )
        done[name] = Cell(**json.loads(made.stdout.splitlines()[-1]))
        save(given.json, done, given.scale)
        print(f"{name}: {done[name].accuracy:.4f} in {done[name].seconds:.0f} s", flush=True)
    show(done)


if __name__ == "__main__":
    main()

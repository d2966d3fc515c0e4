"""What parallel runs gain, on this machine: seconds per step, in turns, medians.

    python benchmarks/runs.py parallel [--rounds 5] [--steps 12] [--batch 64] [--model starter] [--embeddings]

One thread per process, each on a core of its own; synthetic rows of 20 words; fp32. A step is one of `Finetune`:
embeddings are frozen unless `--embeddings`. `parallel` compares two processes with one, and with two that each train on
half of a batch and never speak (what this machine's cores allow), and, while another program
takes half of the second core, shares by measured speed with equal ones. Results are merged by key into
benchmarks/results/runs.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.loss import Supervised
from netweight.measure import machine
from netweight.model import Model, pretrained
from netweight.reporter import Silent
from netweight.run import Local, Parallel, Pool, Setup
from netweight.seams import Seams
from netweight.task import Classify
from netweight.techniques.finetune import freeze_embeddings
from netweight.train import Plan

RESULTS = Path(__file__).parent / "results" / "runs.json"
_TEXT = (
    "the a my it was is not very too good bad late early soft broken cheap great dress shoe coat lamp parcel shop "
    "size colour price order money back again never always week day month box paper zip button love hate return"
)
WORDS = tuple(_TEXT.split())
WORDS_OF_A_ROW = 20
_FIRST = 3  # steps that are left out: memory is taken
_SETTLED = 16  # steps after which shares have found their place


class Times(Silent):
    """When each step ended."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def step(self, step: int, loss: float, rate: float) -> None:
        """Keep the time."""
        self.at.append(time.perf_counter())


@dataclass(frozen=True)
class Given:
    """What is trained: model, rows and plan."""

    model: Model
    data: Dataset
    plan: Plan

    def seconds(self, pool: Pool, steps: int, skip: int, balance: bool = False) -> list[float]:
        """Of each step after the first `skip`."""
        times = Times()
        epochs = steps * self.plan.batch_size / len(self.data.train)
        plan = replace(self.plan, epochs=epochs, reporter=times)
        run = Parallel(self.data, setup=Setup(balance=balance), pool=pool)
        run.fit(self.model, Supervised(self.model.task), plan)
        run.close()
        return [float(s) for s in np.diff(times.at)[skip - 1 :]]


@dataclass(frozen=True)
class Apart:
    """For each process: train by itself. Gives the median seconds of a step after the first `skip`, of the slowest."""

    model: Model
    plan: Plan
    skip: int

    def __call__(self, local: Local) -> dict[str, Tensor]:
        times = Times()
        local.seams = Seams()
        local.fit(self.model, Supervised(self.model.task), replace(self.plan, reporter=times))
        median = torch.tensor(statistics.median(np.diff(times.at)[self.skip - 1 :].tolist()))
        dist.all_reduce(median, dist.ReduceOp.MAX)
        return {"seconds": median}


def rows(n: int, seed: int = 0, words: int = WORDS_OF_A_ROW) -> Rows:
    """Distinct texts of so many words, with labels of two kinds."""
    rng = np.random.default_rng(seed)
    texts = tuple(" ".join(rng.choice(WORDS, words)) for _ in range(n))
    return Rows(texts, tuple("good" if i % 2 else "bad" for i in range(n)))


def given(options: argparse.Namespace) -> Given:
    """The model and rows that the options ask for."""
    model = pretrained(options.model, Classify(("bad", "good")))
    freeze_embeddings(model.network, not options.embeddings)  # type: ignore[arg-type]
    made = rows(40 * options.batch)
    few = made.take(range(10))
    return Given(model, Dataset(made, few, few, Sealed(few)), Plan(batch_size=options.batch, precision="fp32"))


@contextmanager
def busy(core: int) -> Iterator[None]:
    """A program that takes whatever it gets of a core."""
    pin = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", pin])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def parallel(options: argparse.Namespace) -> dict[str, Any]:
    """Two processes against one; equal shares against measured ones beside a busy program."""
    what = given(options)
    one, two, equal, measured, apart = (list[float]() for _ in range(5))
    half = replace(what.plan, batch_size=options.batch // 2)
    half = replace(half, epochs=options.steps * half.batch_size / len(what.data.train))
    with ExitStack() as stack:
        single, double = (stack.enter_context(Pool(n, pin=True)) for n in (1, 2))
        for _ in range(options.rounds):
            one += what.seconds(single, options.steps, _FIRST)
            two += what.seconds(double, options.steps, _FIRST)
            with Parallel(what.data, pool=double) as run:
                apart.append(float(run._do(Apart(what.model, half, _FIRST))["seconds"]))
        with busy(sorted(os.sched_getaffinity(0))[1]):
            for _ in range(options.rounds):
                equal += what.seconds(double, options.steps, _FIRST)
                measured += what.seconds(double, options.steps + _SETTLED, _SETTLED, balance=True)
    stated = {
        "model": options.model,
        "batch": options.batch,
        "embeddings": "trained" if options.embeddings else "frozen",
        "trained parameters": sum(p.numel() for p in what.model.network.parameters() if p.requires_grad),
        "rows": "synthetic, 20 words",
        "rounds": options.rounds,
        "steps": options.steps,
    }
    a, b, c, d, e = (statistics.median(times) for times in (one, two, equal, measured, apart))
    ends = {"seconds of one": a, "seconds of two": b, "seconds of two that never speak": e}
    return {
        "parallel": {**stated, **ends, "speed-up": a / b, "speed-up without a word": a / e},
        "heterogeneous": {**stated, "seconds of equal shares": c, "seconds of measured shares": d, "speed-up": c / d},
    }


def keep(found: dict[str, Any], path: Path) -> None:
    """Merge by key into the file of results."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known |= {key: value | {"machine": asdict(machine(1))} for key, value in found.items()}
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("parallel", help="two processes against one; unequal speeds")
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--steps", type=int, default=12)
    asked.add_argument("--batch", type=int, default=64)
    asked.add_argument("--model", default="starter")
    asked.add_argument("--embeddings", action="store_true", help="train them as well")
    asked.add_argument("--json", type=Path, default=RESULTS)
    asked.set_defaults(run=parallel)
    options = parser.parse_args()
    found = options.run(options)
    print(json.dumps(found, indent=1))
    keep(found, options.json)


if __name__ == "__main__":
    main()

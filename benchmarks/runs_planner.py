"""The memory that `netweight plan` predicts, beside what processes take, on this machine:

    python benchmarks/runs_planner.py [--model starter] [--batch 32] [--length 128] [--steps 3] [--json FILE]

For each strategy two figures, of the process that takes most, from the beginning of a fit to the end of its last step:

allocated: the most bytes of tensors at once, from the profiler's record of each allocation of torch. This is what the
planner predicts, and what a graphics card's allocator would count; it depends neither on load nor on the C library.
resident: the highest resident memory (VmHWM, reset through /proc/self/clear_refs) above what there was, after freed
memory was given back (malloc_trim) and with blocks from 64 kB on mapped one by one, so that freed ones do not count.
It has more than tensors: scratch memory of matrix products, buffers of gloo, heaps. A first fit of the same kind, the
one that is profiled, has loaded what is loaded once.

The model as it was given lies in each process besides, and is in neither figure. Rows are of full length; fp32, AdamW,
all parameters trained, dropout as the model has it. Two processes (local: one), one thread each. Results are merged
into benchmarks/results/runs.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from runs import RESULTS, keep, rows
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from netweight.data import Dataset
from netweight.data.rows import Sealed
from netweight.encode import TextEncoder
from netweight.loss import Supervised
from netweight.model import Model, pretrained
from netweight.reporter import Silent
from netweight.run import Local, Parallel, Pool, Setup
from netweight.run.commands import Strategy
from netweight.run.planner import Job, needs
from netweight.run.strategies import seams_of
from netweight.seams import Seams
from netweight.task import Classify
from netweight.train import Plan

_MAPPED = (-3, 1 << 16)  # glibc's M_MMAP_THRESHOLD, bytes
CELLS: tuple[tuple[Literal["local"] | Strategy, bool], ...] = (
    ("local", False),
    ("ddp", False),
    ("fsdp", False),
    ("fsdp", True),
    ("tensor", False),
    ("tensor", True),
    ("pipeline", False),
    ("pipeline", True),
)


class Allocated(Silent):
    """The most bytes of tensors at once, from now to the end of a step."""

    def __init__(self, steps: int) -> None:
        self.steps, self.peak = steps, 0
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.start()

    def step(self, step: int, loss: float, rate: float) -> None:
        """Count after the last one."""
        if step == self.steps:
            self.profile.stop()
            assert self.profile.profiler is not None
            self.peak = highest(self.profile.profiler.kineto_results.experimental_event_tree())


class Resident(Silent):
    """The highest resident memory above that of now, to the end of a step."""

    def __init__(self, steps: int) -> None:
        self.steps, self.peak = steps, 0
        gc.collect()
        libc = ctypes.CDLL(None)
        libc.mallopt(*_MAPPED)
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before = _status("VmRSS")

    def step(self, step: int, loss: float, rate: float) -> None:
        """Look after the last one."""
        if step == self.steps:
            self.peak = _status("VmHWM") - self.before


def highest(tree: Any) -> int:
    """The most bytes at once. What another thread frees (those of gloo do) is not recorded; it is known to be free when
    its place is taken again."""
    changes, now, most = list[Any](), 0, 0
    while tree:
        changes += [e for e in tree if e.tag == _EventType.Allocation]
        tree = [child for e in tree for child in e.children]
    there: dict[int, int] = {}
    for change in sorted(changes, key=lambda e: e.start_time_ns):
        _, fields = change.typed
        now -= there.pop(fields.ptr, 0)
        if fields.alloc_size > 0:
            there[fields.ptr] = fields.alloc_size
            now += fields.alloc_size
        most = max(most, now)
    return most


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


@dataclass(frozen=True)
class Peak:
    """For each process: train some steps. Gives what each took at most, in bytes."""

    model: Model
    plan: Plan
    steps: int
    strategy: Literal["local"] | Strategy
    setup: Setup
    resident: bool = False

    def __call__(self, local: Local) -> dict[str, Tensor]:
        alone = self.strategy == "local"
        local.seams = Seams() if alone else seams_of(self.strategy, self.setup, torch.device("cpu"), None)  # type: ignore[arg-type]
        count = (Resident if self.resident else Allocated)(self.steps)
        local.fit(self.model, Supervised(self.model.task), replace(self.plan, reporter=count))
        every = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size())]
        dist.all_gather(every, torch.tensor([count.peak]))
        return {"peak": torch.cat(every)}


def peaks(
    data: Dataset, model: Model, strategy: Literal["local"] | Strategy, setup: Setup, pool: Pool, batch: int, steps: int
) -> tuple[list[int], list[int]]:
    """Bytes allocated, and resident, in each process of the pool."""
    plan = Plan(batch_size=batch, precision="fp32", epochs=steps * batch / len(data.train))
    command = Peak(model, plan, steps, strategy, setup)
    with Parallel(data, pool=pool) as run:
        both = [run._do(replace(command, resident=resident))["peak"].tolist() for resident in (False, True)]
    return both[0], both[1]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    model = pretrained(options.model, Classify(("bad", "good")))
    # As many words as tokens: the encoder cuts what is too long.
    model = replace(model, encoder=TextEncoder(model.encoder.definition, options.length))
    made = rows(options.steps * options.batch, words=options.length)
    few = made.take(range(10))
    data = Dataset(made, few, few, Sealed(few))
    cells: list[dict[str, Any]] = []
    with Pool(1) as one, Pool(2) as two:
        for strategy, again in CELLS:
            job = Job(options.batch, options.length, device="cpu", activation_checkpointing=again)
            (need,) = (n for n in needs(model.network, 2, job) if n.strategy == strategy)
            setup = Setup(balance=False, activation_checkpointing=again)
            pool = one if strategy == "local" else two
            allocated, resident = peaks(data, model, strategy, setup, pool, options.batch, options.steps)
            cells.append({"checkpointing": again, **asdict(need), "allocated": allocated, "resident": resident})
            print(json.dumps(cells[-1]), flush=True)
    stated = {"model": options.model, "batch": options.batch, "length": options.length, "steps": options.steps}
    keep({"planner": {**stated, "optimizer": "adamw", "precision": "fp32", "cells": cells}}, options.json)


if __name__ == "__main__":
    main()

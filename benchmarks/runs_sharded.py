"""What sharded runs hold and wait for, with two processes on this machine:

    python benchmarks/runs_sharded.py [--model starter] [--batch 32] [--steps 6] [--json FILE]

fsdp: bytes of parameters, gradients and optimizer state that the process with the most holds after a step (AdamW, fp32,
all parameters trained), against one process that holds all. pipeline: the part of its steps that a process idles, on
average over both stages, against (p - 1) / (m + p - 1) for p stages and m micro-batches, and the time that the stages
compute. sent: bytes of a step that cross the loopback device, for each process, under every strategy.

One thread a process, each on a core of its own; the rows of `runs.py`. Results are merged into
benchmarks/results/runs.json.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from runs import RESULTS, WORDS_OF_A_ROW, Given, given, keep
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from netweight.loss import Supervised
from netweight.model import Model
from netweight.run import Local, Parallel, Pool, Setup
from netweight.run.commands import Strategy
from netweight.run.pipelined import Pipelined
from netweight.run.strategies import seams_of
from netweight.seams import Seams
from netweight.train import Plan

MICRO = (2, 4, 8)


def crossed() -> int:
    """Bytes that have crossed the loopback device so far."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[0])


def bytes_of(tensor: Tensor) -> int:
    """Of this process's part."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def fitted(local: Local, model: Model, plan: Plan, seams: Seams) -> None:
    """A fit with these seams; the model is thrown away."""
    local.seams = seams
    local.fit(model, Supervised(model.task), plan)


@dataclass(frozen=True)
class Held:
    """For each process: train, then count what is held. Gives parameters, gradients and optimizer state, in bytes, of
    the process with the most."""

    model: Model
    plan: Plan
    strategy: Strategy

    def __call__(self, local: Local) -> dict[str, Tensor]:
        seams = seams_of(self.strategy, Setup(), torch.device("cpu"), None)
        finish, found = seams.finish, list[float]()

        def count(network: nn.Module) -> None:
            held = list(network.parameters())
            there = [o for o in gc.get_objects() if isinstance(o, torch.optim.Optimizer)]
            moments = [t for o in there for state in o.state.values() for t in state.values() if t.ndim]
            gradients = [p.grad for p in held if p.grad is not None]
            found[:] = [float(sum(map(bytes_of, part))) for part in (held, gradients, moments)]
            finish(network)

        seams.finish = count  # type: ignore[method-assign]
        fitted(local, self.model, self.plan, seams)
        every = [torch.zeros(3) for _ in range(dist.get_world_size())]
        dist.all_gather(every, torch.tensor(found))
        return {"held": max(every, key=lambda part: float(part.sum()))}


@dataclass(frozen=True)
class Waited:
    """For each process: train in a pipeline. Gives seconds that each stage computed and idled (stages, 2)."""

    model: Model
    plan: Plan
    micro_batches: int

    def __call__(self, local: Local) -> dict[str, Tensor]:
        seams = Pipelined(self.micro_batches, torch.device("cpu"))
        fitted(local, self.model, self.plan, seams)
        every = [torch.zeros(2) for _ in range(dist.get_world_size())]
        dist.all_gather(every, torch.tensor([seams.busy, seams.idle]))
        return {"seconds": torch.stack(every)}


def sent(what: Given, plan: Plan, strategy: Strategy) -> float:
    """Bytes that each of two processes sends in a step: from fits of some steps, and of twice as many."""
    loss = Supervised(what.model.task)
    totals = []
    with Pool(2) as pool, Parallel(what.data, strategy=strategy, setup=Setup(balance=False), pool=pool) as run:
        run.fit(what.model, loss, plan)
        for times in (1, 2):
            before = crossed()
            run.fit(what.model, loss, replace(plan, epochs=times * plan.epochs))
            totals.append(crossed() - before)
    steps = plan.epochs * len(what.data.train) / plan.batch_size
    return (totals[1] - totals[0]) / steps / 2


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.embeddings = True
    what = given(options)
    plan = Plan(batch_size=options.batch, precision="fp32", epochs=options.steps * options.batch / len(what.data.train))
    stated = {"model": options.model, "batch": options.batch, "steps": options.steps, "rows": "synthetic, 20 words"}

    def asked(processes: int, command: Any) -> Tensor:
        with Pool(processes, pin=True) as pool, Parallel(what.data, pool=pool) as run:
            (found,) = run._do(command).values()
        return found

    one, two = (asked(n, Held(what.model, plan, "fsdp" if n > 1 else "ddp")).tolist() for n in (1, 2))
    names = ("parameters", "gradients", "optimizer state")
    found: dict[str, Any] = {
        "fsdp": {
            **stated,
            "bytes of one": dict(zip(names, one, strict=True)),
            "bytes of each of two": dict(zip(names, two, strict=True)),
            "ratio": sum(two) / sum(one),
        }
    }
    bubbles = []
    for m in MICRO:
        seconds = asked(2, Waited(what.model, plan, m))
        busy, idle = seconds[:, 0], seconds[:, 1]
        bubble = float((idle / (busy + idle)).mean())
        bubbles.append({"micro-batches": m, "measured": bubble, "theory": 1 / (m + 1), "seconds": seconds.tolist()})
    found["pipeline"] = {**stated, "stages": 2, "bubbles": bubbles}
    found["sent"] = {
        **stated,
        "tokens": options.batch * (WORDS_OF_A_ROW + 2),
        "trained": sum(p.numel() for p in what.model.network.parameters()),
        "layers": what.model.depth,
        "hidden": what.model.network.config.hidden_size,  # type: ignore[union-attr]
        "bytes": {strategy: sent(what, plan, strategy) for strategy in get_args(Strategy)},
    }
    print(json.dumps(found, indent=1))
    keep(found, options.json)


if __name__ == "__main__":
    main()

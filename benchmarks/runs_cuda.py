"""What a graphics card gains, and what it takes: seconds of a step, and memory beside what `netweight plan` predicts.

    python benchmarks/runs_cuda.py [--model starter] [--batch 32] [--length 128] [--steps 12] [--json FILE]

speed: median seconds of a fine-tuning step (rows of full length, all parameters trained) on the card in fp32 and bf16,
and on all cores of this machine in what pays there.
peaks: bytes of tensors at once (torch.cuda.max_memory_allocated above what there was), of the model that is named and
of an encoder of 24 layers and 1,024 columns with random weights, beside what the planner predicts. Strategies that
divide a network run as one process over NCCL.
too large: that encoder on a card of which a process may take only `--small` bytes, alone and with parameters in the
host's memory.
mixed: the card and one core share batches, equally and by measured speed, beside the card alone.

Writes benchmarks/results/runs-cuda.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from runs import Given, Times, rows
from torch import Tensor
from transformers import AutoConfig, AutoModel

from netweight.data import Dataset
from netweight.data.rows import Sealed
from netweight.encode import TextEncoder
from netweight.loss import Supervised
from netweight.measure import cores, machine
from netweight.model import Model, pretrained
from netweight.network import Transformer
from netweight.reporter import Silent
from netweight.run import Local, Parallel, Pool, Setup
from netweight.run.group import device_of
from netweight.run.planner import Job, needs
from netweight.run.strategies import seams_of
from netweight.seams import Seams
from netweight.task import Classify
from netweight.train import Plan

RESULTS = Path(__file__).parent / "results" / "runs-cuda.json"
_FIRST = 4  # steps that are left out: memory is taken, kernels are chosen


class Peak(Silent):
    """The most bytes of tensors on the card above those of now, to the end of the last step."""

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before, self.bytes = torch.cuda.memory_allocated(), 0

    def step(self, step: int, loss: float, rate: float) -> None:
        """Look again."""
        self.bytes = torch.cuda.max_memory_allocated() - self.before


@dataclass(frozen=True)
class Fit:
    """Train some steps in a process of a pool, with `share` of the card's memory. Gives bytes, 0 where they were not
    enough."""

    model: Model
    plan: Plan
    strategy: str
    setup: Setup
    share: float = 1.0

    def __call__(self, local: Local) -> dict[str, Tensor]:
        torch.cuda.set_per_process_memory_fraction(self.share)
        device = device_of(0)
        alone = self.strategy == "local"
        local.seams = Seams(device) if alone else seams_of(self.strategy, self.setup, device, None)  # type: ignore[arg-type]
        count = Peak()
        try:
            local.fit(self.model, Supervised(self.model.task), replace(self.plan, reporter=count))
        except torch.cuda.OutOfMemoryError:
            count.bytes = 0
        torch.cuda.set_per_process_memory_fraction(1.0)
        return {"peak": torch.tensor([count.bytes])}


def large(encoder: TextEncoder) -> Model:
    """An encoder as large as BERT-large, with random weights."""
    config = AutoConfig.for_model(
        "bert",
        vocab_size=encoder.vocabulary,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    )
    task = Classify(("bad", "good"))
    small = pretrained("starter", task)
    return replace(small, encoder=encoder, network=Transformer(AutoModel.from_config(config), 2, "mean"))


def peaks(name: str, model: Model, data: Dataset, pool: Pool, batch: int, length: int) -> list[dict[str, Any]]:
    """Predicted and measured, strategy by strategy."""
    found = []
    for strategy, again in (("local", False), ("ddp", False), ("fsdp", False), ("fsdp", True)):
        for precision in ("fp32", "bf16"):
            job = Job(batch, length, device="cuda", activation_checkpointing=again, precision=precision)  # type: ignore[arg-type]
            (need,) = (n for n in needs(model.network, 1, job) if n.strategy == strategy)  # type: ignore[arg-type]
            plan = Plan(batch_size=batch, precision=precision, epochs=3 * batch / len(data.train))  # type: ignore[arg-type]
            setup = Setup(balance=False, activation_checkpointing=again)
            with Parallel(data, pool=pool) as run:
                peak = int(run._do(Fit(model, plan, strategy, setup))["peak"])
            cell = {"model": name, "checkpointing": again, "precision": precision, **asdict(need), "allocated": peak}
            print(json.dumps(cell), flush=True)
            found.append(cell)
    return found


def too_large(model: Model, data: Dataset, pool: Pool, batch: int, small: int) -> dict[str, Any]:
    """Whether a fit ends on a card of so many bytes: alone, and with parameters that wait in the host's memory."""
    share = small / torch.cuda.get_device_properties(0).total_memory
    plan = Plan(batch_size=batch, precision="bf16", epochs=3 * batch / len(data.train))
    ways = {
        "local": Setup(),
        "fsdp": Setup(activation_checkpointing=True),
        "fsdp with offload": Setup(activation_checkpointing=True, offload=True),
    }
    taken = {}
    for way, setup in ways.items():
        with Parallel(data, pool=pool) as run:
            taken[way] = int(run._do(Fit(model, plan, way.split()[0], setup, share))["peak"])
        print(f"too large: {way} {taken[way]}", flush=True)
    return {"bytes": small, "parameters": sum(p.numel() for p in model.network.parameters()), "taken": taken}


def step(run: Callable[[], Local], model: Model, plan: Plan, steps: int) -> float:
    """Median seconds of a step."""
    times, local = Times(), run()
    torch.cuda.synchronize()
    epochs = steps * plan.batch_size / len(local.data.train)
    local.fit(model, Supervised(model.task), replace(plan, epochs=epochs, reporter=times))
    return statistics.median(b - a for a, b in zip(times.at[_FIRST - 1 :], times.at[_FIRST:], strict=False))


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--small", type=float, default=4e9)
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(cores())
    began = time.monotonic()
    model = pretrained(given.model, Classify(("bad", "good")))
    # As many words as tokens: the encoder cuts what is too long.
    model = replace(model, encoder=TextEncoder(model.encoder.definition, given.length))
    made = rows(given.steps * given.batch, words=given.length)
    few = made.take(range(10))
    data = Dataset(made, few, few, Sealed(few))
    plan = Plan(batch_size=given.batch)
    found: dict[str, Any] = {
        "card": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "machine": asdict(machine(cores())),
        "model": given.model,
        "batch": given.batch,
        "length": given.length,
    }
    found["speed"] = {
        "card, fp32": step(lambda: Local(data), model, replace(plan, precision="fp32"), given.steps),
        "card, bf16": step(lambda: Local(data), model, replace(plan, precision="bf16"), given.steps),
        "processor": step(lambda: Local(data, seams=Seams()), model, plan, 10),
    }
    print(json.dumps(found), flush=True)
    with Pool(1) as one:
        found["peaks"] = peaks(given.model, model, data, one, given.batch, given.length)
        big = large(model.encoder)
        found["peaks"] += peaks("24 layers of 1,024", big, data, one, given.batch, given.length)
        found["too large"] = too_large(big, data, one, given.batch, int(given.small))
        alone = Given(model, data, replace(plan, precision="fp32")).seconds(one, given.steps, _FIRST)
    with Pool(2) as two:
        mixed = Given(model, data, replace(plan, precision="fp32"))
        found["mixed"] = {
            "card": statistics.median(alone),
            "equal": statistics.median(mixed.seconds(two, given.steps, _FIRST)),
            "by speed": statistics.median(mixed.seconds(two, 4 * given.steps, 3 * given.steps, balance=True)),
        }
    print(json.dumps(found["mixed"]))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

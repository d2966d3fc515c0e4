"""How much memory each strategy of a parallel run needs in each process, before anything is started.

Parameters, gradients and optimizer state are counted from the shapes of the network, exactly. Activations are those of
a rehearsed step (`rehearsal`), and what a strategy gathers or sends is added. `benchmarks/runs_planner.py` compares the
peak with what processes took (docs/results.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from netweight.errors import OptionError
from netweight.model import positions
from netweight.network import Transformer
from netweight.run.commands import Strategy
from netweight.run.pipelined import owners
from netweight.run.rehearsal import Kept, rehearse
from netweight.run.tensor import cuts_of
from netweight.train import Optimizer

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16"]

# Numbers that an optimizer keeps for each parameter.
_STATE: dict[Optimizer, int] = {"adamw": 2, "adam": 2, "sgd": 1, "rmsprop": 1}
_FLOAT = 4  # weights, gradients and moments are fp32; autocast casts on the fly
_ROOM = 0.9  # of a device's memory: the rest is for the context, buffers and fragments


@dataclass(frozen=True)
class Job:
    """What is to be trained, and how. `length`: tokens of a row, padding included. `device`: what attention keeps
    differs between a graphics card and a CPU; "auto" is what a run on this machine would use."""

    batch: int = 32
    length: int = 128
    optimizer: Optimizer = "adamw"
    precision: Precision = "fp32"
    device: Device = "auto"
    micro_batches: int = 4
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", Optimizer), ("precision", Precision), ("device", Device)):
            if (given := getattr(self, name)) not in get_args(allowed):
                raise OptionError(f"unknown {name} {given!r}; use {', '.join(get_args(allowed))}.")
        for name in ("batch", "length", "micro_batches"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; use 1 or more.")


@dataclass(frozen=True)
class Need:
    """Bytes in the process that needs most. `working`: what is gathered or sent. `total`: at the peak of a step, which
    is less than the sum, since gradients come as activations go. `refused` says why a strategy does not work on this
    network; all else is then zero."""

    strategy: Literal["local"] | Strategy
    processes: int
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    working: int = 0
    total: int = 0
    refused: str = ""

    @property
    def held(self) -> int:
        """Parameters, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer

    def fits(self, memory: int) -> bool:
        """Whether a device of so many bytes holds it, with a tenth left over."""
        return not self.refused and self.total <= _ROOM * memory


def needs(network: nn.Module, processes: int, job: Job) -> list[Need]:
    """What each strategy needs; the network may lie on torch's meta device, where it takes no memory.

    Raises OptionError for a network without layers, for rows that are longer than it takes, and for fewer than two
    processes.
    """
    if not isinstance(network, Transformer):
        raise OptionError(f"the planner divides transformers, and this network is a {type(network).__name__}.")
    if processes < 2:
        raise OptionError(f"{processes} processes cannot divide anything; plan for 2 or more.")
    longest = positions(network.backbone)
    if longest is not None and job.length > longest:
        raise OptionError(f"length is {job.length}, and this model takes {longest} tokens at most; use that or less.")
    made: list[tuple[Literal["local"] | Strategy, Callable[[Transformer, int, Job], Need]]] = [
        ("local", _local),
        ("ddp", _ddp),
        ("fsdp", _fsdp),
        ("tensor", _tensor),
        ("pipeline", _pipeline),
    ]
    found = []
    for strategy, count in made:
        try:
            found.append(count(network, processes, job))
        except OptionError as refusal:
            found.append(Need(strategy, processes, refused=str(refusal)))
    return found


def recommended(found: Iterable[Need], memory: int) -> Need | None:
    """The one to use on devices of so much memory: of those that fit, the first of ddp, fsdp, tensor and pipeline, the
    order in which they send more on ordinary networks (docs/scaling.md). None where none fits."""
    return next((need for need in found if need.strategy != "local" and need.fits(memory)), None)


@dataclass(frozen=True)
class _Held:
    """Bytes of parameters, gradients and optimizer state in a process; `inside`: of gradients inside of layers."""

    parameters: int
    gradients: int
    optimizer: int
    inside: int


def _held(network: Transformer, job: Job, part: Callable[[str, nn.Parameter], int]) -> _Held:
    """Where a process holds `part` numbers of each parameter."""
    every = trained = inside = 0
    for name, parameter in network.named_parameters():
        held = part(name, parameter)
        every += held
        trained += held if parameter.requires_grad else 0
        inside += held if parameter.requires_grad and name.startswith(f"{network.stack}.") else 0
    return _Held(_FLOAT * every, _FLOAT * trained, _FLOAT * _STATE[job.optimizer] * trained, _FLOAT * inside)


def _kept(network: Transformer, job: Job, rows: int, ways: int = 1) -> Kept:
    fused = job.device == "cuda" or (job.device == "auto" and torch.cuda.is_available())
    return rehearse(network, rows, job.length, ways, job.precision == "bf16", fused)


def _inside(kept: Kept, layers: int, again: bool) -> int:
    """Activations of layers when the forward pass has ended. Of those that are computed again the input stays, and all
    of one at a time comes back."""
    return layers * kept.state + kept.layer if again else layers * kept.layer


def _need(
    strategy: Literal["local"] | Strategy, processes: int, held: _Held, kept: Kept, inside: int, sent: tuple[int, int]
) -> Need:
    """The most of three moments: the forward pass has ended; the backward pass is at the first layer; all gradients are
    there. `sent`: what is gathered or sent in the first two, and in the last."""
    activations = kept.before + inside + kept.behind + kept.spike
    first = kept.before + kept.state + kept.layer + kept.spike + held.inside
    moving = max(max(activations, first) + sent[0], held.gradients + sent[1])
    total = held.parameters + held.optimizer + moving
    parts = (held.parameters, held.gradients, held.optimizer, activations)
    return Need(strategy, processes, *parts, max(sent), total)


def _local(network: Transformer, processes: int, job: Job) -> Need:
    held, kept = _held(network, job, lambda _, p: p.numel()), _kept(network, job, job.batch)
    return _need("local", 1, held, kept, _inside(kept, len(network.layers()), False), (0, 0))


def _ddp(network: Transformer, processes: int, job: Job) -> Need:
    held, kept = _held(network, job, lambda _, p: p.numel()), _kept(network, job, math.ceil(job.batch / processes))
    # Gradients travel as one vector, which stays from step to step.
    sent = (held.gradients, held.gradients)
    return _need("ddp", processes, held, kept, _inside(kept, len(network.layers()), False), sent)


def _fsdp(network: Transformer, processes: int, job: Job) -> Need:
    def share(_: str, parameter: nn.Parameter) -> int:
        first = parameter.shape[0]
        return math.ceil(first / processes) * (parameter.numel() // max(first, 1))

    held, kept = _held(network, job, share), _kept(network, job, math.ceil(job.batch / processes))
    inside = {id(p) for p in network.layers().parameters()}
    layer = _FLOAT * sum(p.numel() for p in network.layers()[0].parameters())
    root = _FLOAT * sum(p.numel() for p in network.parameters() if id(p) not in inside)
    trained = _FLOAT * sum(p.numel() for p in network.parameters() if id(p) not in inside and p.requires_grad)
    # Tables, norms and head stay gathered through a step. Of layers one is there, and the next on its way; its
    # gradients are there twice, once as they are sent. So are those of the root in the end.
    sent = (root + 3 * layer, root + 2 * trained)
    again = _inside(kept, len(network.layers()), job.activation_checkpointing)
    return _need("fsdp", processes, held, kept, again, sent)


def _tensor(network: Transformer, processes: int, job: Job) -> Need:
    cuts = cuts_of(network, processes)

    def share(name: str, parameter: nn.Parameter) -> int:
        cut = cuts.get(name)
        return parameter.numel() // (processes if cut and cut.dim is not None else 1)

    held, kept = _held(network, job, share), _kept(network, job, job.batch, processes)
    again = _inside(kept, len(network.layers()), job.activation_checkpointing)
    # What is added up is copied before it is sent.
    return _need("tensor", processes, held, kept, again, (kept.state, 0))


def _pipeline(network: Transformer, processes: int, job: Job) -> Need:
    owner = owners(network, processes)
    kept = _kept(network, job, math.ceil(job.batch / job.micro_batches))
    found = []
    for stage in range(processes):
        held = _held(network, job, lambda name, p, stage=stage: p.numel() if owner[name] == stage else 0)  # type: ignore[misc]
        layers = {
            name.split(".")[len(network.stack.split("."))]
            for name, s in owner.items()
            if s == stage and name.startswith(f"{network.stack}.")
        }
        flying = min(job.micro_batches, processes - stage)
        first, last = stage == 0, stage == processes - 1
        again = job.activation_checkpointing
        each = len(layers) * (kept.state if again else kept.layer)
        each += (kept.before if first else kept.state) + (kept.behind if last else 0)
        activations = flying * each + (kept.layer if again else 0) + kept.spike
        # What is sent, forward and backward, stays until the step has ended.
        sent = (2 - first - last) * job.micro_batches * kept.state
        # Gradients of one micro-batch are there while others fly; those of the next are added one by one.
        mine = [p for name, p in network.named_parameters() if owner[name] == stage and p.requires_grad]
        largest = _FLOAT * max((p.numel() for p in mine), default=0) if job.micro_batches > 1 else 0
        moving = max(activations, activations - each + largest)
        parts = (held.parameters, held.gradients, held.optimizer)
        found.append(Need("pipeline", processes, *parts, activations, sent, sum(parts) + moving + sent))
    return max(found, key=lambda need: need.total)

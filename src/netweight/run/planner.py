"""How much memory each strategy of a parallel run needs in each process, before anything is started.

Parameters, gradients and optimizer state are counted from the shapes of the network, exactly. Activations follow
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (MLSys 2023), section 4, without the
attention maps, which fused attention does not keep: what a layer keeps for its gradient is, for each token, about nine
vectors of the hidden width and two of the width inside the feed-forward network for each matrix that goes up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from netweight.anatomy import blocks
from netweight.errors import OptionError
from netweight.network import Transformer
from netweight.run.commands import Strategy
from netweight.run.pipelined import owners
from netweight.run.tensor import cuts_of
from netweight.train import Optimizer, Precision

# Numbers that an optimizer keeps for each parameter.
_STATE: dict[Optimizer, int] = {"adamw": 2, "adam": 2, "sgd": 1, "rmsprop": 1}
_FLOAT = 4  # weights, gradients and moments are fp32; autocast casts on the fly
_ROOM = 0.9  # of a device's memory: the rest is for the context, buffers and fragments

# Vectors of the hidden width that a layer keeps for each token, and those of them that are made of heads.
_VECTORS = 9
_BY_HEADS = 4


@dataclass(frozen=True)
class Job:
    """What is to be trained, and how. `length`: tokens of a row, padding included; `memory`: bytes of a device."""

    batch: int = 32
    length: int = 128
    optimizer: Optimizer = "adamw"
    precision: Precision = "fp32"
    memory: int | None = None
    micro_batches: int = 4
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in _STATE:
            raise OptionError(f"unknown optimizer {self.optimizer!r}; use {', '.join(get_args(Optimizer))}.")
        for name in ("batch", "length", "micro_batches"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; use 1 or more.")


@dataclass(frozen=True)
class Need:
    """Bytes in the process that needs most. `working`: what is gathered or sent for a moment. `refused` says why a
    strategy does not work on this network; all else is then zero."""

    strategy: Literal["local"] | Strategy
    processes: int
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    working: int = 0
    refused: str = ""

    @property
    def held(self) -> int:
        """What stays from step to step: parameters, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """At the peak of a step."""
        return self.held + self.activations + self.working

    def fits(self, memory: int) -> bool:
        """Whether a device of so many bytes holds it, with a tenth left over."""
        return not self.refused and self.total <= _ROOM * memory


def needs(network: nn.Module, processes: int, job: Job) -> list[Need]:
    """What each strategy needs; the network may lie on torch's meta device, where it takes no memory.

    Raises OptionError for a network without layers, and for fewer than two processes.
    """
    if not isinstance(network, Transformer):
        raise OptionError(f"the planner divides transformers, and this network is a {type(network).__name__}.")
    if processes < 2:
        raise OptionError(f"{processes} processes cannot divide anything; plan for 2 or more.")
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


def _held(network: Transformer, job: Job, part: Callable[[str, nn.Parameter], int]) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimizer state where a process holds `part` numbers of each parameter."""
    every = trained = 0
    for name, parameter in network.named_parameters():
        held = part(name, parameter)
        every += held
        trained += held if parameter.requires_grad else 0
    return _FLOAT * every, _FLOAT * trained, _FLOAT * _STATE[job.optimizer] * trained


def _activations(network: Transformer, job: Job, rows: float, layers: float, ways: int = 1) -> int:
    """Bytes that `layers` layers keep for the gradients of so many rows, where `ways` processes divide heads and
    neurons."""
    hidden = network.head.in_features
    block = blocks(network)[0]
    wide = (1 + len(block.up) * block.up_groups) * block.neurons
    inside = (_BY_HEADS * hidden + wide) / ways
    layer = (_VECTORS - _BY_HEADS) * hidden + inside
    # What is computed again needs its input for each layer, and all of one layer at a time.
    numbers = layers * hidden + layer if job.activation_checkpointing else layers * layer
    size = 2 if job.precision == "bf16" else _FLOAT
    return math.ceil(rows * job.length * (numbers + 3 * hidden) * size)


def _local(network: Transformer, processes: int, job: Job) -> Need:
    held = _held(network, job, lambda _, p: p.numel())
    return Need("local", 1, *held, _activations(network, job, job.batch, len(network.layers())))


def _ddp(network: Transformer, processes: int, job: Job) -> Need:
    held = _held(network, job, lambda _, p: p.numel())
    rows = math.ceil(job.batch / processes)
    # Gradients travel as one vector.
    return Need("ddp", processes, *held, _activations(network, job, rows, len(network.layers())), held[1])


def _fsdp(network: Transformer, processes: int, job: Job) -> Need:
    def share(_: str, parameter: nn.Parameter) -> int:
        first = parameter.shape[0]
        return math.ceil(first / processes) * (parameter.numel() // max(first, 1))

    held = _held(network, job, share)
    inside = {id(p) for p in network.layers().parameters()}
    layer = sum(p.numel() for p in network.layers()[0].parameters())
    root = sum(p.numel() for p in network.parameters() if id(p) not in inside)
    trained = sum(p.numel() for p in network.parameters() if id(p) not in inside and p.requires_grad)
    # Tables, norms and head stay gathered through a step, with their gradients; of layers one is, and the next.
    working = _FLOAT * (root + trained + 3 * layer)
    rows = math.ceil(job.batch / processes)
    return Need("fsdp", processes, *held, _activations(network, job, rows, len(network.layers())), working)


def _tensor(network: Transformer, processes: int, job: Job) -> Need:
    cuts = cuts_of(network, processes)

    def share(name: str, parameter: nn.Parameter) -> int:
        cut = cuts.get(name)
        return parameter.numel() // (processes if cut and cut.dim is not None else 1)

    held = _held(network, job, share)
    return Need("tensor", processes, *held, _activations(network, job, job.batch, len(network.layers()), processes))


def _pipeline(network: Transformer, processes: int, job: Job) -> Need:
    owner = owners(network, processes)
    rows = math.ceil(job.batch / job.micro_batches)
    found = []
    for stage in range(processes):
        held = _held(network, job, lambda name, p, stage=stage: p.numel() if owner[name] == stage else 0)  # type: ignore[misc]
        layers = {
            name.split(".")[len(network.stack.split("."))]
            for name, s in owner.items()
            if s == stage and name.startswith(f"{network.stack}.")
        }
        flying = min(job.micro_batches, processes - stage)
        found.append(Need("pipeline", processes, *held, _activations(network, job, rows * flying, len(layers))))
    return max(found, key=lambda need: need.total)

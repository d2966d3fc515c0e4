"""Which seams a strategy has."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
import torch.distributed as dist
from torch import nn

from netweight.anatomy import blocks
from netweight.errors import OptionError
from netweight.network import Transformer
from netweight.run import group
from netweight.run.commands import Setup, Strategy
from netweight.run.ddp import Ddp
from netweight.run.pipelined import Pipelined
from netweight.run.sharded import Fsdp
from netweight.run.tensor import TensorParallel, teams
from netweight.seams import Lost, Seams

# Strategies whose every process holds all that a fit goes on from.
WHOLE = ("ddp",)

_MICRO_BATCHES = 4


# Options of a setup, and the strategies that they are for.
_FOR = {
    "tensor": ("tensor",),
    "micro_batches": ("pipeline",),
    "activation_checkpointing": ("fsdp", "tensor", "pipeline"),
    "offload": ("fsdp",),
}


def check(strategy: Strategy, setup: Setup, processes: int) -> None:
    """Raises OptionError for a strategy that is not known, and for an option that it does not have or that does not fit
    so many processes."""
    if strategy not in get_args(Strategy):
        raise OptionError(f"unknown strategy {strategy!r}; use {', '.join(get_args(Strategy))}.")
    for option, strategies in _FOR.items():
        if getattr(setup, option) not in (None, False) and strategy not in strategies:
            raise OptionError(
                f"{option} is for strategy {' or '.join(strategies)}, not for {strategy!r}; leave it out."
            )
    if setup.tensor is not None:
        teams(processes, setup.tensor)
    if setup.micro_batches is not None and setup.micro_batches < 1:
        raise OptionError(f"micro_batches is {setup.micro_batches}; use 1 or more.")
    if setup.offload and (setup.device == "cpu" or not torch.cuda.is_available()):
        raise OptionError(
            "offload moves parameters from a device's memory to the host's, and this run computes on the CPU, where "
            "both are one; leave offload out."
        )


def workable(strategy: Strategy, setup: Setup, left: int, network: nn.Module | None) -> int:
    """How many of the processes that are left can divide the work; 0 where `tensor` asks for more than there are.

    Without `tensor` all of them divide the layers of the network, if one is given, so their number must divide them.
    """
    if strategy != "tensor":
        return left
    if setup.tensor is not None:
        return left - left % setup.tensor
    if not isinstance(network, Transformer):
        return left
    units = {count for block in blocks(network) for count in (block.heads, block.neurons)}
    return max((n for n in range(1, left + 1) if not any(count % n for count in units)), default=0)


def seams_of(strategy: Strategy, setup: Setup, device: torch.device, rejoin: Callable[[Lost], None] | None) -> Seams:
    """Seams of this process, which is in a group. Raises OptionError where some of the group have graphics cards and
    others not, and the strategy divides the network."""
    if strategy not in WHOLE and setup.device == "auto":
        _alike(strategy, torch.cuda.device_count(), group.beside(dist.get_world_size()))
        if device.type == "cuda" and "nccl" not in dist.get_backend_config():
            raise OptionError(
                f"{strategy} divides one network over processes that compute alike, and some machines of this run have "
                'a graphics card for each process and others not; use those that have, Setup(device="cpu"), or ddp, '
                "which mixes them."
            )
    if strategy == "fsdp":
        return Fsdp(device, setup.activation_checkpointing, setup.offload)
    if strategy == "tensor":
        return TensorParallel(setup.tensor, device, setup.activation_checkpointing, setup.timeout)
    if strategy == "pipeline":
        parts = _MICRO_BATCHES if setup.micro_batches is None else setup.micro_batches
        return Pipelined(parts, device, setup.activation_checkpointing, setup.timeout)
    return Ddp(device, setup.balance, rejoin)


def _alike(strategy: Strategy, cards: int, processes: int) -> None:
    if 0 < cards < processes:
        raise OptionError(
            f"{strategy} divides one network over processes that compute alike, and this machine has {processes} of "
            f'them and {cards} graphics card{"s" * (cards > 1)}; start {cards}, use Setup(device="cpu"), or ddp, which '
            "mixes them."
        )

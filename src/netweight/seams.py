"""Where a run may step into the optimizer loop (`train.py`). The defaults are what one process alone needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from netweight.errors import RunError
from netweight.loss import Batch, Loss

Ask = Callable[[nn.Module, Batch], Tensor]


class Source(Protocol):
    """Rows that the loop can draw from."""

    def __len__(self) -> int: ...
    def epoch(self, size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]: ...
    def batch(self, rows: NDArray[np.int64], rng: np.random.Generator, hide: float) -> Batch: ...


class Lost(RunError):
    """Raised by seams that wait for other processes: one of them is gone."""


@dataclass(frozen=True)
class State:
    """What a fit goes on from: tensors by name (model/, best/ and optimizer/), and its `_Progress` as JSON."""

    tensors: dict[str, Tensor]
    progress: str


class Seams:
    """The loop as one process alone runs it; runs override what is different for them.

    `device` is where the network computes. `lane` numbers the processes that share a batch: each draws its own dropout.
    The `first` of them writes checkpoints. What says "all" is called by all of them at the same place.
    """

    lane = 0
    first = True

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    @property
    def terms(self) -> str:
        """What here changes a fit: one does not go on from a checkpoint that was made under other terms."""
        return ""

    def random(self) -> AbstractContextManager[None]:
        """A block after which torch's generators are as they were before it."""
        return torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device])

    def admit(self, loss: Loss) -> None:
        """Raise OptionError for a loss that cannot be evaluated this way."""

    def prepare(self, network: nn.Module) -> None:
        """Move or divide the network, in place, before the optimizer sees its parameters."""
        network.to(self.device)

    def share(self, source: Source, rows: NDArray[np.int64], rng: np.random.Generator, hide: float) -> Batch:
        """This process's part of a global batch, on its device. Its `everywhere` adds up over all parts, so that a
        weighted mean (`loss.mean`) is divided by the weights of the whole batch."""
        return source.batch(rows, rng, hide).to(self.device)

    def backward(self, network: nn.Module, loss: Ask, batch: Batch, scale: float) -> float:
        """Add the gradients of scale * loss to those that are there; returns scale * loss. Plain, row by row (privacy),
        or a pipeline schedule."""
        value = loss(network, batch) * scale
        value.backward()
        return value.item()

    def sync(self, network: nn.Module, value: float) -> float:
        """Add up gradients, and the loss, over all."""
        return value

    def correct(self, network: nn.Module) -> None:
        """Change gradients before they are clipped and the step is made (SCAFFOLD, proximal)."""

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> None:
        """Scale gradients down to a norm over the network of `limit`; tables that are trained row by row are apart."""
        nn.utils.clip_grad_norm_(parameters, limit)

    def agree(self, value: float) -> float:
        """What the first of all says: of clocks, and of sums whose last bits differ."""
        return value

    def stretch(self, n: int) -> slice:
        """Which of n rows, or of n other things that are worked on one by one, this process takes."""
        return slice(0, n)

    def collect(self, mine: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """What each of all gives, in their order."""
        return [dict(mine)]

    def regroup(self, mine: State, at: tuple[int, int, int]) -> State:
        """After `Lost`: go on with the processes that are left, from the state of the one that is furthest. `at` is how
        far this one is: the steps that it made, the step after which quality was last asked, and the steps that it
        plans, which a look at the clock may have shortened in some processes only. Raises Lost where none can go on."""
        raise Lost("a process of this run is gone.")

    def gather(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole of tensors of which each of all holds a part, on the CPU; only the first need get them."""
        return {name: tensor.cpu() for name, tensor in held.items()}

    def scatter(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `gather`: this process's part of these tensors."""
        return {name: tensor.to(self.device) for name, tensor in whole.items()}

    def finish(self, network: nn.Module) -> None:
        """Undo `prepare` in place: the network is whole and plain again in every process, and on the CPU."""
        network.to("cpu")

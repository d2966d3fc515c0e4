"""Processes that share every batch: what all strategies of a parallel run have in common.

Each holds a part of the rows of a global batch. A weighted mean is divided by the sum of weights of all parts
(`loss.mean`), so adding up the gradients of the parts gives the gradient of one process that holds the whole batch,
whatever the sizes of the parts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from netweight.errors import OptionError
from netweight.loss import Batch
from netweight.seams import Seams, Source


class Processes(Seams):
    """This process among those of a `torch.distributed` group that hold different rows of each batch.

    Args:
        group: those processes; None for all that there are.
        device: where this one computes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        self.group = group
        self.lane = dist.get_rank(group)
        self.lanes = dist.get_world_size(group)
        self.first = dist.get_rank() == 0
        self.device = device or torch.device("cpu")
        self.speeds: Sequence[float] = [1.0] * self.lanes

    def share(self, source: Source, rows: NDArray[np.int64], rng: np.random.Generator, hide: float) -> Batch:
        sizes = shares(len(rows), self.speeds)
        end = sum(sizes[: self.lane + 1])
        mine = rows[end - sizes[self.lane] : end]
        # A process without rows must still take part in every sum: it takes one that does not count.
        batch = source.batch(mine if len(mine) else rows[:1], rng, hide)
        weight = batch.weight if len(mine) else torch.zeros_like(batch.weight)
        moved = {name: getattr(batch, name).to(self.device) for name in ("ids", "mask", "types", "targets")}
        teachers = tuple(t.to(self.device) for t in batch.teachers)
        return replace(batch, **moved, weight=weight.to(self.device), teachers=teachers, everywhere=self.everywhere)

    def everywhere(self, value: Tensor) -> Tensor:
        """The sum of a tensor over these processes, without gradient."""
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def agree(self, value: float) -> float:
        said = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(said, src=0)
        return float(said)


def shares(rows: int, speeds: Sequence[float]) -> list[int]:
    """How many of the rows each process takes, in proportion to its speed; they add up to `rows`.

    Cuts are rounded cumulative sums, so that nobody is more than one row off. Raises OptionError for speeds that are no
    positive numbers.
    """
    if not speeds or not all(np.isfinite(s) and s > 0 for s in speeds):
        raise OptionError(f"speeds of processes are {list(speeds)}; they must be positive numbers.")
    cuts = [round(rows * part / sum(speeds)) for part in accumulate(speeds)]
    return [end - begin for begin, end in zip([0, *cuts], cuts, strict=False)]

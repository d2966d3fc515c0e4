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
    """This process among all of a `torch.distributed` group.

    Args:
        device: where this one computes.
        lanes: parts that a batch is cut into; None: one for each process. Neighbours have the same one.

    `group` has one process of each lane; None: all that there are.
    """

    def __init__(self, device: torch.device | None = None, lanes: int | None = None) -> None:
        super().__init__(device)
        rank, size = dist.get_rank(), dist.get_world_size()
        self.lanes = size if lanes is None else lanes
        self.lane = rank * self.lanes // size
        self.group: dist.ProcessGroup | None = None
        self.first = rank == 0
        self.speeds: Sequence[float] = [1.0] * self.lanes

    def share(self, source: Source, rows: NDArray[np.int64], rng: np.random.Generator, hide: float) -> Batch:
        sizes = shares(len(rows), self.speeds)
        end = sum(sizes[: self.lane + 1])
        mine = sizes[self.lane]
        # All draw all: the same tokens are hidden as in one process; rows are padded alike, so that one costs the same
        # wherever it is, and tables of bigrams meet the same ones. A process without rows takes one that
        # does not count: it must take part in every sum.
        batch = source.batch(rows, rng, hide).part(slice(end - mine, end) if mine else slice(0, 1)).to(self.device)
        weight = batch.weight if mine else torch.zeros_like(batch.weight)
        return replace(batch, weight=weight, everywhere=self.everywhere)

    def everywhere(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the lanes, without gradient."""
        total = value.detach().clone()
        if self.lanes > 1:
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

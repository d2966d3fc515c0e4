"""Data parallel training: every process holds the whole network and some rows of each batch; gradients are added up.

DistributedDataParallel is not used: losses look inside the network and call its methods, which its wrapper hides, and
it waits forever for a gradient that one process has and another has not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from netweight.loss import Batch
from netweight.network import Network
from netweight.run.group import told, waiting
from netweight.run.processes import Processes
from netweight.seams import Lost, Source, State

_AGAIN = 5  # steps between looks at the speeds
_FIRST = 2  # steps that say nothing of speed: memory is taken, kernels are chosen
_NEWEST = 0.5  # weight of the latest steps in the average of seconds per row
_WORTH = 0.1  # shares stay as they are while no speed differs by more than this part
_SLOWEST = 0.05  # of the fastest: one that gets no rows at all would never be measured again


class Again(Lost):
    """The group is whole again, but some of it had not begun, or had ended: all begin anew."""


class Ddp(Processes):
    """This process among those that each hold the whole network.

    Args:
        device: where this one computes.
        balance: give each process the share of every batch that its measured speed deserves.
        rejoin: enters a new group after `Lost`; None where there is nobody who makes one.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        balance: bool = True,
        rejoin: Callable[[Lost], None] | None = None,
    ) -> None:
        super().__init__(device)
        self.balance, self.rejoin = balance, rejoin
        self.buffer: Tensor | None = None
        self._count()

    def _count(self) -> None:
        """Ranks as they are now; speeds are unknown."""
        self.lane, self.lanes = dist.get_rank(), dist.get_world_size()
        self.first = self.lane == 0
        self.speeds: Sequence[float] = [1.0] * self.lanes
        self.pace, self.steps, self.rows = 0.0, 0, 0
        self.latest: list[float] = []
        self.began = self.waited = 0.0

    def share(self, source: Source, rows: NDArray[np.int64], rng: np.random.Generator, hide: float) -> Batch:
        if not self.rows:
            self.began, self.waited = time.perf_counter(), 0.0
        batch = super().share(source, rows, rng, hide)
        self.rows += len(batch)
        return batch

    def everywhere(self, value: Tensor) -> Tensor:
        began = time.perf_counter()
        with waiting():
            total = super().everywhere(value)
        self.waited += time.perf_counter() - began
        return total

    def agree(self, value: float) -> float:
        with waiting():
            return super().agree(value)

    def sync(self, network: nn.Module, value: float) -> float:
        seconds = time.perf_counter() - self.began - self.waited
        self.steps += 1
        if self.steps > _FIRST and self.rows:
            self.latest.append(max(seconds / self.rows, 1e-9))
        if self.latest and self.steps % _AGAIN == 0:
            # Of the latest steps the median: one in which the machine was busy must not move the rows.
            each, self.latest = median(self.latest), []
            self.pace = each if not self.pace else (1 - _NEWEST) * self.pace + _NEWEST * each
        self.rows = 0
        sparse = network.sparse if isinstance(network, Network) else frozenset()
        with waiting():
            total = self._added(network, sparse, value)
            for name, parameter in network.named_parameters():
                if name in sparse and parameter.requires_grad:
                    parameter.grad = _sparse_sum(parameter, self.lanes)
        return total

    def _added(self, network: nn.Module, sparse: frozenset[str], value: float) -> float:
        """Dense gradients, loss and paces travel as one vector. A gradient that nobody has stays None: an optimizer
        that meets zeros instead would still decay the weight."""
        dense = [p for name, p in network.named_parameters() if p.requires_grad and name not in sparse]
        known = [float(p.grad is not None) for p in dense]
        paces = [0.0] * self.lanes
        paces[self.lane] = self.pace
        extra = torch.tensor([value, *paces, *known], device=self.device)
        parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in dense]
        size = sum(p.numel() for p in dense) + len(extra)
        if self.buffer is None or len(self.buffer) != size:
            self.buffer = torch.empty(size, device=self.device)
        # The last step's gradients, which were parts of it, are gone: the loop drops them before each step. A fresh
        # vector of this size would cost as much again, in pages that the system has to clear.
        flat = torch.cat([*(part.float() for part in parts), extra], out=self.buffer)
        dist.all_reduce(flat)
        *gradients, extra = flat.split([*(p.numel() for p in dense), len(extra)])
        total, *told_ = extra.tolist()
        for parameter, gradient, holders in zip(dense, gradients, told_[self.lanes :], strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if holders else None
        self._share_out(told_[: self.lanes])
        return float(total)

    def _share_out(self, paces: Sequence[float]) -> None:
        """New speeds, where they are worth it; from numbers that all have alike."""
        if not self.balance or self.steps % _AGAIN or not all(paces):
            return
        fastest = min(paces)
        speeds = [max(fastest / pace, _SLOWEST) for pace in paces]
        was = [speed / sum(self.speeds) for speed in self.speeds]
        now = [speed / sum(speeds) for speed in speeds]
        if any(abs(a - b) > _WORTH * b for a, b in zip(now, was, strict=True)):
            self.speeds = speeds

    def stretch(self, n: int) -> slice:
        return slice(n * self.lane // self.lanes, n * (self.lane + 1) // self.lanes)

    def collect(self, mine: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        return [told(mine, source) for source in range(self.lanes)]

    def regroup(self, mine: State, at: tuple[int, int, int]) -> State:
        lost = sys.exception()  # where the loop was when it was lost
        lost = lost if isinstance(lost, Lost) else Lost("a process is gone")
        if self.rejoin is None:
            raise lost
        while True:
            self.rejoin(lost)
            self._count()
            try:
                found = [tuple(part["at"].tolist()) for part in self.collect({"at": torch.tensor(at)})]
                if min(found) < (0, 0, 0):
                    raise Again("some begin anew")
                # Of several at one step that of the shortest fit: it keeps within the time box.
                furthest = max(found, key=lambda one: (one[0], one[1], -one[2]))
                if set(found) == {furthest}:
                    return mine
                source = found.index(furthest)
                line = torch.frombuffer(bytearray(mine.progress.encode()), dtype=torch.uint8)
                given = told({**mine.tensors, "progress": line}, source)
                return State(given, bytes(given.pop("progress").tolist()).decode())
            except Again:
                raise
            except Lost as again:
                lost = again


def _sparse_sum(parameter: nn.Parameter, lanes: int) -> Tensor | None:
    """The sum of a gradient of few rows over all processes, added up in their order; None where nobody has one."""
    mine = parameter.grad
    width = parameter.shape[1]
    if mine is None:
        rows, values = torch.zeros(0, dtype=torch.long), torch.zeros(0, width)
    else:
        mine = mine.coalesce() if mine.is_sparse else mine.to_sparse(1)
        rows, values = mine.indices()[0].cpu(), mine.values().cpu()
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(lanes)]
    dist.all_gather(sizes, torch.tensor([-1 if mine is None else len(rows)]))
    counts = [int(size) for size in sizes]
    longest = max(counts)
    if longest < 0:
        return None
    held = [(torch.zeros(longest, dtype=torch.long), torch.zeros(longest, width)) for _ in range(lanes)]
    if longest:
        more = longest - len(rows)
        dist.all_gather([pair[0] for pair in held], torch.cat([rows, rows.new_zeros(more)]))
        dist.all_gather([pair[1] for pair in held], torch.cat([values, values.new_zeros(more, width)]))
    cut = [(r[: max(n, 0)], v[: max(n, 0)]) for (r, v), n in zip(held, counts, strict=True)]
    where, what = torch.cat([r for r, _ in cut]), torch.cat([v for _, v in cut])
    total = torch.sparse_coo_tensor(where[None], what, parameter.shape, device=parameter.device, check_invariants=False)
    return total.coalesce()

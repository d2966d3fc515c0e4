"""What processes of which each holds a part of the network have in common: taking a network apart and putting it back.

Checkpoints hold whole tensors by the names that one process gives them, so a fit that was saved under one strategy and
number of processes goes on under any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from netweight.errors import OptionError
from netweight.loss import Loss, Penalized
from netweight.network import Transformer, tensors
from netweight.run.group import told
from netweight.run.processes import Processes
from netweight.seams import Lost


class Divided(Processes):
    """The part of a network that this process holds.

    Args:
        device: where this one computes.
        activation_checkpointing: keep no activations inside layers but compute them again for the gradient (Chen et
            al., 2016): a third more computation, and memory for one layer's instead of all.
        lanes: see `Processes`.
    """

    strategy = ""

    def __init__(
        self,
        device: torch.device | None = None,
        activation_checkpointing: bool = False,
        lanes: int | None = None,
    ) -> None:
        super().__init__(device, lanes)
        self.activation_checkpointing = activation_checkpointing
        self._whole: nn.Module | None = None

    def admit(self, loss: Loss) -> None:
        if isinstance(loss, Penalized):
            raise OptionError(
                f"a penalty on weights reads whole matrices, and under {self.strategy} no process holds them; "
                "use local or ddp."
            )

    def prepare(self, network: nn.Module) -> None:
        if not isinstance(network, Transformer):
            raise OptionError(
                f"{self.strategy} divides the layers of a transformer, and this network is a "
                f"{type(network).__name__}, which has none; use local or ddp."
            )
        self._whole = hollow(network)
        if self.activation_checkpointing:
            for layer in network.layers():
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        self.divide(network)

    def stretch(self, n: int) -> slice:
        # A network in parts answers only when all ask it the same.
        if self._whole is not None:
            return slice(0, n)
        rank, size = dist.get_rank(), dist.get_world_size()
        return slice(n * rank // size, n * (rank + 1) // size)

    def collect(self, mine: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        return [dict(mine)] if self._whole is not None else from_all(mine)

    def divide(self, network: Transformer) -> None:
        """Leave only this process's part of the network, in place, and move that to the device: the whole may be too
        large for it."""
        raise NotImplementedError

    def joined(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor of the state's entry `name` (or of what an optimizer keeps for it), asked by all at once."""
        raise NotImplementedError

    def own(self, name: str, whole: Tensor) -> Tensor:
        """Inverse of `joined`, from the CPU to where the part is held."""
        raise NotImplementedError

    def gather(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.whole(held, self.first)

    def whole(self, held: Mapping[str, Tensor], wanted: bool) -> dict[str, Tensor]:
        """All of what each holds a part of, on the CPU, to those that want it; asked by all at once."""
        kept: dict[str, Tensor] = {}
        for name, part in held.items():
            value = self.joined(entry(name), part)
            if wanted:
                kept[name] = value.cpu().contiguous()
        return kept

    def scatter(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.own(entry(name), value) for name, value in whole.items()}

    def finish(self, network: nn.Module) -> None:
        assert self._whole is not None
        state = self.whole({f"model/{name}": part for name, part in tensors(network).items()}, True)
        self._whole.load_state_dict({entry(name): value for name, value in state.items()}, assign=True)
        # The caller's object becomes what it was, with new tensors.
        network.__class__, network.__dict__ = type(self._whole), self._whole.__dict__
        self._whole = None


def hollow(network: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes but take no memory."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, cast("dict[int, Any]", empty))


def entry(name: str) -> str:
    """The entry of the network's state that a name in a checkpoint (model/, best/, optimizer/NAME/KEY) belongs to."""
    kind, _, rest = name.partition("/")
    return rest.rpartition("/")[0] if kind == "optimizer" else rest


def from_all(mine: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What each process holds, by rank, on the CPU."""
    try:
        return [told(mine, rank) for rank in range(dist.get_world_size())]
    except Lost as lost:
        # Nobody holds what the fit could go on from but the file of the last checkpoint.
        raise RuntimeError(str(lost)) from None


def clip(
    mine: Iterable[Tensor],
    everyones: Iterable[Tensor],
    limit: float,
    group: dist.ProcessGroup | None,
    device: torch.device,
    copies: Iterable[Tensor] = (),
) -> None:
    """Scale gradients down to a norm of `limit`, as `torch.nn.utils.clip_grad_norm_` does for those of one process.

    `mine` are parts of gradients that are divided over `group`; `everyones` are the same in each of its processes;
    `copies` are counted by another one.
    """
    mine, everyones = list(mine), list(everyones)
    square = torch.zeros((), device=device)
    for gradient in mine:
        square = square + _square(gradient)
    dist.all_reduce(square, group=group)
    for gradient in everyones:
        square = square + _square(gradient)
    factor = (limit / (square.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in (*mine, *everyones, *copies):
        gradient.mul_(factor)


def _square(gradient: Tensor) -> Tensor:
    """The sum of squares, without a tensor of them."""
    norm: Tensor = torch.linalg.vector_norm(gradient.float())
    return norm.square()

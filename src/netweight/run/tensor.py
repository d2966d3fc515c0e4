"""Tensor parallel: attention heads and feed-forward neurons of every layer are divided over processes.

Shoeybi et al., Megatron-LM (2019), section 3: the matrices that make heads and neurons are cut by outputs, those that
read them by inputs, so that each half of a layer needs one sum over the processes forward (after the second matrix) and
one backward (before the first). What lies outside of that is held, and computed alike, by each of them.

Cut are plain tensors, not DTensors: rounding layers, adapters and fused optimizers then work on them as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from netweight.anatomy import blocks
from netweight.errors import OptionError
from netweight.loss import Loss
from netweight.matching import Matching
from netweight.network import Transformer
from netweight.run.divided import Divided, clip

Side = Literal["outputs", "inputs"]


@dataclass(frozen=True)
class Cut:
    """How a parameter is divided. `dim`: along which dimension, of which `groups` stretches each are divided by
    themselves; None where each process has all of it, but computes only its part of the gradient, `factor` times."""

    dim: int | None
    groups: int = 1
    factor: float = 1.0


class TensorParallel(Divided):
    """Heads and neurons divided over `tensor` neighbouring processes; rows over groups of so many.

    Args:
        tensor: processes that divide the layers between them; None for all.
        device, activation_checkpointing: see `Divided`.
        timeout: seconds after which a process that waits for another gives up.

    Raises OptionError where the number of processes is no multiple of `tensor`.
    """

    strategy = "tensor"

    def __init__(
        self,
        tensor: int | None = None,
        device: torch.device | None = None,
        activation_checkpointing: bool = False,
        timeout: float = 300.0,
    ) -> None:
        world = dist.get_world_size()
        self.ways = world if tensor is None else tensor
        super().__init__(device, activation_checkpointing, lanes=teams(world, self.ways))
        self.place = dist.get_rank() % self.ways
        self.timeout = timedelta(seconds=timeout)
        self.team: dist.ProcessGroup | None = None
        self.cuts: dict[str, Cut] = {}
        self._held: dict[str, nn.Parameter] = {}
        self._shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def admit(self, loss: Loss) -> None:
        super().admit(loss)
        if isinstance(loss, Matching) and {"attention", "relations"} & set(loss.match):
            raise OptionError(
                "matching attention or relations reads all heads of a layer, and under tensor each process has some; "
                "match logits or hidden states, or use local, ddp or fsdp."
            )

    def divide(self, network: Transformer) -> None:
        self.cuts = cuts_of(network, self.ways)
        if self.lanes > 1:
            ranks = torch.arange(self.lanes * self.ways).reshape(self.lanes, self.ways)
            # Without a timeout of their own these would wait for half an hour.
            self.team, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=self.timeout)
            self.group, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=self.timeout)
        for block in blocks(network):
            self._enter(network, block.qkv)
            self._enter(network, block.up)
            self._leave(network, block.out)
            self._leave(network, block.down)
        narrow(network, self.ways)
        self._shapes = {}
        held: dict[str, Tensor] = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        for name, cut in self.cuts.items():
            if cut.dim is None:
                continue
            value = held[name]
            part = self._part(value.detach(), cut)
            self._shapes[name] = (value.shape, part.shape)
            # The parameter itself stays, so that whoever refers to it (an adapter, a rounding layer) sees its part.
            value.data = part
        network.to(self.device)
        self._held = dict(network.named_parameters())

    def _enter(self, network: Transformer, names: Iterable[str]) -> None:
        """The gradient of what goes into these layers is the sum over the team; one sum for those with one input."""
        last: list[Tensor] = []
        modules = [network.get_submodule(name) for name in names]

        def hook(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            if not last or last[0] is not given[0]:
                last[:] = [given[0], _Entered.apply(given[0], self.team)]  # type: ignore[no-untyped-call]
            entered = last[1]
            if module is modules[-1]:
                # Else the graph behind it would live to the next step, and with it all that was computed again.
                last.clear()
            return (entered, *given[1:])

        for module in modules:
            module.register_forward_pre_hook(hook)

    def _leave(self, network: Transformer, name: str) -> None:
        """What comes out of this layer is the sum over the team, in which its bias counts once."""
        module = network.get_submodule(name)
        linear = cast(nn.Linear, getattr(module, "base_layer", module))

        def hook(_: nn.Module, __: object, out: Tensor) -> Tensor:
            total = cast(Tensor, _Left.apply(out, self.team))  # type: ignore[no-untyped-call]
            # Each has added it, and each gets its whole gradient.
            return total if linear.bias is None else total - (self.ways - 1) * linear.bias.detach()

        module.register_forward_hook(hook)

    def finish(self, network: nn.Module) -> None:
        super().finish(network)
        if self.lanes > 1:
            for group in (self.team, self.group):
                dist.destroy_process_group(group)
            self.team = self.group = None

    def sync(self, network: nn.Module, value: float) -> float:
        found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        partial = [(found[name], cut.factor) for name, cut in self.cuts.items() if cut.dim is None and name in found]
        for gradient, factor in partial:
            gradient.mul_(factor)
        added([gradient for gradient, _ in partial], self.team)
        if self.lanes > 1:
            added(list(found.values()), self.group)
        return float(self.everywhere(torch.tensor(value, dtype=torch.float64, device=self.device)))

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> None:
        held = [p for p in parameters if p.grad is not None]
        parts = {id(self._held[name]) for name in self._shapes if name in self._held}
        mine = [cast(Tensor, p.grad) for p in held if id(p) in parts]
        clip(mine, [cast(Tensor, p.grad) for p in held if id(p) not in parts], limit, self.team, self.device)

    def joined(self, name: str, part: Tensor) -> Tensor:
        whole, mine = self._shapes.get(name, (None, None))
        if whole is None or part.shape != mine:
            return part
        cut = self.cuts[name]
        assert cut.dim is not None
        parts = [torch.empty_like(part) for _ in range(self.ways)]
        dist.all_gather(parts, part.contiguous(), group=self.team)
        stretches = [p.unflatten(cut.dim, (cut.groups, -1)) for p in parts]
        return torch.stack(stretches, cut.dim + 1).reshape(whole)

    def own(self, name: str, whole: Tensor) -> Tensor:
        shapes = self._shapes.get(name)
        part = whole if shapes is None or shapes[0] != whole.shape else self._part(whole, self.cuts[name])
        return part.to(self.device)

    def _part(self, whole: Tensor, cut: Cut) -> Tensor:
        assert cut.dim is not None
        parted: Tensor = whole.unflatten(cut.dim, (cut.groups, self.ways, -1))
        return parted.select(cut.dim + 1, self.place).flatten(cut.dim, cut.dim + 1).clone().contiguous()


def teams(processes: int, ways: int) -> int:
    """How many groups of `ways` there are. Raises OptionError where processes are left over."""
    if ways < 1 or processes % ways:
        raise OptionError(f"{processes} processes cannot be divided into groups of tensor={ways}; use a divisor.")
    return processes // ways


def cuts_of(network: Transformer, ways: int) -> dict[str, Cut]:
    """How `ways` processes divide a network's parameters and buffers; those that are not named stay whole.

    Raises OptionError where heads or neurons cannot be divided evenly, and for layers that cannot be divided at all.
    """
    cuts: dict[str, Cut] = {}
    for block in blocks(network):
        for what, units in (("key heads", block.heads), ("neurons", block.neurons)):
            if units % ways:
                raise OptionError(
                    f"{block.name} has {units} {what}, which {ways} processes cannot divide evenly; use a divisor of "
                    "it as tensor, or fsdp."
                )
        for names, groups in ((block.qkv, block.qkv_groups), (block.up, block.up_groups)):
            for name in names:
                cuts |= _linear(network, name, "outputs", groups, ways)
        for name in (block.out, block.down):
            cuts |= _linear(network, name, "inputs", 1, ways)
        at = block.qkv[0].rpartition(".")[0]
        for name, _ in network.get_submodule(at).named_parameters():
            if name.startswith(("q_norm", "k_norm")):
                # Norms of heads: each process norms its own.
                cuts[f"{at}.{name}"] = Cut(None)
    return cuts


def narrow(network: Transformer, ways: int) -> None:
    """Divide what layers keep beside their parameters: by this number GPT-2 takes queries, keys and values apart."""
    for block in blocks(network):
        attention = network.get_submodule(block.qkv[0].rpartition(".")[0])
        if hasattr(attention, "split_size"):
            setattr(attention, "split_size", cast(int, attention.split_size) // ways)  # noqa: B010


def _linear(network: Transformer, name: str, side: Side, groups: int, ways: int) -> dict[str, Cut]:
    """The cuts of everything that a linear layer, or what stands for one, holds."""
    module = network.get_submodule(name)
    spec, steps = getattr(module, "spec", None), getattr(module, "steps", None)
    if spec is not None and steps is None and not (spec.granularity == "group" and side == "outputs"):
        raise OptionError(
            f"the grid of {name} follows from weights that tensor divides; use symmetric weights per channel or "
            "tensor, or local, ddp or fsdp."
        )
    if spec is not None and spec.dynamic and side == "inputs":
        raise OptionError(
            f"the ranges of tokens at {name} follow from inputs that tensor divides; use static activations, or local, "
            "ddp or fsdp."
        )
    cuts: dict[str, Cut] = {}
    for part, value in (*module.named_parameters(), *module.named_buffers()):
        found = _cut(part, value.numel(), side, groups, ways)
        if found == "unknown":
            raise OptionError(
                f"{name} is a {type(module).__name__}, which tensor cannot divide; use local, ddp or fsdp."
            )
        if isinstance(found, Cut):
            cuts[f"{name}.{part}"] = found
    return cuts


def _cut(part: str, size: int, side: Side, groups: int, ways: int) -> Cut | Literal["whole", "unknown"]:
    """The cut of a parameter or buffer by its name in a layer; "whole" where all processes have it and its gradient."""
    *at, leaf = part.split(".")
    outwards = side == "outputs"
    across = Cut(0, groups) if outwards else Cut(1)
    if part in ("bias", "base_layer.bias"):
        return across if outwards else "whole"
    if part in ("weight", "mask", "base_layer.weight"):
        return across
    if at[:1] in (["lora_A"], ["lora_B"]):
        # B A x: of the two the one that faces what is divided is divided too.
        return across if (at[0] == "lora_B") == outwards else Cut(None)
    if at[:1] == ["steps"] and size > 1 and outwards:
        return across
    if leaf == "ratio":
        # LSQ divides by the square root of how many values share a scale: fewer do in each process.
        fewer = not outwards or at[0] == "out" or (at[0] == "steps" and size == 1)
        return Cut(None, factor=ways**-0.5 if fewer else 1.0)
    if leaf == "scale":
        return "whole" if outwards else Cut(0)
    return "whole" if leaf in ("first", "zero", "top") else "unknown"


def added(values: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum these tensors over a group in place, in one message for each dtype."""
    for dtype in sorted({v.dtype for v in values}, key=str):
        some = [v for v in values if v.dtype == dtype]
        flat = torch.cat([v.reshape(-1) for v in some])
        dist.all_reduce(flat, group=group)
        for value, total in zip(some, flat.split([v.numel() for v in some]), strict=True):
            value.copy_(total.view_as(value))


class _Entered(torch.autograd.Function):
    """Megatron's f: nothing forward, the sum backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Left(torch.autograd.Function):
    """Megatron's g: the sum forward, nothing backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
